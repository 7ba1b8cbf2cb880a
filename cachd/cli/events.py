"""The command that shows what happened on this node."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import note, show, show_next
from cachd.cli.arguments import SERVER, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.completion import complete_names
from cachd.errors import Invalid, Unavailable, Unreachable
from cachd.model import check_name
from cachd.terminal.events import HEADINGS, WIDE_HEADINGS, event_line, event_row, wide_row

if TYPE_CHECKING:
    from cachd.client import Client

commands = typer.Typer()

_PATH = "/v1/events"
_RECONNECT_SECONDS = 1.0


@commands.command(epilog="Example: cachd events; cachd events org--model -f; cachd events -f -o json")
def events(
    name: Annotated[
        str | None,
        typer.Argument(autocompletion=complete_names, help="only events of this model; default: all"),
    ] = None,
    *,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="keep watching: show new events until Ctrl-C")
    ] = False,
    after: Annotated[
        int | None,
        typer.Option(
            min=0, help="only events after this id, which -o wide shows; default: all that are kept"
        ),
    ] = None,
    server: Server = SERVER,
    token_file: TokenFile = None,
    output: Form = Output.text,
) -> None:
    """Show what happened on this node: pulls, evictions, damage, pins, configuration, and who asked.

    The daemon keeps the newest 1000 events until it ends. With -f, a stopped daemon is asked again until it
    is back. In JSON, each followed event is one line.
    """
    if name is not None:
        check_name(name)
    if follow:
        following = Following(name, after, output)
        ask(server, token_file, following.run)
        return
    params = _params(name, after) | {"follow": "false"}
    page = ask(server, token_file, lambda client: client.get(_PATH, params=params))
    if page["gap"]:
        note(output, _gap(after))
    if output is Output.name:
        for each in page["events"]:
            terminal.say(each["model"] or "-")
    else:
        show(page, output, lambda: _show_events(page["events"], is_wide=output is Output.wide))


def _show_events(found: Sequence[Mapping[str, Any]], *, is_wide: bool) -> None:
    rows = [wide_row(each) if is_wide else event_row(each) for each in found]
    terminal.show_table(WIDE_HEADINGS if is_wide else HEADINGS, rows, none="no event")


class Following:
    """Follows the events of a daemon, also while it restarts.

    connecting ──> listening ──(the stream ends or breaks)──> connecting, after the last id
    """

    def __init__(self, name: str | None, after: int | None, output: Output) -> None:
        self._name, self._last, self._output = name, after, output
        self._is_reached = False

    async def run(self, client: Client) -> None:
        """Print events without end. Raises Unreachable when the daemon does not answer the first time."""
        import asyncio

        while True:
            try:
                await self._listen(client)
            except (Unreachable, Unavailable) as error:
                if not self._is_reached:
                    raise
                note(self._output, f"asking again: {error.detail}")
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _listen(self, client: Client) -> None:
        """Print the events of one connection."""
        from cachd.cli.sse import events_of

        headers = {"Accept": "text/event-stream"}
        async for event in events_of(
            client.lines(_PATH, params=_params(self._name, self._last), headers=headers)
        ):
            self._is_reached = True
            if event.kind == "gap":
                note(self._output, _gap(self._last))
            if event.id.isdecimal():
                self._last = int(event.id)
            if event.kind not in ("gap", "end") and event.data:
                self._print(_parsed(event.data))

    def _print(self, event: Mapping[str, Any]) -> None:
        name = str(event.get("model") or "-")
        show_next(event, self._output, name=name, line=lambda: event_line(event))


def _params(name: str | None, after: int | None) -> dict[str, str]:
    given = {"model": name, "after": after}
    return {key: str(value) for key, value in given.items() if value is not None}


def _gap(after: int | None) -> str:
    return f"events after {after} may be missing: the daemon restarted, or has forgotten them"


def _parsed(data: str) -> Mapping[str, Any]:
    """The document of an event. Raises Invalid."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Invalid(
            f"{data[:80]!r} is no event of cachd",
            code="bad_event",
            hint="check the address: another program may answer there, or a proxy in between",
        )
    return found
