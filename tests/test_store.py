"""The store on real directories: what it believes after a crash, what pods see, and what it never removes."""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import hashlib
import itertools
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
import xxhash

from cachd.errors import (
    CachdError,
    Cancelled,
    Corrupt,
    DiskFailed,
    Forbidden,
    InUse,
    Invalid,
    NoSpace,
    NotFound,
    TooBig,
)
from cachd.kernel.leases import is_open
from cachd.model import Digest, Extent, File, Manifest, ModelSpec, Ref, Snapshot
from cachd.store import catalog
from cachd.store.disk_store import DiskStore
from cachd.store.ingest import Ingest
from cachd.store.layout import Layout
from cachd.store.overhead import beside_file
from cachd.store.space import Space, bytes_beside
from cachd.store.store import Store
from tests.ground import mount
from tests.ground.disks import fill, remount, take_inodes
from tests.ground.models import digests, noise
from tests.ground.needs import require
from tests.ground.node import short_name
from tests.ground.site import mapped

KIB, MIB = 1 << 10, 1 << 20
Files = Mapping[str, bytes]
A, B, C = "a" * 40, "b" * 40, "c" * 40


# --- making things ---


def sha256(content: bytes) -> Digest:
    return Digest("sha256", hashlib.sha256(content).hexdigest())


def file_of(content: bytes, path: str = "model.bin") -> File:
    return File(path, len(content), f"https://host/{path}", sha256(content))


def manifest_of(files: Files, *, base: str = "hf://org/model", revision: str = A) -> Manifest:
    return Manifest(base, revision, tuple(file_of(content, path) for path, content in files.items()))


def write(ingest: Ingest, content: bytes, *parts: Extent) -> None:
    """Write and finish these parts of the content as streams do; without any, the whole as one part."""
    for part in parts or (Extent(0, len(content)),):
        piece = content[part.start : part.stop]
        ingest.write(part.start, memoryview(piece))
        ingest.received(part)
        hashed = ingest.part_hash()
        hashed.update(memoryview(piece))
        ingest.finish(part, hashed)


def commit(store: Store, file: File, content: bytes) -> None:
    """Take the content in as the file's blob."""
    with closing(store.content.begin(file)) as ingest:
        for gap in ingest.gaps():
            write(ingest, content, gap)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        store.content.commit(ingest)


def keep(store: Store, files: Files) -> None:
    """Take every blob in that is not here."""
    for path, content in files.items():
        if not store.content.has(file_of(content, path)):
            commit(store, file_of(content, path), content)


def publish(
    store: Store,
    files: Files,
    ref: str = "hf://org/model",
    name: str | None = None,
    *,
    revision: str = A,
    now: float = 1.0,
) -> Snapshot:
    """Take the files in and publish them as what the ref resolved to."""
    parsed = Ref.parse(ref)
    keep(store, files)
    manifest = manifest_of(files, base=parsed.base, revision=revision)
    return store.publish(ModelSpec(parsed, name or short_name(ref) or ""), manifest, now=now)


def shown(files: Files) -> dict[str, str]:
    return {path: hashlib.sha256(content).hexdigest() for path, content in sorted(files.items())}


def hub(root: Path, repo: str = "org/model") -> Path:
    return root / "hub" / ("models--" + repo.replace("/", "--"))


def refs_of(root: Path, repo: str = "org/model") -> dict[str, str]:
    top = hub(root, repo) / "refs"
    return {p.relative_to(top).as_posix(): p.read_text() for p in top.rglob("*") if p.is_file()}


def names_below(directory: Path) -> set[str]:
    """What a directory holds, a tag of backup tools left out."""
    return {path.name for path in directory.iterdir()} - {"CACHEDIR.TAG"} if directory.exists() else set()


def blobs_of(root: Path) -> set[str]:
    return {path.name for path in (root / ".cachd/blobs").glob("*/*")}


def hexes(*several: Files) -> set[str]:
    return {sha256(content).hex for files in several for content in files.values()}


def assert_whole(root: Path, name: str, files: Files, *, commit: str, repo: str = "org/model") -> None:
    """A ready model's views show exactly its files: right bytes, read-only, in directories nobody may write
    to; and its branch names a commit that is here."""
    plain = root / "models" / name
    told = json.loads((root / "ready" / f"{name}.json").read_text())
    assert plain.readlink() == Path(".trees") / told["manifest"]
    assert told["revision"] == commit
    assert mount.wrong(root) == []
    if branch := told["hub"]["revision"]:
        assert (hub(root, repo) / "snapshots" / refs_of(root, repo)[branch]).is_dir()
    for view in (plain, hub(root, repo) / "snapshots" / commit):
        assert digests(view) == shown(files)
        for path in files:
            status = (view / path).lstat()
            assert stat.S_ISREG(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o444
            assert os.path.samestat(status, (plain / path).lstat())
    for directory, _, _ in os.walk(plain.resolve()):
        assert stat.S_IMODE(Path(directory).stat().st_mode) == 0o555, directory


def assert_nothing_left(root: Path) -> None:
    """No model, no blob, nothing half-made."""
    for directory in ("models/.trees", "models/.holds", "hub", "ready"):
        assert names_below(root / directory) == set(), directory
    assert names_below(root / "models") == {".trees", ".holds"}
    for directory in ("ingest", "manifests", "staging", "trash", "pending", "pins"):
        assert names_below(root / ".cachd" / directory) == set(), directory
    assert blobs_of(root) == set()


@pytest.fixture
def next_life(root: Path) -> Iterator[Callable[[], DiskStore]]:
    """Closes the store of the test's root and opens it as the next daemon does."""
    with ExitStack() as life:

        def opened() -> DiskStore:
            life.close()
            return life.enter_context(DiskStore(root))

        yield opened


@pytest.fixture
def store(next_life: Callable[[], DiskStore]) -> DiskStore:
    return next_life()


# --- other users, small disks, other processes ---


@contextmanager
def as_another_user() -> Iterator[Path]:
    """A directory of a user without rights, who we are meanwhile; as we are where we have none anyway.

    In memory where there is room for it: hundreds of processes are killed in it.
    """
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        place = Path(directory)
        place.chmod(0o755)
        privileged = True
        try:
            os.chown(place, 10001, 10001)
            os.setresuid(10001, 10001, 0)
        except PermissionError:
            privileged = False
        try:
            yield place
        finally:
            if privileged:
                os.setresuid(0, 0, 0)


@contextmanager
def base_as_another_user() -> Iterator[Path]:
    """An empty root for killed_at_every_step, as a user without rights: root ignores the modes of files."""
    with as_another_user() as place:
        base = place / "root"
        base.mkdir()
        yield base


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Makes empty file systems in memory: `small_disk(size_bytes, inodes=100)`."""
    require("mount")
    mounted: list[Path] = []

    def made(size: int, *, inodes: int = 10_000) -> Path:
        disk = tmp_path / f"disk-{len(mounted)}"
        disk.mkdir()
        options = f"size={size},nr_inodes={inodes},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
        mounted.append(disk)
        return disk

    yield made
    for disk in mounted:
        subprocess.run(["umount", disk], check=True)


def give_back(fillers: Path) -> None:
    for filler in fillers.iterdir():
        filler.unlink()
    fillers.rmdir()


KILLED = 99
CHANGING: tuple[str, ...] = ("mkdir", "rmdir", "rename", "link", "symlink", "unlink", "chmod", "fchmod")
CHANGING += ("write", "pwrite", "ftruncate", "posix_fallocate")


def in_child(work: Callable[[], object]) -> int:
    """Exit status of a child process that does the work: 0, or 1 after an exception."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        except BaseException:  # noqa: BLE001 the parent sees the status, the test's output the reason
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_after(calls: int, work: Callable[[], object]) -> Callable[[], object]:
    """The work of a process that is killed right after its so-manieth system call that changes a disk."""
    left = itertools.count(calls, -1)

    def deadly(call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **kwargs: object) -> object:
            result = call(*args, **kwargs)
            if not next(left):
                os._exit(KILLED)
            return result

        return called

    def run() -> object:
        opened = os.open
        created = deadly(opened)
        for name in CHANGING:
            setattr(os, name, deadly(getattr(os, name)))
        os.open = lambda path, flags, *rest, **by: (  # type: ignore[assignment]
            (created if flags & os.O_CREAT else opened)(path, flags, *rest, **by)
        )
        return work()

    return run


def killed_at_every_step(base: Path, work: Callable[[Path], object]) -> Iterator[Path]:
    """Copies of a closed root, each left by a process that was killed one step later; the last by one that
    did all of its work."""
    for calls in itertools.count():
        root = base.with_name(f"{base.name}-{calls}")
        subprocess.run(["cp", "-a", base, root], check=True)
        status = in_child(dying_after(calls, lambda root=root: work(root)))
        assert status in (0, KILLED)
        yield root
        if status == 0:
            assert calls > 3, "it was killed at least three times"
            return


def leases_work() -> bool:
    """Whether the kernel lends files of the directory for temporary files (man 2 fcntl, "Leases")."""
    with tempfile.NamedTemporaryFile() as opened, open(opened.name, "rb") as again:
        try:
            fcntl.fcntl(again, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
    return True


needs_leases = pytest.mark.skipif(not leases_work(), reason="this file system has no leases (F_SETLEASE)")


# --- ingest: parts, journal, resume ---

CONTENT = noise(10 * KIB)
PARTS = [Extent(start, min(start + 4 * KIB, len(CONTENT))) for start in range(0, len(CONTENT), 4 * KIB)]
FILE = file_of(CONTENT)


def ingest_directory(store: DiskStore, file: File = FILE) -> Path:
    return store.layout.ingest(file.blob)


def left_by_an_earlier_life(store: DiskStore, *parts: Extent) -> Path:
    """An ingest that holds these parts of CONTENT and was closed; its directory."""
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *parts)
    return ingest_directory(store)


def test_a_new_ingest_lacks_everything_and_has_blocks_for_what_is_allocated_alone(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(0, len(CONTENT))]
        assert (ingest.prefix, ingest.behind, ingest.resumed) == (0, 0, 0)
        assert store.content.allocated(FILE) == ingest.allocated == 0
        ingest.allocate(Extent(0, len(CONTENT)))
        assert store.content.allocated(FILE) == ingest.allocated >= len(CONTENT)
        assert stat.S_IMODE(ingest.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_parts_come_in_any_order_and_the_digest_follows_the_prefix(
    store: DiskStore, order: tuple[int, ...]
) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        for number in order:
            write(ingest, CONTENT, PARTS[number])
            ingest.follow(memoryview(bytearray(1000)))
            assert not ingest.behind
        assert ingest.is_received
        assert ingest.is_hashed
        assert ingest.digest() == FILE.digest


def test_a_digest_is_not_to_be_had_before_the_whole_is_hashed(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *PARTS[:2])
        ingest.follow(memoryview(bytearray(KIB)))
        with pytest.raises(ValueError, match="digest asked"):
            ingest.digest()


def test_an_ingest_is_not_sealed_before_it_is_hashed(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *PARTS)
        with pytest.raises(ValueError, match="sealed before"):
            ingest.seal()
        assert stat.S_IMODE((ingest.directory / "data").stat().st_mode) == 0o600


def test_finished_parts_are_resumed_and_landed_bytes_are_not(
    store: DiskStore, next_life: Callable[[], DiskStore]
) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, PARTS[0], PARTS[2])
        ingest.write(PARTS[1].start, memoryview(CONTENT[PARTS[1].start : PARTS[1].stop]))
        ingest.received(PARTS[1])
    with closing(next_life().content.begin(FILE)) as resumed:
        assert resumed.gaps() == [PARTS[1]]
        assert resumed.resumed == PARTS[0].size + PARTS[2].size
    commit(next_life(), FILE, CONTENT)
    assert store.content.path(FILE.blob).read_bytes() == CONTENT


def test_a_file_of_one_part_is_kept_with_no_sync_and_no_journal(store: DiskStore) -> None:
    assert names_below(left_by_an_earlier_life(store)) == {"data", "about.json", "received"}
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == []


def keep_begun(ingest: Ingest, *stops: int) -> None:
    """Write the first part of CONTENT so far, and keep it at each of these."""
    hashed, reached = ingest.part_hash(), 0
    for stop in stops:
        piece = memoryview(CONTENT[reached:stop])
        ingest.write(reached, piece)
        hashed.update(piece)
        ingest.received(Extent(0, stop))
        ingest.keep(Extent(0, stop), hashed)
        reached = stop


def test_a_digest_that_is_far_behind_is_taken_in_steps_that_a_cancel_can_end(store: DiskStore) -> None:
    content = bytes(65 * MIB)
    with closing(store.content.begin(file_of(content))) as ingest:
        write(ingest, content)
        ingest.follow(memoryview(bytearray(MIB)))
        assert ingest.behind == MIB


def test_a_resume_that_is_cancelled_in_mid_file_loses_nothing(
    store: DiskStore, next_life: Callable[[], DiskStore]
) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, PARTS[0], PARTS[2])

    def cancelled() -> None:
        raise Cancelled("while it is read back")

    again = next_life()
    with pytest.raises(Cancelled):
        again.content.begin(FILE, cancelled)
    with closing(again.content.begin(FILE)) as resumed:
        assert resumed.resumed == PARTS[0].size + PARTS[2].size


