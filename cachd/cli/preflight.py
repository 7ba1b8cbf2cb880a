"""The command that examines whether an engine would load a model without a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from cachd.cli.arguments import SERVER, Form, Names, Output, Server, TokenFile
from cachd.cli.several import ask_each
from cachd.terminal.preflight import show_preflight

commands = typer.Typer()


@commands.command(epilog="Example: cachd preflight org--model; cachd preflight org--model -o json")
def preflight(
    names: Names, server: Server = SERVER, token_file: TokenFile = None, output: Form = Output.text
) -> None:
    """Examine whether engines would load models without a network, and which engines take their layout.

    Only headers of weights and small JSON files are read; nothing of a model is run. Exit code 1 if an engine
    would refuse one; a warning is no reason.
    """

    def status(document: Mapping[str, Any]) -> int:
        return 1 if document["level"] == "refused" else 0

    ask_each(
        server,
        token_file,
        names,
        lambda client, name: client.preflight(name),
        output=output,
        text=show_preflight,
        status=status,
    )
