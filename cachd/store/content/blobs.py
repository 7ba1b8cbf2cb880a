"""Finds and reads blobs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from cachd.kernel import durable
from cachd.model import Digest, Extent, File, Manifest
from cachd.store.hashes import Hashes
from cachd.store.ingest.part_lines import parts_of
from cachd.store.layout import Layout
from cachd.store.proven import Proven
from cachd.store.reads import Reads

_READ_BYTES = 1 << 20


class Blobs:
    """The blobs of one cache root, and what is known of them. Safe from any thread.

    `hashes`: their computed sha256. `proven`: which source has proven to have which blob. `reads`: separates
    cachd's own reads from its checks for open files. `trusts_claims`: a source need not prove that it has a
    blob that came from another source.
    """

    def __init__(self, layout: Layout, *, trusts_claims: bool = False) -> None:
        self.layout = layout
        self.at: Callable[[Digest], str] = layout.blob_at  # the path of a blob's file, as a string
        self.hashes = Hashes()
        self.proven = Proven(layout.proven, lambda blob: bool(self.inode(blob)), trusts_claims=trusts_claims)
        self.reads = Reads()

    def path(self, blob: Digest) -> Path:
        """The path of a blob's file, which need not be there."""
        return self.layout.blob(blob)

    def has(self, file: File) -> bool:
        """Whether the file's blob is here and has the right size."""
        try:
            return os.lstat(self.at(file.blob)).st_size == file.size
        except FileNotFoundError:
            return False

    def missing(self, manifest: Manifest) -> list[File]:
        """The files whose blob is not here, one file per blob."""
        return [f for f in {f.blob: f for f in manifest.files}.values() if not self.has(f)]

    def inode(self, blob: Digest) -> int:
        """The inode number of the blob's file; 0 when there is no such file."""
        return inode_of(self.at(blob))

    def alike(self, file: File) -> Digest | None:
        """A blob under another name that has the file's content.

        None when the source states no sha256, no such blob is known, or the file's own blob is here.
        """
        found = self.hashes.blob_of(file.digest) if file.digest and file.is_named_by_content else None
        if found is None or self.has(replace(file, kept=None)):
            return None
        return found if self.has(replace(file, kept=found)) else None

    def sizes(self, manifest: Manifest) -> dict[Digest, int]:
        """Bytes of disk that each blob of a manifest occupies; blobs that are not here are left out."""
        found = {}
        for blob in {f.blob for f in manifest.files}:
            with suppress(FileNotFoundError):
                path = self.path(blob)
                found[blob] = os.lstat(path).st_blocks * 512 + blocks_of(parts_of(path))
        return found

    @contextmanager
    def opened(self, file: File) -> Iterator[BinaryIO]:
        """A context with the blob of a file, open for reading. Raises DiskFailed, Leased or Unavailable."""
        path = self.path(file.blob)
        with durable.disk_errors(path), open(durable.open_file(path, os.O_RDONLY), "rb") as opened:
            yield opened

    def agrees(self, file: File, extent: Extent, view: memoryview) -> bool:
        """Whether the file's blob has exactly the bytes of `view` at `extent`; False when the blob is gone.

        Raises Leased, Unavailable or DiskFailed.
        """
        path = self.path(file.blob)
        with durable.disk_errors(path), self.reads.reading():
            try:
                fd = durable.open_file(path, os.O_RDONLY)
            except FileNotFoundError:  # meanwhile the blob was found damaged, and moved to damaged/
                return False
            try:
                return os.pread(fd, extent.size, extent.start) == view
            finally:
                os.close(fd)

    def computed_sha256(self, file: File, go_on: Callable[[], None]) -> Digest:
        """Read a blob that is here and return its sha256.

        Calls `go_on` after each MiB. Raises what `go_on` raises, and DiskFailed, Leased or Unavailable.
        """
        path, found = self.path(file.blob), hashlib.sha256()
        with durable.disk_errors(path), open(durable.open_file(path, os.O_RDONLY), "rb") as opened:
            while content := opened.read(_READ_BYTES):
                found.update(content)
                go_on()
        return Digest("sha256", found.hexdigest())

    def sync(self, blobs: Iterable[Digest]) -> None:
        """Make the names of committed blobs durable. Raises Unavailable or DiskFailed."""
        for directory in {self.path(blob).parent for blob in {b.algorithm: b for b in blobs}.values()}:
            with durable.disk_errors(directory):
                durable.sync_directory(directory)
        with durable.disk_errors(self.layout.blobs):
            durable.sync_directory(self.layout.blobs)

    def forget(self, blob: Digest) -> None:
        """Forget what is known of a blob that was removed."""
        self.hashes.forget(blob)
        self.proven.forget(blob)


def inode_of(path: Path | str) -> int:
    """The inode number of what is at a path; 0 if nothing is. Raises OSError."""
    try:
        return os.lstat(path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return 0


def blocks_of(path: Path | str) -> int:
    """Bytes of disk that a file occupies; 0 when there is no such file."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0


def freed_by(path: Path) -> int:
    """Bytes of disk that removing a file or directory frees. Files with other hard links do not count."""
    total = 0
    for at in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
        with suppress(FileNotFoundError):
            status = os.lstat(at)
            total += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return total
