"""Divides files into the parts that one request asks for, and records which bytes were received."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from cachd.model import Extent, File

MIN_PART_BYTES = 4 << 20
MAX_PART_BYTES = 32 << 20
SMALL_BYTES = 256 << 10  # must fit into a stream's buffer
UNKEPT_BYTES, UNKEPT_OF_A_STREAM_BYTES = 47 << 20, 2 << 20


def is_small(file: File) -> bool:
    """Whether the file is received in one piece, verified, and written without an ingest."""
    return file.digest is not None and 0 < file.size <= SMALL_BYTES


class Received:
    """The extents of a file that were received: disjoint, sorted, and merged when they touch."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def add(self, extent: Extent) -> None:
        """Count `extent` as received. It may overlap extents from before."""
        if not extent.size:
            return
        first = bisect_left(self._stops, extent.start)
        last = first
        start, stop = extent.start, extent.stop
        while last < len(self._starts) and self._starts[last] <= stop:
            start, stop = min(start, self._starts[last]), max(stop, self._stops[last])
            last += 1
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    @property
    def bytes(self) -> int:
        """The number of bytes received; bytes that came twice count once."""
        return sum(self._stops) - sum(self._starts)

    @property
    def prefix(self) -> int:
        """The number of bytes received from the start of the file without a gap."""
        return self._stops[0] if self._starts and self._starts[0] == 0 else 0

    def gaps(self, size: int) -> Iterator[Extent]:
        """Yields the missing extents of a file of `size` bytes, in order."""
        reached = 0
        for start, stop in zip(self._starts, self._stops, strict=True):
            if start > reached:
                yield Extent(reached, start)
            reached = stop
        if reached < size:
            yield Extent(reached, size)


def part_bytes(size: int, streams: int) -> int:
    """The length of a part of a file of `size` bytes: four parts for every stream, in MiB, from 4 to 32 MiB.

    Large parts cost an origin fewer requests; smaller ones keep all streams busy on a small file.
    """
    wanted = -(-size // (4 * streams))
    rounded = -(-wanted // (1 << 20)) << 20
    return min(max(rounded, MIN_PART_BYTES), MAX_PART_BYTES)


def unkept_bytes(streams: int) -> int:
    """Bytes that each of so many streams may receive before it records them: `kill -9` loses at most these.

    At most 2 MiB, and 47 MiB for all streams together: 64 MiB just after their number was raised by half.
    """
    return min(UNKEPT_BYTES // streams, UNKEPT_OF_A_STREAM_BYTES)


def split(gap: Extent, length: int) -> Iterator[Extent]:
    """Yields `gap` in parts that end at multiples of `length`; the last ends with the gap."""
    start = gap.start
    while start < gap.stop:
        stop = min(gap.stop, (start // length + 1) * length)
        yield Extent(start, stop)
        start = stop
