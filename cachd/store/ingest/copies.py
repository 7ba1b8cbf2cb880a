"""Copies an ingest into new files, because another process may still write to the old ones.

Only the recorded parts are copied. Their lines all go to `received`: nothing of the copy is synced yet.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

from cachd.kernel import durable
from cachd.model import Extent
from cachd.store.ingest.part_lines import read_parts

_PIECE_BYTES = 8 << 20
_NO_COPY = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # man 2 copy_file_range


def copy_ingest(source: Path, target: Path) -> None:
    """Copy the ingest `source` to the new directory `target`. Raises OSError, CachdError.

    A resume verifies the copied parts by their hashes, as those of any other ingest.
    """
    target.mkdir(mode=0o700)
    fd = durable.open_file(source / "data", os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        lines = _recorded(source, size)
        _copy_extents(fd, target / "data", sorted({part for part, _ in lines}, key=_start))
    finally:
        os.close(fd)
    noted = "".join(f"{part.start} {part.stop} {expected}\n" for part, expected in lines)
    durable.write_note(target / "received", noted.encode())
    for name in ("about.json", "owners"):
        with suppress(FileNotFoundError):
            durable.write_note(target / name, durable.read_file(source / name, at_most=1 << 20))


def bytes_to_copy(source: Path) -> int:
    """The bytes that a copy of the ingest would take, without its small files. Raises OSError, CachdError."""
    total = at = 0
    for part in sorted((part for part, _ in _recorded(source, (source / "data").stat().st_size)), key=_start):
        at = max(at, part.start)
        total += max(0, part.stop - at)
        at = max(at, part.stop)
    return total


def _recorded(source: Path, size: int) -> list[tuple[Extent, str]]:
    return [line for name in ("received", "journal") for line in read_parts(source / name, size)]


def _start(part: Extent) -> int:
    return part.start


def _copy_extents(source: int, target: Path, parts: list[Extent]) -> None:
    """Copy these extents, sorted by their start, of an open file into a new one."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        at = 0
        for part in parts:
            at = max(at, part.start)
            while at < part.stop:
                copied = _copy_piece(source, fd, at, min(_PIECE_BYTES, part.stop - at))
                if not copied:
                    return  # the file is shorter than its lines say: a resume fetches the rest
                at += copied
    finally:
        os.close(fd)


def _copy_piece(source: int, target: int, at: int, size: int) -> int:
    """Copy up to `size` bytes at the offset `at`, in the file server where it can. Returns their number."""
    try:
        return os.copy_file_range(source, target, size, at, at)
    except OSError as error:
        if error.errno not in _NO_COPY:
            raise
    content = os.pread(source, size, at)
    durable.write_at(target, memoryview(content), at)
    return len(content)
