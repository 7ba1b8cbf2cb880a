"""Reads a published blob from the disk and checks that it still has its digest.

The read bypasses the page cache (O_DIRECT), so that the pages of pods stay in memory and the disk itself is
checked. On a file system without O_DIRECT, bytes that were not in memory before a read are dropped after it.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from cachd.errors import DiskFailed
from cachd.kernel import durable
from cachd.kernel.calls import resident_bytes
from cachd.model import Digest, Extent, File
from cachd.store.digests import Hasher, PartHash, hasher_of
from cachd.store.ingest.part_lines import parts_of, read_parts
from cachd.store.reads import Reads

READ_BYTES = 1 << 20


class Replaced(Exception):
    """The blob was removed or replaced during the check, so the check has no result."""


def quick_check(blob: Path, file: File) -> str | None:
    """Check a blob without reading it. Returns what is wrong; None when nothing is."""
    try:
        status = os.lstat(blob)
    except FileNotFoundError:
        return "it is gone"
    if not stat.S_ISREG(status.st_mode):
        return "it is not a regular file"
    if status.st_size != file.size:
        return f"it has {status.st_size} of {file.size} bytes"
    return None


def verify_blob(
    blob: Path,
    file: File,
    reads: Reads,
    took: Callable[[int], None],
    *,
    beside: Hasher | None = None,
    parts: Path | None = None,
    opening: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> str | None:
    """Check a blob, or a copy of it, by reading it completely. Returns what is wrong; None when nothing is.

    `took` is called with the number of bytes of each read; it may wait or raise. `beside` is fed the bytes,
    too, if the file has a digest. `parts`: the part hashes, if they are not beside the blob. `opening`: the
    context of each open. Raises Replaced, Leased, Unavailable or DiskFailed.
    """
    if wrong := quick_check(blob, file):
        return wrong
    reading = _Reading(blob, reads, parts or parts_of(blob), opening)
    try:
        return (
            _wrong_digest(reading, file, file.digest, took, beside)
            if file.digest
            else _wrong_part(reading, file, took)
        )
    except OSError as error:
        if error.errno == errno.EIO:
            return "the disk cannot read it"
        with durable.disk_errors(blob):
            raise
    finally:
        reading.close()


def _wrong_digest(
    reading: _Reading, file: File, digest: Digest, took: Callable[[int], None], beside: Hasher | None
) -> str | None:
    hasher = hasher_of(digest, file.size)
    for view in reading.extent(Extent(0, file.size), took):
        hasher.update(view)
        if beside:
            beside.update(view)
    got = hasher.digest()
    return None if got == digest else f"it hashes to {got}"


def _wrong_part(reading: _Reading, file: File, took: Callable[[int], None]) -> str | None:
    """Check a blob whose source states no digest against its part hashes.

    Raises DiskFailed if they do not cover the blob: then nobody can say whether it is intact.
    """
    unchecked = file.size
    for part, expected in read_parts(reading.parts, file.size):
        unchecked -= part.size
        hashed = PartHash(None)
        for view in reading.extent(part, took):
            hashed.update(view)
        if hashed.hexdigest != expected:
            return f"its part at byte {part.start} has another hash"
    if unchecked:
        raise DiskFailed(
            f"{file.path}: {unchecked} of {file.size} bytes cannot be verified: their part hashes are gone",
            hint="delete the model and pull it again",
        )
    return None


class _Reading:
    """One blob, which is opened for each read and closed after it."""

    def __init__(
        self, blob: Path, reads: Reads, parts: Path, opening: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self.path, self.parts, self._reads, self._opening = blob, parts, reads, opening
        self._buffer = mmap.mmap(-1, READ_BYTES)  # aligned to a page, as O_DIRECT requires (man 2 open)
        self._direct = os.O_DIRECT
        self._inode: int | None = None

    def close(self) -> None:
        self._buffer.close()

    def extent(self, extent: Extent, took: Callable[[int], None]) -> Iterator[memoryview]:
        """Yield the bytes of an extent in order, as views of the buffer; fewer when the file is shorter."""
        offset = extent.start - extent.start % mmap.PAGESIZE
        buffer = memoryview(self._buffer)
        with buffer:
            while offset < extent.stop:
                got = self._read(offset)
                with buffer[max(extent.start - offset, 0) : min(got, extent.stop - offset)] as view:
                    yield view
                    took(len(view))
                if got < READ_BYTES:
                    return
                offset += got

    def _read(self, offset: int) -> int:
        try:
            return self._read_by(self._direct, offset)
        except OSError as error:
            if not self._direct or error.errno != errno.EINVAL:
                raise
        self._direct = 0  # there is no O_DIRECT here; some file systems refuse the read, and not the open
        return self._read_by(0, offset)

    def _read_by(self, flags: int, offset: int) -> int:
        with self._reads.reading():
            try:
                fd = self._opened(flags)
            except FileNotFoundError as error:
                raise Replaced from error
            try:
                inode = os.fstat(fd).st_ino
                if self._inode not in (None, inode):
                    raise Replaced
                self._inode = inode
                return os.preadv(fd, [self._buffer], offset) if flags else self._read_kept(fd, offset)
            finally:
                os.close(fd)

    def _opened(self, flags: int) -> int:
        with self._opening():
            return durable.open_file(self.path, os.O_RDONLY | flags)

    def _read_kept(self, fd: int, offset: int) -> int:
        """Read through the page cache. Drop the pages after it if none of them was in memory before."""
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
        kept = resident_bytes(fd, offset, offset + READ_BYTES)
        got = os.preadv(fd, [self._buffer], offset)
        if not kept:
            os.posix_fadvise(fd, offset, READ_BYTES, os.POSIX_FADV_DONTNEED)
        return got
