"""Asks the kernel which files are open in other processes: it refuses a write lease on such a file."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cachd.errors import Leased
from cachd.kernel import durable


def is_open(paths: Iterable[Path | str]) -> bool:
    """Whether any process on this node has one of the files open or mapped. Never waits.

    The kernel refuses a write lease with EAGAIN while anybody else has the inode open, through any link,
    mount or container (man 2 fcntl, "Leases"). A file on which another process holds a lease counts as open.
    False on a file system without leases. Raises Unavailable or DiskFailed when a file cannot be opened.
    """
    return any(_is_open(path) for path in paths)


def unlinked_unless_open(path: Path) -> bool:
    """Unlink a file and return True. If another process has it open, keep it and return False.

    A process that opens the file meanwhile waits until it is unlinked. On a file system without leases, the
    file is unlinked in any case. Raises Unavailable or DiskFailed.
    """
    with durable.disk_errors(path), suppress(FileNotFoundError):
        try:
            fd = durable.open_file(path, os.O_RDONLY)
        except Leased:
            return False
        try:
            with suppress(OSError):
                if not _take_lease(fd):
                    return False
            os.unlink(path)
        finally:
            os.close(fd)  # this also ends the lease
    return True


def _is_open(path: Path | str) -> bool:
    with durable.disk_errors(path), suppress(FileNotFoundError):
        try:
            fd = durable.open_file(path, os.O_RDONLY)
        except Leased:
            return True
        try:
            return not _lease(fd)
        except OSError:
            return False
        finally:
            os.close(fd)
    return False


def _lease(fd: int) -> bool:
    """Take the file's write lease and end it at once. Returns False if another process has the file open."""
    taken = _take_lease(fd)
    if taken:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return taken


def _take_lease(fd: int) -> bool:
    """Take the file's write lease. Returns False if another process has the file open."""
    # If a process opens the file meanwhile, the kernel signals this one. SIGURG is ignored by default.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return False
        raise
    return True


def reports_open_files(probe: Path) -> bool:
    """Whether the kernel reports open files here. Tries it on the file `probe`, which is created and removed.

    The kernel reports none on file systems without leases (some network and FUSE ones), and none to a process
    that has neither the owner's uid nor CAP_LEASE. Then only pins and cachd's own leases protect models.
    """
    try:
        fd = os.open(probe, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    try:
        if not _lease(fd):
            return False
        other = os.open(probe, os.O_RDONLY)
        try:
            return not _lease(fd)
        finally:
            os.close(other)
    except OSError:
        return False
    finally:
        os.close(fd)
        with suppress(OSError):
            os.unlink(probe)
