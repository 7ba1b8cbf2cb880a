"""Disk space for models: measures what the file system has and reserves it for pulls.

    usable      the smaller of `limit` and the file system minus `reserve_free`: the most models can ever take
    available   what can be reserved now: free under the limit and above the reserve, and not reserved yet

The size that a source states is only a claim until the bytes arrive. So a reservation has two parts:

    backed      bytes that are free now and reserved for this pull alone
    owed        bytes that evictions free later, when bytes have arrived and need blocks

All figures come from the disk: free space from statvfs, used space from the allocated blocks of each inode.
Sizes that a source states are never added up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cachd.errors import NoSpace, TooBig
from cachd.kernel import durable
from cachd.model import SizeOrPercent, bytes_in
from cachd.store.layout import Layout

_SPARE_INODES = 64  # per pull: directories of the views, ingests and journals
_BYTES_BESIDE_MODEL = 128 << 10  # directories of the views, manifest, ready file
_BYTES_BESIDE_FILE = 24 << 10  # rounding to blocks, the small files of its ingest, its entries in the views
_COUNT_SECONDS = 1.0  # between two counts of used space, while blocks are granted
# A measurement that leaves more than these bytes free serves small grants for so long: no other process
# fills so much in so little time.
_PLENTY_SECONDS, _PLENTY_BYTES = 0.02, 256 << 20
_BYTES_PER_BYTE_OF_LINES = 4096  # so many bytes of a file cost at most one byte of part lines


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of disk in cachd's files.

    `blobs`: verified blobs. `ingests`: partial downloads, damaged blobs and staged files. `held`: deleted
    files that a process may still have open.
    """

    blobs: int
    ingests: int
    held: int

    @property
    def total(self) -> int:
        return self.blobs + self.ingests + self.held


@dataclass(frozen=True, slots=True)
class Capacity:
    """The figures of the cache's file system, in bytes and inodes.

    `total`: its size. `free`: what this process may still write. `reserved`: reserved for pulls.
    `backed`: the part of `reserved` that is free now. `reserve_free`: what must stay free.
    `limit`: the most that models may take, None without a limit. `usage`: what they take.
    `inodes`, `free_inodes`, `reserve_inodes`: all inodes, the free ones, those that must stay free.
    """

    total: int
    free: int
    reserved: int
    backed: int
    reserve_free: int
    limit: int | None
    usage: Usage
    inodes: int
    free_inodes: int
    reserve_inodes: int

    @property
    def usable(self) -> int:
        """The most bytes that models can ever take here."""
        most = max(self.total - self.reserve_free, 0)
        return most if self.limit is None else min(self.limit, most)

    @property
    def available(self) -> int:
        """Bytes that can be reserved now; negative when more is used than allowed."""
        return self.allocatable - self.backed

    @property
    def allocatable(self) -> int:
        """Bytes that can get blocks before the reserve or the limit is reached, reserved or not."""
        free = self.free - self.reserve_free
        return free if self.limit is None else min(free, self.limit - self.usage.total)

    @property
    def available_inodes(self) -> int | None:
        """Inodes that may be taken; None where the file system makes inodes as needed."""
        return self.free_inodes - self.reserve_inodes if self.inodes else None


