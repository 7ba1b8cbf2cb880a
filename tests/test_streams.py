"""The stream threads: who is served next, and when."""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cachd.errors import Unavailable
from cachd.kernel import threads
from cachd.transfer.streams import NICENESS, StreamQuota, Streams
from tests.ground.counted import counted
from tests.ground.site import until

PATIENCE_SECONDS = 120


@contextmanager
def streams(count: int) -> Iterator[Streams]:
    opened = Streams(count, first=count)
    try:
        yield opened
    finally:
        opened.close()


class Gate:
    """A task that runs until it is let go; `reached` tells that a stream is in it."""

    def __init__(self) -> None:
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, _buffer: memoryview) -> None:
        self.reached.set()
        self.open.wait(PATIENCE_SECONDS)


class Order:
    """Tasks that note their names when they run; `all` is set when as many ran as were made."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.all = threading.Event()
        self._made = 0

    def task(self, name: str) -> Callable[[memoryview], None]:
        self._made += 1

        def run(_buffer: memoryview) -> None:
            self.ran.append(name)
            if len(self.ran) == self._made:
                self.all.set()

        return run


def test_one_stream_serves_two_pulls_in_turn() -> None:
    order, gate = Order(), Gate()
    first, second = StreamQuota(), StreamQuota()
    with streams(1) as pool:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        pool.append(first, *(order.task("first") for _ in range(3)))
        pool.append(second, *(order.task("second") for _ in range(3)))
        gate.open.set()
        assert order.all.wait(PATIENCE_SECONDS)
    assert order.ran == ["first", "second"] * 3


def test_a_higher_priority_goes_first() -> None:
    order, gate = Order(), Gate()
    with streams(1) as pool:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        pool.append(StreamQuota(0), order.task("later"))
        pool.append(StreamQuota(5), order.task("sooner"))
        gate.open.set()
        assert order.all.wait(PATIENCE_SECONDS)
    assert order.ran == ["sooner", "later"]


def test_what_is_submitted_goes_before_what_was_appended() -> None:
    order, gate, share = Order(), Gate(), StreamQuota()
    with streams(1) as pool:
        pool.append(share, gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        pool.append(share, order.task("next file"))
        pool.submit(share, order.task("part 1"), order.task("part 2"))
        gate.open.set()
        assert order.all.wait(PATIENCE_SECONDS)
    assert order.ran == ["part 1", "part 2", "next file"]


def test_a_delayed_task_runs_on_whichever_stream_is_free_when_it_is_due() -> None:
    order, gates = Order(), [Gate() for _ in range(3)]
    with streams(4) as pool:
        pool.submit_later(StreamQuota(), order.task("again"), 0.3)
        for gate in gates:
            pool.append(StreamQuota(), gate)
        for gate in gates:
            assert gate.reached.wait(PATIENCE_SECONDS)
        assert order.all.wait(5), "three of four streams are busy, one is free"
        for gate in gates:
            gate.open.set()


def test_a_task_that_fails_ends_no_stream() -> None:
    order = Order()

    def fails(_buffer: memoryview) -> None:
        raise RuntimeError("on purpose")

    with streams(1) as pool:
        pool.append(StreamQuota(), fails, order.task("after"))
        assert order.all.wait(PATIENCE_SECONDS)


def test_every_stream_has_a_page_aligned_buffer_of_its_own() -> None:
    """The first eight have a larger one: more are at work only where each gets little."""
    gates, seen = [Gate() for _ in range(10)], []

    def look(gate: Gate) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            seen.append((id(buffer.obj), len(buffer)))
            gate(buffer)

        return run

    with streams(10) as pool:
        for gate in gates:
            pool.append(StreamQuota(), look(gate))
        for gate in gates:
            assert gate.reached.wait(PATIENCE_SECONDS)
        for gate in gates:
            gate.open.set()
    assert len({buffer for buffer, _ in seen}) == 10
    assert sorted(length for _, length in seen) == [1 << 20] * 2 + [2 << 20] * 8


def test_no_more_streams_have_tasks_than_are_at_work() -> None:
    order, gates = Order(), [Gate(), Gate()]
    pool = Streams(8, first=2)
    try:
        pool.append(StreamQuota(), *gates)
        assert all(gate.reached.wait(PATIENCE_SECONDS) for gate in gates)
        pool.append(StreamQuota(), *(order.task(str(number)) for number in range(100)))
        gates[0].open.set()
        assert order.all.wait(PATIENCE_SECONDS)
        assert order.ran == [str(number) for number in range(100)]  # one after the other: the other is held
        gates[1].open.set()
    finally:
        pool.close()


def test_more_streams_are_put_to_work_while_each_brings_more() -> None:
    told: list[int] = []
    grown, share = threading.Event(), StreamQuota()

    def changed(count: int) -> None:
        told.append(count)
        if count > 4:
            grown.set()

    def receive(_buffer: memoryview) -> None:
        while not grown.is_set():
            with moving:
                now[0] += 0.01 / pool.at_work  # each stream brings as much by this clock, on any machine
            pool.received(1000)

    moving, now = threading.Lock(), [0.0]
    pool = Streams(8, first=2, changed=changed, clock=lambda: now[0])
    try:
        pool.append(share, *(receive for _ in range(9)))
        assert grown.wait(PATIENCE_SECONDS)
        assert told[:2] == [2, 3]
    finally:
        pool.close()


def test_a_stream_too_many_is_told_to_end() -> None:
    ended, share = threading.Event(), StreamQuota()

    def receive(_buffer: memoryview) -> None:
        while not (pool.should_yield(share) or ended.is_set()):
            pool.received(1000 // pool.at_work)  # in all as much, whatever their number
            ended.wait(0.01)
        ended.set()

    pool = Streams(6, first=6)
    try:
        pool.append(share, *(receive for _ in range(7)))
        assert ended.wait(PATIENCE_SECONDS)
        assert pool.at_work < 6
    finally:
        pool.close()


def test_streams_that_keep_the_cores_busy_become_fewer() -> None:
    ended, fewer, share, most = threading.Event(), threading.Event(), StreamQuota(), 8

    def receive(_buffer: memoryview) -> None:
        began = time.monotonic()
        while not (ended.is_set() or pool.should_yield(share)):
            hashlib.sha256(bytes(1 << 20))
            began, before = time.monotonic(), began
            pool.received(int(1e9 * (began - before)))  # as if each brought as much as the others

    def changed(count: int) -> None:
        if count <= most // 2:
            fewer.set()

    cores = 0.05  # a busy machine, too, keeps so little of a core busy
    pool = Streams(most, first=most, changed=changed, cores=cores)
    try:
        pool.append(share, *(receive for _ in range(10 * most)))
        assert fewer.wait(PATIENCE_SECONDS)
    finally:
        ended.set()
        pool.close()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_number_at_work_is_measured_over_half_a_second_in_which_all_have_work() -> None:
    told, clock, quota = list[int](), Clock(), StreamQuota()
    steps: queue.Queue[tuple[float, int] | None] = queue.Queue()
    taken = threading.Semaphore(0)

    def receives(_buffer: memoryview) -> None:
        while (step := steps.get(timeout=PATIENCE_SECONDS)) is not None:
            clock.now, count = step
            pool.received(count)
            taken.release()

    def step(now: float, count: int) -> list[int]:
        steps.put((now, count))
        assert taken.acquire(timeout=PATIENCE_SECONDS)
        return told

    gate = Gate()
    pool = Streams(8, first=2, changed=told.append, clock=clock)
    try:
        pool.append(quota, receives, gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        assert step(100.0, 10**6) == [2]
        assert step(100.6, 10**6) == [2], "no task waits: the rate says nothing"
        waiting = StreamQuota()
        waiting.tasks.append(gate)
        with pool._lock:
            pool._admit(waiting)  # no stream is woken
        assert step(100.7, 10**6) == [2]
        assert pool._interval is None, "not before it has settled"
        assert step(100.8, 10**6) == [2]
        assert step(101.29, 10**6) == [2]
        assert step(101.3, 10**6) == [2, 3]
        assert pool.at_work == 3
    finally:
        steps.put(None)
        gate.open.set()
        pool.close()


@pytest.mark.parametrize(
    ("priority", "running", "own", "yields"),
    [
        (1, 0, 0, True),
        (0, 0, 1, False),
        (0, 0, 2, True),
        (0, 1, 2, False),
        (0, 1, 3, True),
        (-1, 0, 9, False),
    ],
)
def test_a_stream_yields_to_a_pull_that_waits_and_has_a_higher_priority_or_two_tasks_fewer(
    priority: int, running: int, own: int, yields: bool
) -> None:
    gate, quota, other = Gate(), StreamQuota(), StreamQuota(priority)
    with streams(1) as pool:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        quota.running, other.running = own, running
        assert not pool.should_yield(quota), "nothing of the other one waits"
        pool.append(other, lambda _: None)
        assert pool.should_yield(quota) is yields
        gate.open.set()


def test_a_stream_does_not_yield_to_a_pull_whose_origin_takes_no_request_but_to_one_of_its_own() -> None:
    gate, quota, other = Gate(), StreamQuota(), StreamQuota(1)
    with streams(1) as pool:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        server = other.server = pool.origins.of("https://host/x")
        server.begin()
        with server.serving():
            for _ in range(2):
                server.refused(Unavailable("busy", code="origin_failed", origin_status=503))
        pool.append(other, lambda _: None)
        assert not pool.should_yield(quota)
        quota.server = server
        assert pool.should_yield(quota)
        server.end()
        quota.server = None
        assert pool.should_yield(quota)
        gate.open.set()


def test_delayed_tasks_that_are_due_go_before_those_that_wait() -> None:
    order, gate, quota, clock = Order(), Gate(), StreamQuota(), Clock()
    pool = Streams(1, first=1, clock=clock)
    try:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        pool.append(quota, order.task("waits"))
        for number, seconds in enumerate((5.0, 5.0, 4.0)):
            pool.submit_later(quota, order.task(f"later {number}"), seconds)
        clock.now += 5.0
        gate.open.set()
        assert order.all.wait(PATIENCE_SECONDS)
    finally:
        pool.close()
    assert (len(order.ran), order.ran[-1]) == (4, "waits")


def test_a_free_stream_wakes_up_when_a_delayed_task_is_due() -> None:
    order = Order()
    with streams(1) as pool:
        assert not pool.is_one_too_many, "the calling thread is no stream"
        pool.submit_later(StreamQuota(), order.task("later"), 0.05)
        pool.submit_later(StreamQuota(), order.task("now"), 0.0)
        assert order.all.wait(PATIENCE_SECONDS)
    assert order.ran == ["now", "later"]


def test_after_the_last_task_nothing_counts_as_running() -> None:
    order, quota = Order(), StreamQuota()
    with streams(2) as pool:
        quota.server = pool.origins.of("https://host/x")
        pool.append(quota, *(order.task(str(number)) for number in range(5)))
        assert order.all.wait(PATIENCE_SECONDS)
        until(lambda: not pool._busy)
        assert (quota.running, quota.server._limit.running, pool._quotas) == (0, 0, [])


def test_a_pool_that_is_closed_drops_what_waits_and_ends_what_runs() -> None:
    order, gate = Order(), Gate()
    pool = Streams(1, first=1)
    pool.append(StreamQuota(), gate, order.task("never"))
    assert gate.reached.wait(PATIENCE_SECONDS)
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: pool._closed)
    gate.open.set()
    closing.join(PATIENCE_SECONDS)
    assert order.ran == []
    assert not any(thread.is_alive() for thread in pool._threads)


def test_without_a_first_number_there_is_a_stream_for_each_core_within_bounds() -> None:
    for most, expected in ((32, min(max(threads.CORES, 4), 16)), (2, 2)):
        pool = Streams(most)
        assert pool.at_work == expected
        pool.close()


def test_streams_let_whoever_asks_go_first() -> None:
    told: list[int] = []
    done = threading.Event()

    def ask(_buffer: memoryview) -> None:
        told.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        done.set()

    with streams(1) as pool:
        pool.append(StreamQuota(), ask)
        assert done.wait(PATIENCE_SECONDS)
    assert told == [min(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + NICENESS, 19)]


def test_the_threads_of_a_pool_have_all_begun_when_it_is_given() -> None:
    """Or a shutdown that cancels what is queued would leave some of them waiting for the others for ever."""
    begun: list[str] = []
    made = threads.pool(4, "pool", lambda: begun.append(hashlib.sha256(bytes(64 << 20)).hexdigest()))
    try:
        assert len(begun) == 4
    finally:
        made.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "step",
    [
        lambda pool: pool.more_files(StreamQuota(), 1),
        lambda pool: pool.submit(StreamQuota(), lambda _: None),
        lambda pool: pool.append(StreamQuota(), lambda _: None),
        lambda pool: pool.submit_later(StreamQuota(), lambda _: None, 600.0),
        lambda pool: pool.should_yield(StreamQuota()),
        lambda pool: pool.claim(StreamQuota()),
    ],
)
def test_what_all_streams_share_is_changed_and_compared_with_the_lock(
    step: Callable[[Streams], None],
) -> None:
    with streams(1) as pool, counted(pool) as lock:
        step(pool)
        assert lock.here == 1


def test_a_stream_counts_the_end_of_its_task_with_the_lock() -> None:
    gate = Gate()
    with streams(1) as pool:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        with counted(pool) as lock:
            gate.open.set()
            pool.close()
            (thread,) = pool._threads
            assert lock.taken[thread.ident or 0] == 2, "at the end of the task, and to ask for the next one"


def test_a_stream_that_may_not_work_any_more_passes_its_task_on() -> None:
    gates = [Gate(), Gate()]
    places, order = dict[int, Gate](), Order()

    def look(gate: Gate) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            places[pool._places[threading.get_ident()]] = gate
            gate(buffer)

        return run

    with streams(2) as pool:
        pool.append(StreamQuota(), *map(look, gates))
        assert all(gate.reached.wait(PATIENCE_SECONDS) for gate in gates)
        for place in (1, 0):  # the stream that waits first is woken first
            places[place].open.set()
            until(lambda: pool._busy == place)  # noqa: B023
            until(lambda: len(pool._ready._waiters) == 2 - place)  # type: ignore[attr-defined]  # noqa: B023
        pool._concurrency.count = 1
        pool.append(StreamQuota(), order.task("one"))
        assert order.all.wait(PATIENCE_SECONDS)


def test_a_higher_priority_goes_first_however_many_of_its_tasks_run() -> None:
    order, gate = Order(), Gate()
    with streams(1) as pool:
        pool.append(StreamQuota(), gate)
        assert gate.reached.wait(PATIENCE_SECONDS)
        sooner = StreamQuota(1)
        sooner.running = 5
        pool.append(StreamQuota(0), order.task("later"))
        pool.append(sooner, order.task("sooner"))
        gate.open.set()
        assert order.all.wait(PATIENCE_SECONDS)
    assert order.ran == ["sooner", "later"]
