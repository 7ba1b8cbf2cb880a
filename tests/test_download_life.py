"""The life of one download: suppliers join and leave it, threads work on it, and the last one closes it."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from cachd.errors import CachdError, Cancelled, DiskFailed, Forbidden, NoSpace, Unavailable
from cachd.model import Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.download.download import Download
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.download.schedule import Stage
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.streams import Asking, StreamQuota
from tests.test_downloads import AWAY, LARGE, PATIENCE_SECONDS, Source, file_of, opened


class Life:
    """A download whose turns wait, because the only stream is busy."""

    def __init__(self, store: DiskStore, stack: ExitStack) -> None:
        self._stack, self.store = stack, store
        self.ground = stack.enter_context(opened(store, streams=1))
        self.streams, self._go_on, busy = self.ground.engine.streams, threading.Event(), threading.Event()

        def keeps_busy(_buffer: memoryview) -> None:
            busy.set()
            self._go_on.wait(PATIENCE_SECONDS)

        self.streams.append(StreamQuota(), keeps_busy)
        assert busy.wait(PATIENCE_SECONDS)
        self.closed, self.suppliers = list[Download](), list[Supplier]()
        self.download = Download(file_of(LARGE), store.content, self.ground.engine, self.closed.append)
        stack.callback(self._end)

    def _end(self) -> None:
        self.download.cancel()
        self.drop_turns()
        self._go_on.set()

    def drop_turns(self) -> None:
        for each in self.suppliers:
            each.queued = 0
            each.quota.tasks.clear()
        self.streams._quotas.clear()

    def supplier(self, host: str) -> Supplier:
        file, space = file_of(LARGE, host), self.store.space.reserve(9, total=9)
        reservation = self._stack.enter_context(space)
        supply = Supply(Source(LARGE), Ref.parse(file.origin), StreamQuota(), reservation, Outcomes())
        return Supplier(file, supply, self.ground.engine)

    def join(self, host: str) -> Supplier:
        self.suppliers.append(self.supplier(host))
        assert self.download.join(self.suppliers[-1]) is True
        return self.suppliers[-1]

    def turns(self) -> list[int]:
        """How many turns of each supplier wait for the stream."""
        return [len(each.quota.tasks) for each in self.suppliers]


@pytest.fixture
def life(store: DiskStore) -> Iterator[Life]:
    with ExitStack() as stack:
        yield Life(store, stack)


def outcome_of(supplier: Supplier) -> CachdError | bool:
    """The error that the pull heard of; else whether it heard of the end."""
    try:
        return supplier.outcomes.wait(0)
    except CachdError as error:
        return error


def test_who_joins_has_one_turn_and_one_more_file(life: Life) -> None:
    supplier = life.join("one")
    assert (supplier.download, list(life.download.schedule.suppliers)) == (life.download, [supplier])
    assert (supplier.queued, life.turns(), supplier.quota.files) == (1, [1], 1)
    assert life.download.blocks.payer() is supplier.reservation
    assert outcome_of(supplier) is False
    assert life.download.commits is life.download.commits


def test_nobody_joins_a_download_that_is_over(life: Life) -> None:
    life.join("one")
    life.download.end(None)
    late = life.supplier("two")
    assert life.download.join(late) is False
    assert (late.queued, late.quota.files, late.outcomes.wait(0)) == (0, 0, True)


@pytest.mark.parametrize("stage", Stage)
def test_only_a_download_whose_blob_is_here_is_closed_to_others(life: Life, stage: Stage) -> None:
    life.download.schedule.stage = stage
    assert life.download.is_closed_to_others is (stage is Stage.proving)


def test_the_last_supplier_that_leaves_ends_the_download(life: Life) -> None:
    first, second = life.join("one"), life.join("two")
    life.drop_turns()
    life.download.leave(first)
    left = outcome_of(first)
    assert isinstance(left, Cancelled)
    assert left.detail == f"model.bin: cancelled after 0 of {len(LARGE)} bytes"
    assert (first.has_ended, second.has_ended, life.download.tally.is_over) == (True, False, False)
    assert life.turns() == [0, 1], "the other goes on"
    life.download.leave(first)
    assert (outcome_of(second), life.closed) == (False, [])
    life.download.leave(second)
    assert isinstance(outcome_of(second), Cancelled)
    assert life.closed == [life.download]
    assert (first.quota.files, second.quota.files) == (0, 0)
    life.download.leave(second)
    life.download.cancel()
    assert life.closed == [life.download], "once"


def test_a_cancel_ends_all_suppliers(life: Life) -> None:
    suppliers = [life.join("one"), life.join("two")]
    life.download.tally.add(5)
    life.download.cancel()
    for each in suppliers:
        error = outcome_of(each)
        assert isinstance(error, Cancelled)
        assert "cancelled after 5 of" in error.detail
    assert life.closed == [life.download]


def test_the_last_thread_inside_closes_a_download_that_is_over(life: Life) -> None:
    supplier = life.join("one")
    with life.download.inside(supplier) as first, life.download.inside() as second:
        assert (first, second) == (True, True)
        life.download.end(AWAY)
        life.download.end(None)
        assert (supplier.is_stopped, life.closed, outcome_of(supplier)) == (True, [], False)
    assert life.closed == [life.download]
    assert outcome_of(supplier) is AWAY
    assert (list(life.download.schedule.suppliers), life.download.schedule.assembly) == ([], None)
    with life.download.inside() as inside:
        assert inside is False
    assert life.closed == [life.download]


def test_a_supplier_that_is_stopped_works_no_more_while_others_do(life: Life) -> None:
    first, second = life.join("one"), life.join("two")
    first.stop()
    with life.download.inside(first) as stopped, life.download.inside(second) as inside:
        assert (stopped, inside) == (False, True)
    life.download.end(None)
    assert life.closed == [life.download], "no thread counts as inside"


@pytest.mark.parametrize(
    ("error", "is_for_all"),
    [
        (AWAY, False),
        (Forbidden("no", code="source_forbidden"), False),
        (NoSpace("full"), True),
        (DiskFailed("disk", errno=errno.EROFS), True),
        (ZeroDivisionError("secret"), True),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("is_of_one", [True, False])
def test_an_error_ends_its_supplier_or_the_download(
    life: Life, error: Exception, is_for_all: bool, is_of_one: bool
) -> None:
    first, second = life.join("one"), life.join("two")
    with life.download.inside(first if is_of_one else None):
        raise error
    is_over = is_for_all or not is_of_one
    assert (life.download.tally.is_over, life.closed) == (is_over, [life.download] if is_over else [])
    assert (first.has_ended, second.has_ended) == (True, is_over)
    heard = outcome_of(first)
    if isinstance(error, CachdError):
        assert heard is error
    else:
        assert type(heard) is CachdError
        assert heard.detail == "model.bin: ZeroDivisionError"


def test_an_interrupt_of_the_process_is_no_error_of_a_download(life: Life) -> None:
    supplier = life.join("one")
    with pytest.raises(KeyboardInterrupt), life.download.inside(supplier):
        raise KeyboardInterrupt
    assert (life.download.tally.is_over, supplier.has_ended) == (False, False)
    life.download.end(None)
    assert life.closed == [life.download]


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("is_over", [True, False])
def test_a_download_that_waits_begins_before_the_other_files(life: Life, stage: Stage, is_over: bool) -> None:
    life.join("one")
    life.join("two")
    life.download.schedule.stage, life.download.tally.is_over = stage, is_over
    life.download.hasten()
    life.download.tally.is_over = False
    assert life.turns() == ([2, 2] if stage is Stage.waiting and not is_over else [1, 1])


@pytest.mark.parametrize(
    ("count", "stage", "is_over", "is_watched"),
    [
        (1, Stage.waiting, False, False),
        (2, Stage.waiting, False, True),
        (3, Stage.waiting, False, True),
        (2, Stage.proving, False, False),
        (2, Stage.waiting, True, False),
    ],
)
def test_suppliers_are_compared_while_several_work(
    life: Life, count: int, stage: Stage, is_over: bool, is_watched: bool
) -> None:
    for number in range(count):
        life.join(f"host-{number}")
    life.drop_turns()
    life.download.schedule.stage, life.download.tally.is_over = stage, is_over
    life.download.watch(7.0)
    life.download.tally.is_over = False
    assert {each._mark for each in life.suppliers} == {(7.0, 0) if is_watched else (0.0, 0)}
    assert life.turns() == [int(is_watched)] * count, "whoever may take a part has a turn"


def test_a_supplier_that_is_new_gets_a_part_of_a_busy_one(life: Life) -> None:
    busy, _ = life.join("one"), life.join("two")
    part = Part(life.download.commits.extent)
    asking = Asking(busy.quota, 5.0, {}, {threading.get_ident(): 0}, now=0.0)
    busy.turns[asking], busy.running, busy.was_measured, busy.pace = part, 1, True, len(LARGE) / 6.0
    life.download.watch(7.0)
    assert asking.is_taken, "no part waits"
    busy.turns.clear()


Ends = Callable[[], CachdError]


@pytest.mark.parametrize(
    ("error", "received", "stays"),
    [
        (lambda: AWAY, 0, False),
        (lambda: AWAY, 1, True),
        (lambda: DiskFailed("disk", errno=errno.EIO), 0, True),
        (lambda: DiskFailed("disk", errno=errno.EROFS), 1, False),
    ],
    ids=["nothing came", "a byte came", "its bytes may be on the disk", "the disk is read-only"],
)
def test_an_ingest_stays_if_bytes_of_it_may_be_resumed(
    life: Life, error: Ends, received: int, stays: bool
) -> None:
    life.join("one")
    ingest = life.download.ingest = life.store.content.begin(life.download.file)
    life.download.tally.add(received)
    life.download.end(error())
    assert ingest.directory.exists() is stays
    again = life.store.content.begin(life.download.file)  # which its end has let go
    again.close()


def test_a_turn_counts_and_calls_for_the_others(life: Life) -> None:
    first, second = life.join("one"), life.join("two")
    life.drop_turns()
    life.download.schedule.stage, first.queued = Stage.beginning, 1
    life.download.turn(first, memoryview(b""))
    assert (first.queued, life.turns()) == (0, [0, 0]), "one begins"
    first.stop()
    life.download.schedule.stage, first.queued = Stage.waiting, 1
    life.download.turn(first, memoryview(b""))
    assert (first.queued, life.turns(), second.queued) == (1, [0, 0], 0), "it is stopped"


def test_a_turn_after_a_wait_is_queued_anew(life: Life) -> None:
    supplier = life.join("one")
    supplier.called_at = 5.0
    supplier.stop()
    supplier.turn_later(memoryview(b""))
    assert (supplier.queued, supplier.called_at > 1e9) == (2, True)


def test_what_a_supplier_failed_with_is_what_its_pull_hears(life: Life) -> None:
    first, second = life.join("one"), life.join("two")
    error = Unavailable("away", code="origin_failed")
    life.download.drop(first, error)
    life.download.drop(second, None)
    assert (outcome_of(first), outcome_of(second)) == (error, True)
