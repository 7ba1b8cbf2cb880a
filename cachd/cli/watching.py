"""Shows how models change: in one place on a terminal, and as one line for each change in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd.cli.answers import note, show_next
from cachd.cli.arguments import SERVER, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.completion import complete_names
from cachd.cli.failures import report
from cachd.errors import error_of
from cachd.terminal import models as printed
from cachd.terminal.output import redrawn
from cachd.terminal.progress import progress_bars

if TYPE_CHECKING:
    from cachd.client import Client

Model = Mapping[str, Any]
_POLL_SECONDS = 1.0
_PERCENT_A_LINE = 5

commands = typer.Typer()


@commands.command(epilog="Example: cachd watch; cachd watch org--model other--model")
def watch(
    names: Annotated[
        list[str] | None,
        typer.Argument(autocompletion=complete_names, help="names of models; default: all that are pulled"),
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show the progress of pulls until all have ended: of these models, or of all that are being pulled.

    On a terminal each has a bar; in a pipe, each change is one line. The exit code is that of the first pull
    that failed. Ctrl-C ends only the watching.
    """
    try:
        ended = ask(server, token_file, lambda client: _until_settled(client, names or (), output))
    except KeyboardInterrupt:
        note(output, "the pulls go on; cachd cancel NAME ends one")
        raise
    if not ended:
        note(output, "nothing is being pulled")
    failed = [error_of(model["pull"]["error"]) for model in ended if (model["pull"] or {}).get("error")]
    if codes := [report(error) for error in failed]:
        raise typer.Exit(codes[0])


async def watch_models(client: Client, output: Output) -> None:
    """Show the list of models and its changes, without end."""
    import asyncio

    if sys.stdout.isatty() and output in (Output.text, Output.wide):
        with redrawn() as draw:
            while True:
                draw(*printed.table(await client.models(), is_wide=output is Output.wide))
                await asyncio.sleep(_POLL_SECONDS)
    lines = Lines(output)
    while True:
        lines.show(await client.models(), are_all=True)
        await asyncio.sleep(_POLL_SECONDS)


async def _until_settled(client: Client, names: Sequence[str], output: Output) -> list[Model]:
    """The documents of the models, once no pull of them runs. Without names: of those being pulled now."""
    import asyncio

    chosen = list(dict.fromkeys(names)) or [m["name"] for m in await client.models() if not is_settled(m)]
    is_drawn = sys.stderr.isatty() and output in (Output.text, Output.wide)
    lines = Lines(output)
    with progress_bars() as update:
        while True:
            found: list[Model] = [await client.model(name) for name in chosen]
            if is_drawn:
                for model in found:
                    update(printed.status_of(model))
            else:
                lines.show(found)
            if all(map(is_settled, found)):
                return found
            await asyncio.sleep(_POLL_SECONDS)


def is_settled(model: Model) -> bool:
    """Whether neither a pull nor a repair of the model is under way."""
    pull = model["pull"]
    has_ended = pull is None or pull["ended_at"] is not None
    return has_ended and (model["state"] != "damaged" or bool(model["final"]))


class Lines:
    """Prints a line for each model whose state, wait or error changed, or that came 5 % further."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._shown: dict[str, tuple[object, ...]] = {}

    def show(self, models: Sequence[Model], *, are_all: bool = False) -> None:
        """Print what changed. With `are_all`, also the names that are no longer among the models."""
        for model in models:
            name, now = model["name"], _what_counts(model)
            if self._shown.get(name) != now:
                self._shown[name] = now
                self._print(model)
        if are_all:
            for name in self._shown.keys() - {model["name"] for model in models}:
                del self._shown[name]
                self._print({"name": name, "state": "deleted"})

    def _print(self, model: Model) -> None:
        def line() -> str:
            return printed.line_of(model) if "pull" in model else f"{model['name']}  {model['state']}"

        show_next(model, self._output, name=model["name"], line=line)


def _what_counts(model: Model) -> tuple[object, ...]:
    """What of a model's document is worth a line when it changes."""
    pull = model["pull"] or {}
    waits, error = pull.get("waits") or {}, pull.get("error") or {}
    status = printed.status_of(model)
    steps = 100 * status.done // status.total // _PERCENT_A_LINE if status.total else 0
    reasons = (
        waits.get("reason"),
        waits.get("detail"),
        error.get("code"),
        (model["damage"] or {}).get("reason"),
    )
    return status.state, steps, *reasons, printed.used_by(model)
