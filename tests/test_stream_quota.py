"""One pull's work for the streams: how much it receives at once, and when one of its streams is taken."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest

from cachd.errors import Cancelled, Unavailable
from cachd.policy.origin_limit import FIRST_HOLD_SECONDS
from cachd.transfer.origins import Origin
from cachd.transfer.streams import (
    BUFFER_BYTES,
    FIRST_READ_BYTES,
    QUICK_SECONDS,
    SLOW_BYTES_PER_SECOND,
    Asking,
    StreamQuota,
)
from tests.ground.site import until
from tests.test_streams import PATIENCE_SECONDS, Gate, Order, streams

KIB = 1 << 10
THREAD = threading.get_ident()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("count", "seconds", "read_bytes"),
    [
        (FIRST_READ_BYTES, QUICK_SECONDS / 2, 2 * FIRST_READ_BYTES),
        (FIRST_READ_BYTES, QUICK_SECONDS, FIRST_READ_BYTES),
        (FIRST_READ_BYTES - 1, QUICK_SECONDS / 2, FIRST_READ_BYTES),
    ],
    ids=["full and quick", "slow", "not full"],
)
def test_a_full_and_quick_read_lets_streams_receive_more(count: int, seconds: float, read_bytes: int) -> None:
    quota = StreamQuota()
    quota.note_read(count, seconds)
    assert quota.read_bytes == read_bytes


def test_streams_receive_a_buffer_at_most_and_what_the_pace_says_once_it_is_measured() -> None:
    quota, sizes = StreamQuota(), list[int]()
    for _ in range(4):
        quota.note_read(quota.read_bytes, 0.0)
        sizes.append(quota.read_bytes)
    assert sizes == [2 * FIRST_READ_BYTES, BUFFER_BYTES, BUFFER_BYTES, BUFFER_BYTES]
    quota.set_pace(64 * KIB)
    quota.note_read(64 * KIB, 0.0)
    assert (quota.read_bytes, quota.has_pace) == (64 * KIB, True)


def limited(clock: Clock) -> Origin:
    """An origin that takes one request, which runs."""
    server = Origin("https://host", clock)
    server.begin()
    with server.serving():
        for _ in range(2):
            server.refused(Unavailable("busy", code="origin_failed", origin_status=503))
    return server


def test_a_task_runs_when_its_origin_takes_a_request_and_another_thread_is_of_use() -> None:
    clock, quota = Clock(), StreamQuota()
    assert quota.may_run(clock.now)
    assert quota.waits(clock.now) == math.inf
    quota.server = Origin("https://host", clock)
    assert quota.may_run(clock.now)
    assert quota.waits(clock.now) == math.inf
    quota.server = limited(clock)
    assert not quota.may_run(clock.now)
    assert quota.waits(clock.now) == FIRST_HOLD_SECONDS
    quota.server.end()
    assert quota.may_run(clock.now)
    for _ in range(16):
        quota.short.ended(0.001, 0.001, clock.now)
    assert quota.may_run(clock.now)
    quota.running = 1
    assert not quota.may_run(clock.now), "one short task at once is enough"
    assert 0 < quota.waits(clock.now) < 1
    clock.now += 1
    assert quota.may_run(clock.now)


def asking(received: dict[int, int], *, seconds: float = 5.0) -> Asking:
    return Asking(StreamQuota(), seconds, {}, received, now=100.0)


@pytest.mark.parametrize(
    ("count", "at", "is_slow"),
    [
        (0, 104.9, False),
        (0, 105.0, True),
        (5 * SLOW_BYTES_PER_SECOND - 1, 105.0, True),
        (5 * SLOW_BYTES_PER_SECOND, 105.0, False),
    ],
)
def test_a_request_is_slow_if_it_hardly_received_a_byte_for_its_time(
    count: int, at: float, is_slow: bool
) -> None:
    assert asking({THREAD: 7}).is_slow(7 + count, at) is is_slow


def test_each_interval_of_a_request_is_measured_alone() -> None:
    request = asking({THREAD: 0})
    assert request.is_slow(0, 105.0)
    assert request.is_slow(10**9, 109.0), "until the next interval has ended"
    assert not request.is_slow(10**9, 110.0)
    assert request.is_slow(10**9, 115.0)


def test_a_request_counts_what_its_thread_has_received_since_it_began() -> None:
    received = {THREAD: 40}
    request = asking(received)
    assert (request.received, request.opened, request.wanted, request.began) == (0, 0.0, 0, 100.0)
    received[THREAD] = 70
    assert request.received == 30


def test_a_request_that_is_taken_is_cancelled() -> None:
    request = asking({THREAD: 0})
    assert not request.is_taken
    request.take()
    assert request.is_taken
    with pytest.raises(Cancelled):
        request.check()


class Slow:
    """A task that asks an origin which sends nothing, until its stream is taken or the test ends."""

    def __init__(self) -> None:
        self.reached, self.ended = threading.Event(), threading.Event()
        self.is_taken: bool | None = None

    def task(self, pool: object, quota: StreamQuota) -> Callable[[memoryview], None]:
        def run(_buffer: memoryview) -> None:
            with pool.asking(quota, 0.0) as request:  # type: ignore[attr-defined]
                pool.waits_for(9)  # type: ignore[attr-defined]
                self.reached.set()
                try:
                    request.wait(PATIENCE_SECONDS)
                except Cancelled:
                    self.is_taken = request.is_taken
            self.ended.set()

        return run


@pytest.mark.parametrize(
    ("waiting", "running", "others", "is_claimed"),
    [
        (0, 0, 1, True),
        (1, 0, 1, True),
        (-1, 0, 1, False),
        (0, 1, 1, False),
        (0, 1, 2, False),
        (0, 1, 3, True),
        (1, 5, 1, True),
        (-1, 1, 9, False),
    ],
)
def test_a_waiting_pull_claims_a_slow_stream_of_one_that_does_not_go_before_it(
    waiting: int, running: int, others: int, is_claimed: bool
) -> None:
    with streams(1) as pool:
        slow, quota, other, order = Slow(), StreamQuota(), StreamQuota(waiting), Order()
        pool.claim(other)
        pool.submit(quota, slow.task(pool, quota))
        assert slow.reached.wait(PATIENCE_SECONDS)
        pool.claim(other)
        assert not slow.ended.is_set(), "nothing of the other one waits"
        other.running += running
        quota.running += others - 1
        pool.submit(other, order.task("other"))
        pool.claim(other)
        other.running -= running
        quota.running -= others - 1
        if not is_claimed:
            (request,) = pool._asking.values()
            assert not request.is_taken
            request.cancel()
        assert slow.ended.wait(PATIENCE_SECONDS)
        assert slow.is_taken is is_claimed
        assert order.all.wait(PATIENCE_SECONDS)


def test_of_several_slow_streams_the_pull_with_most_gives_one() -> None:
    with streams(2) as pool:
        few, many, other, order = Slow(), Slow(), StreamQuota(), Order()
        quotas = {slow: StreamQuota() for slow in (few, many)}
        for slow, quota in quotas.items():
            pool.submit(quota, slow.task(pool, quota))
            assert slow.reached.wait(PATIENCE_SECONDS)
        quotas[many].running += 3
        pool.submit(other, order.task("other"))
        pool.claim(other)
        assert many.ended.wait(PATIENCE_SECONDS)
        quotas[many].running -= 3
        assert order.all.wait(PATIENCE_SECONDS)
        (request,) = pool._asking.values()
        assert (many.is_taken, request.is_taken) == (True, False)
        request.cancel()
        assert few.ended.wait(PATIENCE_SECONDS)
        until(lambda: not pool._asking)


def test_no_stream_is_claimed_while_one_is_free() -> None:
    with streams(2) as pool:
        slow, quota, other, gate = Slow(), StreamQuota(), StreamQuota(), Gate()
        pool.submit(quota, slow.task(pool, quota))
        assert slow.reached.wait(PATIENCE_SECONDS)
        pool.submit(other, gate)
        pool.claim(other)
        (request,) = pool._asking.values()
        assert not request.is_taken
        request.cancel()
        gate.open.set()
        assert slow.ended.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize(("files", "to_begin", "has"), [(1, 0, False), (2, 0, True), (1, 1, True)])
def test_a_pull_has_a_file_for_each_stream_at_work(files: int, to_begin: int, has: bool) -> None:
    with streams(2) as pool:
        quota = StreamQuota()
        pool.more_files(quota, files)
        quota.to_begin = to_begin
        assert pool.has_a_file_each(quota) is has
        quota.server = limited(Clock())
        assert pool.has_a_file_each(quota), "its origin takes one request at once"
        pool.more_files(quota, -files)
        quota.to_begin = 0
        assert not pool.has_a_file_each(quota)


def test_what_an_error_of_a_task_leaves_is_as_after_any_other_end() -> None:
    with streams(1) as pool:
        quota, order, clock = StreamQuota(), Order(), Clock()
        quota.server = limited(clock)
        quota.server.end()

        def fail(_buffer: memoryview) -> None:
            raise ValueError

        pool.submit(quota, fail, order.task("next"))
        assert order.all.wait(PATIENCE_SECONDS), "the origin, which takes one request, has an end of each"