@pytest.mark.parametrize("algorithm", ["sha256", "crc64nvme", "crc32c", None])
def test_what_was_kept_of_a_part_is_resumed_in_every_life_and_the_rest_of_it_is_missing(
    store: DiskStore, algorithm: str | None
) -> None:
    digest = DIGESTS[algorithm](CONTENT) if algorithm else None
    file = File("model.bin", len(CONTENT), "https://host/model.bin", digest, '"tag"')
    with closing(store.content.begin(file)) as ingest:
        keep_begun(ingest, KIB, 3 * KIB)
    about = (ingest.directory / "about.json").stat()
    for _ in range(3):
        with closing(store.content.begin(file)) as ingest:
            assert (ingest.gaps(), ingest.resumed) == ([Extent(3 * KIB, 10 * KIB)], 3 * KIB)
            # A life that is killed while it begins must not take away what makes the others' lines believed.
            assert (ingest.directory / "about.json").stat().st_mtime_ns == about.st_mtime_ns
    commit(store, file, CONTENT)
    assert store.content.path(file.blob).read_bytes() == CONTENT


def test_of_what_was_kept_the_longest_that_is_right_is_believed(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        keep_begun(ingest, KIB, 2 * KIB, 3 * KIB)
    overwrite(ingest_directory(store) / "data", 2 * KIB + 5, b"!")
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(2 * KIB, 10 * KIB)]
    commit(store, FILE, CONTENT)


def test_a_part_that_goes_on_has_one_hash_however_often_it_was_kept(store: DiskStore) -> None:
    """The table of a blob's parts has no line for each time."""
    file = File("model.bin", len(CONTENT), "https://host/model.bin", None, '"tag"')
    with closing(store.content.begin(file)) as ingest:
        keep_begun(ingest, KIB, 2 * KIB, 3 * KIB, 4 * KIB)
        write(ingest, CONTENT, *PARTS[1:])
        ingest.follow(memoryview(bytearray(KIB)))
        assert [line.split()[:2] for line in ingest.part_lines().splitlines()] == [
            [str(part.start), str(part.stop)] for part in PARTS
        ]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda data: overwrite(data, PARTS[1].start + 7, bytes([CONTENT[PARTS[1].start + 7] ^ 1])),
    "zeros": lambda data: overwrite(data, PARTS[1].start, bytes(PARTS[1].size)),
    "other bytes": lambda data: overwrite(data, PARTS[1].start, noise(100, 9)),
    "the bytes of another part": lambda data: overwrite(data, PARTS[1].start, CONTENT[: PARTS[1].size]),
}


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as opened:
        opened.seek(offset)
        opened.write(content)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_journal_line_is_not_believed_when_its_bytes_are_others(
    store: DiskStore, damage: Callable[[Path], object]
) -> None:
    damage(left_by_an_earlier_life(store, *PARTS) / "data")
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [PARTS[1]]
    commit(store, FILE, CONTENT)


def test_data_that_lost_its_tail_is_believed_as_far_as_it_goes(store: DiskStore) -> None:
    os.truncate(left_by_an_earlier_life(store, *PARTS) / "data", PARTS[1].stop)
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [PARTS[2]]
    commit(store, FILE, CONTENT)


def test_data_that_grew_is_cut_to_the_size_of_its_file(store: DiskStore) -> None:
    overwrite(left_by_an_earlier_life(store, *PARTS) / "data", len(CONTENT), noise(100))
    commit(store, FILE, CONTENT)
    assert store.content.path(FILE.blob).read_bytes() == CONTENT


HASH = xxhash.xxh3_128(CONTENT[4 * KIB : 8 * KIB]).hexdigest()
GARBAGE_LINES = {
    "torn": f"4096 8192 {HASH[:9]}",
    "torn at a number": "4096 81",
    "empty": "",
    "binary": "\0\0\0\0\xff\xfe",
    "words": "four eight hash",
    "signs": f"-4096 +8192 {HASH}",
    "backwards": f"8192 4096 {HASH}",
    "nothing": f"4096 4096 {HASH}",
    "beyond the end": f"4096 99999999 {HASH}",
    "a number too long": f"{'9' * 5000} {'9' * 5001} {HASH}",
    "four words": f"4096 8192 {HASH} 1",
    "another hash": f"4096 8192 {'0' * 32}",
    "another digit script": f"\u0664 8192 {HASH}",
}


