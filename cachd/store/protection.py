"""What must not be removed: models that are pinned or leased, and files that some process has open."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import Leased, NotFound, Unavailable
from cachd.model import check_name
from cachd.store import durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

MOST_LEASES = 10_000


class Pins:
    """The names an operator wants kept, one empty file each."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def add(self, name: str) -> None:
        with durable.disk_errors(self._layout.pin(name)):
            durable.write_file(self._layout.pin(name), b"")

    def remove(self, name: str) -> None:
        with durable.disk_errors(self._layout.pin(name)):
            durable.remove(self._layout.pin(name))

    def has(self, name: str) -> bool:
        return self._layout.pin(name).exists()


@dataclass(frozen=True, slots=True)
class Lease:
    """A claim on a name until `expires_at`, seconds since the epoch; `holder` is for people to read."""

    id: str
    name: str
    holder: str
    expires_at: float


class Leases:
    """The names that somebody who is about to use them wants kept for a while, one file a lease.

    A lease outlives the daemon, and its holder by no more than what is left of it. Safe from any thread.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._leases = {lease.id: lease for lease in self._read()}

    def take(self, name: str, holder: str, *, until: float) -> Lease:
        """Raises Unavailable when there are too many, NoSpace or DiskFailed when it cannot be kept."""
        lease = Lease(secrets.token_hex(8), name, holder, until)
        with self._lock:
            if len(self._leases) >= MOST_LEASES:
                raise Unavailable(
                    f"{len(self._leases)} leases are held", code="too_many_leases", retry_after=60.0
                )
            self._write(lease)
        return lease

    def renew(self, name: str, lease: str, *, until: float, now: float) -> Lease:
        """Raises NotFound when it has expired: what it kept may be gone."""
        with self._lock:
            found = self._leases.get(lease)
            if found is None or found.name != name or found.expires_at <= now:
                raise NotFound(
                    f"{name} has no lease {lease!r:.40}: it was released or has expired",
                    code="no_such_lease",
                    hint="take a new one, and look whether the model is ready",
                )
            renewed = Lease(found.id, found.name, found.holder, until)
            self._write(renewed)
        return renewed

    def release(self, name: str, lease: str) -> None:
        """Give it back; gone already is fine."""
        with self._lock:
            found = self._leases.get(lease)
            if found is not None and found.name == name:
                self._remove(found)

    def release_all(self, name: str) -> None:
        with self._lock:
            for lease in [found for found in self._leases.values() if found.name == name]:
                self._remove(lease)

    def of(self, name: str, now: float) -> list[Lease]:
        """The leases on a name that have not expired, the longest last."""
        held = [
            found for found in list(self._leases.values()) if found.name == name and found.expires_at > now
        ]
        return sorted(held, key=lambda found: found.expires_at)

    def expire(self, now: float) -> list[Lease]:
        """Forget the leases whose time is over; which they were."""
        with self._lock:
            over = [found for found in self._leases.values() if found.expires_at <= now]
            for lease in over:
                self._remove(lease)
                log.info("lease expired", lease=lease.id, name=lease.name, holder=lease.holder)
        return over

    def count(self, now: float) -> int:
        return sum(found.expires_at > now for found in list(self._leases.values()))

    def _read(self) -> Iterable[Lease]:
        for path in self._layout.leases.glob("[!.]*.json"):
            try:
                told = durable.read_document(path)
                lease = Lease(
                    path.stem, check_name(told["name"]), str(told["holder"]), float(told["expires_at"])
                )
            except files.UNREADABLE as error:
                log.warning("unreadable lease forgotten", file=path.name, reason=repr(error))
                path.unlink(missing_ok=True)
                continue
            yield lease

    def _write(self, lease: Lease) -> None:
        path = self._layout.lease(lease.id)
        with durable.disk_errors(path):
            durable.write_file(path, json.dumps(asdict(lease)).encode())
        self._leases[lease.id] = lease

    def _remove(self, lease: Lease) -> None:
        path = self._layout.lease(lease.id)
        with durable.disk_errors(path):
            durable.remove(path)
        del self._leases[lease.id]


class InUseBy(StrEnum):
    """Who needs a snapshot now, as people read it."""

    POD = "held by a pod"
    PROCESS = "open in a process on this node"


def is_open(paths: Iterable[Path]) -> bool:
    """Whether any process on this node has one of the files open or mapped.

    Asked of the kernel: a write lease is refused with EAGAIN while anybody else has the inode open, through
    whatever link, mount or container (man 2 fcntl, "Leases"). A file that another process holds a lease on is
    open there. False where the file system has no leases. Nothing is waited for. Raises Unavailable or
    DiskFailed when a file cannot be opened to ask.
    """
    return any(_is_open(path) for path in paths)


def unlinked_unless_open(path: Path) -> bool:
    """Unlink a file that no other process has open; False, and it stays, when one has.

    Whoever opens it in between waits until it is unlinked. Where the file system has no leases, it is
    unlinked. Raises Unavailable or DiskFailed.
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
            os.close(fd)  # gives the lease back
    return True


def _is_open(path: Path) -> bool:
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
    """Take the file's write lease and give it back at once; False when somebody else has it open."""
    taken = _take_lease(fd)
    if taken:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return taken


def _take_lease(fd: int) -> bool:
    """Take the file's write lease; False when somebody else has it open."""
    # Somebody opening the file meanwhile gets us a signal; SIGURG is one that ends nobody.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EBUSY):
            return False
        raise
    return True


def tells_use(probe: Path) -> bool:
    """Whether the kernel tells open files here: tried on the file `probe`, which is made and removed.

    It does not on file systems without leases (some network and FUSE ones), nor to a process that has
    neither the owner's uid nor CAP_LEASE. Then only pins and leases protect.
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
