"""Reserves disk space for pulls, and grants it to bytes that have arrived.

    usable      the smaller of `limit` and the file system minus `reserve_free`: the most models can ever take
    available   what can be reserved now: free under the limit and above the reserve, and not reserved yet

The size that a source states is only a claim until the bytes arrive. So a reservation has two parts:

    backed      bytes that are free now and reserved for this pull alone
    owed        bytes that evictions free later, when bytes have arrived and need blocks
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cachd.errors import NoSpace, TooBig
from cachd.kernel import durable
from cachd.model import Digest, SizeOrPercent
from cachd.store.capacity import Capacity
from cachd.store.layout import PRIVATE_DIRECTORY, Layout
from cachd.store.meter import Meter
from cachd.store.overhead import ENTRIES_BYTES, MODEL_BYTES

_SPARE_INODES = 64  # per pull: directories of the views, ingests and journals
# For so long after a measurement, grants take free bytes without another one, but never the last so many
# bytes: other processes need longer than this to fill these.
_PLENTY_SECONDS, _PLENTY_BYTES = 0.02, 256 << 20
_NO_FILES: Mapping[Digest, int] = {}


class Reservation:
    """Bytes of disk reserved for one pull. Grants hand them over as bytes arrive and need blocks.

        reserved --grant, spend--> handed over        (return_unused: some of it is reserved again)
                 --committed--> less overhead         (the overhead of one file is known now)
                 --has_arrived--> only the overhead   (all content has its blocks)
                 --end--> released                    (point of no return)

    `left`: bytes not handed over yet. `beside`: the overhead among them (overhead.py), of which `files` has
    that of each file whose blob is not here yet. `owed`, `owed_inodes`: what must still be freed for it.
    `make_space(least)`: called when `least` bytes cannot get blocks. It frees some of what is owed and
    returns whether to try again, or raises NoSpace. `waits_for`: bytes that have arrived and have no space,
    because another process took it.
    """

    def __init__(
        self, space: Space, size: int, files: Mapping[Digest, int], *, owed: int, owed_inodes: int
    ) -> None:
        self._space, self.files = space, dict(files)
        # These are changed by the space, under its lock.
        self.beside = bytes_beside(files)
        self.left = size + self.beside
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

    def grant(self, least: int, most: int) -> AbstractContextManager[int]:
        """A context that yields how many bytes may get blocks now: `least` (at least 1) to `most`, or 0.

        0 means that another process has taken the reserved space; the caller tries again later. While inside,
        these bytes count as used, so other grants cannot push the disk below its reserve. `least` bytes have
        arrived: for them, the snapshots chosen for this pull are evicted. Raises NoSpace when that is needed
        and not possible.
        """
        return _Grant(self._space, self, least, most)

    def has_space_for(self, size: int) -> bool:
        """Whether `size` bytes may get blocks now, by the file system's own figures."""
        return self._space.has_space_for(self, size)

    def return_unused(self, size: int) -> None:
        """Give back `size` granted bytes that took no new blocks. Negative: more bytes took blocks."""
        self._space.change_left(self, size)

    def spend(self, size: int) -> None:
        """Count `size` reserved bytes as handed over: another pull's grant gave them blocks."""
        self._space.spend(self, size)

    def expect(self, blob: Digest, beside: int) -> None:
        """Reserve `beside` bytes as the overhead of a file whose blob is not here yet."""
        self._space.change_beside(self, blob, beside)

    def committed(self, blob: Digest) -> None:
        """Give back the overhead of a file, because its blob is here: only its entries are still to come."""
        if blob in self.files:
            self._space.change_beside(self, blob, 0)

    def has_arrived(self) -> None:
        """Reduce the reservation to the overhead of files, because all content has its blocks."""
        self._space.change_left(self, self.beside - self.left)

    def end(self) -> None:
        """Release what is left of the reservation."""
        self.has_ended = True
        self._space.forget(self)


class _Grant:
    """The context of `Reservation.grant`. A class, as a generator would cost more for every small file."""

    __slots__ = ("_granted", "_least", "_most", "_reservation", "_space")

    def __init__(self, space: Space, reservation: Reservation, least: int, most: int) -> None:
        self._space, self._reservation, self._least, self._most = space, reservation, least, most
        self._granted = 0

    def __enter__(self) -> int:
        reservation = self._reservation
        while not (granted := self._space.begin_grant(reservation, self._least, self._most)):
            if not reservation.make_space(self._least):
                reservation.waits_for = self._least
                return 0
        reservation.waits_for, self._granted = 0, granted
        return granted

    def __exit__(self, *exception: object) -> None:
        if self._granted:
            self._space.end_grant(self._granted)


