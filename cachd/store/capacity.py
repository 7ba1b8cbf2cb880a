"""The figures of the cache's file system, and those computed from them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes of disk in cachd's files.

    `blobs`: verified blobs, and their copies in the views. `ingests`: partial downloads, damaged blobs and
    staged files. `held`: deleted files that a process may still have open.
    """

    blobs: int
    ingests: int
    held: int

    @property
    def total(self) -> int:
        """The bytes of all these files."""
        return self.blobs + self.ingests + self.held


@dataclass(frozen=True, slots=True)
class Capacity:
    """The figures at one moment, in bytes and inodes.

    `total`: size of the file system. `free`: what this process may still write. `reserved`: reserved for
    pulls. `backed`: the part of `reserved` that is free now. `reserve_free`: what must stay free.
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
    def is_limited(self) -> bool:
        """Whether `limit` bounds what can be taken more than the file system does."""
        return self.limit is not None and self.limit - self.usage.total < self.free - self.reserve_free

    @property
    def available_inodes(self) -> int | None:
        """Inodes that may be taken; None where the file system makes inodes as needed."""
        return self.free_inodes - self.reserve_inodes if self.inodes else None

    def short_of(self, size: int) -> int:
        """Bytes to free before `size` bytes can be reserved."""
        return max(size - self.available, 0)

    def short_of_inodes(self, count: int) -> int:
        """Inodes to free before `count` files can be made."""
        return 0 if self.available_inodes is None else max(count - self.available_inodes, 0)
