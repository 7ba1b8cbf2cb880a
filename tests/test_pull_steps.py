"""The steps of one pull: a slow resolve, a disk error, a late refusal, and the copies for its views."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import pytest

from cachd.errors import Cancelled, Changed, DiskFailed, Forbidden, NoSpace, NotFound
from cachd.model import Extent, File, Manifest, ModelSpec, Percentage, Ref, Snapshot
from cachd.sources.cancel import CancelToken
from cachd.sources.table import Table
from cachd.store.disk_store import DiskStore
from cachd.store.permit import Permit
from cachd.transfer.attempt import Attempt
from cachd.transfer.fetch import fetch
from cachd.transfer.progress import Progress, State
from cachd.transfer.pull import pull
from cachd.transfer.resolves import SLOW_SECONDS, Resolves
from cachd.transfer.streams import StreamQuota
from cachd.transfer.view_copies import staged_copies
from cachd.transfer.waits import Reason
from tests.ground.disks import FuseDisk
from tests.ground.pause import at_event
from tests.ground.site import until
from tests.ground.stored import MIB, commit, file_of, sha256
from tests.shelf import ShelfBody
from tests.test_runner import FILES, PATIENCE_SECONDS, SPEC, Ground, Scripted


class Clock:
    now = 70.0

    def __call__(self) -> float:
        return self.now


class Own(Scripted):
    """A scripted source that notes which files it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.at_open: Callable[[str, CancelToken], None] = lambda _path, _token: None

    def open(self, file: File, extent: Extent, cancel_token: CancelToken) -> ShelfBody:
        self.opened.append(file.path)
        self.at_open(file.path, cancel_token)
        return super().open(file, extent, cancel_token)


class Lent:
    """A slot that notes what a pull does with it."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_lent = threading.Event()

    def lend(self) -> None:
        self.calls.append("lend")
        self.is_lent.set()

    def take(self) -> None:
        self.calls.append("take")

    def take_when_free(self) -> None:
        self.calls.append("take_when_free")


class One(Ground):
    """One attempt at a pull of a scripted source."""

    source: Own

    def __init__(self, store: DiskStore, stack: ExitStack, ref: str = "hf://org/m") -> None:
        super().__init__(store, Own(), stack)
        self.slot, self.clock = Lent(), Clock()
        resolves = stack.enter_context(closing(Resolves(600.0, stall_seconds=60.0, clock=self.clock)))
        self.attempt = Attempt(
            spec=ModelSpec(Ref.parse(ref), "m"),
            source=self.source,
            slot=self.slot,
            progress=Progress(),
            quota=StreamQuota(),
            permit=Permit(),
            context=replace(self.context, resolves=resolves, clock=self.clock),
        )

    def pull(self) -> str:
        """Pull, and return the manifest's id."""
        return pull(self.attempt).manifest


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def one(store: DiskStore, stack: ExitStack) -> One:
    return One(store, stack)


def test_an_attempt_resolves_fetches_and_publishes(one: One) -> None:
    assert one.pull() == one.store.names.ready("m").manifest
    assert (one.source.resolves, sorted(one.source.opened)) == (1, sorted(FILES))
    assert one.slot.calls[0] == "take_when_free"
    assert set(one.slot.calls[1:]) == {"take"}, "bytes come"
    assert one.attempt.progress.state is State.publishing
    assert one.attempt.progress.done == one.attempt.progress.total == sum(map(len, FILES.values()))


def test_while_the_source_is_slow_the_pull_lends_its_slot_and_says_so(one: One) -> None:
    waits = []

    def slowly(_: CancelToken) -> None:
        one.clock.now += SLOW_SECONDS
        assert one.slot.is_lent.wait(PATIENCE_SECONDS)
        waits.append(one.attempt.progress.waits(one.attempt.progress.now))

    one.source.answers = [slowly]
    one.pull()
    (found,) = waits
    assert found is not None
    assert found.reason is Reason.slow
    assert one.slot.calls[:2] == ["lend", "take_when_free"]
    assert one.attempt.progress.resolve_seconds == SLOW_SECONDS


# --- the fetch ---


class Fetching(One):
    """A fetch of two files, of 100 and 9 bytes. `at_open`: called when a file is asked for."""

    def __init__(self, store: DiskStore, stack: ExitStack, clock: Callable[[], float]) -> None:
        super().__init__(store, stack)
        self.attempt = replace(self.attempt, progress=Progress(clock))
        self.manifest = self.source.manifest(SPEC.ref)
        self.source.at_open = self.at_open
        self.attempt.progress.begin_download(self.manifest, self.manifest.size)
        self.reservation = stack.enter_context(store.space.reserve(MIB, total=MIB))

    def at_open(self, path: str, cancel_token: CancelToken) -> None:
        """Nothing."""

    def fetch(self) -> None:
        fetch(self.manifest.files, self.attempt, self.reservation)


