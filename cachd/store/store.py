"""Opens one cache directory under a lock, and puts the parts of the store together."""

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
from cachd.kernel import durable
from cachd.kernel.leases import reports_open_files
from cachd.model import File, Manifest, ModelSpec, SizeOrPercent
from cachd.policy.eviction import OPENED_SECONDS
from cachd.store import catalog
from cachd.store.catalog import Remembered
from cachd.store.content import ContentStore
from cachd.store.layout import PRIVATE, PUBLIC, Layout
from cachd.store.root import check_root, make_directories
from cachd.store.snapshots import Snapshots
from cachd.store.space import Reservation, Space, bytes_beside
from cachd.store.sweep import Sweep
from cachd.store.usage_log import UsageLog
from cachd.store.watch import Watch

log = structlog.get_logger(__name__)

FORMAT = "cachd 1\n"
_LONGEST_FORMAT_BYTES = 4096
# Backup tools skip a directory with such a tag (Cache Directory Tagging Specification).
_CACHEDIR_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Models kept by cachd.\n"
# Names expected in a root. Pods keep their own caches in `cache`; ext4 makes lost+found.
_KNOWN = {name.partition("/")[0] for name in (*PUBLIC, *PRIVATE)} | {"CACHEDIR.TAG", "cache", "lost+found"}


class Store:
    """The store of one root. It holds the root's lock until `close`.

    Opening it cleans up after a crash. Raises Invalid, Forbidden, InUse, NoSpace, Leased, Unavailable or
    DiskFailed if the root cannot be used.
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
                    durable.sync_directory(directory)  # a published model needs these names after a crash
                _check_format(self.layout)
                _check_links(self.layout)
                for leftover in self.layout.staging.iterdir():
                    _delete(leftover)
                for ingest in self.layout.ingests.iterdir():
                    if not (ingest / "data").exists():  # its data became a blob already
                        _delete(ingest)
                for tag in (root / "CACHEDIR.TAG", self.layout.hub / "CACHEDIR.TAG"):
                    if not tag.exists():
                        with suppress(OSError):  # only for backup tools: no reason not to start
                            durable.write_file(tag, _CACHEDIR_TAG)
            if foreign := sorted({entry.name for entry in root.iterdir()} - _KNOWN):
                log.warning(
                    "entries that cachd did not make are left alone",
                    root=str(root),
                    names=foreign[:20],
                    count=len(foreign),
                )
            self.content = ContentStore(self.layout, trusts_claims=trust_claimed_digests)
            with durable.disk_errors(root):
                self.content.trash.empty_all()
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
            self.tells_use = reports_open_files(self.layout.staging / "lease")
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
        """Reserve space for the missing blobs of a manifest, and let nobody remove the others meanwhile.

        `owed`, `owed_inodes`: bytes and inodes that need not be free yet, because evictions will free them.
        Raises TooBig or NoSpace.
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
        """Bytes that must be available before a pull of the manifest can begin."""
        missing = self.content.missing(manifest)
        lacking = self._lacking(missing)
        return lacking + bytes_beside(len(missing), lacking)

    def _lacking(self, missing: Iterable[File]) -> int:
        return sum(max(f.size - self.content.allocated(f), 0) for f in missing)

    # --- pulls to resume after a restart ---

    def remember(self, spec: ModelSpec, *, replace: bool = True, pins: bool = False) -> None:
        """Record a pull until `forget`, so that a restart resumes it. `replace`, `pins`: as in Permit."""
        path = self.layout.pending_file(spec.name)
        document = {**spec.as_document(), "replace": replace, "pins": pins}
        with durable.disk_errors(path):
            durable.remove(self.layout.began(spec.name))
            durable.write_file(path, json.dumps(document).encode())

    def forget(self, name: str) -> None:
        with durable.disk_errors(self.layout.pending_file(name)):
            durable.remove(self.layout.began(name))
            durable.remove(self.layout.pending_file(name))

    def remembered(self) -> list[Remembered]:
        return list(catalog.read_pending(self.layout))

    def begins(self, name: str) -> None:
        """Count one more daemon process that began this pull. Called before the pull does anything."""
        path = self.layout.began(name)
        with durable.disk_errors(path):
            durable.write_file(path, str(catalog.read_began(path) + 1).encode())

    def ends_well(self, name: str) -> None:
        """Reset the count of `begins`: this daemon process did not die during the pull."""
        with durable.disk_errors(self.layout.began(name)):
            durable.remove(self.layout.began(name))


