"""The room that models may take: asked of the file system, promised before the first byte.

    usable      the least of `limit` and the file system less `reserve_free`: what can ever be held
    available   what may be promised now: under the limit and above the reserve, less earlier promises

A source's word for a size is a claim until bytes arrive. So a promise has two halves:

    backed      free now, and nobody else's
    owed        to be freed by what was chosen to go, when bytes that have arrived need the blocks

Bytes are the disk's: statvfs for what is free, allocated blocks of each inode for what is ours. Nothing is
added up from sizes that somebody declared.
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
from cachd.model import Percentage, SizeOrPercent, bytes_in
from cachd.store import durable
from cachd.store.layout import Layout

_SPARE_INODES = 64  # of one pull: directories of the views, ingests and journals at work
_BYTES_BESIDE_MODEL = 128 << 10  # directories of the views, manifest, ready file
_BYTES_BESIDE_FILE = 24 << 10  # rounding to blocks, the small files of its ingest, its place in the views
_COUNT_SECONDS = 1.0  # between two counts of what is taken, while blocks are granted
_PLENTY_SECONDS, _PLENTY_BYTES = 0.02, 256 << 20  # nobody else fills so much in so little time
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
    """Bytes of the cache's file system: its size, what is free to us, what is promised to pulls, how much of
    that is free now, what pulls leave free; the most that models may take, None without a limit, and what
    they take; and inodes: in all, free, and left free."""

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
        """Bytes that models can ever take here."""
        most = max(self.total - self.reserve_free, 0)
        return most if self.limit is None else min(self.limit, most)

    @property
    def available(self) -> int:
        """Bytes that may be promised now; negative when too much is taken already."""
        return self.allocatable - self.backed

    @property
    def allocatable(self) -> int:
        """Bytes that may become blocks before the reserve or the limit is reached, whoever they are promised
        to."""
        free = self.free - self.reserve_free
        return free if self.limit is None else min(free, self.limit - self.usage.total)

    @property
    def available_inodes(self) -> int | None:
        """Inodes that may be taken; None where the file system makes them as needed."""
        return self.free_inodes - self.reserve_inodes if self.inodes else None


class Reservation:
    """Bytes promised to one pull, handed over as bytes that have arrived need blocks.

    `owed`, `owed_inodes`: what is still to be freed for it. `make_space(least)` frees some of that, and is
    called when so many bytes cannot become blocks: it returns whether to try again, or raises NoSpace.
    `waits_for`: bytes that have arrived and found no space, since another process took it.
    """

    def __init__(self, space: Space, size: int, *, beside: int, owed: int, owed_inodes: int) -> None:
        self._space, self.beside = space, beside
        self.left, self.owed, self.owed_inodes = (
            size,
            owed,
            owed_inodes,
        )  # changed by the space, under its lock
        self.make_space: Callable[[int], bool] = lambda _: False
        self.waits_for = 0
        self.has_ended = False

    @property
    def backed(self) -> int:
        """Bytes that are free now, and promised to nobody else."""
        return max(self.left - self.owed, 0)

    @property
    def usable(self) -> int:
        """Bytes of these that data may take; negative when more is owed. While anything is owed, what files
        take beside their bytes comes first."""
        return self.left - self.owed - self.beside if self.owed else self.left

    @contextmanager
    def grant(self, least: int, most: int) -> Iterator[int]:
        """How many bytes may become blocks now, `least` (not 0) to `most`; 0 when another process has taken
        what was promised: wait. While inside, no other grant can push the disk below its reserve with them.

        `least` bytes have arrived: for them what was chosen to go goes. Raises NoSpace when it is needed and
        cannot go.
        """
        is_worth_trying = True
        while is_worth_trying:
            with self._space.granting(self, least, most) as granted:
                if granted >= least:
                    self.waits_for = 0
                    yield granted
                    return
            is_worth_trying = self.make_space(least)
        self.waits_for = least
        yield 0

    def take(self, size: int) -> bool:
        """Let `size` bytes become blocks at once, as a grant does, where the disk has plenty; else False."""
        return self._space.take(self, size)

    def has_space_for(self, size: int) -> bool:
        """Whether the file system says that so many bytes may become blocks now."""
        return self._space.has_space_for(self, size)

    def return_unused(self, size: int) -> None:
        """Say that so many granted bytes took no new blocks; negative: that more did."""
        self._space.change_left(self, size)

    def spend(self, size: int) -> None:
        """Say that `size` promised bytes became blocks by another pull's grant."""
        self._space.spend(self, size)

    def has_arrived(self) -> None:
        """Say that every byte has its blocks: what the files take beside them stays promised."""
        self._space.change_left(self, self.beside - self.left)

    def end(self) -> None:
        """Take back what is left of the promise."""
        self.has_ended = True
        self._space.forget(self)


