"""One blob is downloaded from scripted sources into a real store: small, in parts, in order, or proven."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import pytest

from cachd.errors import (
    CachdError,
    Cancelled,
    Changed,
    Corrupt,
    DiskFailed,
    Forbidden,
    NoSpace,
    Unavailable,
)
from cachd.metrics import Metrics
from cachd.model import Extent, File, Limits, Ref
from cachd.policy.parts import MIN_PART_BYTES, SMALL_BYTES
from cachd.sources.cancel import CancelToken
from cachd.sources.source import NoRanges
from cachd.store.disk_store import DiskStore
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.download.outcomes import Outcomes
from cachd.transfer.download.schedule import Stage
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.downloads import Downloads
from cachd.transfer.engine import Engine
from cachd.transfer.streams import StreamQuota, Streams
from tests.ground.models import noise
from tests.ground.site import until
from tests.ground.stored import MIB, commit, sha256
from tests.shelf import ShelfBody, ShelfSource

PATIENCE_SECONDS = 120.0
AWAY = Unavailable("away", code="origin_failed", retry_after=0.0)
SMALL, LARGE = noise(1000), noise(2 * MIN_PART_BYTES + 12345)


class Broken(ShelfBody):
    """A body that breaks off at its end."""

    def readinto(self, view: object) -> int:
        count = super().readinto(view)  # type: ignore[arg-type]
        if not count:
            raise AWAY
        return count


class Source(ShelfSource):
    """Serves `contents`, one for each request, and the last for all others. An error is raised.

    `ends_at`: where the first request breaks off. `asked`: the extents.
    """

    has_ranges = True
    ends_at: int | None = None

    def __init__(self, *contents: bytes | CachdError) -> None:
        self.contents, self.asked, self.renewed = list(contents), list[Extent](), 0

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        self.asked.append(extent)
        if extent.size < file.size and not self.has_ranges:
            raise NoRanges
        content = self.contents[0] if len(self.contents) == 1 else self.contents.pop(0)
        if isinstance(content, CachdError):
            raise content
        if self.ends_at is not None and len(self.asked) == 1:
            return Broken(content[extent.start : self.ends_at])
        return ShelfBody(content[extent.start : extent.stop])

    def anew(self) -> None:
        self.renewed += 1


def file_of(content: bytes, host: str = "host") -> File:
    origin = f"https://{host}/model.bin"
    return File("model.bin", len(content), origin, sha256(content), base=origin)


class Ground:
    """A store, the downloads into it, and the pulls that wait for them."""

    def __init__(self, store: DiskStore, engine: Engine, metrics: Metrics, stack: ExitStack) -> None:
        self.store, self.engine, self.metrics, self._stack = store, engine, metrics, stack
        self.downloads = Downloads(store.content, engine)

    def join(self, file: File, source: Source) -> Supplier:
        reservation = self._stack.enter_context(self.store.space.reserve(64 * MIB, total=64 * MIB))
        supply = Supply(source, Ref.parse(file.origin), StreamQuota(), reservation, Outcomes())
        return self.downloads.join(file, supply)

    def end(self, *suppliers: Supplier) -> None:
        """Wait for the end of all. Raises the first error of one."""
        try:
            for each in suppliers:
                while not each.outcomes.wait(PATIENCE_SECONDS):
                    pass
        finally:
            for each in suppliers:
                self.downloads.leave([each])

    def fetch(self, content: bytes, source: Source, host: str = "host") -> Supplier:
        supplier = self.join(file_of(content, host), source)
        self.end(supplier)
        return supplier

    def refetched(self, reason: str) -> float:
        return float(self.metrics.refetched_bytes.labels(reason)._value.get())

    def here(self, content: bytes) -> bool:
        blob = file_of(content).blob
        return (
            self.store.content.has(file_of(content)) and self.store.content.path(blob).read_bytes() == content
        )


@contextmanager
def opened(store: DiskStore, streams: int = 4) -> Iterator[Ground]:
    metrics = Metrics()
    engine = Engine(Streams(streams, first=streams), Bandwidth(Limits(), metrics), metrics, retries=1)
    with closing(engine), ExitStack() as stack:
        yield Ground(store, engine, metrics, stack)


@pytest.fixture
def ground(store: DiskStore) -> Iterator[Ground]:
    with opened(store) as made:
        yield made


def covered(extents: Sequence[Extent], size: int) -> bool:
    """Whether the extents are all bytes of a file, each once."""
    at = 0
    for extent in sorted(extents, key=lambda each: each.start):
        if extent.start != at:
            return False
        at = extent.stop
    return at == size


@pytest.mark.parametrize("size", [1, 1000, SMALL_BYTES])
def test_a_small_file_is_one_request_and_no_ingest(ground: Ground, size: int) -> None:
    content, source = noise(size), Source(noise(size))
    supplier = ground.fetch(content, source)
    assert ground.here(content)
    assert source.asked == [Extent(0, size)]
    tally = supplier.download.tally
    assert (tally.fetched, tally.resumed, tally.is_over, tally.is_proven) == (size, 0, True, False)
    assert ground.store.sweep.partial_downloads() == []


def test_a_large_file_is_requested_in_parts_each_once(ground: Ground) -> None:
    source = Source(LARGE)
    supplier = ground.fetch(LARGE, source)
    assert ground.here(LARGE)
    assert len(source.asked) == 3
    assert covered(source.asked, len(LARGE))
    assert supplier.download.tally.fetched == len(LARGE)


def test_a_file_from_a_source_without_ranges_is_requested_completely(ground: Ground) -> None:
    source = Source(LARGE)
    source.has_ranges = False
    ground.fetch(LARGE, source)
    assert ground.here(LARGE)
    assert source.asked[-1] == Extent(0, len(LARGE))
    assert source.asked.count(source.asked[-1]) == 1


BREAKS = [(SMALL, 400), (SMALL, 0), (LARGE, 3 * MIB), (LARGE, MIB)]


@pytest.mark.parametrize(("content", "ends_at"), BREAKS)
def test_what_came_before_a_break_is_not_requested_again(
    ground: Ground, content: bytes, ends_at: int
) -> None:
    source = Source(content)
    source.ends_at = ends_at
    supplier = ground.fetch(content, source)
    assert ground.here(content)
    assert any(extent.start == ends_at for extent in source.asked[1:])
    assert supplier.download.tally.fetched == len(content)


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_wrong_digest_is_fetched_once_more_over_new_connections(ground: Ground, content: bytes) -> None:
    wrong = bytes(len(content))
    count = 1 if content is SMALL else 3
    source = Source(*[wrong] * count, content)
    supplier = ground.fetch(content, source)
    assert ground.here(content)
    assert (source.renewed, ground.refetched("source"), ground.refetched("disk")) == (1, len(content), 0)
    assert supplier.download.tally.fetched == 2 * len(content)
    assert supplier.download.tally.received == len(content)


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_digest_that_is_wrong_twice_fails_and_leaves_nothing(ground: Ground, content: bytes) -> None:
    source = Source(bytes(len(content)))
    with pytest.raises(Corrupt) as refusal:
        ground.fetch(content, source)
    assert "sent the same bytes twice" in refusal.value.hint
    assert (source.renewed, ground.here(content)) == (1, False)
    assert ground.store.sweep.partial_downloads() == []


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_failure_that_may_pass_is_retried_and_another_is_not(ground: Ground, content: bytes) -> None:
    source = Source(AWAY, content)
    ground.fetch(content, source)
    assert ground.here(content)
    for error, most in ((AWAY, 2), (Forbidden("no", code="source_forbidden"), 1)):
        other = noise(len(content), seed=9)
        failing = Source(error)
        with pytest.raises(type(error)) as refusal:
            ground.fetch(other, failing)
        assert refusal.value is error
        assert max(failing.asked.count(extent) for extent in failing.asked) == most


def test_two_pulls_share_one_download(ground: Ground) -> None:
    first, second = Source(LARGE), Source(LARGE)
    suppliers = [ground.join(file_of(LARGE), first), ground.join(file_of(LARGE), second)]
    assert suppliers[0].download is suppliers[1].download
    assert ground.downloads.hasten(file_of(LARGE)) is True
    ground.end(*suppliers)
    assert ground.here(LARGE)
    assert covered(first.asked + second.asked, len(LARGE))
    assert ground.downloads.hasten(file_of(LARGE)) is False


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_blob_of_another_source_must_be_proven(ground: Ground, content: bytes) -> None:
    commit(ground.store, file_of(content, "first"), content)
    source = Source(content)
    supplier = ground.fetch(content, source, "second")
    assert supplier.download.tally.is_proven
    assert supplier.download.schedule.stage is Stage.proving
    assert ground.store.content.proven.has(file_of(content, "second"))
    sent = sum(extent.size for extent in source.asked)
    assert sent == (len(content) if content is SMALL else 32 * (16 << 10))
    again = Source(content)
    ground.fetch(content, again, "second")
    assert again.asked == []


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_a_source_that_lacks_the_blob_fails_and_the_blob_stays(ground: Ground, content: bytes) -> None:
    commit(ground.store, file_of(content, "first"), content)
    source = Source(bytes(len(content)))
    with pytest.raises(Corrupt):
        ground.fetch(content, source, "second")
    assert not ground.store.content.proven.has(file_of(content, "second"))
    assert ground.here(content)
    assert source.asked[-1] == Extent(0, len(content)), "after a sample that differs"


def test_a_proof_goes_on_after_a_failure_and_without_ranges(ground: Ground) -> None:
    commit(ground.store, file_of(LARGE, "first"), LARGE)
    ground.fetch(LARGE, Source(AWAY, LARGE), "second")
    assert ground.store.content.proven.has(file_of(LARGE, "second"))
    source = Source(LARGE)
    source.has_ranges = False
    ground.fetch(LARGE, source, "third")
    assert ground.store.content.proven.has(file_of(LARGE, "third"))
    assert source.asked[1:] == [Extent(0, len(LARGE))]
    with pytest.raises(Unavailable):
        ground.fetch(LARGE, Source(AWAY), "fourth")
    assert not ground.store.content.proven.has(file_of(LARGE, "fourth"))


def test_an_empty_file_needs_no_request_to_be_proven(ground: Ground) -> None:
    commit(ground.store, file_of(b"", "first"), b"")
    source = Source(AWAY)
    ground.fetch(b"", source, "second")
    assert source.asked == []


def test_a_file_that_somebody_waits_for_begins_before_the_others_of_its_pull(store: DiskStore) -> None:
    busy, go_on = threading.Event(), threading.Event()

    def keeps_busy(_buffer: memoryview) -> None:
        busy.set()
        go_on.wait(PATIENCE_SECONDS)

    with opened(store, streams=1) as ground:
        ground.engine.streams.append(StreamQuota(), keeps_busy)
        assert busy.wait(PATIENCE_SECONDS)
        supplier = ground.join(file_of(SMALL), Source(SMALL))
        supplier.quota.tasks.append(lambda _: None)  # of another file of the pull
        assert ground.downloads.hasten(file_of(SMALL)) is True
        assert supplier.quota.tasks[0] == supplier.turn
        assert (supplier.queued, len(supplier.quota.tasks)) == (2, 3)
        go_on.set()
        ground.end(supplier)
        assert ground.here(SMALL)
        assert ground.downloads.hasten(file_of(SMALL)) is False


class Failing(Source):
    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        raise ZeroDivisionError


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
def test_an_error_of_cachd_itself_ends_the_download_for_all(ground: Ground, content: bytes) -> None:
    with pytest.raises(CachdError) as refusal:
        ground.fetch(content, Failing(content))
    assert (type(refusal.value), refusal.value.detail) == (CachdError, "model.bin: ZeroDivisionError")


@pytest.mark.parametrize(
    ("outcome", "leaves_nothing"),
    [
        (None, False),
        (Cancelled("x"), False),
        (AWAY, False),
        (Changed("x"), True),
        (NoSpace("x", short=0), True),
        (NoSpace("x", short=1), False),
        (DiskFailed("x", errno=errno.EIO), False),
        (DiskFailed("x", errno=errno.EROFS), True),
    ],
    ids=lambda value: repr(value),
)
def test_what_a_download_leaves_for_a_resume_depends_on_its_end(
    ground: Ground, outcome: CachdError | None, leaves_nothing: bool
) -> None:
    supplier = ground.join(file_of(LARGE), Holding(LARGE))
    while not supplier.download.tally.fetched:
        supplier.outcomes.wait(0.01)
    supplier.download.end(outcome)
    supplier.outcomes.wait_for_all()
    assert (ground.store.sweep.partial_downloads() == []) is leaves_nothing


class Held(ShelfBody):
    """A body that ends with a failure once it is aborted, and sends nothing before."""

    def __init__(self, content: bytes, token: CancelToken) -> None:
        super().__init__(content)
        self._token = token

    def readinto(self, view: object) -> int:
        count = super().readinto(view)  # type: ignore[arg-type]
        if not count:
            self._token.wait(PATIENCE_SECONDS)
        return count


class Holding(Source):
    """Sends the first MiB of each request, and then nothing."""

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        self.asked.append(extent)
        content = self.contents[0]
        assert isinstance(content, bytes)
        return Held(content[extent.start : extent.start + MIB], cancel_token)


def stopped(ground: Ground, stop: Callable[[Supplier], object]) -> None:
    """Begin to fetch LARGE, and stop when bytes have arrived."""
    supplier = ground.join(file_of(LARGE), Holding(LARGE))
    while not supplier.download.tally.fetched:
        supplier.outcomes.wait(0.01)
    stop(supplier)
    with pytest.raises(Cancelled, match=r"cancelled after \d+ of"):
        ground.end(supplier)


def test_bytes_of_a_download_that_its_pull_leaves_are_resumed(ground: Ground) -> None:
    stopped(ground, lambda supplier: ground.downloads.leave([supplier]))
    (left,) = ground.store.sweep.partial_downloads()
    assert left.size >= MIB
    source = Source(LARGE)
    supplier = ground.fetch(LARGE, source)
    assert ground.here(LARGE)
    tally = supplier.download.tally
    assert tally.resumed >= MIB
    assert tally.resumed + tally.fetched == len(LARGE)


def test_after_an_interrupt_no_download_begins(ground: Ground) -> None:
    stopped(ground, lambda _: ground.downloads.interrupt())
    with pytest.raises(Cancelled, match="cancelled before it began"):
        ground.join(file_of(SMALL), Source(SMALL))


class Deaf(Source):
    """Sends the first MiB of each request, and then nothing until `goes_on`, even if it is cancelled."""

    def __init__(self, *contents: bytes | CachdError) -> None:
        super().__init__(*contents)
        self.goes_on = threading.Event()

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        body = Waits(LARGE[extent.start : extent.start + MIB])
        body.goes_on = self.goes_on
        return body


class Waits(ShelfBody):
    goes_on: threading.Event

    def readinto(self, view: object) -> int:
        count = super().readinto(view)  # type: ignore[arg-type]
        if not count:
            self.goes_on.wait(PATIENCE_SECONDS)
        return count


def test_a_pull_that_comes_while_a_cancelled_download_ends_waits_for_it_and_begins_its_own(
    ground: Ground,
) -> None:
    deaf = Deaf(LARGE)
    first = ground.join(file_of(LARGE), deaf)
    while not first.download.tally.fetched:
        first.outcomes.wait(0.01)
    leaving = threading.Thread(target=ground.downloads.leave, args=([first],), daemon=True)
    fetching = threading.Thread(target=ground.fetch, args=(LARGE, Source(LARGE)), daemon=True)
    leaving.start()
    until(lambda: first.download.tally.is_over)
    fetching.start()
    until(lambda: ground.downloads._waiting)
    deaf.goes_on.set()
    for thread in (leaving, fetching):
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()
    assert ground.here(LARGE)


def test_an_origin_serves_while_it_answers(ground: Ground) -> None:
    def stop(_: Supplier) -> None:
        assert ground.downloads.are_served_by("https://host/other")
        assert not ground.downloads.are_served_by("https://second/other")
        ground.downloads.interrupt()

    stopped(ground, stop)
    assert not ground.downloads.are_served_by("https://host/other")
