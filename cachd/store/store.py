"""One cache directory, opened: the parts of the store put together under one lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import structlog

from cachd import files
from cachd.errors import DiskFailed, InUse, Invalid
from cachd.model import File, Manifest, ModelSpec, SizeOrPercent
from cachd.policy.eviction import OPENED_SECONDS
from cachd.store import catalog, durable
from cachd.store.catalog import Remembered
from cachd.store.content import ContentStore
from cachd.store.layout import PRIVATE, PUBLIC, Layout
from cachd.store.protection import tells_use
from cachd.store.root import check_root, make_directories
from cachd.store.snapshots import Snapshots
from cachd.store.space import Reservation, Space, bytes_beside
from cachd.store.sweep import Sweep
from cachd.store.usage_log import UsageLog
from cachd.store.watch import Watch

log = structlog.get_logger(__name__)

FORMAT = "cachd 1\n"
# The Cache Directory Tagging Specification: backup tools pass such a directory over.
_LONGEST_FORMAT_BYTES = 4096
_CACHEDIR_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Models kept by cachd.\n"
# What a root may hold at its top: `cache` is where pods keep theirs, lost+found the file system's.
_KNOWN = {name.partition("/")[0] for name in (*PUBLIC, *PRIVATE)} | {"CACHEDIR.TAG", "cache", "lost+found"}


class Store:
    """The store of one root. Opening it takes the lock; closing gives it back.

    Raises Invalid, Forbidden, InUse or DiskFailed when the root cannot be used, with the reason.
    """

    def __init__(
        self,
        root: Path,
        *,
        reserve_free: SizeOrPercent = 0,
        limit: SizeOrPercent | None = None,
        reserve_inodes: SizeOrPercent = 0,
        disk_at_least: int = 0,
        keep_previous: int = 0,
        keep_opened_seconds: float = OPENED_SECONDS,
        trust_claimed_digests: bool = False,
    ) -> None:
        self.layout = Layout(root)
        check_root(root)
        _check_disk(root, disk_at_least)
        make_directories(root)
        self._lock = _take_lock(self.layout.lock)
        try:
            with durable.disk_errors(root):
                for directory in (root, self.layout.models, self.layout.format.parent):
                    durable.sync_directory(directory)  # what is published below must not lose its way here
                _check_format(self.layout)
                _check_links(self.layout)
                for leftover in self.layout.staging.iterdir():
                    _delete(leftover)
                for ingest in self.layout.ingests.iterdir():
                    if not (ingest / "data").exists():  # it has the blob's name already
                        _delete(ingest)
                for tag in (root / "CACHEDIR.TAG", self.layout.hub / "CACHEDIR.TAG"):
                    if not tag.exists():
                        with suppress(OSError):  # a courtesy to backup tools, no more
                            durable.write_file(tag, _CACHEDIR_TAG)
            if foreign := sorted({entry.name for entry in root.iterdir()} - _KNOWN):
                log.warning("not cachd's, left alone", root=str(root), names=foreign[:20], count=len(foreign))
            self.content = ContentStore(self.layout, trusts_claims=trust_claimed_digests)
            with durable.disk_errors(root):
                self.content.empty_trash()
                self.usage_log = UsageLog(self.layout)
                self.watch = Watch(self.layout, self.usage_log)
                self.snapshots = Snapshots(
                    self.layout,
                    self.content,
                    self.watch,
                    keep_previous=keep_previous,
                    keep_opened_seconds=keep_opened_seconds,
                )
                self.snapshots.settle()
            self.sweep = Sweep(self.layout, self.content, self.snapshots)
            self.space = Space(root, reserve_free=reserve_free, limit=limit, reserve_inodes=reserve_inodes)
            self.tells_use = tells_use(self.layout.staging / "lease")
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.watch.close()
        with suppress(OSError):
            durable.overwrite(self._lock, b"")
        os.close(self._lock)

    @contextmanager
    def reserve(self, manifest: Manifest, *, owed: int = 0, owed_inodes: int = 0) -> Iterator[Reservation]:
        """Promise the space of what is missing, and keep what is here, while a pull needs it.

        `owed`, `owed_inodes`: what may be lacking now. Raises TooBig or NoSpace.
        """
        with self.content.claim(manifest):
            missing = self.content.missing(manifest)
            with self.space.reserve(
                self._lacking(missing),
                total=manifest.size,
                files=len(missing),
                owed=owed,
                owed_inodes=owed_inodes,
            ) as reservation:
                yield reservation

    def need(self, manifest: Manifest) -> int:
        """Bytes that must be available for a pull of the manifest to begin."""
        missing = self.content.missing(manifest)
        lacking = self._lacking(missing)
        return lacking + bytes_beside(len(missing), lacking)

    def _lacking(self, missing: Iterable[File]) -> int:
        return sum(max(f.size - self.content.allocated(f), 0) for f in missing)

    # --- pulls to go on with after a restart ---

    def remember(self, spec: ModelSpec, *, replace: bool = True, pins: bool = False) -> None:
        """Keep a spec until it is forgotten, across restarts, with what its pull is permitted."""
        path = self.layout.spec(spec.name)
        document = {**spec.as_document(), "replace": replace, "pins": pins}
        with durable.disk_errors(path):
            durable.remove(self.layout.began(spec.name))
            durable.write_file(path, json.dumps(document).encode())

    def forget(self, name: str) -> None:
        with durable.disk_errors(self.layout.spec(name)):
            durable.remove(self.layout.began(name))
            durable.remove(self.layout.spec(name))

    def remembered(self) -> list[Remembered]:
        return list(catalog.read_pending(self.layout))

    def begins(self, name: str) -> None:
        """Count, before a remembered pull does anything, that this life of the daemon began it."""
        path = self.layout.began(name)
        with durable.disk_errors(path):
            durable.write_file(path, str(catalog.read_began(path) + 1).encode())

    def ends_well(self, name: str) -> None:
        """Count no life of the daemon against a pull: this one ends as it should."""
        with durable.disk_errors(self.layout.began(name)):
            durable.remove(self.layout.began(name))


def _check_disk(root: Path, at_least: int) -> None:
    """An empty mount point looks like a new disk, but has the size of the node's own."""
    with durable.disk_errors(root):
        status = os.statvfs(root)
    size = status.f_blocks * status.f_frsize
    if size < at_least:
        raise DiskFailed(
            f"root {root} is on a file system of {size} bytes, and disk_at_least is {at_least}",
            code="disk_too_small",
            hint="mount the disk that is meant for it, or lower disk_at_least",
            size=size,
        )