class Reservation:
    """Bytes of disk reserved for one pull. Grants hand them over as bytes arrive and need blocks.

    `left`: bytes not handed over yet. `beside`: the overhead among them, for rounding to blocks, journals and
    directories. `owed`, `owed_inodes`: what must still be freed for it. `make_space(least)`: called when
    `least` bytes cannot get blocks. It frees some of what is owed and returns whether to try again, or raises
    NoSpace. `waits_for`: bytes that have arrived and have no space, because another process took it.
    """

    def __init__(self, space: Space, size: int, *, beside: int, owed: int, owed_inodes: int) -> None:
        self._space, self.beside = space, beside
        self.left = size  # `left`, `owed` and `owed_inodes` are changed by the space, under its lock
        self.owed, self.owed_inodes = owed, owed_inodes
        self.make_space: Callable[[int], bool] = lambda _: False
        self.waits_for = 0
        self.has_ended = False

    @property
    def backed(self) -> int:
        """Bytes that are free now and reserved for this pull alone."""
        return max(self.left - self.owed, 0)

    @property
    def usable(self) -> int:
        """Bytes that file content may take now; negative when too much is owed.

        While anything is owed, the overhead is served first.
        """
        return self.left - self.owed - self.beside if self.owed else self.left

    @contextmanager
    def grant(self, least: int, most: int) -> Iterator[int]:
        """Yields how many bytes may get blocks now: `least` (at least 1) to `most`, or 0.

        0 means that another process has taken the reserved space; the caller tries again later. While inside,
        these bytes count as used, so other grants cannot push the disk below its reserve. `least` bytes have
        arrived: for them, the snapshots chosen for this pull are evicted. Raises NoSpace when that is needed
        and not possible.
        """
        should_try = True
        while should_try:
            with self._space.granting(self, least, most) as granted:
                if granted >= least:
                    self.waits_for = 0
                    yield granted
                    return
            should_try = self.make_space(least)
        self.waits_for = least
        yield 0

    def has_space_for(self, size: int) -> bool:
        """Whether `size` bytes may get blocks now, by the file system's own figures."""
        return self._space.has_space_for(self, size)

    def return_unused(self, size: int) -> None:
        """Give back `size` granted bytes that took no new blocks. Negative: more bytes took blocks."""
        self._space.change_left(self, size)

    def spend(self, size: int) -> None:
        """Count `size` reserved bytes as handed over: another pull's grant gave them blocks."""
        self._space.spend(self, size)

    def has_arrived(self) -> None:
        """Reduce the reservation to the overhead of files, because all content has its blocks."""
        self._space.change_left(self, self.beside - self.left)

    def end(self) -> None:
        """Release what is left of the reservation."""
        self.has_ended = True
        self._space.forget(self)


