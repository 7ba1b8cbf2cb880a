"""Completes the names of models in a shell."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from cachd.client import Client

_SECONDS = 2.0  # longer than a person waits for a completion


def complete_names(context: typer.Context, incomplete: str) -> list[str]:
    """The names of the daemon's models that begin with `incomplete`; none when it does not answer soon."""
    import asyncio

    from cachd.cli.ask import ask
    from cachd.errors import CachdError
    from cachd.model import is_name

    async def names(client: Client) -> list[str]:
        async with asyncio.timeout(_SECONDS):
            return [str(model["name"]) for model in await client.models()]

    given, server, token_file = (context.params.get(key) for key in ("names", "server", "token_file"))
    try:
        found = ask(server, Path(token_file) if token_file else None, names)
    except (CachdError, TimeoutError):
        return []
    return [n for n in found if n.startswith(incomplete) and is_name(n) and n not in (given or ())]