class Ticking(Clock):
    """A clock that says six seconds more each time."""

    def __call__(self) -> float:
        self.now += 6.0
        return self.now


def test_a_fetch_lends_its_slot_while_hardly_any_byte_comes_and_has_it_at_its_end(
    store: DiskStore, stack: ExitStack
) -> None:
    class Slow(Fetching):
        def at_open(self, path: str, cancel_token: CancelToken) -> None:
            assert self.slot.is_lent.wait(PATIENCE_SECONDS)

    slow = Slow(store, stack, Ticking())
    slow.fetch()
    assert (slow.slot.calls[0], slow.slot.calls[-1]) == ("take", "take")
    assert "lend" in slow.slot.calls
    assert slow.attempt.progress.done == slow.manifest.size
    assert (slow.attempt.quota.to_begin, slow.attempt.quota.files) == (0, 0)


def test_a_fetch_that_fails_says_how_far_it_was_and_ends_its_other_downloads(
    store: DiskStore, stack: ExitStack
) -> None:
    error = NotFound("absent", code="file_not_found")

    class Fails(Fetching):
        def at_open(self, path: str, cancel_token: CancelToken) -> None:
            if path == "b.bin":
                until(lambda: self.attempt.progress.done >= 100)
                raise error

    fails = Fails(store, stack, Clock())
    with pytest.raises(NotFound) as refusal:
        fails.fetch()
    assert refusal.value is error
    assert (error.bytes_done, error.bytes_total) == (100, 109)
    assert (fails.attempt.quota.to_begin, fails.attempt.quota.files) == (0, 0)
    assert not fails.context.downloads._all


def test_a_fetch_ends_when_its_pull_is_cancelled(store: DiskStore, stack: ExitStack) -> None:
    class Waits(Fetching):
        def at_open(self, path: str, cancel_token: CancelToken) -> None:
            self.attempt.progress.cancel_token.cancel()
            cancel_token.wait(PATIENCE_SECONDS)

    waits = Waits(store, stack, Clock())
    with pytest.raises(Cancelled, match="m: cancelled after 0 of 109 bytes"):
        waits.fetch()
    assert not waits.context.downloads._all


# --- errors ---


def test_a_disk_error_lets_the_pull_be_tried_once_more(tmp_path: Path, stack: ExitStack) -> None:
    disk = stack.enter_context(FuseDisk(tmp_path))
    one = One(stack.enter_context(DiskStore(disk.path)), stack)
    disk.fail("fsync", "EIO", "*")
    with at_event("disk error: trying the pull once more", disk.heal) as tried:
        one.pull()
    assert tried.is_set()
    assert one.source.resolves == 1
    assert one.store.names.has("m")


@pytest.mark.parametrize(("error", "tries"), [("EIO", 2), ("EROFS", 1)])
def test_a_disk_error_that_stays_fails_the_pull(
    tmp_path: Path, stack: ExitStack, error: str, tries: int
) -> None:
    disk = stack.enter_context(FuseDisk(tmp_path))
    one = One(stack.enter_context(DiskStore(disk.path)), stack)
    one.source.files = {"a.bin": b"a"}
    disk.fail("fsync", error, "*")
    with pytest.raises(DiskFailed):
        one.pull()
    assert len(one.source.opened) == tries
    assert not one.store.names.has("m")


def test_what_a_model_of_the_same_source_has_needs_no_proof_after_a_restart(
    root: Path, stack: ExitStack
) -> None:
    """A power loss may have removed the proofs, and the manifest stays."""
    ref = "https://host/models/"
    with ExitStack() as life:
        One(life.enter_context(DiskStore(root)), life, ref).pull()
    (root / ".cachd/proven").unlink(missing_ok=True)
    again = One(stack.enter_context(DiskStore(root)), stack, ref)
    again.pull()
    assert again.source.opened == []


def test_what_only_another_source_has_brought_must_be_proven(store: DiskStore, stack: ExitStack) -> None:
    for path, content in FILES.items():
        commit(store, file_of(content, path), content)
    one = One(store, stack, "https://elsewhere/models/")
    one.pull()
    assert sorted(one.source.opened) == sorted(FILES)
    assert one.attempt.progress.fetched == sum(map(len, FILES.values()))


def test_a_model_that_is_refused_while_it_is_published_is_withdrawn(one: One) -> None:
    def refuse() -> None:
        one.table = Table(refuse=[str(sha256(FILES["b.bin"]))])

    with at_event("published", refuse), pytest.raises(Forbidden) as refusal:
        one.pull()
    assert refusal.value.code == "refused_digest"
    assert not one.store.names.has("m")


