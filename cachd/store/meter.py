"""Measures the cache's file system: free space by statvfs, used space by the blocks of each inode.

It never adds up sizes that sources state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from cachd.kernel import durable
from cachd.model import SizeOrPercent, amount_in
from cachd.store.capacity import Capacity, Usage
from cachd.store.layout import Layout

_COUNT_SECONDS = 1.0  # between two counts of used space, for `roughly`


class Meter:
    """The figures of one root, as Capacity.

    `allocating`: bytes of the grants that have not ended. `granted`: bytes granted since used space was
    counted. Both are changed by Space, under its lock. `copies`: the copies of blobs in the views.
    `reserved`, `backed`: as in Capacity. Each measurement raises DiskFailed or Unavailable.
    """

    def __init__(
        self, layout: Layout, clock: Callable[[], float], copies: Callable[[], Iterable[str]]
    ) -> None:
        self._layout, self._clock, self._copies = layout, clock, copies
        self.allocating = self.granted = 0
        self._counted_at = 0.0
        self._counted: tuple[tuple[int, int], Usage] | None = None
        self.change(reserve_free=0, limit=None, reserve_inodes=0)

    def change(
        self, *, reserve_free: SizeOrPercent, limit: SizeOrPercent | None, reserve_inodes: SizeOrPercent
    ) -> None:
        """Replace the bounds."""
        self._bounds = reserve_free, limit, reserve_inodes

    def capacity(self, reserved: int, backed: int) -> Capacity:
        """All figures, measured now."""
        found = self._statvfs()
        return self._capacity(found, self._usage(found), reserved, backed)

    def bounded(self, reserved: int, backed: int) -> Capacity:
        """Like `capacity`, for decisions: `usage` is counted only if there is a limit, and is 0 otherwise."""
        found = self._statvfs()
        usage = _UNCOUNTED if self._bounds[1] is None else self._usage(found)
        return self._capacity(found, usage, reserved, backed)

    def roughly(self, reserved: int, backed: int) -> Capacity:
        """Like `bounded`, but cheap: `usage` is counted once a second, and granted bytes are added."""
        found = self._statvfs()
        if self._bounds[1] is None:
            usage = _UNCOUNTED
        elif self._counted is None or self._clock() - self._counted_at > _COUNT_SECONDS:
            usage = self._usage(found)
        else:
            usage = replace(self._counted[1], ingests=self._counted[1].ingests + self.granted)
        return self._capacity(found, usage, reserved, backed)

    def _statvfs(self) -> os.statvfs_result:
        with durable.disk_errors(self._layout.root):
            return os.statvfs(self._layout.root)

    def _capacity(self, found: os.statvfs_result, usage: Usage, reserved: int, backed: int) -> Capacity:
        total = found.f_blocks * found.f_frsize
        reserve_free, limit, reserve_inodes = self._bounds
        return Capacity(
            total=total,
            free=found.f_bavail * found.f_frsize,
            reserved=reserved,
            backed=backed,
            reserve_free=amount_in(total, reserve_free),
            limit=None if limit is None else amount_in(total, limit),
            usage=usage,
            inodes=found.f_files,
            free_inodes=found.f_favail,
            reserve_inodes=amount_in(found.f_files, reserve_inodes),
        )

    def _usage(self, found: os.statvfs_result) -> Usage:
        """Used space, counted again only if the file system's free blocks or inodes have changed."""
        mark = found.f_bfree, found.f_ffree
        if self._counted is None or self._counted[0] != mark:
            self._counted_at, self.granted = self._clock(), self.allocating
            seen: set[int] = set()
            layout = self._layout
            beside = (layout.ingests, layout.damaged_blobs, layout.staging)
            with durable.disk_errors(layout.root):
                blobs = _allocated(layout.blobs, seen) + _blocks(self._copies(), seen)
                ingests = sum(_allocated(at, seen) for at in beside)
                self._counted = mark, Usage(blobs, ingests, _allocated(layout.trash, seen))
        return self._counted[1]


_UNCOUNTED = Usage(0, 0, 0)


def _blocks(paths: Iterable[str], seen: set[int]) -> int:
    """Bytes of disk of these files. Each inode counts once; vanished files do not count."""
    total = 0
    for path in paths:
        with suppress(FileNotFoundError, NotADirectoryError):
            total += _blocks_once(os.lstat(path), seen)
    return total


def _blocks_once(status: os.stat_result, seen: set[int]) -> int:
    """Bytes of disk of an inode; 0 if it is in `seen`, to which it is added."""
    if status.st_ino in seen:
        return 0
    seen.add(status.st_ino)
    return status.st_blocks * 512


def _allocated(directory: Path | str, seen: set[int]) -> int:
    """Bytes of disk in the files below a directory. Each inode counts once; vanished files do not count."""
    total = 0
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                total += _allocated(entry.path, seen)
                continue
            with suppress(FileNotFoundError):
                total += _blocks_once(entry.stat(follow_symlinks=False), seen)
    return total
