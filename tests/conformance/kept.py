"""Keeps the results in docs/conformance.json, and renders them as the table of docs/engines.md."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conformance.clients import (
    ALL,
    COLD,
    COLUMNS,
    ENDPOINT,
    HUB,
    NO_NETWORK,
    NOT_TRIED,
    OFFLINE,
    WARM,
    Client,
    Fault,
    Place,
)

FILE = Path(__file__).parent.parent.parent / "docs/conformance.json"
USERS = {"random uid": 12345, "root": 0}
_LONG_SECONDS = 5
_WAITS = {(HUB, NO_NETWORK), (ENDPOINT, COLD), (ENDPOINT, WARM)}  # where the time is of interest


@dataclass(frozen=True, slots=True)
class Cell:
    """One trial.

    `seconds`: how long it took. `waited`: for how many seconds of that it waited for something else than a
    processor; 0 if that is unknown. `failure`: the last line that the client printed; "" if it works.
    """

    view: str
    case: str
    user: str
    seconds: float
    waited: float
    failure: str


@dataclass(frozen=True, slots=True)
class Result:
    """The trials of one client. `day` is that of the last one, as YYYY-MM-DD."""

    client: str
    version: str
    day: str
    cells: tuple[Cell, ...]


def read() -> dict[str, Result]:
    """The kept results by the name of their client."""
    kept = json.loads(FILE.read_text()) if FILE.exists() else []
    results = [Result(**{**each, "cells": tuple(Cell(**cell) for cell in each["cells"])}) for each in kept]
    return {each.client: each for each in results}


def write(client: Client, version: str, day: str, cell: Cell) -> None:
    """Keep one trial, in place of an older one. Forgets clients that are none any more."""
    with _only_one():
        known = read()
        older = known[client.name].cells if client.name in known else ()
        place = (cell.view, cell.case, cell.user)
        cells = [each for each in older if (each.view, each.case, each.user) != place]
        known[client.name] = Result(client.name, version, day, (*cells, cell))
        lines = [json.dumps(dataclasses.asdict(known[c.name])) for c in ALL if c.name in known]
        FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")


@contextmanager
def _only_one() -> Iterator[None]:
    """Let one process at a time change the file."""
    directory = os.open(FILE.parent, os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def users_of(place: Place) -> tuple[str, ...]:
    """The users as whom a client is tried. The endpoint's clients have no mount, so one user is enough."""
    return ("random uid",) if place[0] == ENDPOINT else tuple(USERS)


def undocumented(client: Client, cells: Iterable[Cell]) -> Iterator[str]:
    """What the table of clients does not say: failures that are no known fault, and faults that are gone."""
    for cell in cells:
        fault = client.faults.get((cell.view, cell.case))
        where = f"{client.name}, {cell.view} view, {cell.case}, {cell.user}"
        if cell.failure and not (fault and fault.fails):
            yield f"{where}: {cell.failure}"
        elif fault and fault.fails and not cell.failure:
            yield f"{where}: works, so its fault is to be removed from the list"


def table() -> str:
    """The results in Markdown: a row for each client, a column for each view and case, and notes."""
    known = read()
    tried = [(c, (cell.view, cell.case)) for c in ALL if c.name in known for cell in known[c.name].cells]
    notes = list(dict.fromkeys(c.faults[place] for c, place in tried if place in c.faults))
    lines = [
        "| Client | Version | " + " | ".join(map(", ".join, COLUMNS)) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for client in ALL:
        result = known.get(client.name)
        cells = [_shown(client, result, place, notes) for place in COLUMNS]
        lines.append(f"| {client.name} | {result.version if result else ''} | {' | '.join(cells)} |")
    days = sorted(result.day for result in known.values()) or ["never"]
    shown = [f"{number}. {note.text} ([report]({note.issue}))" for number, note in enumerate(notes, 1)]
    missing = "; ".join(f"{name}: {reason}" for name, reason in NOT_TRIED.items())
    when = f"Tried from {days[0]} to {days[-1]}." if days[0] != days[-1] else f"Tried on {days[0]}."
    return "\n".join([*lines, "", *shown, "", f"{when} Not tried: {missing}."])


def _shown(client: Client, result: Result | None, place: Place, notes: list[Fault]) -> str:
    """One cell of the table: whether it works, how long it takes if that is long, and the note."""
    if place not in client.places:
        return ""
    cells = [cell for cell in result.cells if (cell.view, cell.case) == place] if result else []
    if not cells:
        return "not tried"
    failed = [cell for cell in cells if cell.failure]
    fault = client.faults.get(place)
    usual = max((cell.waited for cell in result.cells if cell.case == OFFLINE), default=0) if result else 0
    more = max(cell.waited for cell in cells) - usual  # the rest is for the network
    is_long = place in _WAITS and more > _LONG_SECONDS
    alone = f" as {cells[0].user}" if len(cells) < len(users_of(place)) else ""
    text = f"works{alone}" + (f", waits {more:.0f} s" if is_long else "")
    if failed:
        users = "" if len(failed) == len(users_of(place)) else f" as {failed[0].user}"
        text = f"fails{users}" if fault else f"**fails{users}**: {failed[0].failure}"
    return f"{text} ({notes.index(fault) + 1})" if fault else text
