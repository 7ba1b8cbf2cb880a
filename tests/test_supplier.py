"""One pull's source of a file: its pace, its requests, and how the pull learns of its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from cachd.errors import CachdError, Cancelled, Unavailable
from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File, Limits, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.source import Body
from cachd.store.disk_store import DiskStore
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.download.download import Download
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import NO_RANGES_SLOW_SECONDS, Busy, GaveWay, Supplier, Supply
from cachd.transfer.engine import Engine
from cachd.transfer.streams import SLOW_SECONDS, StreamQuota, Streams
from tests.ground.streams import done_on_stream
from tests.shelf import ShelfBody, ShelfSource

CONTENT = bytes(range(200))
PATIENCE_SECONDS = 120.0


class Source(ShelfSource):
    """A source of CONTENT, which raises `error` if the test sets one."""

    error: CachdError | None = None

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        if self.error is not None:
            raise self.error
        return ShelfBody(CONTENT[extent.start : extent.stop])


class Ground:
    """A supplier, whose requests a test makes on a stream as downloads do."""

    def __init__(self, store: DiskStore, engine: Engine, metrics: Metrics, stack: ExitStack) -> None:
        self.source, self.outcomes, self.engine = Source(), Outcomes(), engine
        self.metrics = metrics
        self.reservation = stack.enter_context(store.space.reserve(9, total=9))
        supply = Supply(
            self.source, Ref.parse("https://host/model.bin"), StreamQuota(), self.reservation, self.outcomes
        )
        file = File("model.bin", len(CONTENT), "https://host/model.bin", Digest("sha256", "0" * 64))
        self.supplier = Supplier(file, supply, engine)
        self.supplier.download = Download(file, store.content, engine, lambda _: None)

    def on_stream(self, work: Callable[[memoryview], object]) -> None:
        """Do it on the only stream. Raises what it raises."""
        done_on_stream(self.engine.streams, StreamQuota(), work)


@pytest.fixture
def ground(store: DiskStore) -> Iterator[Ground]:
    metrics = Metrics()
    engine = Engine(Streams(1), Bandwidth(Limits(), metrics), metrics, retries=0)
    with closing(engine), ExitStack() as stack:
        yield Ground(store, engine, metrics, stack)


def test_a_pace_is_measured_over_two_seconds_in_which_it_received(ground: Ground) -> None:
    supplier = ground.supplier
    supplier.measure(10.0)
    assert not supplier.was_measured
    supplier.running, supplier.sent = 2, 400
    supplier.measure(11.9)
    assert not supplier.was_measured
    supplier.measure(12.0)
    assert [supplier.pace, supplier.was_measured] == [100.0, True], "of each of two requests"
    supplier.running, supplier.sent = 0, 1000
    supplier.measure(14.0)
    assert supplier.pace == 300.0
    supplier.measure(20.0)
    assert supplier.pace == 300.0, "while it is idle, the earlier pace stays"
    supplier.running = 1
    supplier.measure(21.0)
    supplier.measure(22.0)
    assert supplier.pace == 0.0


def test_one_that_is_benched_is_measured_anew_after_its_release(ground: Ground) -> None:
    supplier = ground.supplier
    supplier.measure(10.0)
    supplier.running, supplier.sent = 1, 200
    supplier.measure(12.0)
    supplier.release(13.0)
    assert supplier.pace == 100.0, "it was not benched"
    supplier.bench()
    assert supplier.is_benched
    supplier.release(13.0)
    assert [supplier.is_benched, supplier.pace, supplier.was_measured] == [False, None, True]
    supplier.sent = 500
    supplier.measure(15.0)
    assert supplier.pace == 150.0


def test_bytes_are_counted_where_they_are_received(ground: Ground) -> None:
    supplier, part = ground.supplier, Part(Extent(10, 110))

    def work(buffer: memoryview) -> None:
        with supplier.open(part.extent, part) as body:
            assert list(supplier.turns.values()) == [part]
            supplier.skip(body, 40, buffer[:30])
            assert bytes(supplier.read(body, buffer[:60])) == CONTENT[50:110]
            (asking,) = supplier.turns
            assert (asking.received, asking.wanted) == (100, 60)
            assert asking.opened > 0

    ground.on_stream(work)
    assert supplier.turns == {}
    assert (supplier.sent, supplier.download.tally.fetched) == (100, 100)


def test_a_read_is_no_longer_than_its_quota_lets_it_be(ground: Ground) -> None:
    ground.supplier.quota.set_pace(16)

    def work(buffer: memoryview) -> None:
        with ground.supplier.open(Extent(0, 100), Part(Extent(0, 100))) as body:
            assert len(ground.supplier.read(body, buffer[:100])) == 16
            assert len(ground.supplier.read(body, buffer[:8])) == 8

    ground.on_stream(work)


def asked(ground: Ground, then: Callable[[Body], object] = lambda _body: None) -> None:
    def work(_buffer: memoryview) -> None:
        with ground.supplier.open(Extent(0, 9), Part(Extent(0, 9))) as body:
            then(body)

    ground.on_stream(work)


def test_an_error_of_the_source_is_raised_and_only_a_refusal_while_it_serves_is_busy(ground: Ground) -> None:
    ground.source.error = Unavailable("busy", code="origin_failed", origin_status=503)
    with pytest.raises(Unavailable) as refusal:
        asked(ground)
    assert type(refusal.value) is Unavailable
    with ground.engine.streams.origins.of("https://host/x").serving(), pytest.raises(Busy) as busy:
        asked(ground)
    assert (busy.value.code, busy.value.origin_status) == ("origin_failed", 503)
    assert ground.supplier.turns == {}


def test_a_request_that_is_taken_gives_way(ground: Ground) -> None:
    def taken(_body: Body) -> None:
        ground.supplier.give_parts_away()
        raise Cancelled("aborted")

    with pytest.raises(GaveWay):
        asked(ground, taken)

    def stopped(_body: Body) -> None:
        ground.supplier.give_parts_away()
        ground.supplier.stop()
        raise Cancelled("aborted")

    with pytest.raises(Cancelled):
        asked(ground, stopped)
    assert ground.supplier.is_stopped
    with pytest.raises(Cancelled):
        asked(ground)


@pytest.mark.parametrize("error", [None, Unavailable("away", code="origin_failed")])
def test_the_pull_learns_of_the_end(ground: Ground, error: CachdError | None) -> None:
    supplier = ground.supplier
    ground.engine.streams.more_files(supplier.quota, 1)
    ground.outcomes.expect()
    ground.reservation.expect(supplier.file.blob, 100)
    assert not supplier.has_ended
    supplier.end(error)
    assert (supplier.has_ended, supplier.is_stopped, supplier.quota.files) == (True, True, 0)
    assert (supplier.file.blob in ground.reservation.files) == (error is not None)
    if error is None:
        assert ground.outcomes.wait(0) is True
    else:
        with pytest.raises(Unavailable):
            ground.outcomes.wait(0)


def test_the_outcomes_of_a_pull_are_its_first_error_or_the_end_of_all() -> None:
    outcomes, first = Outcomes(), Unavailable("first", code="origin_failed")
    assert outcomes.wait(0) is True
    for _ in range(3):
        outcomes.expect()
    outcomes.note(None)
    assert outcomes.wait(0) is False
    outcomes.note(first)
    outcomes.note(Unavailable("second", code="origin_failed"))
    with pytest.raises(Unavailable) as refusal:
        outcomes.wait(0)
    assert refusal.value is first
    outcomes.wait_for_all()


def test_a_supplier_begins_without_requests(ground: Ground) -> None:
    supplier = ground.supplier
    assert (supplier.queued, supplier.running, supplier.sent, supplier.vouched) == (0, 0, 0, 0)
    assert (supplier.called_at, supplier.rests_until, supplier.wrong) == (math.inf, 0.0, "")
    assert supplier.has_ranges
    assert not supplier.is_benched
    assert supplier.quota.server is ground.engine.streams.origins.of("https://host/other")


@pytest.mark.parametrize(("has_ranges", "seconds"), [(True, SLOW_SECONDS), (False, NO_RANGES_SLOW_SECONDS)])
def test_a_file_that_would_start_over_has_more_time_before_its_stream_is_taken(
    ground: Ground, has_ranges: bool, seconds: float
) -> None:
    ground.supplier.has_ranges = has_ranges
    patience = list[float]()
    asked(ground, lambda _body: patience.extend(each._seconds for each in ground.supplier.turns))
    assert patience == [seconds]


def test_a_supplier_that_is_stopped_skips_nothing(ground: Ground) -> None:
    def work(buffer: memoryview) -> None:
        with ground.supplier.open(Extent(0, 100), Part(Extent(0, 100))) as body:
            ground.supplier.skip(body, 0, buffer)
            ground.supplier.is_stopped = True
            ground.supplier.skip(body, 40, buffer)
            assert ground.supplier.sent == 0

    ground.on_stream(work)


def failures(ground: Ground) -> float:
    """Failures of the origin that are counted."""
    samples = [each for metric in ground.metrics.origin_failures.collect() for each in metric.samples]
    return sum(each.value for each in samples if each.name.endswith("_total"))


@pytest.mark.parametrize(
    ("error", "count"), [(Unavailable("broke off", code="origin_failed"), 1), (Cancelled("x"), 0)]
)
def test_an_answer_that_breaks_off_is_a_failure_of_the_origin_once(
    ground: Ground, error: CachdError, count: int
) -> None:
    def breaks(_body: Body) -> None:
        raise error

    with pytest.raises(type(error)):
        asked(ground, breaks)
    assert failures(ground) == count
    ground.source.error = Unavailable("away", code="origin_failed")
    with pytest.raises(Unavailable):
        asked(ground)
    assert failures(ground) == count + 1, "one that was not answered is counted once, too"