def _check_disk(root: Path, at_least: int) -> None:
    """Raises DiskFailed if the file system is too small: then the disk is probably not mounted."""
    with durable.disk_errors(root):
        status = os.statvfs(root)
    size = status.f_blocks * status.f_frsize
    if size < at_least:
        raise DiskFailed(
            f"root {root} is on a file system of {size} bytes, but disk_at_least is {at_least}",
            code="disk_too_small",
            hint="mount the intended disk there, or lower disk_at_least",
            size=size,
        )


def _take_lock(path: Path) -> int:
    """Lock the root, and note in the lock file who holds it. Returns the descriptor that has the lock.

    Raises InUse if another process holds the root. Some network file systems have no locks, or grant the same
    lock to several nodes. So the note is checked even if the lock was granted.
    """
    with durable.disk_errors(path):
        fd = durable.open_file(path, os.O_RDWR | os.O_CREAT)
    refused: OSError | None = None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        refused = error
    holder, _, note = os.pread(fd, 300, 0).decode(errors="replace").partition("\n")
    is_taken = isinstance(refused, BlockingIOError)
    inode = str(os.fstat(fd).st_ino)  # it differs if the note was copied here with another root
    if is_taken or _is_of_other_process(note.strip(), inode):
        os.close(fd)
        raise InUse(
            f"another cachd ({holder or 'unknown'}) uses {path.parent.parent}",
            code="root_locked",
            hint="send the request to it (cachd pull without --direct), or stop it",
        ) from refused
    if refused:
        log.warning(
            "the file system does not support locks", root=str(path.parent.parent), reason=str(refused)
        )
    with suppress(OSError):  # the note is optional: the disk may be full
        own = f"{os.getpid()} {inode} {_identity_of(os.getpid())}"
        durable.overwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n{own}\n".encode())
    return fd


def _is_of_other_process(note: str, inode: str) -> bool:
    """Whether another process wrote the note into the file of this inode, and still runs."""
    pid, _, rest = note.partition(" ")
    noted_inode, _, identity = rest.partition(" ")
    if not pid.isdecimal() or int(pid) == os.getpid() or noted_inode != inode:
        return False
    return bool(identity) and _identity_of(int(pid)) == identity


def _identity_of(pid: int) -> str:
    """Boot id, PID namespace and start time (man 5 proc: stat, field 22) of a process; empty if it has ended.

    The pid alone does not identify a process: after a reboot, in another container, or later, another process
    may have it.
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
            f"{layout.root} has the format {found.strip()!r:.40}; cachd supports {FORMAT.strip()!r}",
            code="bad_format",
            hint="run the version of cachd that wrote it, or use another root",
        )


def _check_links(layout: Layout) -> None:
    """Raises DiskFailed if hard links and renames between directories fail, which the views need."""
    probe, linked = layout.staging / "probe", layout.ready / ".probe"
    try:
        for leftover in (probe, linked):
            leftover.unlink(missing_ok=True)
        durable.write_file(probe, b"")
        durable.link(probe, linked, beside=layout.staging / "link")
        durable.move(linked, layout.models / ".probe")
    except OSError as error:
        if error.errno in durable.FULL:
            log.warning("disk full: hard links and renames not checked", root=str(layout.root))
            return  # the daemon must start on a full disk, to serve and to free space
        if error.errno == errno.EROFS:
            raise
        raise DiskFailed(
            f"{layout.root} does not allow hard links and renames between its directories: {error.strerror}",
            code="no_hard_links",
            hint="put the complete root on one mount of one local file system (ext4, xfs, btrfs, tmpfs)",
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
