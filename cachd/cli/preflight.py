"""The command that examines whether an engine would load a model without a network."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd.cli.arguments import (
    SERVER,
    Exclude,
    Form,
    Formats,
    Include,
    Output,
    Server,
    Timeout,
    TokenFile,
    Weights,
)
from cachd.cli.completion import complete_names
from cachd.cli.several import ask_each
from cachd.terminal.preflight import show_preflight

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()
_SECONDS = 60.0
Models = Annotated[
    list[str],
    typer.Argument(
        autocompletion=complete_names, help="names of models, or refs such as org/model, which are not pulled"
    ),
]


@commands.command(epilog="Example: cachd preflight org--model; cachd preflight org/model@main -o json")
def preflight(
    models: Models,
    *,
    include: Include = None,
    exclude: Exclude = None,
    weights: Weights = None,
    formats: Formats = None,
    timeout: Timeout = _SECONDS,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Examine whether engines would load models without a network, and which engines take their layout.

    Only headers of weights and small JSON files are read; nothing of a model is run. A ref is examined at its
    source, by at most 500 requests and 64 MiB; nothing is pulled. --include, --exclude, --weights, --formats
    and --timeout are for refs. Exit code 1 if an engine would refuse a model; a warning is no reason.
    """
    asked = {"include": include or [], "exclude": exclude or [], "weights": weights, "formats": formats}

    def examined(client: Client, model: str) -> Awaitable[Mapping[str, Any]]:
        if "/" in model:  # no name has one
            return client.preflight_ref({**asked, "ref": model, "seconds": timeout})
        return client.preflight(model)

    def status(document: Mapping[str, Any]) -> int:
        return 1 if document["level"] == "refused" else 0

    ask_each(server, token_file, models, examined, output=output, text=show_preflight, status=status)