class Space:
    """The space of the cache's file system, and the reservations of it. Safe from any thread.

    `limit`: the most that models may take, None for no limit. `reserve_free`, `reserve_inodes`: what must
    stay free. Each is a number of bytes (inodes) or a Percentage of the file system. `work`: as in `Layout`.
    `copies`: as in Meter.
    """

    def __init__(
        self,
        root: Path,
        work: str = PRIVATE_DIRECTORY,
        *,
        reserve_free: SizeOrPercent = 0,
        limit: SizeOrPercent | None = None,
        reserve_inodes: SizeOrPercent = 0,
        copies: Callable[[], Iterable[str]] = lambda: (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._clock = Layout(root, work), clock
        self._lock = threading.Lock()
        self._meter = Meter(self._layout, clock, copies)
        self._reservations: set[Reservation] = set()
        self._plenty, self._plenty_until = 0, 0.0  # bytes that grants may take unmeasured, until then
        self.change(reserve_free=reserve_free, limit=limit, reserve_inodes=reserve_inodes)

    def change(
        self, *, reserve_free: SizeOrPercent, limit: SizeOrPercent | None, reserve_inodes: SizeOrPercent
    ) -> None:
        """Replace the bounds. They apply to running pulls, too."""
        self._meter.change(reserve_free=reserve_free, limit=limit, reserve_inodes=reserve_inodes)

    def capacity(self) -> Capacity:
        """All figures, measured now. Raises DiskFailed or Unavailable."""
        return self._meter.capacity(*self._reserved())

    def bounded(self) -> Capacity:
        """Like `capacity`, for decisions: `usage` is counted only if there is a limit, and is 0 otherwise."""
        return self._meter.bounded(*self._reserved())

    def _reserved(self) -> tuple[int, int]:
        """The bytes of all reservations, and those of them that are free now."""
        reservations = list(self._reservations)
        return sum(r.left for r in reservations), sum(r.backed for r in reservations)

    def is_read_only(self) -> bool:
        """Whether the file system refuses changes, as ext4 does after an error.

        This tries a change, because not every kernel reports such a file system as read-only.
        """
        try:
            os.utime(self._layout.lock)
        except OSError as error:
            return error.errno not in durable.FULL
        return False

    # --- reservations ---

    @contextmanager
    def reserve(
        self,
        size: int,
        *,
        total: int,
        files: Mapping[Digest, int] = _NO_FILES,
        owed: int = 0,
        owed_inodes: int = 0,
    ) -> Iterator[Reservation]:
        """Reserve `size` bytes for a model of `total` bytes. `files`: the overhead of each new blob.

        Up to `owed` bytes and `owed_inodes` inodes of these may be missing now: the caller frees them later.
        Raises TooBig when the model can never fit. Raises NoSpace when more is missing: its `short` or
        `short_inodes` says how much.
        """
        beside, inodes = bytes_beside(files), len(files) + _SPARE_INODES if files else 0
        with self._lock:
            now = self.bounded()
            if total > now.usable:
                raise _too_big(total, now)
            short, short_inodes = now.short_of(size + beside), now.short_of_inodes(inodes)
            if short > owed:
                raise _too_few_bytes(size, short, now)
            if short_inodes > owed_inodes:
                raise _too_few_inodes(size, inodes, short_inodes, now)
            reservation = Reservation(self, size, files, owed=short, owed_inodes=short_inodes)
            self._reservations.add(reservation)
        try:
            yield reservation
        finally:
            reservation.end()

    def spend(self, reservation: Reservation, size: int) -> None:
        """See Reservation.spend."""
        with self._lock:
            reservation.left = max(reservation.left - size, 0)
            reservation.owed = max(reservation.owed - size, 0)

    def change_left(self, reservation: Reservation, size: int) -> None:
        """See Reservation.return_unused."""
        with self._lock:
            reservation.left = max(reservation.left + size, 0)

    def change_beside(self, reservation: Reservation, blob: Digest, beside: int) -> None:
        """See Reservation.expect and Reservation.committed."""
        with self._lock:
            before = reservation.files.pop(blob, 0)
            if beside:
                reservation.files[blob] = beside
            more = beside - before
            if more < 0:  # what is not needed need not be freed
                reservation.owed = max(reservation.owed + more, 0)
            reservation.beside = max(reservation.beside + more, 0)
            reservation.left = max(reservation.left + more, 0)

    def forget(self, reservation: Reservation) -> None:
        """Release a reservation."""
        with self._lock:
            self._reservations.discard(reservation)

    # --- grants ---

    def begin_grant(self, reservation: Reservation, least: int, most: int) -> int:
        """See Reservation.grant, but frees nothing: 0 when `least` bytes may not get blocks now.

        If it returns bytes, the caller passes them to `end_grant` once they have blocks or failed to get any.
        """
        with self._lock:
            granted = min(most, self._most_of(reservation, least))
            if granted < least or (reservation.owed_inodes and self.lacks_inodes()):
                return 0
            unclaimed = max(granted - max(reservation.usable, 0), 0)
            reservation.owed = max(reservation.owed - unclaimed, 0)
            reservation.left = max(reservation.left - granted, 0)
            self._plenty -= granted
            self._meter.allocating += granted
            self._meter.granted += granted
            return granted

    def end_grant(self, granted: int) -> None:
        """The granted bytes have blocks now, or need none."""
        with self._lock:
            self._meter.allocating -= granted

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
        if not reservation.owed and least <= plenty and self._clock() < self._plenty_until:
            return plenty
        roughly = self._most(reservation, self._meter.roughly(*self._reserved()))
        return roughly if roughly >= least else self._most(reservation, self.bounded())

    def _most(self, reservation: Reservation, now: Capacity) -> int:
        allocatable = now.allocatable - self._meter.allocating
        unclaimed = max(allocatable - now.backed, 0)
        self._plenty, self._plenty_until = unclaimed - _PLENTY_BYTES, self._clock() + _PLENTY_SECONDS
        return min(reservation.usable + unclaimed, allocatable - reservation.beside)

    # --- freeing ---

    def lacks_inodes(self) -> bool:
        """Whether fewer inodes are available now than the spare ones of a single pull."""
        return self._meter.roughly(*self._reserved()).short_of_inodes(_SPARE_INODES) > 0

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

    def waited_for(self) -> int:
        """Bytes to free before the grants that found no space can succeed.

        Another process took what was reserved for them. A grant never takes the overhead of its own pull, so
        that must be free, too.
        """
        waited_for = sum(r.waits_for + r.beside for r in list(self._reservations) if r.waits_for)
        return max(waited_for - self.bounded().allocatable, 0) if waited_for else 0


def bytes_beside(files: Mapping[Digest, int]) -> int:
    """The overhead of the new files of one model, at most. `files`: the overhead of each file."""
    return MODEL_BYTES + sum(files.values()) + len(files) * ENTRIES_BYTES if files else 0


_HINT = "delete a model (cachd rm NAME), unpin one, stop the pods that use one (cachd capacity shows which)"
_DISK_HINT = f"{_HINT}, delete other files on this disk"


def _too_big(total: int, now: Capacity) -> TooBig:
    bounds = (
        "limit_bytes and this file system allow" if now.limit is not None else "this file system can hold"
    )
    return TooBig(
        f"the model has {total} bytes; {bounds} at most {now.usable}",
        hint="use a larger disk, raise limit_bytes or lower reserve_free, or narrow the model"
        " with include and exclude",
        need=total,
        usable=now.usable,
    )


def _too_few_bytes(size: int, short: int, now: Capacity) -> NoSpace:
    limited = f", {now.usage.total} of limit_bytes {now.limit} used" if now.limit is not None else ""
    return NoSpace(
        f"{size} bytes are needed and {max(now.available, 0)} are available"
        f" ({now.free} free on the file system, {now.reserved} reserved for other pulls,"
        f" {now.reserve_free} kept free{limited})",
        hint=f"{_HINT}, or raise limit_bytes" if now.is_limited else f"{_DISK_HINT}, or lower reserve_free",
        short=short,
        need=size,
        free=max(now.available, 0),
    )


def _too_few_inodes(size: int, inodes: int, short: int, now: Capacity) -> NoSpace:
    return NoSpace(
        f"{inodes} inodes are needed and {now.available_inodes} are free"
        f" ({now.free_inodes} on the file system, {now.reserve_inodes} kept free)",
        hint=f"{_DISK_HINT}, or lower reserve_inodes",
        short_inodes=short,
        need=size,
        free=max(now.available, 0),
    )