@pytest.mark.parametrize("line", GARBAGE_LINES.values(), ids=GARBAGE_LINES.keys())
@pytest.mark.parametrize("end", ["\n", ""], ids=["whole line", "cut off"])
def test_a_garbage_line_is_passed_over_and_swallows_no_other(store: DiskStore, line: str, end: str) -> None:
    journal = left_by_an_earlier_life(store, PARTS[0]) / "journal"
    with journal.open("ab") as opened:
        opened.write(line.encode("latin-1", errors="replace") + end.encode())
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(4 * KIB, 10 * KIB)]
        write(ingest, CONTENT, PARTS[2])
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [PARTS[1]]


@pytest.mark.parametrize(
    "about",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"5",
        b"{}",
        b"\xff\xfe",
        json.dumps({"blob": str(sha256(b"other")), "size": len(CONTENT)}).encode(),
        json.dumps({"blob": str(FILE.blob), "size": len(CONTENT) + 1}).encode(),
    ],
    ids=str,
)
def test_what_was_written_for_another_blob_or_size_is_begun_anew(
    store: DiskStore, about: bytes | None
) -> None:
    directory = left_by_an_earlier_life(store, *PARTS)
    if about is None:
        (directory / "about.json").unlink()
    else:
        (directory / "about.json").write_bytes(about)
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(0, len(CONTENT))]
        write(ingest, CONTENT, PARTS[0])
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.resumed == PARTS[0].size, "and no line of the old journal is believed with the new"
    commit(store, FILE, CONTENT)


def test_a_link_in_place_of_the_data_is_not_followed(store: DiskStore, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"keep me")
    (tmp_path / "victim").chmod(0o444)
    ingest_directory(store).mkdir()
    (ingest_directory(store) / "data").symlink_to(tmp_path / "victim")
    with suppress(DiskFailed):
        store.content.begin(FILE).close()
    assert (tmp_path / "victim").read_bytes() == b"keep me"
    assert stat.S_IMODE((tmp_path / "victim").stat().st_mode) == 0o444


def test_many_streams_write_one_ingest(store: DiskStore) -> None:
    content = noise(4 * MIB)
    file = file_of(content)
    parts = [Extent(start, start + 64 * KIB) for start in range(0, len(content), 64 * KIB)]
    with closing(store.content.begin(file)) as ingest, concurrent.futures.ThreadPoolExecutor(8) as streams:
        list(streams.map(lambda part: write(ingest, content, part), parts))
        assert ingest.is_received
    with closing(store.content.begin(file)) as resumed:
        assert resumed.gaps() == []
        resumed.follow(memoryview(bytearray(MIB)))
        store.content.commit(resumed)
    assert store.content.path(file.blob).read_bytes() == content


def test_an_ingest_leaves_no_descriptor_however_it_ends(store: DiskStore) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    left_by_an_earlier_life(store, PARTS[0])
    store.content.begin(FILE).discard()
    commit(store, FILE, CONTENT)
    wrong = File("wrong", 5, "https://host/wrong", sha256(b"right"))
    with pytest.raises(Corrupt):
        commit(store, wrong, b"wrong")
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- commit ---

DIGESTS = {
    "sha256": lambda c: Digest("sha256", hashlib.sha256(c).hexdigest()),
    "git-sha1": lambda c: Digest("git-sha1", hashlib.sha1(b"blob %d\0" % len(c) + c).hexdigest()),
    "sha1": lambda c: Digest("sha1", hashlib.sha1(c).hexdigest()),
    "crc32": lambda c: Digest("crc32", f"{crc(c, 0xEDB88320, 32):08x}"),
    "crc32c": lambda c: Digest("crc32c", f"{crc(c, 0x82F63B78, 32):08x}"),
    "crc64nvme": lambda c: Digest("crc64nvme", f"{crc(c, 0x9A6C9329AC4BC9B5, 64):016x}"),
}


def crc(content: bytes, polynomial: int, bits: int) -> int:
    """A reflected CRC, bit by bit: slow, and nobody else's code."""
    value = ones = (1 << bits) - 1
    for byte in content:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (polynomial if value & 1 else 0)
    return value ^ ones


@pytest.mark.parametrize("algorithm", DIGESTS)
@pytest.mark.parametrize("content", [b"", b"x", noise(5000)], ids=["empty", "a byte", "5000 bytes"])
def test_a_commit_makes_a_read_only_blob_of_the_right_bytes(
    store: DiskStore, algorithm: str, content: bytes
) -> None:
    file = File("model.bin", len(content), "https://host/model.bin", DIGESTS[algorithm](content))
    assert not store.content.has(file)
    commit(store, file, content)
    assert store.content.has(file)
    path = store.content.path(file.blob)
    status = path.lstat()
    assert path.read_bytes() == content
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o444, 1)
    assert names_below(store.layout.root / ".cachd/ingest") == set()


@pytest.mark.parametrize("algorithm", DIGESTS)
def test_a_commit_of_a_wrong_byte_raises_corrupt_and_leaves_nothing(store: DiskStore, algorithm: str) -> None:
    right = noise(5000)
    wrong = bytes([right[0] ^ 1]) + right[1:]
    file = File("model.bin", len(right), "https://host/model.bin", DIGESTS[algorithm](right))
    with pytest.raises(Corrupt) as refusal:
        commit(store, file, wrong)
    assert refusal.value.facts == {
        "file": "model.bin",
        "expected": str(file.digest),
        "got": str(DIGESTS[algorithm](wrong)),
    }
    assert not store.content.has(file)
    assert_nothing_left(store.layout.root)


def test_a_blob_whose_source_has_no_digest_keeps_the_hashes_of_its_parts(store: DiskStore) -> None:
    file = File("model.bin", len(CONTENT), "https://host/model.bin", None, '"tag"')
    with closing(store.content.begin(file)) as ingest:
        write(ingest, CONTENT, *PARTS)
        ingest.follow(memoryview(bytearray(KIB)))
        store.content.commit(ingest)
    path = store.content.path(file.blob)
    assert path.with_name(f"{path.name}.parts").read_text().splitlines() == [
        f"{p.start} {p.stop} {xxhash.xxh3_128(CONTENT[p.start : p.stop]).hexdigest()}" for p in PARTS
    ]
    store.content.removal.free(Manifest("https://host/model.bin", "0" * 64, (file,)))
    assert_nothing_left(store.layout.root)


@pytest.mark.parametrize(
    ("algorithm", "known_by"),
    [
        ("crc64nvme", lambda content: DIGESTS["crc64nvme"](content).hex),
        ("crc32c", lambda content: xxhash.xxh3_128(content).hexdigest()),
        ("sha256", lambda content: xxhash.xxh3_128(content).hexdigest()),
    ],
)
def test_a_part_is_hashed_once_more_only_where_its_checksum_is_too_short_to_know_it_by(
    store: DiskStore, algorithm: str, known_by: Callable[[bytes], str]
) -> None:
    file = File("model.bin", len(CONTENT), "s3://b/model.bin", DIGESTS[algorithm](CONTENT))
    part = PARTS[1]
    with closing(store.content.begin(file)) as ingest:
        write(ingest, CONTENT, part)
        journal = (ingest.directory / "journal").read_text()
    assert journal == f"{part.start} {part.stop} {known_by(CONTENT[part.start : part.stop])}\n"


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c", "crc32"])
def test_a_checksum_is_joined_from_parts_resumed_received_and_read_back(
    store: DiskStore, algorithm: str
) -> None:
    file = File("model.bin", len(CONTENT), "s3://b/model.bin", DIGESTS[algorithm](CONTENT))
    with closing(store.content.begin(file)) as ingest:
        write(ingest, CONTENT, PARTS[1])
    with closing(store.content.begin(file)) as ingest:
        assert ingest.resumed == PARTS[1].size
        write(ingest, CONTENT, PARTS[2])
        torn = CONTENT[: PARTS[0].stop]  # landed by a stream that never finished the part
        ingest.write(0, memoryview(torn))
        ingest.received(PARTS[0])
        assert ingest.behind == len(CONTENT)
        ingest.follow(memoryview(bytearray(KIB)))
        assert ingest.digest() == file.digest


def test_parts_that_overlap_are_hashed_as_the_disk_has_them(store: DiskStore) -> None:
    file = File("model.bin", len(CONTENT), "s3://b/model.bin", DIGESTS["crc64nvme"](CONTENT))
    with closing(store.content.begin(file)) as ingest:
        write(ingest, bytes(len(CONTENT)), Extent(0, PARTS[1].start + 1), Extent(5 * KIB, 6 * KIB))
        write(ingest, CONTENT, *PARTS)
        ingest.follow(memoryview(bytearray(KIB)))
        assert ingest.digest() == file.digest


def test_a_blob_of_another_size_is_not_here(store: DiskStore) -> None:
    commit(store, FILE, CONTENT)
    cut(store.content.path(FILE.blob), 5)
    assert not store.content.has(FILE)
    commit(store, FILE, CONTENT)
    assert store.content.path(FILE.blob).read_bytes() == CONTENT


