"""Who may write to a root on a shared volume, and what a writer can still do that another one replaced."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest

from cachd.direct import is_for_all
from cachd.errors import (
    CachdError,
    Corrupt,
    DiskFailed,
    Forbidden,
    InUse,
    Invalid,
    NotFound,
    TooBig,
    Unauthorized,
    UnsafeRoot,
    WaitTimeout,
)
from cachd.kernel import durable
from cachd.kernel.periodic import Periodic
from cachd.model import Extent
from cachd.store import root_lock, takeover
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout
from cachd.store.nodes import DEAD_SECONDS, Nodes, Term, end_dead_writer, newest_number
from cachd.store.publish import Publisher
from cachd.store.root import make_directories
from cachd.store.takeover import Takeover, formers_in
from cachd.store.withdrawals import Withdrawals
from tests.ground.models import noise
from tests.ground.pause import paused_before
from tests.ground.stored import KIB, A, B, assert_whole, commit, file_of, keep, publish, write

FILES = {"model.bin": noise(100 * KIB), "config.json": b"{}"}
OTHERS = {"model.bin": noise(100 * KIB, 2), "config.json": b"[]"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def shared(root: Path) -> Path:
    make_directories(root)
    return root


def taken(root: Path, *, fenced: Callable[[], object] = lambda: None) -> Term:
    """The next term, whatever the process does that has the one before."""
    nodes = Nodes(root)
    nodes.writer()
    term = nodes.take("m", {}, fenced=fenced)
    assert term is not None
    term.begin()
    return term


@contextmanager
def writing(root: Path, **how: Any) -> Iterator[DiskStore]:
    """A store of the next writer."""
    term = taken(root)
    try:
        with DiskStore(root, term=term, **how) as store:
            yield store
    finally:
        term.end()


def observed(nodes: Nodes, clock: Clock, seconds: float) -> bool:
    """Whether somebody may still write, for an observer that checks each second."""
    for _ in range(int(seconds)):
        nodes.writer()
        clock.now += 1
    return nodes.writer() is not None


# --- who is next ---


def test_of_many_that_take_a_number_at_once_one_gets_it(shared: Path) -> None:
    many = 16
    start = Barrier(many)

    def take(_: int) -> Term | None:
        nodes = Nodes(shared)
        assert nodes.writer() is None
        start.wait()
        return nodes.take("m", {}, fenced=lambda: None)

    with ThreadPoolExecutor(many) as threads:
        found = [term for term in threads.map(take, range(many)) if term]
    assert [term.number for term in found] == [1]
    assert os.listdir(shared / ".cachd/nodes") == ["1.writer"]


def test_a_writer_is_dead_when_its_beat_did_not_change_while_it_was_observed(shared: Path) -> None:
    clock = Clock()
    nodes = Nodes(shared, clock=clock)
    with closing_term(taken(shared)) as term:
        stopped(term)
        assert observed(nodes, clock, DEAD_SECONDS - 1)
        assert not observed(nodes, clock, 2)


def test_a_beat_keeps_a_writer_alive_whatever_the_clocks_of_the_file_server_say(shared: Path) -> None:
    clock = Clock()
    nodes = Nodes(shared, clock=clock)
    with closing_term(taken(shared)) as term:
        stopped(term)
        beat = shared / f".cachd/nodes/{term.number}.beat"
        for number in range(5):
            assert observed(nodes, clock, DEAD_SECONDS - 1)
            beat.write_bytes(b"%020d\n" % number)
            os.utime(beat, (1.0, 1.0))  # its time never changes


def test_an_observer_that_stood_still_itself_declares_nobody_dead(shared: Path) -> None:
    clock = Clock()
    nodes = Nodes(shared, clock=clock)
    with closing_term(taken(shared)) as term:
        stopped(term)
        assert nodes.writer()
        clock.now += 100 * DEAD_SECONDS
        assert nodes.writer(), "the other process may have stood still as long"


def test_a_writer_that_ended_is_followed_at_once(shared: Path) -> None:
    nodes = Nodes(shared)
    term = taken(shared)
    writer = nodes.writer()
    assert writer
    assert (writer.number, writer.name) == (1, "m")
    assert writer.who.startswith(f"pid {os.getpid()} on ")
    term.end({"code": "file_not_found"})
    assert nodes.writer() is None
    assert nodes.ended_with(1) == {"code": "file_not_found"}
    assert "beat" not in {thread.name for thread in threading.enumerate()}
    assert not (shared / ".cachd/nodes/1.work").exists()


def test_numbers_only_grow_and_few_of_them_are_kept(shared: Path) -> None:
    for number in range(1, 30):
        term = taken(shared)
        assert term.number == number
        term.end()
    kept = {int(name.partition(".")[0]) for name in os.listdir(shared / ".cachd/nodes")}
    assert kept == set(range(10, 30))


def test_a_writer_whose_number_somebody_deleted_writes_no_more(shared: Path) -> None:
    with closing_term(taken(shared)) as term:
        (shared / ".cachd/nodes/1.writer").unlink()
        with pytest.raises(InUse) as refusal:
            term.check()
        assert refusal.value.code == "fenced"


# --- what a fenced writer can still do ---


def test_a_writer_that_was_replaced_is_stopped_before_it_changes_anything(shared: Path) -> None:
    heard: list[str] = []
    with ExitStack() as stack:
        first = taken(shared, fenced=lambda: heard.append("fenced"))
        stack.callback(first.end)
        store = stack.enter_context(DiskStore(shared, term=first))
        keep(store, FILES)
        with writing(shared) as second:
            publish(second, OTHERS)
            for change in (lambda: publish(store, FILES), lambda: store.withdraw("org--model", force=True)):
                with pytest.raises(InUse) as refusal:
                    change()
                assert refusal.value.code == "fenced"
            assert heard
            assert_whole(shared, "org--model", OTHERS, commit=A)


@pytest.mark.parametrize(
    ("step", "within"),
    [
        (Publisher._hide, Publisher._declare),
        (durable.make_link, Publisher._declare),
        (durable.write_file, Publisher._declare),
        (durable.move, Publisher._hide),
        (durable.sync_directory, Publisher._hide),
    ],
    ids=lambda step: step.__qualname__,
)
def test_a_writer_that_stood_still_in_a_publish_cannot_undo_what_the_next_one_published(
    shared: Path, step: Callable[..., Any], within: Callable[..., Any]
) -> None:
    """Promised: A pod that stood still while another one took over its pull changes nothing that pods see.

    It has passed every check, and wakes up at the very step that would harm.
    """
    first = taken(shared)
    with closing_term(first), DiskStore(shared, term=first) as store:
        publish(store, FILES)
        stopped(first)
        with paused_before(step, lambda: publish(store, FILES, now=3.0), within=within) as publishing:
            with writing(shared) as second:
                publish(second, OTHERS, revision=B, now=2.0)
            before = state(shared)
        assert isinstance(publishing.exception(), CachdError)
        assert state(shared) == before
        assert_whole(shared, "org--model", OTHERS, commit=B)


def test_a_writer_that_stood_still_in_a_commit_makes_no_blob_of_another_ones_download(shared: Path) -> None:
    content = noise(100 * KIB)
    file = file_of(content)
    first = taken(shared)
    with closing_term(first), DiskStore(shared, term=first) as store:
        stopped(first)
        with (
            paused_before(durable.move, lambda: commit(store, file, content)) as committing,
            writing(shared) as second,
            closing(second.content.begin(file)) as ingest,
        ):
            ingest.write(0, memoryview(b"half of it"))
        assert isinstance(committing.exception(), CachdError)
        assert not store.content.has(file)


def test_a_writer_that_stood_still_in_a_withdrawal_leaves_the_model_ready(shared: Path) -> None:
    first = taken(shared)
    with closing_term(first), DiskStore(shared, term=first) as store:
        publish(store, FILES)
        stopped(first)

        def withdraw() -> int:
            return store.withdraw("org--model", force=True)

        with (
            paused_before(durable.move, withdraw, within=Withdrawals._remove_names) as removing,
            writing(shared) as second,
        ):
            publish(second, FILES, now=2.0)
            second.pins.add("org--model")
        assert isinstance(removing.exception(), CachdError)
        assert store.pins.has("org--model")
        assert_whole(shared, "org--model", FILES, commit=A)


def test_late_writes_of_a_former_writer_reach_no_file_of_the_next(shared: Path) -> None:
    content = noise(100 * KIB)
    file, half = file_of(content), Extent(0, 50 * KIB)
    first = taken(shared)
    with closing_term(first), DiskStore(shared, term=first) as store:
        stopped(first)
        with closing(store.content.begin(file)) as late:
            write(late, content[: half.stop], half)
            with writing(shared) as second, closing(second.content.begin(file)) as ingest:
                assert ingest.resumed == half.size, "nothing is fetched twice"
                late.write(0, memoryview(bytes(half.size)))
                write(ingest, content, Extent(half.stop, file.size))
                ingest.follow(memoryview(bytearray(64 * KIB)))
                second.content.commit(ingest)
                late.write(0, memoryview(bytes(half.size)))
                assert second.content.path(file.blob).read_bytes() == content


def test_a_writer_that_ended_hands_over_its_downloads_as_they_are(shared: Path) -> None:
    content = noise(100 * KIB)
    file, half = file_of(content), Extent(0, 50 * KIB)
    with writing(shared) as first, closing(first.content.begin(file)) as ingest:
        write(ingest, content[: half.stop], half)
        inode = (ingest.directory / "data").stat().st_ino
    assert [path.stat().st_ino for path in (shared / ".cachd/ingest").glob("*/data")] == [inode]
    with writing(shared) as second, closing(second.content.begin(file)) as ingest:
        assert ingest.resumed == half.size
        assert (ingest.directory / "data").stat().st_ino == inode


def test_downloads_survive_two_writers_that_die_one_after_the_other(shared: Path) -> None:
    content = noise(100 * KIB)
    file, half = file_of(content), Extent(0, 50 * KIB)
    terms = [taken(shared)]
    with ExitStack() as stack:
        store = stack.enter_context(DiskStore(shared, term=terms[0]))
        ingest = stack.enter_context(closing(store.content.begin(file)))
        write(ingest, content[: half.stop], half)
        stopped(terms[0])
        terms.append(taken(shared))
        stopped(terms[1])
        with writing(shared) as third, closing(third.content.begin(file)) as ingest:
            assert ingest.resumed == half.size
    assert not list((shared / ".cachd/nodes").glob("*.work"))


@pytest.mark.parametrize(
    ("error", "concerns_all"),
    [
        (NotFound("no such file"), True),
        (Corrupt("other bytes"), True),
        (TooBig("too big"), True),
        (Invalid("no such ref"), True),
        (Invalid("no root", code="bad_root"), False),
        (WaitTimeout("late"), False),
        (Unauthorized("no token"), False),
        (Forbidden("wrong token"), False),
        (UnsafeRoot("mode 0777"), False),
        (DiskFailed("read error"), False),
        (InUse("fenced"), False),
    ],
    ids=lambda each: each.code if isinstance(each, CachdError) else "",
)
def test_an_error_of_one_pod_alone_is_no_answer_to_those_that_wait(
    error: CachdError, concerns_all: bool
) -> None:
    assert is_for_all(error) == concerns_all


@pytest.mark.parametrize("follower", [lambda root: writing(root), DiskStore], ids=["writer", "alone"])
def test_a_takeover_that_is_interrupted_loses_no_download(
    shared: Path, follower: Callable[[Path], Any]
) -> None:
    content = noise(100 * KIB)
    file, half = file_of(content), Extent(0, 50 * KIB)
    first = taken(shared)
    with DiskStore(shared, term=first) as store, closing(store.content.begin(file)) as ingest:
        write(ingest, content[: half.stop], half)
    killed(first)
    nodes = Nodes(shared)
    nodes.writer()
    second = nodes.take("m", {}, fenced=lambda: None)
    assert second is not None
    work = Layout(shared, second.work)
    for directory in (work.ingests, work.staging, work.trash):
        directory.mkdir(parents=True)
    (shared / ".cachd/staging/left").touch()  # it is asked about once the former writer is fenced

    def interrupted() -> None:
        if formers_in(work.ingests.parent):
            raise KeyboardInterrupt  # as at SIGTERM

    with pytest.raises(KeyboardInterrupt), closing_term(second):
        Takeover(work, second.number, interrupted, reserve_free=0).run()
    assert nodes.writer() is None
    assert nodes.has_ended(second.number)
    with follower(shared) as third, closing(third.content.begin(file)) as ingest:
        assert ingest.resumed == half.size
    assert not list((shared / ".cachd/nodes").glob("*.work"))


def test_a_writer_that_stood_still_when_it_began_takes_nothing_from_the_next_one(shared: Path) -> None:
    nodes = Nodes(shared)
    nodes.writer()
    first = nodes.take("m", {}, fenced=lambda: None)
    assert first is not None
    content = noise(100 * KIB)
    file = file_of(content)
    with closing_term(first), ExitStack() as stack:
        with paused_before(Periodic.start, first.begin, within=Term.begin) as beginning:
            second = stack.enter_context(writing(shared))
            ingest = stack.enter_context(closing(second.content.begin(file)))
            write(ingest, content)
        assert isinstance(beginning.exception(), InUse)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        second.content.commit(ingest)


def test_a_takeover_without_space_for_copies_drops_the_oldest_download(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = [noise(100 * KIB, seed) for seed in range(3)]
    first = taken(shared)
    with DiskStore(shared, term=first) as store:
        for age, content in enumerate(contents):
            with closing(store.content.begin(file_of(content))) as ingest:
                write(ingest, content[: 50 * KIB], Extent(0, 50 * KIB))
                os.utime(ingest.directory / "data", (1000 - age, 1000 - age))
    killed(first)
    really = os.statvfs

    def small(place: Path) -> Any:
        """A disk on which one more download fits once another one was dropped."""
        left = [*place.glob("former-*/ingest/*"), *place.glob("ingest/*")]
        free = takeover._SPARE_BYTES + (20 + 50 * (3 - len(left))) * KIB
        return SimpleNamespace(f_blocks=really(place).f_blocks, f_frsize=1, f_bavail=free)

    monkeypatch.setattr(os, "statvfs", small)
    second = taken(shared)
    monkeypatch.undo()
    with closing_term(second):
        kept = {path.name for path in second._layout.ingests.iterdir()}
    assert kept == {second._layout.ingest(file.blob, file.size).name for file in map(file_of, contents[:2])}


def test_a_file_that_cannot_be_deleted_stops_no_later_writer(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As .nfsXXXX on NFS and .fuse_hiddenXXXX on FUSE while a process has the deleted file open."""
    unlink = os.unlink

    def refuse(path: str, **how: Any) -> None:
        if "/.nfs" in str(path):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        unlink(path, **how)

    first = taken(shared)
    stopped(first)
    (shared / first.work / "trash/.nfs0001").write_bytes(b"open")
    monkeypatch.setattr(os, "unlink", refuse)
    for _ in range(3):
        taken(shared).end()
    (left,) = (shared / ".cachd/nodes").rglob(".nfs*")
    assert left.relative_to(shared / ".cachd/nodes").parts[:2] == ("4.work", "former-1.4-2")
    monkeypatch.undo()
    taken(shared).end()
    assert not list((shared / ".cachd/nodes").glob("*.work"))


