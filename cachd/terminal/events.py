"""Prints events: a table of those that happened, and a line for each that happens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cachd.terminal.amounts import duration_text, moment_text, size_text
from cachd.terminal.table import Cell, Row

HEADINGS = ("TIME", "KIND", "MODEL", "WHO", "DETAIL")
WIDE_HEADINGS = ("ID", *HEADINGS)
_BAD = ("pull_failed", "damaged", "quarantined", "refused", "config_refused", "config_last_good")


def event_row(event: Mapping[str, Any]) -> Row:
    """The cells of HEADINGS."""
    kind = str(event.get("kind"))
    return [
        moment_text(str(event.get("time"))),
        Cell(kind, "red") if kind in _BAD else kind,
        str(event.get("model") or "-"),
        str(event.get("who") or "-"),
        _detail(event),
    ]


def wide_row(event: Mapping[str, Any]) -> Row:
    """The cells of WIDE_HEADINGS."""
    return [str(event.get("id")), *event_row(event)]


def event_line(event: Mapping[str, Any]) -> str:
    """One line about an event."""
    who = f"({event['who']})" if event.get("who") else ""
    parts = (
        moment_text(str(event.get("time"))),
        str(event.get("kind")),
        str(event.get("model") or ""),
        _detail(event),
        who,
    )
    return "  ".join(filter(None, parts))


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
    kind = event.get("kind")
    if kind == "config_in_force" and not options:
        options = "no option changed"
    if kind in ("config_refused", "config_last_good"):
        options = f"{options}; cachd doctor says why" if options else "cachd doctor says why"
    return "; ".join(filter(None, [", ".join(counts), *texts, options]))