def test_what_is_missing_is_one_file_a_blob(store: DiskStore) -> None:
    manifest = manifest_of({"a": CONTENT, "b": CONTENT, "c": b"c", "d": b"d"})
    keep(store, {"d": b"d"})
    assert sorted(len(CONTENT) if f.size > 1 else f.size for f in store.content.missing(manifest)) == [
        1,
        len(CONTENT),
    ]


def test_a_process_killed_at_any_step_of_a_commit_leaves_what_the_next_can_finish() -> None:
    with base_as_another_user() as base:
        DiskStore(base).close()

        def committed(root: Path) -> None:
            with DiskStore(root) as store:
                commit_in_parts(store)

        for root in killed_at_every_step(base, committed):
            with DiskStore(root) as store:
                if store.content.has(FILE):
                    assert store.content.path(FILE.blob).read_bytes() == CONTENT
                else:
                    commit(store, FILE, CONTENT)
                assert store.content.path(FILE.blob).read_bytes() == CONTENT
                store.content.removal.free(manifest_of({"model.bin": CONTENT}))
                assert_nothing_left(root)


def commit_in_parts(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *PARTS)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        store.content.commit(ingest)


@pytest.mark.parametrize("algorithm", DIGESTS)
def test_a_small_file_is_put_as_a_read_only_blob_and_a_wrong_one_is_not(
    store: DiskStore, algorithm: str
) -> None:
    right = noise(5000)
    wrong = bytes([right[0] ^ 1]) + right[1:]
    file = File("config.json", len(right), "https://host/config.json", DIGESTS[algorithm](right))
    with pytest.raises(Corrupt) as refusal:
        store.content.put(file, memoryview(wrong))
    assert refusal.value.facts["got"] == str(DIGESTS[algorithm](wrong))
    assert_nothing_left(store.layout.root)
    store.content.put(file, memoryview(right))
    path = store.content.path(file.blob)
    assert path.read_bytes() == right
    assert (stat.S_IMODE(path.lstat().st_mode), path.lstat().st_nlink) == (0o444, 1)
    for directory in ("ingest", "staging"):
        assert names_below(store.layout.root / ".cachd" / directory) == set()


def test_a_process_killed_at_any_step_of_a_put_leaves_a_blob_or_nothing() -> None:
    with base_as_another_user() as base:
        DiskStore(base).close()

        def put(root: Path) -> None:
            with DiskStore(root) as store:
                store.content.put(FILE, memoryview(CONTENT))

        for root in killed_at_every_step(base, put):
            with DiskStore(root) as store:
                if not store.content.has(FILE):
                    assert_nothing_left(root)
                    store.content.put(FILE, memoryview(CONTENT))
                assert store.content.path(FILE.blob).read_bytes() == CONTENT
                store.content.removal.free(manifest_of({"model.bin": CONTENT}))
                assert_nothing_left(root)


def test_a_small_file_that_finds_no_room_leaves_no_block_behind(small_disk: Callable[..., Path]) -> None:
    root = small_disk(MIB)
    with DiskStore(root) as store:
        filler = fill(root)
        with pytest.raises(NoSpace):
            store.content.put(FILE, memoryview(CONTENT))
        assert_nothing_left(root)
        filler.unlink()
        store.content.put(FILE, memoryview(CONTENT))


def test_bytes_that_no_digest_vouches_for_are_not_put(store: DiskStore) -> None:
    file = File("model.bin", 1, "https://host/model.bin", None, '"tag"')
    with pytest.raises(ValueError, match="cannot be verified"):
        store.content.put(file, memoryview(b"x"))


# --- publish ---

ONE: Files = {
    "config.json": b'{"model_type": "noise"}',
    "model.safetensors": noise(20 * KIB, 1),
    "1_Pooling/config.json": b"{}",
    "empty.txt": b"",
    "twin.safetensors": noise(20 * KIB, 1),
}
TWO: Files = {
    **ONE,
    "model.safetensors": noise(20 * KIB, 2),
    "twin.safetensors": noise(20 * KIB, 2),
    "new/deep/er.bin": noise(KIB, 3),
}
SMALL: Files = {"config.json": b"{}", "dir/model.bin": noise(KIB)}


def test_a_published_model_is_in_both_views_and_its_ready_file_says_what_it_is(
    store: DiskStore, root: Path
) -> None:
    snapshot = publish(store, ONE, now=1_700_000_000.0)
    assert_whole(root, "org--model", ONE, commit=A)
    assert refs_of(root) == {"main": A}
    assert (hub(root) / "refs/main").read_bytes() == A.encode(), "without a newline"
    told = json.loads((root / "ready/org--model.json").read_text())
    assert told["ref"] == "hf://org/model"
    assert told["manifest"] == snapshot.manifest
    assert told["bytes"] == sum({len(c): len(c) for c in ONE.values()}.values())
    assert (told["files"], told["verified"]) == (5, True)
    assert told["published_at"] == "2023-11-14T22:13:20+00:00"
    assert told["hub"] == {"repo": "org/model", "commit": A, "revision": "main"}
    assert (root / told["path"]).is_dir()
    assert store.names.get("org--model") == snapshot


def test_a_ready_file_that_tells_no_file_is_one_of_before_and_its_model_stays_ready(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, {"model.gguf": noise(1000)})
    path = root / "ready/org--model.json"
    told = json.loads(path.read_text())
    assert told.pop("file") == "models/org--model/model.gguf"
    path.write_text(json.dumps(told))
    snapshot = next_life().names.get("org--model")
    assert snapshot is not None
    assert snapshot.file is None