# --- beside those who use a root alone ---


def test_a_root_that_is_used_alone_has_no_writers_beside(shared: Path) -> None:
    content = noise(100 * KIB)
    file = file_of(content)
    with DiskStore(shared) as store, closing(store.content.begin(file)) as ingest:
        write(ingest, content)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        with pytest.raises(InUse) as refusal:
            taken(shared)
        assert refusal.value.code == "root_locked"
        store.content.commit(ingest)  # the other process has not touched the download
    with writing(shared):
        with pytest.raises(InUse) as refusal:
            DiskStore(shared)
        assert refusal.value.code == "root_locked"


def test_who_wants_a_root_alone_waits_for_no_writer_that_lives_and_takes_over_from_a_dead_one(
    shared: Path,
) -> None:
    content = noise(100 * KIB)
    file, half = file_of(content), Extent(0, 50 * KIB)
    term = taken(shared)
    with DiskStore(shared, term=term) as store, closing(store.content.begin(file)) as ingest:
        write(ingest, content[: half.stop], half)
        with pytest.raises(InUse) as refusal:
            end_dead_writer(shared)
        assert refusal.value.code == "root_locked"
    killed(term)
    with DiskStore(shared) as alone, closing(alone.content.begin(file)) as ingest:
        assert ingest.resumed == half.size
    assert newest_number(alone.layout) == term.number + 1


