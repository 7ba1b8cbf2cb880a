"""The route /v1/events: what happened on this node, as a stream of server-sent events or as one page.

A stream follows the HTML standard, section "Server-sent events":

    event: pull_ready                            the kind
    data: {"id":…,"time":…,"kind":…,"model":…}   an Event in one line
    id: 1796032000123                            a number; the next request may begin after it

`event: gap` (StreamGap) comes first if events may be missing, `event: end` (StreamEnd) before the daemon ends
the stream. Both have no id. While nothing happens, a block with an id alone comes every few seconds: it keeps
proxies from closing the connection, and a browser takes it for the last id.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from cachd.api.answers import json_answer
from cachd.api.dependencies import AnyLanes, AnyServices
from cachd.api.lanes import Lanes
from cachd.api.problems import problem
from cachd.api.schema import EVENT_STREAM, answers
from cachd.errors import Unavailable
from cachd.model import check_name
from cachd.report.events import MAX_EVENTS, EndReason, Event, EventLog, EventPage, StreamEnd, StreamGap
from cachd.report.readiness import RETRY_SECONDS
from cachd.report.values import as_json

router = APIRouter(tags=["events"])

_HEADERS = {
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",  # nginx passes each event on at once
}
_AT_ONCE = 20  # events that are written without a turn for other requests
_MAX_ID = 1 << 53  # JavaScript's largest exact integer


@dataclass(frozen=True, slots=True)
class Times:
    """How long a stream may be silent, and how long it may last: a token may have been revoked meanwhile."""

    heartbeat_seconds: float = 15.0
    most_seconds: float = 600.0
    reconnect_seconds: float = 1.0


@router.get("/v1/events", responses=answers({200: EventPage}, stream=(Event, StreamGap, StreamEnd)))
async def events(
    request: Request,
    services: AnyServices,
    lanes: AnyLanes,
    model: Annotated[
        str | None, Query(max_length=200, description="only events of this model; default: all")
    ] = None,
    after: Annotated[
        int | None,
        Query(ge=0, le=_MAX_ID, description="only events after this id; default: all that are kept"),
    ] = None,
    follow: Annotated[
        bool | None,
        Query(description="true: a stream; false: one page of JSON; default: as the header Accept says"),
    ] = None,
    last_event_id: Annotated[
        int | None, Header(ge=0, le=_MAX_ID, description="as `after`; browsers send it when they reconnect")
    ] = None,
) -> Response:
    """Show what happened on this node: pulls, evictions, damage, pins, configuration, and who asked.

    The answer is a stream of server-sent events, resumable by id. With `follow=false`, or when the client
    accepts application/json and no stream, it is one page. The daemon keeps the newest 1000 events, until it
    ends. A stream ends with an event `end` after 10 minutes, when the daemon stops, or when the client falls
    behind by more than is kept; then connect again with the last id.
    """
    if model is not None:
        check_name(model)
    begin = after if last_event_id is None else last_event_id
    is_head = getattr(request.state, "is_head", False)  # its answer has no body
    if (_is_stream(request) if follow is None else follow) and not is_head:
        return EventStream(services.events, lanes, model=model, after=begin)
    page = await lanes.reads.shared(
        ("events", begin, model), lambda: as_json(services.events.after(begin, model))
    )
    return json_answer(page, headers={"Cache-Control": "no-store"})


class EventStream(Response):
    """An answer that lasts until the client disconnects, or the daemon ends it.

    Only so many clients may listen at once; another one gets a problem document. A client needs no memory of
    its own: what it has not read is in the event log, until newer events take its place.
    """

    def __init__(
        self,
        log: EventLog,
        lanes: Lanes,
        *,
        model: str | None,
        after: int | None,
        times: Times = Times(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self._log, self._lanes, self._model, self._after = log, lanes, model, after
        self._times, self._clock = times, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, or the refusal."""
        with self._lanes.listeners.one() as may_listen:
            if may_listen:
                stream = StreamingResponse(self.blocks(), headers=_HEADERS, media_type=EVENT_STREAM)
                await stream(scope, receive, send)
            else:
                busy = Unavailable(
                    "too many clients listen to events",
                    code="busy",
                    hint="try again later",
                    retry_after=RETRY_SECONDS,
                )
                await problem(busy)(scope, receive, send)

    async def blocks(self) -> AsyncIterator[bytes]:
        """Yields the blocks of the stream. Each ends with an empty line. Blocks of events come joined."""
        log, times, ends_at = self._log, self._times, self._clock() + self._times.most_seconds
        happened = asyncio.Event()
        with log.waking(partial(_set, happened, asyncio.get_running_loop())):
            yield format_sse_event(retry=round(times.reconnect_seconds * 1000))
            page = log.after(self._after, self._model)
            if page.gap and self._after is not None:
                yield _block("gap", StreamGap(after=self._after))
            while True:
                for at in range(0, len(page.events), _AT_ONCE):
                    yield b"".join(map(_event_block, page.events[at : at + _AT_ONCE]))
                    await asyncio.sleep(0)  # a probe waits for no client that reads a thousand events
                if log.is_closed or self._clock() >= ends_at:
                    reason: EndReason = "stopping" if log.is_closed else "deadline"
                    yield _block("end", StreamEnd(reason=reason))
                    return
                if not await _within(happened, min(times.heartbeat_seconds, ends_at - self._clock())):
                    yield format_sse_event(id=str(page.last))
                page = log.after(page.last, self._model)
                if page.gap:
                    yield _block("end", StreamEnd(reason="slow"))
                    return


async def _within(happened: asyncio.Event, seconds: float) -> bool:
    """Wait for the event, for at most `seconds`, and reset it. Returns whether it happened."""
    with suppress(TimeoutError):
        async with asyncio.timeout(max(seconds, 0.0)):
            await happened.wait()
    is_set = happened.is_set()
    happened.clear()
    return is_set


def _set(happened: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
    with suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(happened.set)


def _is_stream(request: Request) -> bool:
    """Whether the client gets a stream, as its header Accept says."""
    accept = request.headers.get("accept", "")
    return EVENT_STREAM in accept or "application/json" not in accept


@lru_cache(MAX_EVENTS)
def _event_block(event: Event) -> bytes:
    """The block of an event. It is encoded once for all streams."""
    return _block(event.kind, event, str(event.id))


def _block(kind: str, report: object, number: str | None = None) -> bytes:
    return format_sse_event(event=kind, data_str=as_json(report).decode(), id=number)