def test_a_model_costs_the_disk_its_size_once(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    links = {path: (root / "models/org--model" / path).stat().st_nlink for path in ONE}
    assert links == {path: 5 if "safetensors" in path else 3 for path in ONE}


def test_what_is_published_is_found_again_by_the_next_daemon(
    store: DiskStore, next_life: Callable[[], DiskStore]
) -> None:
    published = [
        publish(store, ONE, "hf://org/model@v1", "mine"),
        publish(store, SMALL, "s3://bucket/small/", revision="f" * 64),
    ]
    store = next_life()
    assert store.names.all() == published
    assert [store.manifests.of(s).id for s in published] == [s.manifest for s in published]


def test_publishing_twice_changes_nothing(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    before = {path: path.lstat().st_ino for path in sorted(root.rglob("*safetensors"))}
    publish(store, ONE)
    assert {path: path.lstat().st_ino for path in sorted(root.rglob("*safetensors"))} == before
    assert_whole(root, "org--model", ONE, commit=A)
    assert store.sweep_snapshots() == 0


def test_reserved_looking_names_collide_with_nothing(store: DiskStore, root: Path) -> None:
    files = {
        name: noise(10, number)
        for number, name in enumerate(
            [
                ".ready",
                "MANIFEST.json",
                "blobs/x",
                ".incomplete",
                "CACHEDIR.TAG",
                "refs/main",
                "...",
            ]
        )
    }
    publish(store, files)
    assert_whole(root, "org--model", files, commit=A)


def cut(path: Path, size: int) -> None:
    """Take the tail of a read-only file, as a failing disk does."""
    path.chmod(0o644)
    os.truncate(path, size)


def fetched_anew(store: DiskStore, content: bytes) -> None:
    """Damage the blob of the content and take it in again: it is another file then."""
    cut(store.content.path(sha256(content)), 1)
    commit(store, file_of(content), content)


def test_the_links_of_a_blob_that_was_fetched_anew_follow_it(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    fetched_anew(store, ONE["model.safetensors"])
    publish(store, ONE)
    assert_whole(root, "org--model", ONE, commit=A)


def test_a_file_beside_one_fetched_anew_is_never_touched_whatever_its_name(
    store: DiskStore, root: Path
) -> None:
    files = {"x": noise(100, 1), ".x.new": noise(100, 2), "y/z": noise(100, 3), "y/.z.new": noise(100, 4)}
    publish(store, files)
    for content in files.values():
        fetched_anew(store, content)
        publish(store, files)
        assert_whole(root, "org--model", files, commit=A)


def test_the_longest_names_and_the_deepest_path_are_published_replaced_and_removed(
    store: DiskStore, root: Path
) -> None:
    files = {"n" * 255: noise(10, 1), "/".join(["d" * 255] * 4): noise(10, 2), "a/" * 511 + "a": noise(10, 3)}
    publish(store, files)
    for content in files.values():
        fetched_anew(store, content)
    publish(store, files)
    assert_whole(root, "org--model", files, commit=A)
    store.withdraw("org--model")
    assert_nothing_left(root)


def test_a_process_killed_at_any_step_of_a_publish_leaves_a_model_whole_or_absent() -> None:
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            keep(store, SMALL)

        def published(root: Path) -> None:
            with DiskStore(root) as store:
                publish(store, SMALL)

        for root in killed_at_every_step(base, published):
            if (root / "ready/org--model.json").exists():
                assert_whole(root, "org--model", SMALL, commit=A)
            with DiskStore(root) as store:
                assert mount.names(root) == {s.name for s in store.names.all()}
                assert mount.left_over(root) == []
                publish(store, SMALL)
                assert_whole(root, "org--model", SMALL, commit=A)
                assert refs_of(root) == {"main": A}
                store.withdraw("org--model")
                assert_nothing_left(root)


def test_a_process_killed_at_any_step_of_a_new_revision_leaves_the_old_the_new_or_none() -> None:
    old, new = SMALL, {**SMALL, "dir/model.bin": noise(KIB, 2)}
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, old, "hf://org/model@v1", "mine", revision=A)
            keep(store, new)

        def moved(root: Path) -> None:
            with DiskStore(root) as store:
                publish(store, new, "hf://org/model@v2", "mine", revision=B)

        for root in killed_at_every_step(base, moved):
            with suppress(FileNotFoundError):
                ready = json.loads((root / "ready/mine.json").read_text())
                assert_whole(root, "mine", {A: old, B: new}[ready["revision"]], commit=ready["revision"])
            with DiskStore(root) as store:
                for snapshot in store.names.all():
                    assert_whole(root, "mine", {A: old, B: new}[snapshot.commit], commit=snapshot.commit)
                moved_again = publish(store, new, "hf://org/model@v2", "mine", revision=B)
                store.sweep_snapshots()
                assert_whole(root, "mine", new, commit=B)
                assert_only(root, {"mine": moved_again}, new)


def assert_only(root: Path, named: Mapping[str, Snapshot], *files: Files) -> None:
    """A root of one repository holds these names, their snapshots and their files, and nothing else."""
    snapshots = {s.manifest for s in named.values()}
    commits = {s.commit for s in named.values()}
    assert mount.names(root) == set(named)
    assert mount.holds(root) == set(mount.addresses(root).values()) == snapshots
    assert names_below(root / "ready") == {f"{name}.json" for name in named}
    assert names_below(root / "models/.trees") == snapshots
    assert names_below(root / ".cachd/manifests") == {f"{m}.json" for m in snapshots}
    assert names_below(hub(root) / "snapshots") == commits
    assert names_below(hub(root) / "trees") == {f"{c}.json" for c in commits}
    assert refs_of(root) == {str(s.hub_revision): s.commit for s in named.values() if s.hub_revision}
    assert blobs_of(root) == hexes(*files)
    for directory in ("staging", "trash"):
        assert names_below(root / ".cachd" / directory) == set()


# --- names, filters, branches ---


def test_two_names_share_one_snapshot_until_the_last_is_gone(store: DiskStore, root: Path) -> None:
    one, other = publish(store, ONE, name="one"), publish(store, ONE, name="other")
    assert one.manifest == other.manifest
    assert store.withdraw("one") == 0
    assert_whole(root, "other", ONE, commit=A)
    assert refs_of(root) == {"main": A}
    assert store.withdraw("other") > 0
    assert_nothing_left(root)


def test_a_name_moves_to_a_new_revision_and_what_it_replaced_is_swept(store: DiskStore, root: Path) -> None:
    publish(store, ONE, revision=A)
    new = publish(store, TWO, revision=B)
    assert_whole(root, "org--model", TWO, commit=B)
    assert refs_of(root) == {"main": B}
    assert (hub(root) / "snapshots" / A).is_dir(), "pods may read it still"
    assert store.sweep_snapshots() == swept_bytes(ONE, TWO)
    assert_only(root, {"org--model": new}, TWO)
    assert_whole(root, "org--model", TWO, commit=B)


def test_two_filters_of_one_commit_share_its_hub_directory(store: DiskStore, root: Path) -> None:
    weights = {path: content for path, content in ONE.items() if "safetensors" in path}
    texts = {path: content for path, content in ONE.items() if path not in weights} | {
        "twin.safetensors": ONE["twin.safetensors"]
    }
    publish(store, weights, name="weights")
    publish(store, texts, name="texts")
    together = hub(root) / "snapshots" / A
    assert digests(together) == shown(ONE)
    listing = json.loads((hub(root) / "trees" / f"{A}.json").read_text())
    assert set(listing["files"]) == set(ONE)
    store.withdraw("weights")
    assert digests(together) == shown(texts) == digests(root / "models/texts")
    assert set(json.loads((hub(root) / "trees" / f"{A}.json").read_text())["files"]) == set(texts)
    assert refs_of(root) == {"main": A}
    store.withdraw("texts")
    assert_nothing_left(root)


def test_a_branch_moves_back_when_the_newest_snapshot_of_it_goes(store: DiskStore, root: Path) -> None:
    publish(store, ONE, name="old", revision=A, now=1.0)
    publish(store, TWO, name="new", revision=B, now=2.0)
    publish(store, SMALL, "hf://org/model@v1", "tagged", revision=C, now=3.0)
    assert refs_of(root) == {"main": B, "v1": C}
    store.withdraw("new")
    assert refs_of(root) == {"main": A, "v1": C}
    store.withdraw("old")
    assert refs_of(root) == {"v1": C}
    assert_whole(root, "tagged", SMALL, commit=C)


def test_a_commit_asked_for_by_its_number_has_no_branch(store: DiskStore, root: Path) -> None:
    publish(store, SMALL, f"hf://org/model@{A}", revision=A)
    assert refs_of(root) == {}
    assert_whole(root, "org--model", SMALL, commit=A)


def test_no_branch_names_a_commit_that_is_gone(store: DiskStore, root: Path) -> None:
    kept = publish(store, ONE, "hf://org/model@v1", "kept", revision=B)
    publish(store, SMALL, "hf://org/model@main", "gone", revision=A)
    publish(store, SMALL, f"hf://org/model@{A}", "gone", revision=A)
    store.withdraw("gone")
    assert_only(root, {"kept": kept}, ONE)


def test_a_branch_may_take_the_place_of_one_with_a_slash(store: DiskStore, root: Path) -> None:
    publish(store, ONE, "hf://org/model@v1", "kept", revision=A)
    publish(store, SMALL, "hf://org/model@feature/x", "mine", revision=B)
    assert refs_of(root) == {"v1": A, "feature/x": B}
    store.withdraw("mine")
    publish(store, SMALL, "hf://org/model@feature", "mine", revision=B)
    assert refs_of(root) == {"v1": A, "feature": B}


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a")])
def test_a_branch_that_cannot_stand_beside_another_is_refused_and_the_other_stays(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore], first: str, second: str
) -> None:
    publish(store, ONE, f"hf://org/model@{first}", "first", revision=A, now=2.0)
    with pytest.raises(CachdError):
        publish(store, SMALL, f"hf://org/model@{second}", "second", revision=B, now=1.0)
    assert refs_of(root) == {first: A}
    assert_whole(root, "first", ONE, commit=A)
    assert [snapshot.name for snapshot in next_life().names.all()] == ["first"]


def test_blobs_shared_with_another_model_survive(store: DiskStore, root: Path) -> None:
    publish(store, ONE, "hf://org/one", revision=A)
    publish(store, TWO, "hf://org/two", revision=B)
    assert store.withdraw("org--one") == swept_bytes(ONE, TWO) == 20 * KIB
    assert_whole(root, "org--two", TWO, commit=B, repo="org/two")
    assert blobs_of(root) == hexes(TWO)


def test_names_that_differ_in_case_alone_are_two_models(store: DiskStore, root: Path) -> None:
    publish(store, ONE, name="Model", revision=A)
    publish(store, TWO, name="model", revision=B)
    assert_whole(root, "Model", ONE, commit=A)
    assert_whole(root, "model", TWO, commit=B)


def test_many_threads_publish_and_withdraw_at_once(store: DiskStore, root: Path) -> None:
    models = {f"m{number}": {"shared": noise(KIB), "own": noise(KIB, 2 + number)} for number in range(8)}
    keep(store, models["m0"])

    def turn(name: str) -> None:
        ref = f"hf://org/{name}"
        with store.content.claim(manifest_of(models[name])):
            publish(store, models[name], ref)
            if int(name[1:]) % 2:
                store.withdraw(f"org--{name}")
                publish(store, models[name], ref)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(turn, models))
    for name, files in models.items():
        assert_whole(root, f"org--{name}", files, commit=A, repo=f"org/{name}")


# --- withdraw ---


def test_a_withdrawn_model_leaves_nothing(store: DiskStore, root: Path) -> None:
    snapshot = publish(store, ONE)
    on_disk = store.space.capacity().usage.blobs
    assert snapshot.size < on_disk
    assert store.withdraw("org--model") == on_disk
    assert store.names.get("org--model") is None
    assert_nothing_left(root)
    with pytest.raises(NotFound):
        store.manifests.of(snapshot)


def test_a_name_nobody_has_is_not_found(store: DiskStore) -> None:
    with pytest.raises(NotFound) as refusal:
        store.withdraw("nobody")
    assert refusal.value.code == "no_such_model"


