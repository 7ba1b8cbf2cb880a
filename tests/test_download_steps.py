"""The steps of one download: a stream's turn at a part, the digest that follows, and a small file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing

import pytest

from cachd.errors import CachdError, Cancelled, Corrupt, Unavailable
from cachd.model import Extent, File, Percentage, Ref
from cachd.sources.cancel import CancelToken
from cachd.store.digests import PartHash
from cachd.store.disk_store import DiskStore
from cachd.store.ingest.ingest import Ingest
from cachd.transfer.download.assembly import Assembly
from cachd.transfer.download.beginning import begin
from cachd.transfer.download.download import Download
from cachd.transfer.download.following import Following
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.part import Part
from cachd.transfer.download.proving import prove
from cachd.transfer.download.schedule import Stage
from cachd.transfer.download.small import fetch_small
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.download.turn import YIELD_AFTER_SECONDS, Turn, write
from cachd.transfer.streams import StreamQuota
from tests.ground.models import noise
from tests.ground.site import until
from tests.ground.stored import MIB, commit
from tests.ground.streams import done_on_stream
from tests.shelf import ShelfBody
from tests.test_downloads import AWAY, PATIENCE_SECONDS, SMALL, Ground, Source, file_of, opened

CONTENT = noise(5 * MIB)
FOLLOWED = 4 * MIB  # so many bytes are worth a hashing thread's while
LIMIT = 64 * MIB


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Steps:
    """One download with an ingest and a supplier, whose steps a test takes on a stream or off it."""

    def __init__(self, ground: Ground, source: Source, content: bytes = CONTENT) -> None:
        self.ground, self.source, self.content = ground, source, content
        self.file, self.engine = file_of(content), ground.engine
        self.download = Download(self.file, ground.store.content, self.engine, lambda _: None)
        self.reservation = ground._stack.enter_context(ground.store.space.reserve(LIMIT, total=LIMIT))
        supply = Supply(source, Ref.parse(self.file.origin), StreamQuota(), self.reservation, Outcomes())
        self.supplier = Supplier(self.file, supply, self.engine)
        self.supplier.download = self.download
        self.download.schedule.suppliers.append(self.supplier)
        self.download.blocks.share_with(self.reservation)
        supply.outcomes.expect()

    def begin(self) -> Ingest:
        self.assembly = Assembly.begun(self.download, self.supplier)
        self.ground._stack.callback(self.assembly.ingest.close)
        return self.assembly.ingest

    def receive(self, extent: Extent) -> None:
        """Let bytes be in the ingest, as if a stream had received them."""
        ingest = self.assembly.ingest
        ingest.write(extent.start, memoryview(self.content)[extent.start : extent.stop])
        ingest.received(extent)

    def on_stream(self, work: Callable[[memoryview], object]) -> None:
        """Do it on a stream. Raises what it raises."""
        done_on_stream(self.engine.streams, self.supplier.quota, work)

    def while_another_waits(self, work: Callable[[memoryview], object], priority: int = 1) -> None:
        """Do it on a stream, while another pull waits for one. Wait until that has got its stream, too."""
        waiting, ran = StreamQuota(priority), Future[None]()

        def task(buffer: memoryview) -> None:
            waiting.tasks.append(lambda _: ran.set_result(None))
            with self.engine.streams._lock:
                self.engine.streams._admit(waiting)  # no stream is woken: the other pull waits
            work(buffer)

        self.on_stream(task)
        ran.result(PATIENCE_SECONDS)

    def turn(self, part: Part, clock: Clock | None = None) -> None:
        """A stream's turn at a part."""
        self.on_stream(lambda buffer: self.turn_with(part, buffer, clock).fetch())

    def turn_with(self, part: Part, buffer: memoryview, clock: Clock | None = None) -> Turn:
        return Turn(self.assembly, self.supplier, part, buffer, clock=clock or Clock())

    def small(self) -> None:
        """Begin the download with one request for the complete file."""
        self.on_stream(lambda buffer: fetch_small(self.download, self.supplier, buffer))


@pytest.fixture
def ground(store: DiskStore) -> Iterator[Ground]:
    with opened(store, streams=2) as made:
        yield made


# --- the digest follows the bytes ---


