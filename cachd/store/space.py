"""The room that models may take: asked of the file system, promised before the first byte.

    usable      the least of `limit` and the file system less `reserve_free`: what can ever be held
    available   what may be promised now: under the limit and above the reserve, less earlier promises

Bytes are the disk's: statvfs for what is free, allocated blocks of each inode for what is ours. Nothing is
added up from sizes that somebody declared.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cachd.errors import NoSpace, TooBig
from cachd.model import Room, Share, room_in
from cachd.store import durable
from cachd.store.layout import Layout

_SPARE_INODES = 64  # of one pull: directories of the views, ingests and journals at work
_BYTES_BESIDE_MODEL = 128 << 10  # directories of the views, manifest, ready file
_BYTES_BESIDE_FILE = 24 << 10  # rounding to blocks, the small files of its ingest, its place in the views
_BYTES_PER_BYTE_OF_LINES = 4096  # of a file: what its ingest writes of its parts is no more


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of disk in files of ours: published blobs, pulls under way, and deleted ones that a process
    still has open."""

    blobs: int
    ingests: int
    held: int

    @property
    def total(self) -> int:
        return self.blobs + self.ingests + self.held


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes of the cache's file system: its size, what is free to us, what of that is promised to pulls,
    what pulls leave free; the most that models may take, None without a limit, and what they take; and
    inodes: in all, free, and left free."""

    total: int
    free: int
    reserved: int
    reserve_free: int
    limit: int | None
    usage: Usage
    inodes: int
    free_inodes: int
    reserve_inodes: int

    @property
    def usable(self) -> int:
        """Bytes that models can ever take here."""
        most = max(self.total - self.reserve_free, 0)
        return most if self.limit is None else min(self.limit, most)

    @property
    def available(self) -> int:
        """Bytes that may be promised now; negative when too much is taken already."""
        free = self.free - self.reserved - self.reserve_free
        return free if self.limit is None else min(free, self.limit - self.usage.total - self.reserved)

    @property
    def available_inodes(self) -> int | None:
        """Inodes that may be taken; None where the file system makes them as needed."""
        return self.free_inodes - self.reserve_inodes if self.inodes else None


class Reservation:
    """Bytes promised to one pull, handed over file by file as they become real blocks."""

    def __init__(self, space: Space, size: int) -> None:
        self._space, self._left = space, size
        self._lock = threading.Lock()

    def spend(self, size: int) -> None:
        """Say that `size` promised bytes are allocated now and show in the file system's own count."""
        with self._lock:
            size = min(size, self._left)
            self._left -= size
        self._space.release(size)

    @contextmanager
    def allocating(self, size: int) -> Iterator[bool]:
        """Whether `size` of the promised bytes may become blocks now. While they may, nobody else's
        allocation can push the disk below its reserve with them; when another process has taken what was
        promised, the answer is no: wait."""
        with self._space.allocating(size) as allowed:
            yield allowed

    def end(self) -> None:
        """Take back what is left of the promise."""
        self.spend(self._left)


