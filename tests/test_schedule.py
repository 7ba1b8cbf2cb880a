"""Which suppliers of a download have a turn on the streams, and when one that failed has its next."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from structlog.testing import capture_logs

from cachd.errors import CachdError, Cancelled, Unavailable
from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File, Limits, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.download.proving import Proving
from cachd.transfer.download.schedule import SPACE_RETRY_SECONDS, Schedule, Stage
from cachd.transfer.download.supplier import Busy, GaveWay, Supplier, Supply
from cachd.transfer.download.tally import Tally
from cachd.transfer.engine import Engine
from cachd.transfer.streams import StreamQuota, Streams
from cachd.transfer.waits import Reason, Waits
from tests.ground.counted import counted
from tests.shelf import ShelfSource

PATIENCE_SECONDS = 120.0
NOW, UNIX_NOW = 100.0, 5000.0
PART = Extent(0, 9)


class Scheduled:
    """The turns of one download, whose only stream is busy, so that they wait. Time stands still."""

    def __init__(self, store: DiskStore, stack: ExitStack, *, retries: int = 1) -> None:
        self.metrics, self.busy, self.go_on = Metrics(), threading.Event(), threading.Event()
        streams = Streams(1, first=1)
        bandwidth = Bandwidth(Limits(), self.metrics)
        self.engine = stack.enter_context(closing(Engine(streams, bandwidth, self.metrics, retries=retries)))
        stack.callback(self.go_on.set)
        self.file = File("model.bin", 9, "https://host/model.bin", Digest("sha256", "0" * 64))
        self.tally = Tally(self.file)
        self.schedule = Schedule(
            self.engine, self.tally, clock=lambda: NOW, now=lambda: UNIX_NOW, chance=lambda: 0.0
        )
        self._reservation = stack.enter_context(store.space.reserve(9, total=9))
        streams.append(StreamQuota(), self._keeps_busy)
        assert self.busy.wait(PATIENCE_SECONDS)
        stack.callback(self.drop)

    def _keeps_busy(self, _buffer: memoryview) -> None:
        self.busy.set()
        self.go_on.wait(PATIENCE_SECONDS)

    def drop(self) -> None:
        """Let no turn run."""
        for each in self.schedule.suppliers:
            each.quota.tasks.clear()
        self.engine.streams._later.clear()
        self.engine.streams._quotas.clear()

    def join(self) -> Supplier:
        supply = Supply(
            ShelfSource(), Ref.parse("https://host/x"), StreamQuota(), self._reservation, Outcomes()
        )
        self.schedule.suppliers.append(Supplier(self.file, supply, self.engine))
        return self.schedule.suppliers[-1]

    def turns(self) -> list[int]:
        """How many turns of each supplier are queued."""
        return [len(each.quota.tasks) for each in self.schedule.suppliers]

    def later(self) -> list[float]:
        """In how many seconds turns are queued."""
        return [round(due - self.engine.streams._clock(), 1) for due, *_ in self.engine.streams._later]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def scheduled(store: DiskStore, stack: ExitStack) -> Scheduled:
    return Scheduled(store, stack)


@pytest.mark.parametrize(
    ("stage", "rests", "returned", "then"),
    [
        (Stage.waiting, False, Stage.waiting, Stage.beginning),
        (Stage.waiting, True, Stage.beginning, Stage.waiting),
        (Stage.beginning, False, Stage.beginning, Stage.beginning),
        (Stage.fetching, False, Stage.fetching, Stage.fetching),
        (Stage.proving, True, Stage.proving, Stage.proving),
    ],
)
def test_the_first_turn_that_may_begin_begins(
    scheduled: Scheduled, stage: Stage, rests: bool, returned: Stage, then: Stage
) -> None:
    first, _ = scheduled.join(), scheduled.join()
    scheduled.schedule.stage, first.queued = stage, 1
    first.rests_until = NOW + 1 if rests else NOW
    assert scheduled.schedule.begins(first) is returned
    assert (scheduled.schedule.stage, first.queued) == (then, 0)


def test_the_only_supplier_begins_even_if_it_rests(scheduled: Scheduled) -> None:
    only = scheduled.join()
    only.rests_until, only.has_ranges = NOW + 1, False
    assert scheduled.schedule.begins(only) is Stage.waiting
    assert scheduled.schedule.stage is Stage.beginning


def test_whoever_may_begin_has_one_turn(scheduled: Scheduled) -> None:
    suppliers = [scheduled.join() for _ in range(6)]
    _, queued, running, called, proving, rests = suppliers
    queued.queued, running.running, called.called_at = 1, 1, NOW + 5
    proving.proving = Proving.__new__(Proving)
    rests.rests_until = NOW + 5
    scheduled.schedule.call()
    assert scheduled.turns() == [1, 0, 0, 0, 0, 0]
    assert [each.queued for each in suppliers] == [1, 1, 0, 0, 0, 0]
    scheduled.schedule.call()
    assert scheduled.turns() == [1, 0, 0, 0, 0, 0]
    scheduled.schedule.stage = Stage.proving
    scheduled.schedule.call()
    assert scheduled.turns() == [1, 0, 0, 0, 0, 1], "each proves on its own"


@pytest.mark.parametrize(("stage", "is_over"), [(Stage.beginning, False), (Stage.waiting, True)])
def test_nobody_has_a_turn_while_one_begins_or_after_the_end(
    scheduled: Scheduled, stage: Stage, is_over: bool
) -> None:
    scheduled.join()
    scheduled.schedule.stage, scheduled.tally.is_over = stage, is_over
    scheduled.schedule.call()
    assert scheduled.turns() == [0]


def test_a_turn_is_queued_before_or_behind_the_other_tasks_of_its_pull(scheduled: Scheduled) -> None:
    supplier = scheduled.join()
    supplier.quota.tasks.append(scheduled._keeps_busy)
    scheduled.schedule.submit(supplier)
    scheduled.schedule.append(supplier)
    assert list(supplier.quota.tasks) == [supplier.turn, scheduled._keeps_busy, supplier.turn]
    assert supplier.queued == 2


# --- after a failure ---


@pytest.mark.parametrize(
    ("error", "is_advice"),
    [
        (Unavailable("away", code="origin_failed", retry_after=7.0), False),
        (Busy("busy", code="origin_failed", origin_status=503, retry_after=7.0), True),
        (Unavailable("a pause", code="rate_limited", retry_after=7.0), True),
        (Unavailable("slow down", code="rate_limited", origin_status=429, retry_after=7.0), False),
    ],
)
@pytest.mark.parametrize("retries", [0, 1])
def test_a_failure_is_waited_for_and_too_many_are_raised_but_advice_is_none(
    store: DiskStore, stack: ExitStack, error: Unavailable, is_advice: bool, retries: int
) -> None:
    scheduled, part = Scheduled(store, stack, retries=retries), Part(PART)
    supplier, other = scheduled.join(), scheduled.join()
    other.is_benched = True
    for failures in range(4):
        if failures >= retries and not is_advice:
            with pytest.raises(Unavailable) as refusal:
                scheduled.schedule.retry_seconds(supplier, part, 0, error)
            assert refusal.value is error
            continue
        assert scheduled.schedule.retry_seconds(supplier, part, 0, error) == 7.0
        assert scheduled.tally.waits == Waits(Reason.origin, UNIX_NOW + 7.0, error.detail)
        assert (supplier.rests_until, other.is_benched) == (NOW + 7.0, False)


def test_a_cancel_is_raised_at_once(scheduled: Scheduled) -> None:
    error: CachdError = Cancelled("x")
    with pytest.raises(Cancelled):
        scheduled.schedule.retry_seconds(scheduled.join(), Part(PART), 0, error)  # type: ignore[arg-type]


def test_who_failed_has_a_turn_later_and_who_gave_way_one_now(scheduled: Scheduled) -> None:
    supplier, part = scheduled.join(), Part(PART)
    away = Unavailable("away", code="origin_failed", retry_after=60.0)
    supplier.is_stopped = True
    scheduled.schedule.retry(supplier, part, 0, away)
    scheduled.schedule.retry(supplier, part, 0, GaveWay("taken"))
    assert (scheduled.turns(), scheduled.later(), supplier.called_at) == ([0], [], math.inf)
    supplier.is_stopped = False
    scheduled.schedule.retry(supplier, part, 0, GaveWay("taken"))
    assert (scheduled.turns(), supplier.queued, supplier.called_at) == ([1], 1, math.inf)
    scheduled.schedule.retry(supplier, part, 0, away)
    assert (scheduled.turns(), supplier.called_at) == ([1], NOW + 60.0)
    assert scheduled.later() == [pytest.approx(60.0, abs=30.0)]


def test_who_waits_for_space_may_have_a_turn_soon(scheduled: Scheduled) -> None:
    supplier = scheduled.join()
    scheduled.schedule.wait_for_space()
    assert scheduled.tally.is_waiting_for_space
    assert supplier.called_at == math.inf
    scheduled.schedule.wait_for_space(supplier)
    assert supplier.called_at == NOW + SPACE_RETRY_SECONDS


@pytest.mark.parametrize(
    ("step", "times"),
    [
        (lambda on, supplier: on.begins(supplier), 1),
        (lambda on, _: on.call(), 1),
        (lambda on, supplier: on.call_others(supplier), 3),
        (lambda on, supplier: on.submit(supplier), 1),
        (lambda on, supplier: on.append(supplier), 1),
        (lambda on, supplier: on.retry_seconds(supplier, Part(PART), 0, GaveWay("taken")), 1),
    ],
    ids=["begins", "call", "call_others", "submit", "append", "retry_seconds"],
)
def test_turns_are_counted_with_the_lock(
    scheduled: Scheduled, step: Callable[[Schedule, Supplier], object], times: int
) -> None:
    supplier = scheduled.join()
    with counted(scheduled.schedule, "lock") as lock:
        step(scheduled.schedule, supplier)
        assert lock.here == times


def test_a_stream_that_goes_on_itself_needs_no_turn_and_the_others_do(scheduled: Scheduled) -> None:
    first, other = scheduled.join(), scheduled.join()
    scheduled.schedule.call_others(first)
    assert scheduled.turns() == [0, 1]
    assert (first.running, other.running) == (0, 0)


def test_the_space_for_a_download_is_waited_for_until_it_has_a_turn_again(scheduled: Scheduled) -> None:
    supplier = scheduled.join()
    scheduled.schedule.wait_for_space(supplier)
    assert scheduled.later() == [pytest.approx(SPACE_RETRY_SECONDS, abs=30.0)]
    with capture_logs() as logs:
        scheduled.schedule.wait_for_space()
    assert logs == [], "it was paused already"


def test_a_retry_is_counted_by_the_code_of_its_error(scheduled: Scheduled) -> None:
    supplier = scheduled.join()
    away = Unavailable("away", code="origin_failed", retry_after=7.0)
    scheduled.schedule.retry_seconds(supplier, Part(PART), 0, away)
    assert scheduled.metrics.origin_retries.labels("origin_failed")._value.get() == 1