class Space:
    """The space of the cache's file system, and the reservations of it. Safe from any thread.

    `limit`: the most that models may take, None for no limit. `reserve_free`, `reserve_inodes`: what must
    stay free. Each is a number of bytes (inodes) or a Percentage of the file system.
    """

    def __init__(
        self,
        root: Path,
        *,
        reserve_free: SizeOrPercent = 0,
        limit: SizeOrPercent | None = None,
        reserve_inodes: SizeOrPercent = 0,
    ) -> None:
        self._layout = Layout(root)
        self._lock = threading.Lock()
        self._reservations: set[Reservation] = set()
        self._allocating = 0  # bytes of the grants that have not ended
        self._plenty, self._plenty_until = 0, 0.0  # bytes that grants may take unmeasured, until then
        self._granted_since = 0  # bytes granted since `_counted_at`
        self._counted_at = 0.0
        self._counted: tuple[tuple[int, int], Usage] | None = None
        self.change(reserve_free=reserve_free, limit=limit, reserve_inodes=reserve_inodes)

    def change(
        self, *, reserve_free: SizeOrPercent, limit: SizeOrPercent | None, reserve_inodes: SizeOrPercent
    ) -> None:
        """Replace the bounds. They apply to running pulls, too."""
        self._bounds = reserve_free, limit, reserve_inodes

    def capacity(self) -> Capacity:
        """All figures, measured now. Raises DiskFailed or Unavailable."""
        found = self._statvfs()
        return self._now(found, self._usage(found))

    def bounded(self) -> Capacity:
        """Like `capacity`, for decisions: `usage` is counted only if there is a limit, and is 0 otherwise."""
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
            reserved=sum(r.left for r in list(self._reservations)),
            backed=sum(r.backed for r in list(self._reservations)),
            reserve_free=bytes_in(total, reserve_free),
            limit=None if limit is None else bytes_in(total, limit),
            usage=usage,
            inodes=found.f_files,
            free_inodes=found.f_favail,
            reserve_inodes=bytes_in(found.f_files, reserve_inodes),
        )

    def is_read_only(self) -> bool:
        """Whether the file system refuses changes, as ext4 does after an error.

        This tries a change, because not every kernel reports such a file system as read-only.
        """
        try:
            os.utime(self._layout.lock)
        except OSError as error:
            return error.errno not in durable.FULL
        return False

    @contextmanager
    def reserve(
        self, size: int, *, total: int, files: int = 0, owed: int = 0, owed_inodes: int = 0
    ) -> Iterator[Reservation]:
        """Reserve `size` bytes in `files` new files for a model of `total` bytes.

        `owed` bytes and `owed_inodes` inodes of these may be missing now: the caller frees them later. Raises
        TooBig when the model can never fit. Raises NoSpace when more is missing; its facts `short` or
        `short_inodes` say how much.
        """
        with self._lock:
            now = self.bounded()
            if total > now.usable:
                raise TooBig(
                    f"the model has {total} bytes; {_bounds(now)} {now.usable}",
                    hint="use a larger disk, raise limit_bytes or lower reserve_free, or narrow the model"
                    " with include and exclude",
                    need=total,
                    usable=now.usable,
                )
            beside = bytes_beside(files, size)
            short = max(size + beside - now.available, 0)
            if short > owed:
                raise NoSpace(
                    _too_little(size, now),
                    hint=f"{_HINT}, or lower reserve_free",
                    need=size,
                    free=now.available,
                    short=short,
                )
            inodes = files + _SPARE_INODES if files else 0
            if now.available_inodes is not None and inodes > now.available_inodes + owed_inodes:
                raise NoSpace(
                    f"{inodes} inodes are needed and {now.available_inodes} are free"
                    f" ({now.free_inodes} on the file system, {now.reserve_inodes} kept free)",
                    hint=f"{_HINT}, or lower reserve_inodes",
                    need=size,
                    free=now.available,
                    short_inodes=inodes - now.available_inodes,
                )
            lacking = inodes - now.available_inodes if now.available_inodes is not None else 0
            reservation = Reservation(
                self, size + beside, beside=beside, owed=short, owed_inodes=max(lacking, 0)
            )
            self._reservations.add(reservation)
        try:
            yield reservation
        finally:
            reservation.end()

    @contextmanager
    def granting(self, reservation: Reservation, least: int, most: int) -> Iterator[int]:
        """Like Reservation.grant, but frees nothing: yields 0 when `least` bytes may not get blocks now."""
        with self._lock:
            granted = min(most, self._most_of(reservation, least))
            if granted < least or (reservation.owed_inodes and self.lacks_inodes()):
                granted = 0
            unclaimed = max(granted - max(reservation.usable, 0), 0)
            reservation.owed = max(reservation.owed - unclaimed, 0)
            reservation.left = max(reservation.left - granted, 0)
            self._plenty -= granted
            self._allocating += granted
            self._granted_since += granted
        try:
            yield granted
        finally:
            with self._lock:
                self._allocating -= granted

    def most_of(self, reservation: Reservation, least: int) -> int:
        """The bytes that a grant could give now: those of the reservation and those that nobody reserved.

        An estimate of at least `least` is returned as it is; otherwise the figure is exact.
        """
        with self._lock:
            return self._most_of(reservation, least)

    def has_space_for(self, reservation: Reservation, size: int) -> bool:
        """See Reservation.has_space_for."""
        with self._lock:
            return self._most(reservation, self.bounded()) >= size

    def _most_of(self, reservation: Reservation, least: int) -> int:
        """See `most_of`. The caller holds the lock."""
        plenty = min(reservation.left, self._plenty)
        if not reservation.owed and least <= plenty and time.monotonic() < self._plenty_until:
            return plenty
        roughly = self._most(reservation, self._roughly())
        return roughly if roughly >= least else self._most(reservation, self.bounded())

    def _most(self, reservation: Reservation, now: Capacity) -> int:
        allocatable = now.allocatable - self._allocating
        unclaimed = max(allocatable - now.backed, 0)
        self._plenty, self._plenty_until = unclaimed - _PLENTY_BYTES, time.monotonic() + _PLENTY_SECONDS
        return min(reservation.usable + unclaimed, allocatable - reservation.beside)

    def lacks_inodes(self) -> bool:
        """Whether fewer inodes are available now than the spare ones of a single pull."""
        left = self._roughly().available_inodes
        return left is not None and left < _SPARE_INODES

    @contextmanager
    def freeing(self, reservation: Reservation, size: int) -> Iterator[Callable[[int], None]]:
        """Inside, the caller frees `size` bytes for this reservation, and no other can reserve them.

        Yields a function that the caller calls with the bytes that came free. The rest is owed again.
        """
        freed = 0

        def count_freed(count: int) -> None:
            nonlocal freed
            freed += count

        with self._lock:
            expected = min(size, reservation.owed)
            reservation.owed -= expected
        try:
            yield count_freed
        finally:
            with self._lock:
                reservation.owed += max(expected - freed, 0)

    def take_unclaimed(self, reservation: Reservation) -> int:
        """Cover what is owed with free bytes that nobody has reserved. Returns what is still owed."""
        with self._lock:
            reservation.owed -= min(max(self.bounded().available, 0), reservation.owed)
            return reservation.owed

    def spend(self, reservation: Reservation, size: int) -> None:
        """See Reservation.spend."""
        with self._lock:
            reservation.left = max(reservation.left - size, 0)
            reservation.owed = max(reservation.owed - size, 0)

    def change_left(self, reservation: Reservation, size: int) -> None:
        """See Reservation.return_unused."""
        with self._lock:
            reservation.left = max(reservation.left + size, 0)

    def forget(self, reservation: Reservation) -> None:
        """Release a reservation."""
        with self._lock:
            self._reservations.discard(reservation)

    def waited_for(self) -> int:
        """Bytes to free before the grants that found no space can succeed.

        Another process took what was reserved for them. A grant never takes the overhead of its own pull, so
        that must be free, too.
        """
        waited_for = sum(r.waits_for + r.beside for r in list(self._reservations) if r.waits_for)
        return max(waited_for - self.bounded().allocatable, 0) if waited_for else 0

    def _roughly(self) -> Capacity:
        """Like `bounded`, but cheap: `usage` is counted once a second, plus the bytes granted since then."""
        found = self._statvfs()
        if self._bounds[1] is None:
            return self._now(found, Usage(0, 0, 0))
        if time.monotonic() - self._counted_at > _COUNT_SECONDS or self._counted is None:
            return self._now(found, self._usage(found))
        usage = self._counted[1]
        return self._now(found, replace(usage, ingests=usage.ingests + self._granted_since))

    def _usage(self, found: os.statvfs_result) -> Usage:
        """Used space, counted again only if the file system's free blocks or inodes have changed.

        Raises Unavailable or DiskFailed.
        """
        mark = found.f_bfree, found.f_ffree
        if self._counted is None or self._counted[0] != mark:
            self._counted_at, self._granted_since = time.monotonic(), self._allocating
            seen: set[int] = set()
            layout = self._layout
            beside = (layout.ingests, layout.damaged_blobs, layout.staging)
            with durable.disk_errors(layout.root):
                blobs = _allocated(layout.blobs, seen)
                ingests = sum(_allocated(at, seen) for at in beside)
                self._counted = mark, Usage(blobs, ingests, _allocated(layout.trash, seen))
        return self._counted[1]


def bytes_beside(files: int, size: int) -> int:
    """The overhead, at most, of `files` new files of one model with `size` bytes of content."""
    return _BYTES_BESIDE_MODEL + files * _BYTES_BESIDE_FILE + size // _BYTES_PER_BYTE_OF_LINES if files else 0


_HINT = (
    "delete a model (cachd rm NAME), unpin one, stop the pods that use one (cachd capacity shows which),"
    " delete other files on this disk"
)


def _bounds(now: Capacity) -> str:
    if now.limit is None:
        return "this file system can hold at most"
    return "limit_bytes and this file system allow at most"


def _too_little(size: int, now: Capacity) -> str:
    limited = f", {now.usage.total} of limit_bytes {now.limit} used" if now.limit is not None else ""
    return (
        f"{size} bytes are needed and {max(now.available, 0)} are available"
        f" ({now.free} free on the file system, {now.reserved} reserved for other pulls,"
        f" {now.reserve_free} kept free{limited})"
    )


def _allocated(directory: Path | str, seen: set[int]) -> int:
    """Bytes of disk in the files below a directory. Each inode counts once; vanished files do not count."""
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
