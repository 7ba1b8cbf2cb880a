"""Locks a root, so that one process at a time uses it.

The lock file has a lock of the kernel (flock) and a note that says which process holds it.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import InUse
from cachd.kernel import durable

log = structlog.get_logger(__name__)

_LONGEST_NOTE_BYTES = 300
_NOTE_AGAIN_SECONDS = 0.2
_LOCKED_HINT = "stop that process, or use another root (--root); a daemon pulls without --direct"


def take_lock(path: Path) -> int:
    """Lock the root, and note in the lock file who holds it. Returns the descriptor that has the lock.

    Raises InUse if another process holds the root. Some network file systems have no locks, or grant the same
    lock to several nodes. So the note is checked even if the lock was granted.
    """
    fd, refused = _tried(path, fcntl.LOCK_EX)
    holder, _, note = os.pread(fd, _LONGEST_NOTE_BYTES, 0).decode(errors="replace").partition("\n")
    is_taken = isinstance(refused, BlockingIOError)
    status = os.fstat(fd)
    inode = str(status.st_ino)  # it differs if the note was copied here with another root
    since = datetime.fromtimestamp(status.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    if is_taken or _is_of_other_process(note.strip(), inode):
        os.close(fd)
        raise InUse(
            f"another cachd ({holder or 'unknown'}, since {since}) uses {path.parent.parent}",
            code="root_locked",
            hint=_LOCKED_HINT,
        ) from refused
    if refused:
        log.warning(
            "the file system does not support locks", root=str(path.parent.parent), reason=str(refused)
        )
    with suppress(OSError):  # the note is optional: the disk may be full
        own = f"{os.getpid()} {inode} {_identity_of(os.getpid())}"
        durable.overwrite(fd, f"pid {os.getpid()} on {socket.gethostname()}\n{own}\n".encode())
    return fd


def take_shared_lock(path: Path) -> int:
    """Lock the root against processes that use it alone. Returns the descriptor that has the lock.

    Processes that agree through files (nodes.py) may have this lock at the same time. Raises InUse if a
    process uses the root alone: by its lock, or on this node by its note, because some file systems have no
    locks.
    """
    fd, refused = _tried(path, fcntl.LOCK_SH)
    by = holder(path)
    if by or isinstance(refused, BlockingIOError):
        by = by or os.pread(fd, _LONGEST_NOTE_BYTES, 0).decode(errors="replace").partition("\n")[0]
        os.close(fd)
        raise InUse(
            f"another cachd ({by or 'unknown'}) uses {path.parent.parent} alone",
            code="root_locked",
            hint=_LOCKED_HINT,
        ) from refused
    if refused:
        log.debug("the file system does not support locks", root=str(path.parent.parent), reason=str(refused))
    return fd


def _tried(path: Path, lock: int) -> tuple[int, OSError | None]:
    """The descriptor of the lock file, and why flock refused `lock` (LOCK_EX or LOCK_SH); None if it did not.

    BlockingIOError: another process has a lock. Any other error: the file system has no locks.
    """
    with durable.disk_errors(path):
        fd = durable.open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, lock | fcntl.LOCK_NB)
    except OSError as error:
        return fd, error
    return fd, None


def wait_until_free(path: Path) -> None:
    """Return as soon as no other process holds the root. The kernel wakes this thread; nothing is polled.

    Only where the file system has no locks, the note is read again and again. Raises OSError, CachdError.
    """
    with durable.disk_errors(path):
        fd = durable.open_file(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError:  # no locks here
            time.sleep(_NOTE_AGAIN_SECONDS)
    finally:
        os.close(fd)
    while holder(path):
        time.sleep(_NOTE_AGAIN_SECONDS)


def holder(path: Path) -> str:
    """Which running process holds the root, as its note in the lock file says; empty if none does.

    It takes no lock, so that no daemon that starts meanwhile is refused. Raises OSError.
    """
    held_by, _, note = (
        files.content(path, at_most=_LONGEST_NOTE_BYTES).decode(errors="replace").partition("\n")
    )
    return held_by if _is_of_other_process(note.strip(), str(path.stat().st_ino)) else ""


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