def test_a_pinned_model_is_not_withdrawn_until_unpinned_or_forced(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, SMALL)
    store.pins.add("org--model")
    store = next_life()
    with pytest.raises(InUse) as refusal:
        store.withdraw("org--model")
    assert refusal.value.code == "pinned"
    assert_whole(root, "org--model", SMALL, commit=A)
    store.pins.remove("org--model")
    store.pins.remove("org--model")
    store.withdraw("org--model")
    publish(store, SMALL)
    store.pins.add("org--model")
    store.withdraw("org--model", force=True)
    assert_nothing_left(root)


@needs_leases
def test_an_open_file_is_in_use_under_every_name_and_an_unopened_one_is_not(
    store: DiskStore, root: Path
) -> None:
    snapshot = publish(store, ONE)
    blob = store.content.path(sha256(ONE["model.safetensors"]))
    for view in (root / "models/org--model", hub(root) / "snapshots" / A):
        with (view / "model.safetensors").open("rb"):
            assert is_open([blob])
            assert store.protection.is_in_use(store.manifests.of(snapshot))
        assert not store.protection.is_in_use(store.manifests.of(snapshot))
    assert not is_open([blob.with_name("absent")])


@needs_leases
def test_a_model_that_another_process_has_mapped_is_withdrawn_by_force_alone(
    store: DiskStore, root: Path
) -> None:
    publish(store, ONE)
    with mapped(root / "models/org--model/model.safetensors") as reader:
        with pytest.raises(InUse) as refusal:
            store.withdraw("org--model")
        assert refusal.value.code == "in_use"
        assert_whole(root, "org--model", ONE, commit=A)
        assert store.withdraw("org--model", force=True) < len(ONE["model.safetensors"])
        assert store.space.capacity().usage.held == len(ONE["model.safetensors"]), "still taken"
        assert blobs_of(root) == set()
        seen, _ = reader.communicate(timeout=30)
        assert seen.strip() == sha256(ONE["model.safetensors"]).hex
    store.content.trash.empty_all()
    assert store.space.capacity().usage.total == 0
    assert_nothing_left(root)


@needs_leases
def test_one_of_two_names_may_go_while_the_model_is_read(store: DiskStore, root: Path) -> None:
    publish(store, ONE, name="one")
    publish(store, ONE, name="other")
    with (root / "models/one/model.safetensors").open("rb"):
        store.withdraw("one")
        with pytest.raises(InUse):
            store.withdraw("other")
    assert_whole(root, "other", ONE, commit=A)


@needs_leases
def test_a_replaced_snapshot_that_is_read_is_swept_when_its_reader_is_gone(
    store: DiskStore, root: Path
) -> None:
    publish(store, ONE, revision=A)
    with mapped(root / "models/org--model/model.safetensors") as reader:
        publish(store, TWO, revision=B)
        assert store.sweep_snapshots() == 0
        assert digests(hub(root) / "snapshots" / A) == shown(ONE)
        reader.communicate(timeout=30)
    assert store.sweep_snapshots() == swept_bytes(ONE, TWO)
    assert names_below(hub(root) / "snapshots") == {B}


def swept_bytes(gone: Files, left: Files) -> int:
    return sum(len(c) for c in {*gone.values()} - {*left.values()})


def test_what_a_pull_is_about_to_publish_is_not_swept(store: DiskStore, root: Path) -> None:
    publish(store, ONE, revision=A)
    publish(store, TWO, revision=B)
    assert store.sweep_snapshots(keep={"hf://org/model"}) == 0
    assert names_below(hub(root) / "snapshots") == {A, B}
    assert store.sweep_snapshots(keep={"hf://org/other"}) > 0


def test_a_blob_that_a_running_pull_needs_is_not_freed(store: DiskStore) -> None:
    publish(store, ONE, "hf://org/one")
    with store.content.claim(manifest_of(TWO)):
        store.withdraw("org--one")
        assert blobs_of(store.layout.root) == hexes(ONE) & hexes(TWO)
    store.content.removal.free(manifest_of(TWO))
    assert blobs_of(store.layout.root) == set()


def test_what_an_interrupted_pull_left_is_freed_with_its_manifest(store: DiskStore, root: Path) -> None:
    left_by_an_earlier_life(store, PARTS[0])
    assert store.content.removal.free(manifest_of({"model.bin": CONTENT})) >= PARTS[0].size
    assert_nothing_left(root)


def test_what_a_remembered_pull_may_need_is_not_swept(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    store.pending.remember(ModelSpec(Ref.parse("hf://org/model"), "mine"))
    left_by_an_earlier_life(store, PARTS[0])
    keep(store, {"committed.bin": b"by a pull that goes on"})
    store = next_life()
    store.sweep_snapshots(keep={"hf://org/model"})
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.resumed == PARTS[0].size
    assert blobs_of(root) == hexes({"committed.bin": b"by a pull that goes on"})


def test_a_process_killed_at_any_step_of_a_withdrawal_leaves_what_a_sweep_ends() -> None:
    gone = {"config.json": b"{}", "dir/model.bin": noise(KIB, 1)}
    left = {"config.json": b"{}", "dir/model.bin": noise(KIB, 2)}
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, gone, "hf://org/model", "gone", revision=A)
            kept = publish(store, left, "hf://org/model@v1", "left", revision=B)

        def withdrawn(root: Path) -> None:
            with DiskStore(root) as store:
                store.withdraw("gone")

        for root in killed_at_every_step(base, withdrawn):
            assert_whole(root, "left", left, commit=B)
            if (root / "ready/gone.json").exists():
                assert_whole(root, "gone", gone, commit=A)
            with DiskStore(root) as store:
                if store.names.get("gone"):
                    store.withdraw("gone")
                store.sweep_snapshots()
                assert_only(root, {"left": kept}, left)
                assert_whole(root, "left", left, commit=B)


def test_a_process_killed_at_any_step_of_a_recovery_leaves_what_the_next_recovers() -> None:
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, SMALL, name="cut-off")
            kept = publish(store, {"model.bin": b"kept"}, "hf://org/model@v1", "kept", revision=B)
        (base / "ready/cut-off.json").unlink()
        for left in (base / ".cachd/staging/tree/sub", base / ".cachd/trash/tree/sub"):
            left.mkdir(parents=True)
            (left / "file").write_bytes(b"x")

        def recovered(root: Path) -> None:
            with DiskStore(root) as store:
                store.sweep_snapshots()

        for root in killed_at_every_step(base, recovered):
            recovered(root)
            assert_whole(root, "kept", {"model.bin": b"kept"}, commit=B)
            assert_only(root, {"kept": kept}, {"model.bin": b"kept"})


# --- space ---


def test_a_model_larger_than_the_file_system_is_too_big(store: DiskStore) -> None:
    total = store.space.capacity().total
    with pytest.raises(TooBig) as refusal, store.space.reserve(0, total=total + 1):
        pass
    assert refusal.value.facts == {"need": total + 1, "usable": total}


def test_what_is_kept_free_is_no_room_for_models(root: Path) -> None:
    total = os.statvfs(root).f_blocks * os.statvfs(root).f_frsize
    with DiskStore(root, reserve_free=total - MIB) as store:
        with pytest.raises(TooBig), store.space.reserve(0, total=MIB + 1):
            pass
        assert store.space.capacity().reserve_free == total - MIB
    with (
        DiskStore(root, reserve_free=total + MIB) as store,
        pytest.raises(TooBig),
        store.space.reserve(0, total=1),
    ):
        pass


def test_promises_add_up_and_end_with_their_pull(small_disk: Callable[..., Path]) -> None:
    space = Space(small_disk(8 * MIB), reserve_free=MIB)
    with space.reserve(4 * MIB, total=7 * MIB) as one:
        with space.reserve(2 * MIB, total=2 * MIB):
            assert space.capacity().reserved == 6 * MIB
            with pytest.raises(NoSpace) as refusal, space.reserve(MIB + 1, total=MIB + 1):
                pass
            assert refusal.value.facts == {"need": MIB + 1, "free": MIB, "short": 1}
            assert (refusal.value.short, refusal.value.short_inodes) == (1, 0)
            assert "cachd rm" in refusal.value.hint
        one.spend(3 * MIB)
        assert space.capacity().reserved == MIB
        one.spend(3 * MIB)
        assert space.capacity().reserved == 0, "more than was promised is not given back"
    assert space.capacity().reserved == 0


def test_a_promise_ends_with_a_pull_that_fails(store: DiskStore) -> None:
    with pytest.raises(RuntimeError), store.space.reserve(MIB, total=MIB):
        raise RuntimeError
    assert store.space.capacity().reserved == 0


def test_a_promise_that_many_streams_spend_is_spent_exactly(store: DiskStore) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            with store.space.reserve(8 * 500, total=8 * 500) as reservation:
                with concurrent.futures.ThreadPoolExecutor(8) as streams:
                    list(streams.map(reservation.spend, [1] * 8 * 500))
                assert store.space.capacity().reserved == 0
            assert store.space.capacity().reserved == 0
    finally:
        sys.setswitchinterval(interval)


