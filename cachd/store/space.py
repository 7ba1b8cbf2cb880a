"""Space promised before the first byte."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachd.errors import NoSpace, TooBig


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes of the cache's file system: its size, what is free to us, what of that is promised to pulls,
    what pulls leave free; and inodes that are free."""

    total: int
    free: int
    reserved: int
    reserve_free: int
    free_inodes: int


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

    def end(self) -> None:
        """Take back what is left of the promise."""
        self.spend(self._left)


class Space:
    """What the file system has, less what is promised, less `reserve_free` bytes nobody may take."""

    def __init__(self, root: Path, *, reserve_free: int) -> None:
        self._root, self._reserve_free = root, reserve_free
        self._lock = threading.Lock()
        self._promised = 0

    def capacity(self) -> Capacity:
        stat = os.statvfs(self._root)
        block = stat.f_frsize
        return Capacity(
            total=stat.f_blocks * block,
            free=stat.f_bavail * block,
            reserved=self._promised,
            reserve_free=self._reserve_free,
            free_inodes=stat.f_favail,
        )

    def is_read_only(self) -> bool:
        """Whether the file system was remounted read-only, as ext4 does after an error."""
        return bool(os.statvfs(self._root).f_flag & os.ST_RDONLY)

    @contextmanager
    def reserve(self, size: int, *, total: int) -> Iterator[Reservation]:
        """Promise `size` bytes of a model of `total` bytes. Raises TooBig or NoSpace."""
        with self._lock:
            now = self.capacity()
            usable = now.total - self._reserve_free
            if total > usable:
                raise TooBig(
                    f"the model has {total} bytes; this file system can hold {max(usable, 0)}",
                    mend="use a larger disk, or narrow the model with include and exclude",
                    need=total,
                    usable=usable,
                )
            free = now.free - self._promised - self._reserve_free
            if size > free:
                raise NoSpace(
                    f"{size} bytes are missing and {max(free, 0)} are free"
                    f" ({now.free} on the file system, {self._promised} promised to other pulls,"
                    f" {self._reserve_free} kept free)",
                    mend="delete a model (cachd rm NAME) or other files of this disk",
                    need=size,
                    free=free,
                )
            self._promised += size
        reservation = Reservation(self, size)
        try:
            yield reservation
        finally:
            reservation.end()

    def release(self, size: int) -> None:
        """Promise `size` bytes less."""
        with self._lock:
            self._promised -= size
