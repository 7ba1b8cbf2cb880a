"""Recovers parts that are on the disk already: from an earlier run of the ingest, or from a damaged blob.

No recorded line is trusted: a part counts only if its bytes still have the hash of its line.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cachd.errors import DiskFailed
from cachd.kernel import durable
from cachd.model import Extent, File
from cachd.store.digests import PartHash
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.file_digest import READ_BYTES
from cachd.store.ingest.journal import Recorded
from cachd.store.ingest.part_hashes import PartHashes
from cachd.store.ingest.part_lines import parts_of, read_parts


@dataclass(frozen=True, slots=True)
class Recovered:
    """A part whose bytes in the data file have the hash `hashed`. `is_synced`: the journal has it."""

    part: Extent
    hashed: PartHash
    is_synced: bool


def resumed(
    recorded: Iterable[Recorded], data: DataFile, parts: PartHashes, buffer: memoryview
) -> Iterator[Recovered]:
    """The parts of an earlier run that are intact. Raises Cancelled, NoSpace or Unavailable.

    Bytes that cannot be read back count as missing. Bytes that were not synced are written again.
    """
    for each in recorded:
        found = _longest_intact(each, data, parts, buffer)
        if found is None:
            continue
        part, hashed = found
        if part.stop <= each.synced_stop:
            yield Recovered(part, hashed, is_synced=True)
            continue
        with suppress(DiskFailed):
            data.write_again(Extent(each.synced_stop, part.stop), buffer)
            yield Recovered(part, hashed, is_synced=False)


def has_all_synced(recorded: Iterable[Recorded], found: Iterable[Recovered]) -> bool:
    """Whether all bytes that the journal promised were recovered. False if no line is left of it."""
    reached = {each.part.start: each.part.stop for each in found}
    promised = [each for each in recorded if each.synced_stop > each.start]
    return bool(promised) and all(reached.get(each.start, 0) >= each.synced_stop for each in promised)


def _longest_intact(
    recorded: Recorded, data: DataFile, parts: PartHashes, buffer: memoryview
) -> tuple[Extent, PartHash] | None:
    """Of several extents with one start, the longest whose bytes have its line's hash; None if none has."""
    hashed, reached = parts.new(), recorded.start
    longest: tuple[Extent, PartHash] | None = None
    with suppress(DiskFailed):
        for stop, expected in recorded.lines:
            data.hash_on(hashed, Extent(reached, stop), buffer)
            reached = stop
            if hashed.hexdigest == expected:
                longest = Extent(recorded.start, stop), hashed.copy()
    return longest


def copied(
    damaged: Path, file: File, gaps: Callable[[], list[Extent]], data: DataFile, parts: PartHashes
) -> Iterator[Recovered]:
    """Copies the intact parts that are missing from a damaged blob of `file`, which is not changed.

    `gaps`: the extents of which no byte has been received. Other bytes of `data` are never replaced, because
    readers may have them.
    A part that the disk cannot read counts as damaged, and so does each part whose hash it cannot read.
    Raises OSError or Leased if `damaged` cannot be opened; NoSpace, Unavailable or DiskFailed if `data`
    cannot be written.
    """
    fd = durable.open_file(damaged, os.O_RDONLY)
    try:
        buffer = memoryview(bytearray(READ_BYTES))
        for part, expected in _readable(parts_of(damaged), file.size):
            read, written = parts.new(), parts.new()
            if not any(gap.start <= part.start and part.stop <= gap.stop for gap in gaps()):
                continue
            _read(fd, part, read, buffer)
            if read.hexdigest != expected:
                continue
            _read(fd, part, written, buffer, data.write)
            if written.hexdigest == expected:
                yield Recovered(part, written, is_synced=False)
    finally:
        os.close(fd)


def _readable(lines: Path, size: int) -> Iterator[tuple[Extent, str]]:
    """As `read_parts`, but nothing if the disk cannot read the file."""
    try:
        yield from read_parts(lines, size)
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _skip(_offset: int, _view: memoryview) -> None:
    """The write of a part that is only hashed."""


def _read(
    fd: int,
    part: Extent,
    hashed: PartHash,
    buffer: memoryview,
    write: Callable[[int, memoryview], None] = _skip,
) -> None:
    """Hash a part of the file `fd`, and `write` it, as far as it can be read."""
    offset = part.start
    while offset < part.stop:
        try:
            got = os.preadv(fd, [buffer[: part.stop - offset]], offset)
        except OSError:
            return
        if not got:
            return
        hashed.update(buffer[:got])
        write(offset, buffer[:got])
        offset += got