class Space:
    """What the file system has, less what is promised, less what nobody may take.

    `limit`: the most that models may take, None for all. `reserve_free`, `reserve_inodes`: what stays free.
    Each in bytes (inodes), or as a Percentage of the file system.
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
        self._allocating = 0
        self._plenty, self._plenty_until = 0, 0.0  # bytes that small files may take for a moment
        self._granted_since = 0  # when what is taken was counted
        self._counted_at = 0.0
        self._counted: tuple[tuple[int, int], Usage] | None = None
        self.change(reserve_free=reserve_free, limit=limit, reserve_inodes=reserve_inodes)

    def change(
        self, *, reserve_free: SizeOrPercent, limit: SizeOrPercent | None, reserve_inodes: SizeOrPercent
    ) -> None:
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
        """Whether the file system takes no change, as ext4 does after an error: tried, because not every
        kernel says so then."""
        try:
            os.utime(self._layout.lock)
        except OSError as error:
            return error.errno not in durable.FULL
        return False

    @contextmanager
    def reserve(
        self, size: int, *, total: int, files: int = 0, owed: int = 0, owed_inodes: int = 0
    ) -> Iterator[Reservation]:
        """Promise `size` bytes in `files` new files to a model of `total` bytes, of which `owed` bytes and
        `owed_inodes` inodes may be lacking now. Raises TooBig or NoSpace, which says how many are."""
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
        """As Reservation.grant, freeing nothing; less than `least` when they may not."""
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

    def take(self, reservation: Reservation, size: int) -> bool:
        """As Reservation.take."""
        with self._lock:
            has_plenty = size <= self._plenty and time.monotonic() < self._plenty_until
            if has_plenty := has_plenty and not reservation.owed and size <= reservation.left:
                reservation.left -= size
                self._plenty -= size
                self._granted_since += size
            return has_plenty

    def most_of(self, reservation: Reservation, least: int) -> int:
        """How many bytes a grant of `least` could give now."""
        with self._lock:
            return self._most_of(reservation, least)

    def has_space_for(self, reservation: Reservation, size: int) -> bool:
        """As Reservation.has_room_for."""
        with self._lock:
            return self._most(reservation, self.bounded()) >= size

    def _most_of(self, reservation: Reservation, least: int) -> int:
        """What is its own, and what is nobody's, of what may become blocks now. With the lock."""
        roughly = self._most(reservation, self._roughly())
        return roughly if roughly >= least else self._most(reservation, self.bounded())

    def _most(self, reservation: Reservation, now: Capacity) -> int:
        allocatable = now.allocatable - self._allocating
        unclaimed = max(allocatable - now.backed, 0)
        self._plenty, self._plenty_until = unclaimed - _PLENTY_BYTES, time.monotonic() + _PLENTY_SECONDS
        return min(reservation.usable + unclaimed, allocatable - reservation.beside)

    def lacks_inodes(self) -> bool:
        """Whether no more than the spare inodes of one pull may be taken now."""
        left = self._roughly().available_inodes
        return left is not None and left < _SPARE_INODES

    @contextmanager
    def freeing(self, reservation: Reservation, size: int) -> Iterator[Callable[[int], None]]:
        """While inside, `size` bytes are freed for this reservation and no other: what is called with the
        bytes that came free. What did not stays owed."""
        freed = 0

        def tell(count: int) -> None:
            nonlocal freed
            freed += count

        with self._lock:
            expected = min(size, reservation.owed)
            reservation.owed -= expected
        try:
            yield tell
        finally:
            with self._lock:
                reservation.owed += max(expected - freed, 0)

    def take_unclaimed(self, reservation: Reservation) -> int:
        """Let what is free and nobody's pay what is owed; what is owed then."""
        with self._lock:
            reservation.owed -= min(max(self.bounded().available, 0), reservation.owed)
            return reservation.owed

    def spend(self, reservation: Reservation, size: int) -> None:
        """As Reservation.spend."""
        with self._lock:
            reservation.left = max(reservation.left - size, 0)
            reservation.owed = max(reservation.owed - size, 0)

    def change_left(self, reservation: Reservation, size: int) -> None:
        """As Reservation.return_unused."""
        with self._lock:
            reservation.left = max(reservation.left + size, 0)

    def forget(self, reservation: Reservation) -> None:
        """Promise it nothing any more."""
        with self._lock:
            self._reservations.discard(reservation)

    def waited_for(self) -> int:
        """Bytes that have arrived and found no space, since another process took what was promised; those
        that would find it now left out."""
        waited_for = sum(r.waits_for for r in list(self._reservations))
        return max(waited_for - self.bounded().allocatable, 0) if waited_for else 0

    def _roughly(self) -> Capacity:
        """As `bounded`; what models take is counted once a second, and what was granted since is added."""
        found = self._statvfs()
        if self._bounds[1] is None:
            return self._now(found, Usage(0, 0, 0))
        if time.monotonic() - self._counted_at > _COUNT_SECONDS or self._counted is None:
            return self._now(found, self._usage(found))
        usage = self._counted[1]
        return self._now(found, replace(usage, ingests=usage.ingests + self._granted_since))

    def _usage(self, found: os.statvfs_result) -> Usage:
        """Counted again whenever the file system's own counts have moved. Raises Unavailable, DiskFailed."""
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
    """What so many new files of one model, of `size` bytes together, take beside their bytes, at the most."""
    return _BYTES_BESIDE_MODEL + files * _BYTES_BESIDE_FILE + size // _BYTES_PER_BYTE_OF_LINES if files else 0


_HINT = (
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


def beside_others(*kept_free: Percentage) -> Percentage:
    """What to leave free of a disk below whose `kept_free` the node deletes images and evicts pods."""
    return Percentage(min(max(percentage.percent for percentage in kept_free) + _MARGIN_PERCENT, 100.0))


_MARGIN_PERCENT = 5.0
