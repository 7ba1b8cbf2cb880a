"""Lanes and waits of the API: how many calls run, wait and are refused, without a daemon."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import pytest
import pytest_asyncio

from cachd.api.lanes import Lane, Lanes, Waits
from cachd.errors import Busy, Unavailable

PATIENCE_SECONDS = 60.0
MARK = contextvars.ContextVar("mark", default="none")


class Gate:
    """Work that reports that it began, and ends when the gate opens."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.is_open = threading.Event()

    def __call__(self) -> str:
        self.begun.release()
        assert self.is_open.wait(PATIENCE_SECONDS)
        return "done"

    async def has_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.acquire, timeout=PATIENCE_SECONDS)


@pytest_asyncio.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    made.is_open.set()


@contextmanager
def lane(most: int, *, callers: int = 8, patience_seconds: float = 10.0) -> Iterator[Lane]:
    before = set(threading.enumerate())
    made = Lane("test", most, callers=callers, patience_seconds=patience_seconds)
    try:
        yield made
    finally:
        made.close()
        for thread in set(threading.enumerate()) - before:
            if thread.name.startswith("test"):
                thread.join(PATIENCE_SECONDS)
                assert not thread.is_alive(), "the close ends the threads of the lane"


async def refusal(asked: Callable[[], Awaitable[object]]) -> Busy:
    with pytest.raises(Busy) as refused:
        await asked()
    return refused.value


async def test_work_runs_in_a_thread_of_the_lane_inside_its_context() -> None:
    inside: list[str] = []

    @contextmanager
    def during() -> Iterator[None]:
        inside.append("in")
        yield
        inside.append("out")

    made = Lane("test", 1, callers=1, during=during)
    MARK.set("asked")

    def work() -> tuple[str, str, list[str]]:
        return threading.current_thread().name, MARK.get(), list(inside)

    assert await made.run(work) == ("test_0", "asked", ["in"])
    assert await made.shared("key", work) == ("test_0", "asked", ["in", "out", "in"])
    assert inside == ["in", "out", "in", "out"]
    made.close()


async def test_as_many_run_at_once_as_the_lane_has_threads(gate: Gate) -> None:
    with lane(2) as made:
        running = [asyncio.create_task(made.run(gate)) for _ in range(3)]
        for _ in range(2):
            await gate.has_begun()
        assert not gate.begun.acquire(blocking=False)
        gate.is_open.set()
        assert await asyncio.gather(*running) == ["done"] * 3


async def test_a_lane_refuses_the_first_call_above_its_callers_and_takes_it_when_one_has_ended() -> None:
    with lane(1, callers=2) as made:
        for gate in (Gate(), Gate()):
            running = [asyncio.create_task(made.run(gate)), asyncio.create_task(made.shared("key", gate))]
            await gate.has_begun()
            for refused in (lambda: made.run(int), lambda: made.shared("key", int)):
                error = await refusal(refused)
                assert (error.code, error.retry_after) == ("busy", 2.0)
                assert "1 run at once" in error.detail
            gate.is_open.set()
            assert await asyncio.gather(*running) == ["done"] * 2
            assert await made.run(lambda: 5) == 5


async def test_a_call_that_waited_too_long_is_refused_and_leaves_its_place(gate: Gate) -> None:
    with lane(1, callers=2, patience_seconds=0.01) as made:
        running = asyncio.create_task(made.run(gate))
        await gate.has_begun()
        for _ in range(3):
            assert (await refusal(lambda: made.run(int))).code == "busy"
        gate.is_open.set()
        assert await running == "done"
        assert await made.run(lambda: 5) == 5


async def test_calls_that_wait_for_the_same_share_one_run_and_those_after_its_begin_do_not() -> None:
    first, second = Gate(), Gate()
    with lane(1) as made:
        ahead = asyncio.create_task(made.run(first))
        await first.has_begun()
        waiting = [asyncio.create_task(made.shared("key", second)) for _ in range(2)]
        other = asyncio.create_task(made.shared("other", lambda: "other"))
        await asyncio.sleep(0)
        first.is_open.set()
        await second.has_begun()
        late = asyncio.create_task(made.shared("key", lambda: "late"))
        second.is_open.set()
        assert await asyncio.gather(ahead, *waiting, other, late) == ["done", "done", "done", "other", "late"]
        assert not second.begun.acquire(blocking=False), "it ran once"