class Space:
    """What the file system has, less what is promised, less what nobody may take.

    `limit`: the most that models may take, None for all. `reserve_free`, `reserve_inodes`: what stays free.
    Each in bytes (inodes), or as a Share of the file system.
    """

    def __init__(
        self, root: Path, *, reserve_free: Room = 0, limit: Room | None = None, reserve_inodes: Room = 0
    ) -> None:
        self._layout = Layout(root)
        self._lock = threading.Lock()
        self._promised = 0
        self._allocating = 0
        self._counted: tuple[tuple[int, int], Usage] | None = None
        self.change(reserve_free=reserve_free, limit=limit, reserve_inodes=reserve_inodes)

    def change(self, *, reserve_free: Room, limit: Room | None, reserve_inodes: Room) -> None:
        """Replace the bounds, for running pulls, too."""
        self._bounds = reserve_free, limit, reserve_inodes

    def capacity(self) -> Capacity:
        """All of it now. Raises DiskFailed."""
        found = self._statvfs()
        return self._now(found, self._usage(found))

    def bounded(self) -> Capacity:
        """The same for a decision: what models take is counted only where there is a limit to it."""
        found = self._statvfs()
        return self._now(found, self._usage(found) if self._bounds[1] is not None else Usage(0, 0, 0))

    def _statvfs(self) -> os.statvfs_result:
        with durable.disk_errors(self._layout.root):
            return os.statvfs(self._layout.root)

    def _now(self, found: os.statvfs_result, usage: Usage) -> Capacity:
        total = found.f_blocks * found.f_frsize
        reserve_free, limit, reserve_inodes = self._bounds
        return Capacity(
            total=total,
            free=found.f_bavail * found.f_frsize,
            reserved=self._promised,
            reserve_free=room_in(total, reserve_free),
            limit=None if limit is None else room_in(total, limit),
            usage=usage,
            inodes=found.f_files,
            free_inodes=found.f_favail,
            reserve_inodes=room_in(found.f_files, reserve_inodes),
        )

    def is_read_only(self) -> bool:
        """Whether the file system takes no change, as ext4 does after an error: tried, because not every
        kernel says so then."""
        try:
            os.utime(self._layout.lock)
        except OSError as error:
            return error.errno not in durable.FULL
        return False

    @contextmanager
    def reserve(self, size: int, *, total: int, files: int = 0) -> Iterator[Reservation]:
        """Promise `size` bytes in `files` new files to a model of `total` bytes. Raises TooBig or NoSpace."""
        with self._lock:
            now = self.bounded()
            if total > now.usable:
                raise TooBig(
                    f"the model has {total} bytes; {_bounds(now)} {now.usable}",
                    mend="use a larger disk, raise limit_bytes or lower reserve_free, or narrow the model"
                    " with include and exclude",
                    need=total,
                    usable=now.usable,
                )
            short = size + bytes_beside(files, size) - now.available
            if short > 0:
                raise NoSpace(
                    _too_little(size, now),
                    mend=f"{_MEND}, or lower reserve_free",
                    need=size,
                    free=now.available,
                    short=short,
                )
            inodes = files + _SPARE_INODES if files else 0
            if now.available_inodes is not None and inodes > now.available_inodes:
                raise NoSpace(
                    f"{inodes} inodes are needed and {now.available_inodes} are free"
                    f" ({now.free_inodes} on the file system, {now.reserve_inodes} kept free)",
                    mend=f"{_MEND}, or lower reserve_inodes",
                    need=size,
                    free=now.available,
                    short_inodes=inodes - now.available_inodes,
                )
            self._promised += size
        reservation = Reservation(self, size)
        try:
            yield reservation
        finally:
            reservation.end()

    @contextmanager
    def allocating(self, size: int) -> Iterator[bool]:
        """As Reservation.allocating."""
        with self._lock:
            now = self.bounded()
            room = now.free - now.reserve_free
            if now.limit is not None:
                room = min(room, now.limit - now.usage.total)
            allowed = self._allocating + size <= room
            taken = size if allowed else 0
            self._allocating += taken
        try:
            yield allowed
        finally:
            with self._lock:
                self._allocating -= taken

    def release(self, size: int) -> None:
        """Promise `size` bytes less."""
        with self._lock:
            self._promised -= size

    def _usage(self, found: os.statvfs_result) -> Usage:
        """Counted again whenever the file system's own counts have moved. Raises Unavailable, DiskFailed."""
        mark = found.f_bfree, found.f_ffree
        if self._counted is None or self._counted[0] != mark:
            seen: set[int] = set()
            layout = self._layout
            beside = (layout.ingests, layout.damaged_blobs, layout.staging)
            with durable.disk_errors(layout.root):
                blobs = _allocated(layout.blobs, seen)
                ingests = sum(_allocated(at, seen) for at in beside)
                self._counted = mark, Usage(blobs, ingests, _allocated(layout.trash, seen))
        return self._counted[1]


def bytes_beside(files: int, size: int) -> int:
    """What so many new files of one model, of `size` bytes together, take beside their bytes, at the most."""
    return _BYTES_BESIDE_MODEL + files * _BYTES_BESIDE_FILE + size // _BYTES_PER_BYTE_OF_LINES if files else 0


_MEND = (
    "delete a model (cachd rm NAME), unpin it or stop the pods that use it (cachd capacity tells which),"
    " delete other files of this disk"
)


def _bounds(now: Capacity) -> str:
    return "this file system can hold" if now.limit is None else "the limit here lets models take"


def _too_little(size: int, now: Capacity) -> str:
    limited = f", {now.usage.total} of {now.limit} taken" if now.limit is not None else ""
    return (
        f"{size} bytes are missing and {max(now.available, 0)} are free"
        f" ({now.free} on the file system, {now.reserved} promised to other pulls,"
        f" {now.reserve_free} kept free{limited})"
    )


def _allocated(directory: Path | str, seen: set[int]) -> int:
    """Bytes of disk in the files below a directory, each inode once; what goes meanwhile is not counted."""
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _allocated(entry.path, seen)
                continue
            with suppress(FileNotFoundError):
                status = entry.stat(follow_symlinks=False)
                if status.st_ino not in seen:
                    seen.add(status.st_ino)
                    total += status.st_blocks * 512
    return total


# --- whose disk it is ---

_OF_THE_NODE = (Path("/"), Path("/etc/hosts"))  # in a pod, /etc/hosts is a file of the kubelet's own disk


def is_shared(root: Path) -> bool:
    """Whether the node keeps files of its own on the root's file system: images, logs, other pods' files."""
    device = root.stat().st_dev
    return any(place.exists() and place.stat().st_dev == device for place in _OF_THE_NODE)


def beside_others(*kept_free: Share) -> Share:
    """What to leave free of a disk below whose `kept_free` the node deletes images and evicts pods."""
    return Share(min(max(share.percent for share in kept_free) + _MARGIN_PERCENT, 100.0))


_MARGIN_PERCENT = 5.0