def test_a_writer_deletes_what_a_process_that_used_the_root_alone_left_half_done(shared: Path) -> None:
    places = [shared / ".cachd" / name for name in ("trash", "staging")]
    for place in places:
        (place / "sha256-x").write_bytes(b"x" * 100 * KIB)
        (place / "tree").mkdir(mode=0o555)
    with writing(shared) as store:
        assert [list(place.iterdir()) for place in (*places, store.layout.trash)] == [[], [], []]


def test_without_locks_the_note_of_a_process_of_this_node_keeps_writers_away(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, other = shared / ".cachd/lock", os.getppid()
    lock.touch()
    note = f"{other} {lock.stat().st_ino} {root_lock._identity_of(other)}"
    lock.write_text(f"pid {other} on node\n{note}\n")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(InUse, match=f"pid {other} on node") as refusal:
        taken(shared)
    assert refusal.value.code == "root_locked"
    lock.write_text("")
    taken(shared).end()


# --- small things of the tests ---


@contextmanager
def closing_term(term: Term) -> Iterator[Term]:
    try:
        yield term
    finally:
        term.end()


def stopped(term: Term) -> None:
    """Let the process of a term beat no more, as one that was killed or stands still."""
    term._thread.close()


def killed(term: Term) -> None:
    """As `stopped`, and without the lock, as after the end of a process."""
    stopped(term)
    assert term._lock is not None
    os.close(term._lock)
    term._lock = None


def state(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file that pods see: inode, mode and content."""
    found = {}
    for top in ("models", "hub", "ready"):
        for at, _, names in os.walk(root / top):
            for name in names:
                path = Path(at, name)
                status = path.lstat()
                content = os.fsencode(path.readlink()) if path.is_symlink() else path.read_bytes()
                found[str(path.relative_to(root))] = (status.st_ino, stat.S_IMODE(status.st_mode), content)
    return found