async def test_a_failure_reaches_all_who_share_it_and_the_next_call_runs_anew(gate: Gate) -> None:
    with lane(1, patience_seconds=0.01) as made:
        running = asyncio.create_task(made.run(gate))
        await gate.has_begun()
        refused = [asyncio.create_task(made.shared("key", int)) for _ in range(2)]
        for each in refused:
            with pytest.raises(Busy):
                await each
        gate.is_open.set()
        assert await running == "done"
        assert await made.shared("key", lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            await made.shared("key", lambda: 1 // 0)


async def test_the_lanes_of_a_server_share_its_connections() -> None:
    """Of 320 connections: half may wait for pulls, and a thirty-second is for each of the bounded lanes."""
    lanes = Lanes(connections=320)
    expected = {
        lanes.probes: (1, 320),
        lanes.reads: (2, 10),
        lanes.scrapes: (1, 10),
        lanes.resolves: (4, 10),
        lanes.changes: (4, 10),
        lanes.preflights: (1, 4),
    }
    try:
        for made, (at_once, callers) in expected.items():
            gate = Gate()
            running = [asyncio.create_task(made.run(gate)) for _ in range(callers)]
            for _ in range(at_once):
                await gate.has_begun()
            assert f"{at_once} run at once" in (await refusal(lambda made=made: made.run(int))).detail
            assert not gate.begun.acquire(blocking=False)
            gate.is_open.set()
            assert await asyncio.gather(*running) == ["done"] * callers
        assert places(lanes.waits) == 160
        assert places(lanes.listeners) == 10
        few = Lanes(connections=16)
        assert (places(few.waits), places(few.listeners)) == (8, 4)
        few.close()
    finally:
        lanes.close()
    for made in expected:
        with pytest.raises(RuntimeError):  # it is closed
            await made.run(int)


def places(waits: Waits) -> int:
    """How many calls may wait at once; afterwards all have left."""
    with waits.one() as may_wait:
        return 1 + places(waits) if may_wait else 0


def test_a_wait_that_was_refused_takes_no_place_and_one_that_ended_frees_its_own() -> None:
    waits = Waits(2)
    for _ in range(3):
        assert places(waits) == 2


async def test_a_wait_ends_with_its_pull_however_that_ends() -> None:
    waits = Waits(8)
    ends: list[Exception | None] = [None, Unavailable("no source")]
    for error in ends:
        done = Future[None]()
        waiting = [asyncio.create_task(waits.end_of(done)) for _ in range(20)]
        await asyncio.sleep(0)
        assert not any(each.done() for each in waiting)
        if error:
            done.set_exception(error)
        else:
            done.set_result(None)
        async with asyncio.timeout(PATIENCE_SECONDS):
            assert await asyncio.gather(*waiting) == [None] * 20
        async with asyncio.timeout(PATIENCE_SECONDS):
            await waits.end_of(done)  # it ended before
    assert waits._ends == {}, "nothing of them is left"


async def test_a_failure_that_nobody_waits_for_any_more_is_not_logged_by_the_event_loop() -> None:
    told: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    is_open, waits = threading.Event(), Waits(1)

    def fails() -> None:
        assert is_open.wait(PATIENCE_SECONDS)
        raise ZeroDivisionError

    with lane(1) as made:
        left = asyncio.create_task(made.shared("key", fails))
        await asyncio.sleep(0)
        (running,) = made._next.values()
        left.cancel()
        await asyncio.wait([left])
        is_open.set()
        await asyncio.wait([running])
    pull = Future[None]()
    left = asyncio.create_task(waits.end_of(pull))
    await asyncio.sleep(0)
    (end,) = waits._ends.values()
    left.cancel()
    await asyncio.wait([left])
    pull.set_exception(Unavailable("no source"))
    await asyncio.wait([end])
    await asyncio.sleep(0)
    del running, end, left
    gc.collect()
    assert told == []
