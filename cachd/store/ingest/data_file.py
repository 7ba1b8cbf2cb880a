"""The bytes of an ingest: one file at its full size, written in place, in any order.

    ingest/<algorithm>-<hex>-<size>/data     read-only once it is sealed; then it becomes the blob by a rename

Blocks are allocated as bytes arrive, so a size that a source only claims takes no disk space.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cachd import files
from cachd.errors import DiskFailed
from cachd.kernel import durable
from cachd.kernel.content_time import content_time
from cachd.model import Extent
from cachd.store.digests import PartHash

_CLOSED = -1


class DataFile:
    """An open data file. Many threads may use it at once, for disjoint extents.

    `check` is called before each read of `hash_on`, and may raise Cancelled. Methods raise NoSpace,
    Unavailable or DiskFailed; only the constructor and `set_size` raise OSError instead.
    """

    def __init__(self, directory: Path, check: Callable[[], None]) -> None:
        self._directory, self._check = directory, check
        self.path = directory / "data"
        if files.is_regular(self.path):
            os.chmod(self.path, 0o600)  # read-only if the daemon crashed between seal and rename
        self._fd = durable.open_file(self.path, os.O_RDWR | os.O_CREAT)

    @property
    def allocated(self) -> int:
        """Bytes of disk that the file occupies."""
        return os.fstat(self._fd).st_blocks * 512

    def set_size(self, size: int) -> None:
        """Give the file its full size. Missing bytes take no blocks."""
        durable.set_size(self._fd, size)

    def allocate(self, extent: Extent) -> None:
        """Allocate disk blocks for an extent, so that a full disk fails here and not at a later write."""
        with durable.disk_errors(self._directory):
            durable.preallocate(self._fd, extent.start, extent.size)

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`. A crash of the node may lose it until `sync`."""
        with durable.disk_errors(self._directory):
            durable.write_at(self._fd, view, offset)

    def sync(self) -> None:
        """Make all written bytes durable.

        After a failure the file may be spoiled: the kernel reports a lost write to one sync only, and the
        next sync may succeed (man 2 fsync).
        """
        with durable.disk_errors(self._directory):
            durable.sync(self._fd)

    def read(self, offset: int, view: memoryview) -> None:
        """Fill all of `view` from `offset`."""
        with durable.disk_errors(self._directory):
            got = 0
            while got < len(view):
                n = os.preadv(self._fd, [view[got:]], offset + got)
                if not n:
                    raise DiskFailed(f"{self._directory}: data ends at {offset + got}", code="disk_failed")
                got += n

    def hash_on(self, hashed: PartHash, extent: Extent, buffer: memoryview) -> None:
        """Feed the bytes of an extent to `hashed`, reading them through `buffer`."""
        start = extent.start
        while start < extent.stop:
            self._check()
            view = buffer[: min(len(buffer), extent.stop - start)]
            self.read(start, view)
            hashed.update(view)
            start += len(view)

    def write_again(self, extent: Extent, buffer: memoryview) -> None:
        """Read an extent back and write it again, so that the next `sync` covers it.

        Bytes that a crashed daemon wrote need this: the kernel may have reported their loss to that process.
        """
        start = extent.start
        while start < extent.stop:
            view = buffer[: min(len(buffer), extent.stop - start)]
            self.read(start, view)
            self.write(start, view)
            start += len(view)

    def seal(self) -> None:
        """Make the file read-only and durable, with the time that belongs to its content."""
        with durable.disk_errors(self._directory):
            size = os.fstat(self._fd).st_size
            durable.seal(self._fd, 10**9 * content_time(size, lambda at, n: os.pread(self._fd, n, at)))

    def close(self) -> None:
        """Close the file; it stays on the disk. Closing twice is fine."""
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            os.close(fd)
