"""Bytes that can be read from anywhere: held, on disk, altered, without end."""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass
from typing import Protocol

WRITE_BYTES = 1 << 20
ENDLESS = 1 << 62


class Content(Protocol):
    """Bytes that can be read from anywhere."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Content in memory."""

    held: bytes

    @property
    def size(self) -> int:
        return len(self.held)

    def read(self, start: int, stop: int) -> bytes:
        return self.held[start:stop]


@dataclass(frozen=True, slots=True)
class Disk:
    """Content in an open file, never in memory as a whole."""

    descriptor: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self.descriptor, stop - start, start)


@dataclass(frozen=True, slots=True)
class Patched:
    """Other content with `patch` written over it at `offset`, which may be its end."""

    under: Content
    offset: int
    patch: bytes

    @property
    def size(self) -> int:
        return max(self.under.size, self.offset + len(self.patch))

    def read(self, start: int, stop: int) -> bytes:
        piece = bytearray(self.under.read(start, stop))
        first, last = max(start, self.offset), min(stop, self.offset + len(self.patch))
        if first < last:
            piece[first - start : last - start] = self.patch[first - self.offset : last - self.offset]
        return bytes(piece)


@dataclass(frozen=True, slots=True)
class Unending:
    """Other content, then noise for ever."""

    under: Content
    size: int = ENDLESS

    def read(self, start: int, stop: int) -> bytes:
        return self.under.read(start, stop) or noise(min(stop - start, WRITE_BYTES))


@functools.cache
def noise(length: int) -> bytes:
    """The same `length` random bytes every time."""
    return random.Random(length).randbytes(length)