# --- repairs ---

NEW = "b" * 40  # the revision that the source has by now


def repaired(one: One, files: dict[str, bytes]) -> Snapshot:
    """Repair `a.bin` of a pulled model from its source, which has these files by now."""
    one.pull()
    file = next(each for each in one.source.manifest(SPEC.ref).files if each.path == "a.bin")
    blob = one.store.layout.blob(file.blob)
    blob.chmod(0o644)
    blob.write_bytes(bytes(file.size))
    inode = one.store.content.inode(file.blob)
    assert one.store.quarantine(file, "it is damaged", inode, now=5.0) == ["m"]
    one.source.files, one.source.revision = files, NEW
    one.source.resolves, has_changed = 0, [Changed("x")]

    def at_open(_path: str, _token: CancelToken) -> None:
        if has_changed:
            raise has_changed.pop()

    one.source.at_open = at_open
    one.attempt = replace(one.attempt, progress=Progress(), permit=Permit(), quota=StreamQuota())
    return pull(one.attempt)


def test_a_repair_keeps_the_revision_while_the_source_has_the_lost_bytes(one: One) -> None:
    one.store.pins.add("m")
    snapshot = repaired(one, {**FILES, "b.bin": b"other"})
    assert (snapshot.revision, one.source.resolves) == ("a" * 40, 1)
    for path, content in FILES.items():
        assert (one.store.layout.model("m") / path).read_bytes() == content


@pytest.mark.parametrize("files", [{**FILES, "a.bin": b"other"}, {"b.bin": FILES["b.bin"]}])
def test_a_repair_takes_the_new_revision_if_the_lost_bytes_are_gone_and_nobody_pins_the_old_one(
    one: One, files: dict[str, bytes]
) -> None:
    assert repaired(one, files).revision == NEW
    assert {path.name for path in one.store.layout.model("m").iterdir()} == set(files)


def test_a_repair_moves_no_pinned_model_to_a_new_revision(one: One) -> None:
    one.store.pins.add("m")
    with pytest.raises(Changed, match=f"pinned at revision {'a' * 40}"):
        repaired(one, {**FILES, "a.bin": b"other"})
    assert one.store.names.get("m") is None, "it stays quarantined"


# --- the copies of the views ---


class Copying(One):
    """A pull that pays for the copies of its views. `times`: what its clock says, one after the other."""

    def __init__(self, store: DiskStore, stack: ExitStack, *times: float) -> None:
        super().__init__(store, stack)
        self.times, self.asked = list(times), 0
        self.at_time: Callable[[], None] = lambda: None
        context = replace(self.attempt.context, clock=self.time)
        self.attempt = replace(self.attempt, spec=replace(SPEC, copy=("*",)), context=context)
        self.reservation = stack.enter_context(store.space.reserve(MIB, total=MIB))
        commit(store, file_of(b"a" * 100, "a.bin"), b"a" * 100)
        self.manifest = Manifest("hf://org/m", "a" * 40, (file_of(b"a" * 100, "a.bin"),), copied=("a.bin",))

    def time(self) -> float:
        self.asked += 1
        self.at_time()
        return self.times.pop(0) if len(self.times) > 1 else self.times[0]

    def stage(self) -> None:
        with staged_copies(self.manifest, self.attempt, self.reservation):
            pass

    def fill(self) -> None:
        self.store.space.change(reserve_free=Percentage(100), limit=None, reserve_inodes=0)


def test_copies_are_paid_from_the_reservation(store: DiskStore, stack: ExitStack) -> None:
    copying = Copying(store, stack, 0.0)
    before = copying.reservation.left
    copying.stage()
    assert copying.reservation.left < before


def test_copies_wait_for_space_and_at_the_end_fail(store: DiskStore, stack: ExitStack) -> None:
    copying = Copying(store, stack, 0.0, 599.9, 600.0)
    copying.fill()
    with pytest.raises(NoSpace, match="of a copy for the views") as refusal:
        copying.stage()
    assert (refusal.value.short > 0, copying.asked) == (True, 3)


def test_copies_that_wait_for_space_end_with_their_pull(store: DiskStore, stack: ExitStack) -> None:
    copying = Copying(store, stack, 0.0)
    token = copying.attempt.progress.cancel_token
    copying.fill()
    copying.at_time = token.cancel
    with pytest.raises(Cancelled):
        copying.stage()
    with pytest.raises(Cancelled):
        copying.stage()
    copying.store.space.change(reserve_free=0, limit=None, reserve_inodes=0)
    with pytest.raises(Cancelled):
        copying.stage()