def _take_lock(path: Path) -> int:
    """Hold the root, by a lock and by a note of who does. Raises InUse when another process holds it.

    A network file system may have no locks, or grant one to each: the note is read in any case.
    """
    with durable.disk_errors(path):
        fd = durable.open_file(path, os.O_RDWR | os.O_CREAT)
    refused: OSError | None = None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        refused = error
    holder, _, note = os.pread(fd, 300, 0).decode(errors="replace").partition("\n")
    taken = isinstance(refused, BlockingIOError)
    place = str(os.fstat(fd).st_ino)  # a note that was copied with the root speaks of the other
    if taken or _lives_elsewhere(note.strip(), place):
        os.close(fd)
        raise InUse(
            f"another cachd ({holder or 'unknown'}) works in {path.parent.parent}",
            code="root_locked",
            hint="ask it instead (cachd pull without --direct), or stop it",
        ) from refused
    if refused:
        log.warning("this file system has no locks", root=str(path.parent.parent), reason=str(refused))
    with suppress(OSError):  # a note for the next one who finds it taken; a full disk has no room for it
        own = f"{os.getpid()} {place} {_life_of(os.getpid())}"
        durable.overwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n{own}\n".encode())
    return fd


def _lives_elsewhere(note: str, place: str) -> bool:
    """Whether a note was written at `place` by another process, and that very one still runs."""
    pid, _, rest = note.partition(" ")
    written_at, _, life = rest.partition(" ")
    if not pid.isdecimal() or int(pid) == os.getpid() or written_at != place:
        return False
    return bool(life) and _life_of(int(pid)) == life


def _life_of(pid: int) -> str:
    """The boot, the PID namespace and the moment a process began in; empty when it has ended.

    Numbers are used again; after a boot, in another container, or later, a pid is another process.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
    except OSError:
        return ""
    return "" if state in "ZX" else f"{boot} {namespace} {fields[18]}"


def _check_format(layout: Layout) -> None:
    try:
        found = durable.read_file(layout.format, at_most=_LONGEST_FORMAT_BYTES).decode(errors="replace")
    except FileNotFoundError:
        durable.write_file(layout.format, FORMAT.encode())
        return
    except files.TooLong as error:
        found = str(error)
    if found != FORMAT:
        raise Invalid(
            f"{layout.root} has the format {found.strip()!r:.40}; this cachd knows {FORMAT.strip()!r}",
            code="bad_format",
            hint="run the cachd that wrote it, or use another root",
        )


def _check_links(layout: Layout) -> None:
    """Both views are hard links and renames within one file system: try one of each."""
    probe, linked = layout.staging / "probe", layout.ready / ".probe"
    try:
        for leftover in (probe, linked):
            leftover.unlink(missing_ok=True)
        durable.write_file(probe, b"")
        durable.link(probe, linked, beside=layout.staging / "link")
        durable.move(linked, layout.models / ".probe")
    except OSError as error:
        if error.errno in durable.FULL:
            log.warning("no room to try a link: the disk is full", root=str(layout.root))
            return  # a full disk still serves, and must still be able to free
        if error.errno == errno.EROFS:
            raise
        raise DiskFailed(
            f"{layout.root} cannot link and rename between its directories: {error.strerror}",
            code="no_hard_links",
            hint="give cachd one mount of one ordinary file system (ext4, xfs, btrfs, tmpfs) for all of it",
        ) from error
    finally:
        for leftover in (probe, linked, layout.models / ".probe"):
            with suppress(OSError):
                leftover.unlink(missing_ok=True)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        durable.remove_tree(path)
    else:
        path.unlink(missing_ok=True)
