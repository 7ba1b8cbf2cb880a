"""Reads server-sent events from the lines of a stream (HTML standard, section 9.2.6)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """An event of a stream. `id`: the last id that the stream had up to here; empty if it had none."""

    kind: str
    data: str
    id: str


async def events_of(lines: AsyncIterator[str]) -> AsyncIterator[ServerSentEvent]:
    """Yields the events of a stream, also those without data, which may have an id."""
    kind, data, last_id = "", list[str](), ""
    async for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            yield ServerSentEvent(kind or "message", "\n".join(data), last_id)
            kind, data = "", []
        elif field == "event":
            kind = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            last_id = value