def test_only_what_is_missing_is_promised(store: DiskStore) -> None:
    files = {"here": noise(8 * KIB, 1), "begun": CONTENT, "absent": noise(8 * KIB, 2)}
    keep(store, {"here": files["here"]})
    with closing(store.content.begin(file_of(CONTENT, "begun"))) as ingest:
        ingest.allocate(Extent(0, len(CONTENT)))
    with store.reserve(manifest_of(files)):
        beside = {
            f.blob: beside_file(f, by_ingest=name == "begun")
            for name in ("begun", "absent")
            for f in [file_of(files[name], name)]
        }
        promised = 8 * KIB + bytes_beside(beside)
        assert store.space.capacity().reserved == promised, "neither what is here nor blocks that are taken"


def test_a_file_that_does_not_fit_leaves_no_block_behind(small_disk: Callable[..., Path]) -> None:
    root = small_disk(MIB)
    with DiskStore(root) as store:
        before, open_before = os.statvfs(root).f_bfree, sorted(os.listdir("/proc/self/fd"))
        ingest = store.content.begin(File("big", 2 * MIB, "https://host/big", sha256(b"big")))
        with pytest.raises(NoSpace):
            ingest.allocate(Extent(0, 2 * MIB))
        ingest.discard()
        assert os.statvfs(root).f_bfree == before
        assert sorted(os.listdir("/proc/self/fd")) == open_before
        assert_nothing_left(root)


def test_a_journal_that_finds_no_room_ends_the_pull_and_the_next_goes_on(
    small_disk: Callable[..., Path],
) -> None:
    root = small_disk(MIB)
    with DiskStore(root) as store:
        with closing(store.content.begin(FILE)) as ingest:
            filler = fill(root)
            with pytest.raises(NoSpace):
                write(ingest, CONTENT, PARTS[0])
        filler.unlink()
        commit(store, FILE, CONTENT)
        assert store.content.path(FILE.blob).read_bytes() == CONTENT


@pytest.mark.parametrize(("before", "after"), [("v1", "v2"), ("main", "main")])
def test_a_publish_that_finds_no_room_leaves_memory_and_disk_of_one_mind(
    small_disk: Callable[..., Path], before: str, after: str
) -> None:
    """Out of inodes at the first step that needs one, the second, the third... until it has enough."""
    disk = small_disk(16 * MIB, inodes=400)
    old, new = SMALL, {**SMALL, "dir/model.bin": noise(KIB, 2)}
    base = disk / "base"
    base.mkdir()
    with DiskStore(base) as store:
        publish(store, old, f"hf://org/model@{before}", "mine", revision=A)
        keep(store, new)
    for leave in itertools.count():
        root = disk / "root"
        subprocess.run(["cp", "-a", base, root], check=True)
        with DiskStore(root) as store:
            fillers = take_inodes(disk, leave=leave)
            try:
                published = publish(store, new, f"hf://org/model@{after}", "mine", revision=B) is not None
            except NoSpace:
                published = False
            give_back(fillers)
            assert store.names.get("mine") == catalog.read_snapshots(Layout(root)).get("mine")
            for snapshot in store.names.all():
                assert_whole(root, "mine", {A: old, B: new}[snapshot.commit], commit=snapshot.commit)
            if not published:
                store.sweep_snapshots()
            for snapshot in store.names.all():
                assert_whole(root, "mine", {A: old, B: new}[snapshot.commit], commit=snapshot.commit)
            final = publish(store, new, f"hf://org/model@{after}", "mine", revision=B)
            store.sweep_snapshots()
            assert_whole(root, "mine", new, commit=B)
            assert_only(root, {"mine": final}, new)
        subprocess.run(["rm", "-rf", root], check=True)
        if published:
            assert leave > 3
            return


