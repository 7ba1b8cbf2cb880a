"""The command that shows what happened on this node."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cachd import terminal
from cachd.cli.answers import note, show
from cachd.cli.arguments import SERVER, Form, Output, Server, TokenFile
from cachd.cli.ask import ask
from cachd.cli.completion import complete_names
from cachd.errors import Invalid, Unavailable, Unreachable
from cachd.model import check_name
from cachd.terminal.events import HEADINGS, event_line, event_row

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
        bool, typer.Option("--follow", "-f", help="go on, and show what happens until Ctrl-C")
    ] = False,
    after: Annotated[
        int | None, typer.Option(min=0, help="only events after this id; default: all that are kept")
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
        return
    rows = [event_row(each) for each in page["events"]]
    show(page, output, lambda: terminal.show_table_or("there are no events", HEADINGS, rows))


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
        forms: dict[Output, Callable[[], None]] = {
            Output.json: lambda: terminal.show_json_line(event),
            Output.name: lambda: terminal.say(event.get("model") or "-"),
            Output.yaml: lambda: terminal.show_yaml_part(event),
        }
        forms.get(self._output, lambda: terminal.say(event_line(event)))()


def _params(name: str | None, after: int | None) -> dict[str, str]:
    return {**({"model": name} if name else {}), **({"after": str(after)} if after is not None else {})}


def _gap(after: int | None) -> str:
    return f"events after {after} may be missing: the daemon restarted, or has forgotten them"


def _parsed(data: str) -> Mapping[str, Any]:
    """The document of an event. Raises Invalid."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Invalid(f"{data[:80]!r} is no event of cachd", code="bad_event")
    return found