class Digesting(Steps):
    """A download whose bytes a test receives, and the digest that follows them."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(ground, Source(CONTENT))
        self.ingest = self.begin()
        self.following: Following = self.assembly.following


def test_one_stream_at_a_time_hashes_what_it_receives_next(ground: Ground) -> None:
    on = Digesting(ground)
    assert not on.following.join_in(1), "the digest needs byte 0 next"
    assert on.following.join_in(0)
    assert not on.following.join_in(0), "one stream hashes already"
    on.following.leave()
    assert on.following.join_in(0)


@pytest.mark.parametrize(("size", "is_hashed"), [(FOLLOWED - 1, False), (FOLLOWED, True)])
def test_a_hashing_thread_reads_bytes_back_once_they_are_worth_its_while(
    ground: Ground, size: int, is_hashed: bool
) -> None:
    on = Digesting(ground)
    on.receive(Extent(0, size))
    on.following.go_on()
    if is_hashed:
        until(lambda: not on.ingest.behind)
        until(lambda: on.following.join_in(size))
    else:
        assert on.following.join_in(0), "nobody hashes"
        assert on.ingest.behind == size


def test_the_last_bytes_are_hashed_however_few_they_are(ground: Ground) -> None:
    on = Digesting(ground)
    for stop in (FOLLOWED, len(CONTENT)):
        on.receive(Extent(stop - MIB if stop > FOLLOWED else 0, stop))
        on.following.go_on()
        until(lambda: not on.ingest.behind)
    until(lambda: on.ingest.is_hashed)
    assert on.ingest.agrees


def test_no_thread_hashes_beside_a_stream_that_does(ground: Ground) -> None:
    on = Digesting(ground)
    assert on.following.join_in(0)
    on.receive(Extent(0, len(CONTENT)))
    on.following.go_on()
    on.engine.hashers.shutdown()
    assert on.ingest.behind == len(CONTENT)


def test_nothing_is_hashed_of_a_download_that_is_over(ground: Ground) -> None:
    on = Digesting(ground)
    on.receive(Extent(0, len(CONTENT)))
    on.download.tally.is_over = True
    on.following.go_on()
    on.engine.hashers.shutdown()
    assert on.ingest.behind == len(CONTENT)


# --- a stream's turn ---


@pytest.mark.parametrize("part", [Extent(0, 5 * MIB), Extent(MIB, 2 * MIB), Extent(0, MIB)])
def test_a_part_that_arrived_is_kept_hashed_vouched_for_and_paid_for(ground: Ground, part: Extent) -> None:
    on = Steps(ground, Source(CONTENT))
    ingest, fetched, before = on.begin(), Part(part), on.reservation.left
    on.turn(fetched)
    assert on.source.asked == [part]
    assert (fetched.is_complete, fetched.kept, fetched.sender) == (True, part.stop, on.supplier)
    assert on.assembly.vouchers.of(part) == {on.file.origin}
    assert part in ingest.parts
    assert before - on.reservation.left == ingest.allocated >= part.size
    until(lambda: not ingest.behind or part.start or part.size < FOLLOWED)
    ingest.close()
    with closing(ground.store.content.begin(on.file)) as again:
        assert again.resumed == part.size


def test_a_stream_of_a_pull_with_a_file_for_each_hashes_what_it_receives(ground: Ground) -> None:
    on = Steps(ground, Source(CONTENT))
    ingest = on.begin()
    on.supplier.quota.files = 2
    on.turn(Part(Extent(MIB, 2 * MIB)))
    assert ingest.behind == 0
    on.turn(Part(Extent(0, MIB)))
    assert ingest.behind == MIB, "the first MiB is hashed, and the second can be"
    assert on.assembly.following.join_in(MIB)


def test_what_came_before_a_failure_is_kept(ground: Ground) -> None:
    on = Steps(ground, Source(CONTENT))
    on.source.ends_at = MIB + 1000
    on.begin()
    part = Part(Extent(0, 3 * MIB))
    with pytest.raises(Unavailable):
        on.turn(part)
    assert (part.reached, part.kept) == (MIB + 1000, MIB + 1000)
    assert on.assembly.vouchers.of(part.extent) == set()
    on.turn(part)
    assert on.source.asked[1:] == [Extent(MIB + 1000, 3 * MIB)]
    assert part.is_complete


def test_bytes_over_the_bound_of_what_may_be_lost_are_kept_before_more_come(ground: Ground) -> None:
    on = Steps(ground, Source(CONTENT))
    ingest = on.begin()
    most = on.assembly.unkept_bytes
    part = Part(Extent(0, len(CONTENT)))
    part.hash = ingest.part_hash()
    ingest.allocate(Extent(0, most))
    write(on.assembly, part, memoryview(CONTENT)[:most])
    assert (part.reached, part.kept) == (most, 0)
    on.turn(part)
    assert part.is_complete
    assert on.source.asked == [Extent(most, len(CONTENT))]


class Stopping(Source):
    """A source that calls `stop` whenever bytes of it have been received."""

    content = CONTENT
    stop: Callable[[], None]

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        super().open(file, extent, cancel_token)
        return StopsAfter(self.content[extent.start : extent.stop], self.stop)


class StopsAfter(ShelfBody):
    def __init__(self, content: bytes, stop: Callable[[], None]) -> None:
        super().__init__(content)
        self._stop = stop

    def readinto(self, view: object) -> int:
        count = super().readinto(view)  # type: ignore[arg-type]
        self._stop()
        return count


def test_received_bytes_are_kept_before_too_many_would_be_lost_and_not_each_time(ground: Ground) -> None:
    source = Stopping(CONTENT)
    on = Steps(ground, source)
    on.begin()
    part, seen = Part(Extent(0, len(CONTENT))), list[tuple[int, int]]()
    source.stop = lambda: seen.append((part.reached, part.kept))
    on.turn(part)
    assert all(reached - kept < on.assembly.unkept_bytes for reached, kept in seen)
    assert {kept for _, kept in seen[:2]} == {0}
    assert seen[-1][1] > 0


@pytest.mark.parametrize("size", [5 * MIB, 100], ids=["in mid part", "with its last byte"])
def test_what_a_stopped_supplier_has_sent_is_kept_and_vouched_for_by_nobody(
    ground: Ground, size: int
) -> None:
    source = Stopping(CONTENT)
    on = Steps(ground, source)
    on.begin()
    source.stop = on.supplier.stop
    part = Part(Extent(0, size))
    on.turn(part)
    assert 0 < part.kept == part.reached <= size
    assert part.is_complete is (size == 100)
    assert on.assembly.vouchers.of(part.extent) == set()


@pytest.mark.parametrize(
    ("seconds", "other", "has_ranges", "yields"),
    [
        (YIELD_AFTER_SECONDS, 1, True, False),
        (YIELD_AFTER_SECONDS + 0.1, 1, True, True),
        (YIELD_AFTER_SECONDS + 0.1, 0, True, False),
        (YIELD_AFTER_SECONDS + 0.1, 1, False, False),
    ],
    ids=["not long yet", "long", "nobody goes before", "it would start over"],
)
def test_a_long_turn_yields_to_a_pull_that_goes_before(
    ground: Ground, seconds: float, other: int, has_ranges: bool, yields: bool
) -> None:
    source, clock = Stopping(CONTENT), Clock()
    on = Steps(ground, source)
    on.begin()
    on.supplier.has_ranges = has_ranges
    source.stop = lambda: setattr(clock, "now", 100.0 + seconds)
    part = Part(Extent(0, 3 * MIB))
    on.while_another_waits(lambda buffer: on.turn_with(part, buffer, clock).fetch(), other)
    assert part.is_complete is not yields
    assert part.kept == part.reached > 0


# --- a small file ---


def keep_free(ground: Ground, percent: int) -> None:
    """Let no file take the last so many percent of the disk."""
    ground.store.space.change(reserve_free=Percentage(percent), limit=None, reserve_inodes=0)


class Filling(Source):
    """A source of a small file. When it is asked first, another process takes all disk space."""

    def __init__(self, ground: Ground) -> None:
        super().__init__(SMALL)
        self._ground = ground

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        if not self.asked:
            keep_free(self._ground, 100)
        return super().open(file, extent, cancel_token)


@pytest.mark.parametrize("ends_at", [None, 400], ids=["complete", "broken off"])
def test_a_small_file_that_finds_no_space_is_asked_for_again_when_there_is_some(
    ground: Ground, ends_at: int | None
) -> None:
    source = Filling(ground)
    source.ends_at = ends_at
    supplier = ground.join(file_of(SMALL), source)
    tally = supplier.download.tally
    until(lambda: tally.is_waiting_for_space)
    until(lambda: not tally.received)
    assert not ground.here(SMALL)
    keep_free(ground, 0)
    ground.end(supplier)
    assert ground.here(SMALL)
    assert (tally.received, tally.is_waiting_for_space) == (len(SMALL), False)


def test_a_wrong_small_file_costs_no_space(ground: Ground) -> None:
    supplier = ground.join(file_of(SMALL), Source(bytes(len(SMALL))))
    with pytest.raises(Corrupt):
        ground.end(supplier)
    assert supplier.reservation.left >= LIMIT


def test_a_small_file_is_paid_for_by_every_pull_that_waits(ground: Ground) -> None:
    on = Steps(ground, Source(SMALL), SMALL)
    other = ground._stack.enter_context(ground.store.space.reserve(LIMIT, total=LIMIT))
    on.download.blocks.share_with(other)
    before = on.reservation.left
    on.small()
    assert ground.here(SMALL)
    assert before - on.reservation.left == before - other.left == len(SMALL)
    assert (on.download.tally.is_over, on.download.tally.is_proven) == (True, False)


def test_what_came_of_a_small_file_is_resumed_after_its_failure(ground: Ground) -> None:
    source = Source(SMALL, AWAY)
    source.ends_at = 400
    with pytest.raises(Unavailable):
        ground.fetch(SMALL, source)
    supplier = ground.fetch(SMALL, Source(SMALL), "other")
    assert ground.here(SMALL)
    assert (supplier.download.tally.resumed, supplier.download.tally.fetched) == (400, len(SMALL) - 400)
    assert not ground.store.content.proven.has(file_of(SMALL, "other")), "a part of it came from elsewhere"


def test_a_small_file_that_yields_goes_on_in_parts(ground: Ground) -> None:
    content, clock = noise(200 << 10), Clock()
    source = Stopping(content)
    source.stop = lambda: setattr(clock, "now", clock.now + 2 * YIELD_AFTER_SECONDS)
    ground.engine.clock = clock
    on = Steps(ground, source, content)
    on.while_another_waits(lambda buffer: fetch_small(on.download, on.supplier, buffer))
    assembly = on.download.schedule.assembly
    assert assembly is not None
    ground._stack.callback(assembly.ingest.close)
    (rest,) = assembly.parts._ready
    assert 0 < rest.reached == rest.kept < len(content)
    assert (rest.sender, type(rest.hash)) == (on.supplier, PartHash)
    assert on.supplier.running == 0


@pytest.mark.parametrize("error", [Cancelled("stopped"), AWAY])
def test_a_small_file_of_a_supplier_that_stops_is_no_error(ground: Ground, error: CachdError) -> None:
    source = Source(error)
    on = Steps(ground, source, SMALL)
    on.supplier.is_stopped = True
    on.small()
    assert on.download.schedule.assembly is not None
    ground._stack.callback(on.download.schedule.assembly.ingest.close)
    assert (on.supplier.running, ground.here(SMALL)) == (0, False)


# --- a proof, and a damaged blob ---


class Proves(Steps):
    """A download of a blob that is here, and that came from another host."""

    def __init__(self, ground: Ground, source: Source) -> None:
        commit(ground.store, file_of(SMALL, "first"), SMALL)
        super().__init__(ground, source, SMALL)
        self.download.schedule.stage = Stage.proving

    @property
    def has_proven(self) -> bool:
        return self.ground.store.content.proven.has(self.file)

    def prove(self) -> None:
        self.on_stream(lambda buffer: prove(self.download, self.supplier, buffer))


class EndsAndRefuses(Source):
    """Breaks off in its first answer, and sends no ranges afterwards."""

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        self.has_ranges = not self.asked
        return super().open(file, extent, cancel_token)


def test_a_proof_that_broke_off_begins_anew_when_the_source_sends_no_ranges(ground: Ground) -> None:
    source = EndsAndRefuses(SMALL)
    source.ends_at = 400
    on = Proves(ground, source)
    on.prove()
    until(lambda: on.has_proven)
    assert source.asked == [Extent(0, 1000), Extent(400, 1000), Extent(0, 1000)]
    assert not on.supplier.has_ranges
    until(lambda: on.supplier.has_ended)


@pytest.mark.parametrize(("seconds", "yields"), [(1.0, False), (1.1, True)])
def test_a_long_proof_yields_and_goes_on_where_it_was(ground: Ground, seconds: float, yields: bool) -> None:
    clock, source = Clock(), Stopping(SMALL)
    source.stop = lambda: setattr(clock, "now", clock.now + seconds)
    ground.engine.clock = clock
    on = Proves(ground, source)
    on.supplier.quota.set_pace(600)
    source.content = SMALL
    on.while_another_waits(lambda buffer: prove(on.download, on.supplier, buffer))
    until(lambda: on.has_proven)
    assert source.asked == [Extent(0, 1000), *([Extent(600, 1000)] if yields else [])]


def test_a_damaged_blob_is_copied_only_when_there_is_space_for_its_missing_parts(ground: Ground) -> None:
    file = file_of(CONTENT)
    commit(ground.store, file, CONTENT)
    path = ground.store.content.path(file.blob)
    path.chmod(0o644)
    with path.open("r+b") as opened_blob:
        opened_blob.write(bytes(1000))
    ground.store.content.damaged.keep(file.blob, path.stat().st_ino)
    on = Steps(ground, Source(CONTENT))
    keep_free(ground, 100)
    on.on_stream(lambda buffer: begin(on.download, on.supplier, buffer))
    assert on.download.tally.is_waiting_for_space
    assert (on.download.schedule.stage, on.download.schedule.assembly) == (Stage.waiting, None)
    assert on.source.asked == []
    keep_free(ground, 0)
    until(lambda: on.download.tally.is_over)
    assert ground.here(CONTENT)