def test_a_publish_that_found_no_room_is_swept_to_the_last_byte(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(16 * MIB, inodes=400)
    for leave in itertools.count():
        root = disk / "root"
        root.mkdir()
        with DiskStore(root) as store:
            keep(store, SMALL)
            fillers = take_inodes(disk, leave=leave)
            try:
                publish(store, SMALL)
            except NoSpace:
                give_back(fillers)
                store.sweep_snapshots()
                store.content.removal.free(manifest_of(SMALL))
                assert_nothing_left(root)
            else:
                give_back(fillers)
                assert leave > 3
                return
        subprocess.run(["rm", "-rf", root], check=True)


def test_a_full_disk_can_be_opened_and_emptied(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, ONE)
    fill(root)
    with DiskStore(root) as store:
        assert_whole(root, "org--model", ONE, commit=A)
        assert store.withdraw("org--model") > 0
        assert_nothing_left(root)


def test_a_full_disk_can_be_opened_after_a_start_that_was_cut_off(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, SMALL)
    os.truncate(root / ".cachd/lock", 0)  # killed before it wrote who it is
    fill(root)
    with DiskStore(root) as store:
        assert store.names.get("org--model")


def test_a_full_disk_can_be_opened_though_a_branch_needs_mending(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, SMALL)
    (hub(root) / "refs/main").unlink()  # killed while it moved
    fill(root)
    with DiskStore(root) as store:
        assert store.withdraw("org--model") > 0
        assert_nothing_left(root)


def test_one_of_two_filters_can_be_withdrawn_on_a_full_disk(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    many = {f"shard-{number:03}-of-200.bin": noise(10, number) for number in range(200)}
    big = {"big.bin": noise(MIB, 999)}
    with DiskStore(root) as store:
        publish(store, many, name="many")
        publish(store, big, name="big")
        filler = fill(root)
        assert store.withdraw("big") >= MIB
        assert blobs_of(root) == hexes(many)
        filler.unlink()
        store.withdraw("many")
        assert_nothing_left(root)


# --- the root ---


def refused(root: Path, kind: type[CachdError], code: str) -> CachdError:
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(kind) as refusal:
        DiskStore(root)
    assert refusal.value.code == code
    assert sorted(os.listdir("/proc/self/fd")) == before
    return refusal.value


def test_a_root_that_does_not_exist_is_refused_and_not_made(tmp_path: Path) -> None:
    root = tmp_path / "absent"
    assert "install -d" in refused(root, Invalid, "bad_root").hint
    assert not root.exists()


def test_a_root_that_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("file", "link", "dangling"):
        refused(tmp_path / name, Invalid, "bad_root")
    assert list((tmp_path / "real").iterdir()) == []


def test_a_root_that_everybody_may_write_to_is_refused(root: Path) -> None:
    root.chmod(0o777)
    assert "chmod 0755" in refused(root, Forbidden, "unsafe_root").hint
    assert list(root.iterdir()) == []


def test_a_root_of_another_user_is_refused_with_the_way_to_mend_it(root: Path) -> None:
    with as_another_user() as place:
        (place / "root").mkdir(mode=0o555)
        (place / "root").chmod(0o555)
        assert "chown" in refused(place / "root", Forbidden, "bad_root").hint


def test_a_directory_of_the_root_that_somebody_else_made_is_refused() -> None:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "root"
        root.mkdir()
        root.chmod(0o1777)
        (root / "models").mkdir()
        require("root")
        os.chown(root / "models", os.getuid() + 1, -1)
        refused(root, Forbidden, "unsafe_root")


@pytest.mark.parametrize("name", ["models", "hub", "ready", ".cachd", "models/.trees", "models/.holds"])
def test_a_link_in_place_of_a_directory_of_the_root_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CachdError):
        DiskStore(root)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_root_has_one_store(store: DiskStore, root: Path, next_life: Callable[[], DiskStore]) -> None:
    error = refused(root, InUse, "root_locked")
    assert str(os.getpid()) in error.detail
    assert socket.gethostname() in error.detail
    with pytest.raises(InUse):
        DiskStore(root)
    assert next_life()


def test_a_root_that_another_process_holds_is_refused_until_that_process_ends(root: Path) -> None:
    script = "import sys; from pathlib import Path; from cachd.store.disk_store import DiskStore\n"
    script += "DiskStore(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, root], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert str(holder.pid) in refused(root, InUse, "root_locked").detail
        finally:
            holder.kill()
    DiskStore(root).close()


@pytest.mark.parametrize(
    "content", [b"cachd 2\n", b"cachd 10\n", b"", b"something else", b"\xff\xfe"], ids=ascii
)
def test_a_root_of_another_format_is_refused_and_left_alone(root: Path, content: bytes) -> None:
    with DiskStore(root) as store:
        publish(store, SMALL)
    (root / ".cachd/format").write_bytes(content)
    refused(root, Invalid, "bad_format")
    (root / ".cachd/format").write_bytes(b"cachd 1\n")
    with DiskStore(root) as store:
        assert store.names.get("org--model")
    assert_whole(root, "org--model", SMALL, commit=A)


def test_a_root_of_two_file_systems_is_refused(small_disk: Callable[..., Path], root: Path) -> None:
    disk = small_disk(MIB)
    (root / "ready").mkdir()
    subprocess.run(["mount", "--bind", disk, root / "ready"], check=True)
    try:
        refused(root, DiskFailed, "no_hard_links")
    finally:
        subprocess.run(["umount", root / "ready"], check=True)


def test_a_root_that_became_read_only_says_so(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    space = Space(root, reserve_free=0)
    with DiskStore(root) as store:
        publish(store, SMALL)
    assert not space.is_read_only()
    remount(root, "ro")
    assert space.is_read_only()
    with pytest.raises(CachdError) as refusal:
        DiskStore(root)
    assert_whole(root, "org--model", SMALL, commit=A)
    assert "read-only" in str(refusal.value).lower()
    assert "chown" not in refusal.value.hint


def test_what_does_not_belong_to_cachd_is_left_alone(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    foreign = [
        "notes.txt",
        "models/readme",
        "hub/version.txt",
        "hub/models--other--model/refs/main",
        "ready/x.txt",
    ]
    foreign += ["cache/torch/kernel", "ready/.keep"]
    for name in foreign:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("mine")
    publish(store, ONE)
    store = next_life()
    publish(store, TWO, revision=B)
    store.sweep_snapshots()
    store.withdraw("org--model")
    assert [(root / name).read_text() for name in foreign] == ["mine"] * len(foreign)


def test_the_private_part_is_private_and_the_views_are_not(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    assert stat.S_IMODE((root / ".cachd").stat().st_mode) == 0o700
    for path in [root / "models", root / "hub", root / "ready", *hub(root).rglob("*")]:
        if path.is_dir():
            assert path.stat().st_mode & 0o005 == 0o005, path
        else:
            assert path.stat().st_mode & 0o004, path
    assert (root / "ready/org--model.json").stat().st_mode & 0o004
    assert (root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


# --- the next daemon ---


def lie(**members: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        ready = root / "ready/org--model.json"
        document = json.loads(ready.read_text())
        ready.write_text(json.dumps({**document, **members}))

    return change


def relink(root: Path, target: str) -> None:
    (root / "models/org--model").unlink()
    (root / "models/org--model").symlink_to(target)


def remove_tree_of(root: Path) -> None:
    tree = (root / "models/org--model").resolve()
    for directory, _, _ in os.walk(tree):
        os.chmod(directory, 0o755)
    subprocess.run(["rm", "-rf", tree], check=True)


def manifest_file(root: Path) -> Path:
    return root / ".cachd/manifests" / f"{(root / 'models/org--model').readlink().name}.json"


LIES: dict[str, Callable[[Path], object]] = {
    "no link": lambda root: (root / "models/org--model").unlink(),
    "its link is elsewhere": lambda root: relink(root, ".trees/" + "0" * 32),
    "its link is absolute": lambda root: relink(root, str((root / "models/org--model").resolve())),
    "no tree": remove_tree_of,
    "no manifest": lambda root: manifest_file(root).unlink(),
    "a garbage manifest": lambda root: manifest_file(root).write_text("{"),
    "a manifest of nothing": lambda root: manifest_file(root).write_text("{}"),
    "a manifest that is a list": lambda root: manifest_file(root).write_text("[]"),
    "empty": lambda root: (root / "ready/org--model.json").write_text(""),
    "garbage": lambda root: (root / "ready/org--model.json").write_text("{"),
    "binary": lambda root: (root / "ready/org--model.json").write_bytes(noise(100)),
    "a list": lambda root: (root / "ready/org--model.json").write_text("[]"),
    "nothing": lambda root: (root / "ready/org--model.json").write_text("{}"),
    "another name": lie(name="other"),
    "no ref": lie(ref=None),
    "another manifest": lie(manifest="0" * 32),
    "no date": lie(published_at=None),
    "no number": lie(bytes="many"),
    "no number but infinity": lie(bytes=float("inf")),
    "no hub": lie(hub=None),
    "a file that it has not": lie(file="models/org--model/nothing"),
    "a file of another model": lie(file="models/org--other/config.json"),
    "a file that climbs": lie(file="models/org--model/../org--other/config.json"),
    "a number for a file": lie(file=1),
    "its file under another name": lambda root: (root / "ready/org--model.json").rename(
        root / "ready/x.json"
    ),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_a_ready_file_that_lies_is_withdrawn_and_the_model_can_be_pulled_again(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore], change: Callable[[Path], object]
) -> None:
    publish(store, ONE)
    publish(store, SMALL, "hf://org/other", revision=C)
    change(root)
    store = next_life()
    assert [snapshot.name for snapshot in store.names.all()] == ["org--other"]
    assert names_below(root / "ready") == {"org--other.json"}
    store.sweep_snapshots()
    publish(store, ONE)
    assert_whole(root, "org--model", ONE, commit=A)
    assert_whole(root, "org--other", SMALL, commit=C, repo="org/other")


def test_unreadable_manifests_do_not_keep_the_others_from_being_swept(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    for number, garbage in enumerate(["{", "{}", "[]", "", '{"base": 1, "revision": 2, "files": [3]}']):
        (root / f".cachd/manifests/{number:032}.json").write_text(garbage)
    publish(store, ONE, revision=A)
    store = next_life()
    publish(store, TWO, revision=B)
    assert store.sweep_snapshots() == swept_bytes(ONE, TWO)


def test_a_model_whose_manifest_became_unreadable_can_still_be_withdrawn(
    store: DiskStore, root: Path
) -> None:
    publish(store, ONE)
    manifest_file(root).write_text("{")
    store.withdraw("org--model", force=True)
    assert names_below(root / "ready") == set()
    assert mount.names(root) == set()
    publish(store, ONE)
    assert_whole(root, "org--model", ONE, commit=A)


def test_a_name_without_a_ready_file_is_removed(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, ONE)
    (root / "ready/org--model.json").unlink()
    store = next_life()
    assert mount.names(root) == set()
    assert store.sweep_snapshots() > 0
    assert_nothing_left(root)


def test_what_a_cut_off_life_was_building_or_deleting_is_gone(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, ONE)
    for place in (root / ".cachd/staging", root / ".cachd/trash"):
        (place / "dir/sub").mkdir(parents=True)
        (place / "dir/sub/file").write_bytes(b"x")
        (place / "dir/sub").chmod(0o500)
        (place / "file").write_bytes(b"x")
        (place / "link").symlink_to(root / "models/org--model")
    next_life()
    for place in (root / ".cachd/staging", root / ".cachd/trash"):
        assert names_below(place) == set()
    assert_whole(root, "org--model", ONE, commit=A)


def test_wishes_are_remembered_until_they_are_forgotten(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    pending = [
        ModelSpec(Ref.parse("hf://org/model@main"), "a", ("*.safetensors",), ("*.bin",)),
        ModelSpec(Ref.parse("s3://bucket/prefix/"), "b"),
    ]
    for spec in pending:
        store.pending.remember(spec)
        store.pending.remember(spec)
    (root / ".cachd/pending/garbage.json").write_text("{")
    (root / ".cachd/pending/list.json").write_text("[]")
    store = next_life()
    assert [found.spec for found in store.pending.all()] == pending
    assert names_below(root / ".cachd/pending") == {"a.json", "b.json"}
    store.pending.forget("a")
    store.pending.forget("a")
    assert [found.spec for found in next_life().pending.all()] == pending[1:]


def test_a_store_of_300_models_is_opened_without_reading_them(root: Path) -> None:
    files = {"model.bin": noise(256 * KIB)}
    names = [f"model-{number:03}" for number in range(300)]
    with DiskStore(root) as store:
        for name in names:
            publish(store, files, name=name)
    before = bytes_read()
    with DiskStore(root) as store:
        assert [snapshot.name for snapshot in store.names.all()] == names
    assert bytes_read() - before < 300 * 8 * KIB


def bytes_read() -> int:
    """Bytes this process has asked of the kernel so far (man 5 proc, /proc/pid/io)."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["rchar"])


def test_a_start_opens_no_blob() -> None:
    """The daemon's own user may not, and everything is ready all the same."""
    with as_another_user() as place:
        with DiskStore(place) as store:
            publish(store, ONE, revision=A)
            publish(store, SMALL, "hf://org/other", revision=C)
        for blob in (place / ".cachd/blobs").glob("*/*"):
            blob.chmod(0)
            with pytest.raises(PermissionError):
                blob.read_bytes()
        with DiskStore(place) as store:
            assert [snapshot.name for snapshot in store.names.all()] == ["org--model", "org--other"]
            assert store.sweep_snapshots() == 0


def test_the_work_of_a_start_grows_with_the_models_and_no_faster(tmp_path: Path) -> None:
    work = []
    for count in (60, 120):
        root = tmp_path / str(count)
        root.mkdir(mode=0o755)
        with DiskStore(root) as store:
            for number in range(count):
                publish(store, {"model.bin": b"same"}, f"hf://org/model-{number}")
        work.append(calls_of(lambda root=root: opened_and_swept(root)))
    assert work[1] < 2.1 * work[0]


def opened_and_swept(root: Path) -> None:
    with DiskStore(root) as store:
        store.sweep_snapshots()


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, Python's and C's."""
    count = 0

    def seen(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event.endswith("call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
