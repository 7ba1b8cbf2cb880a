"""Prints events: a table of those that happened, and a line for each that happens."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from cachd.terminal.amounts import duration_text, size_text
from cachd.terminal.output import Cell, Row

HEADINGS = ("ID", "TIME", "KIND", "MODEL", "WHO", "DETAIL")
_MORE = {
    "config_refused": "cachd doctor says what is wrong",
    "config_last_good": "cachd doctor says what is wrong with the file",
    "config_in_force": "no option changed",
}
_BAD = ("pull_failed", "damaged", "quarantined", "refused", "config_refused", "config_last_good")


def event_row(event: Mapping[str, Any]) -> Row:
    """The cells of HEADINGS."""
    kind = str(event.get("kind"))
    return [
        str(event.get("id")),
        _time(event),
        Cell(kind, "red") if kind in _BAD else kind,
        str(event.get("model") or "-"),
        str(event.get("who") or "-"),
        _detail(event),
    ]


def event_line(event: Mapping[str, Any]) -> str:
    """One line about an event."""
    who = f"({event['who']})" if event.get("who") else ""
    parts = (_time(event), str(event.get("kind")), str(event.get("model") or ""), _detail(event), who)
    return "  ".join(filter(None, parts))


def _time(event: Mapping[str, Any]) -> str:
    """The time of an event in this machine's time zone, to the second."""
    try:
        return datetime.fromisoformat(str(event.get("time"))).astimezone().isoformat(" ", "seconds")
    except ValueError:
        return "-"


def _detail(event: Mapping[str, Any]) -> str:
    """What else an event says, in words."""
    sizes = (("size_bytes", "in all"), ("fetched_bytes", "fetched"), ("freed_bytes", "freed"))
    counts = [f"{size_text(event[key])} {word}" for key, word in sizes if event.get(key)]
    if event.get("seconds"):
        counts.append(f"in {duration_text(event['seconds'])}")
    texts = [str(event[key]) for key in ("ref", "file", "reason", "detail", "code") if event.get(key)]
    if event.get("before"):
        texts.append(f"revision {event['before']} is replaced by {event.get('revision')}")
    elif event.get("revision"):
        texts.append(f"revision {event['revision']}")
    options = ", ".join(map(str, event.get("options") or ()))
    more = _MORE.get(str(event.get("kind")), "") if not options else ""
    return "; ".join(filter(None, [", ".join(counts), *texts, options, more]))
