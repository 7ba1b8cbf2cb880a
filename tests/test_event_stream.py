"""The stream of events, block by block, and the page in its place: the route alone, without a daemon."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest_asyncio
from starlette.types import Message, Scope

from cachd.api.events import EventStream, Times, _within
from cachd.api.lanes import Lanes
from cachd.report.events import EventLog
from tests.ground.in_process import Api, running
from tests.ground.site import assert_problem, said

PATIENCE_SECONDS = 60.0
SCOPE: Scope = {"type": "http", "method": "GET", "path": "/v1/events", "headers": []}


@pytest_asyncio.fixture
async def lanes() -> AsyncIterator[Lanes]:
    made = Lanes(connections=16)
    yield made
    made.close()


def happened(log: EventLog, name: str) -> int:
    """Let a model be pinned; the id of this event."""
    log(None, "info", {"event": "pinned", "name": name})
    return log.after(None).last


def stream(
    log: EventLog, lanes: Lanes, *, model: str | None = None, after: int | None = None, **times: float
) -> EventStream:
    return EventStream(log, lanes, model=model, after=after, times=Times(**times), clock=lambda: 0.0)


async def all_of(stream: EventStream) -> list[bytes]:
    """The blocks of a stream that ends."""
    sent = b"".join([piece async for piece in stream.blocks()])
    return [block + b"\n\n" for block in sent.split(b"\n\n")[:-1]]


async def next_of(blocks: AsyncIterator[bytes]) -> bytes:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await anext(blocks)


async def test_what_is_kept_comes_first_and_then_what_happens(lanes: Lanes) -> None:
    log = EventLog()
    first = happened(log, "a")
    blocks = stream(log, lanes, reconnect_seconds=2.0).blocks()
    assert await next_of(blocks) == b"retry: 2000\n\n"
    block = await next_of(blocks)
    assert block.startswith(b"event: pinned\ndata: {")
    assert block.endswith(b"id: %d\n\n" % first)
    later = asyncio.create_task(next_of(blocks))
    await asyncio.sleep(0)
    assert not later.done()
    second = happened(log, "b")
    assert (await later).endswith(b"id: %d\n\n" % second)
    log.close()
    assert await next_of(blocks) == b'event: end\ndata: {"reason":"stopping"}\n\n'
    assert [block async for block in blocks] == []


async def test_a_stream_goes_on_after_an_id_and_of_one_model(lanes: Lanes) -> None:
    log = EventLog()
    ids = [happened(log, name) for name in ("a", "b", "a", "b")]
    log.close()
    for model, after, expected in ((None, ids[1], ids[2:]), ("a", None, ids[::2]), ("b", ids[1], ids[3:])):
        begun, *events, end = await all_of(stream(log, lanes, model=model, after=after))
        assert (begun, end) == (b"retry: 1000\n\n", b'event: end\ndata: {"reason":"stopping"}\n\n')
        assert [int(event.rpartition(b"id: ")[2]) for event in events] == expected


async def test_a_gap_is_told_to_who_asked_for_what_is_no_longer_kept(lanes: Lanes) -> None:
    log = EventLog(most=2)
    ids = [happened(log, name) for name in ("a", "b", "c", "d")]
    log.close()
    gap = b'event: gap\ndata: {"after":%d}\n\n' % ids[0]
    assert (await all_of(stream(log, lanes, after=ids[0])))[1] == gap
    for after in (None, ids[1], ids[3]):
        assert not [b async for b in stream(log, lanes, after=after).blocks() if b.startswith(b"event: gap")]


async def test_other_requests_have_turns_while_a_stream_begins_with_many_events(lanes: Lanes) -> None:
    """Nothing suspends the stream itself: its client reads as fast as it is sent."""
    log, turns = EventLog(), 0
    for number in range(1000):
        happened(log, f"m{number}")
    log.close()

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    pieces = [piece async for piece in stream(log, lanes).blocks()]
    task.cancel()
    assert turns >= 50
    assert max(map(len, pieces)) < 8 << 10


async def test_a_stream_ends_at_its_deadline(lanes: Lanes) -> None:
    log, times = EventLog(), iter([100.0, 100.0, 100.0, 700.0])
    made = EventStream(
        log, lanes, model=None, after=None, times=Times(heartbeat_seconds=0.0), clock=lambda: next(times)
    )
    blocks = [block async for block in made.blocks()]
    assert blocks[1:] == [
        b"id: %d\n\n" % log.after(None).last,
        b'event: end\ndata: {"reason":"deadline"}\n\n',
    ]


async def test_what_happened_is_told_once() -> None:
    event = asyncio.Event()
    for _ in range(2):
        assert not await _within(event, -1.0)
        event.set()
        assert await _within(event, PATIENCE_SECONDS)
    assert not await _within(event, 0.0)


async def test_one_client_too_many_is_refused_and_has_no_place(lanes: Lanes) -> None:
    log, sent = EventLog(), list[Message]()
    log.close()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError("this client does not hang up")

    for listening, status in ((4, 503), (3, 200)):
        sent.clear()
        with ExitStack() as stack:
            for _ in range(listening):
                assert stack.enter_context(lanes.listeners.one())
            await stream(log, lanes)(SCOPE, receive, send)
        assert sent[0]["status"] == status


@pytest_asyncio.fixture
async def api(root: Path) -> AsyncIterator[Api]:
    async with running(root=root, reserve_free=0) as made:
        yield made


async def test_a_page_has_what_was_asked_for(api: Api) -> None:
    ids = [happened(api.events, name) for name in ("a", "b")]
    for query, headers, expected in (
        ("follow=false", {}, ids),
        ("", {"accept": "application/json"}, ids),
        (f"follow=false&after={ids[0]}", {}, ids[1:]),
        ("follow=false&after=0", {"last_event_id": str(ids[0])}, ids[1:]),
        ("follow=false&model=a", {}, ids[:1]),
    ):
        page = await api.ask("GET", f"/v1/events?{query}", **headers)
        assert (page.status, said(page, "Cache-Control")) == (200, "no-store")
        assert [event["id"] for event in page.document["events"]] == expected
    for query, status in (
        (f"after={1 << 53}", 200),
        (f"after={(1 << 53) + 1}", 422),
        ("after=0", 200),
        ("after=-1", 422),
        ("model=..x", 400),
    ):
        assert (await api.ask("GET", f"/v1/events?follow=false&{query}")).status == status, query
    assert_problem(await api.ask("GET", "/v1/events?model=..x"), 400, "bad_name")


async def test_a_stream_is_sent_unless_json_alone_is_accepted(api: Api) -> None:
    happened(api.events, "a")
    api.events.close()
    both = "application/json, text/event-stream"
    for query, headers in (("", {}), ("", {"accept": both}), ("follow=true", {"accept": "application/json"})):
        answer = await api.ask("GET", f"/v1/events?{query}", **headers)
        assert said(answer, "Content-Type").startswith("text/event-stream")
        assert said(answer, "X-Accel-Buffering") == "no"
        assert answer.document.endswith(b'{"reason":"stopping"}\n\n')
