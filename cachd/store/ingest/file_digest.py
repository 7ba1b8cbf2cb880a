"""Computes the digest of a file while its bytes arrive.

sha256 needs the bytes in order. Bytes that arrive at the hashed offset are hashed at once; the rest are read
back from the page cache later. The CRC of a file is combined from the CRCs of its parts, which are computed
as the bytes arrive. A file without a digest has part hashes only. In these two cases, only bytes that no part
hash covers are read back.
"""

from __future__ import annotations

from cachd.model import Digest, Extent, File
from cachd.policy.parts import Received
from cachd.store.digests import NO_SHA256, Hasher, checksum, in_order
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.part_hashes import PartHashes

READ_BYTES = 1 << 20
_FOLLOWED_BYTES = 64 << 20  # hashed per call of `follow`, at most


class FileDigest:
    """The digest of one file, by the algorithm of its manifest. One thread at a time may use it.

    `hashed`: bytes from the start of the file that need not be read any more. Reading may raise DiskFailed,
    and Cancelled.
    """

    def __init__(self, file: File, data: DataFile) -> None:
        self._file, self._data = file, data
        self._checksum = checksum(file.digest)
        self.parts = PartHashes(self._checksum)
        self.begin()

    def begin(self) -> None:
        """Forget what was hashed. The parts stay."""
        file = self._file
        self.hashed = 0
        self._hasher = in_order(file.digest, file.size) if file.digest and not self._checksum else None
        # Beside a CRC, no sha256 is computed: it would slow the pull down. A scrub computes it later.
        has_git_sha1 = file.digest is not None and file.digest.algorithm == "git-sha1"
        self._sha256: Hasher | None = in_order(NO_SHA256, file.size) if has_git_sha1 else None

    @property
    def is_complete(self) -> bool:
        """Whether the complete file is hashed."""
        return self.hashed == self._file.size

    def behind(self, prefix: int) -> int:
        """The bytes that `follow` can hash once the file has its first `prefix` bytes."""
        return prefix - self.hashed if self._hasher or prefix == self._file.size else 0

    def follow(self, prefix: int, buffer: memoryview) -> None:
        """Hash some of the first `prefix` bytes, reading them back through `buffer`.

        If the digest needs the bytes in order, one call hashes at most 64 MiB, so that a caller that calls it
        in a loop can stop soon.
        """
        if self._hasher is None:
            if prefix == self._file.size:
                self._cover_gaps(buffer)
                self.hashed = self._file.size
            return
        stop = min(prefix, self.hashed + _FOLLOWED_BYTES)
        while self.hashed < stop:
            view = buffer[: min(len(buffer), stop - self.hashed)]
            self._data.read(self.hashed, view)
            self.take(view)

    def takes_from(self, offset: int) -> bool:
        """Whether the digest needs the bytes in order and the next one it needs is at `offset`."""
        return self._hasher is not None and self.hashed == offset

    def take(self, view: memoryview) -> None:
        """Hash the next bytes, if the digest needs the bytes in order."""
        if self._hasher is not None:
            self._hasher.update(view)
            if self._sha256:
                self._sha256.update(view)
            self.hashed += len(view)

    def _cover_gaps(self, buffer: memoryview) -> None:
        """Make the part hashes cover each byte once: read back bytes that no part or several parts cover."""
        covered, parts = Received(), self.parts.without_overlaps()
        for part in parts:
            covered.add(part)
        for gap in covered.gaps(self._file.size):
            parts[gap] = self.parts.new()
            self._data.hash_on(parts[gap], gap, buffer)
        self.parts.replace(parts)

    def digest(self) -> Digest | None:
        """The digest by the algorithm of the manifest; None when the manifest has no digest.

        Raises ValueError before the complete file is hashed.
        """
        if not self.is_complete:
            raise ValueError(
                f"{self._file.path}: digest asked for at {self.hashed} of {self._file.size} bytes"
            )
        if self._hasher:
            return self._hasher.digest()
        if self._checksum:
            return self._checksum.joined((h.checksum, part.size) for part, h in self.parts.in_order())
        return None

    def sha256(self) -> Digest | None:
        """The sha256 of a hashed file, if it was computed in addition to the digest of its manifest."""
        return self._sha256.digest() if self._sha256 else None

    def read_sha256(self) -> Digest:
        """The sha256 of the file, computed by reading the data back."""
        size = self._file.size
        hasher, buffer = in_order(NO_SHA256, size), memoryview(bytearray(READ_BYTES))
        for at in range(0, size, READ_BYTES):
            view = buffer[: min(READ_BYTES, size - at)]
            self._data.read(at, view)
            hasher.update(view)
        return hasher.digest()

    def spoiled(self, buffer: memoryview) -> frozenset[Extent]:
        """The parts whose bytes on disk are not the bytes that were received."""
        found = set[Extent]()
        for part, received in self.parts.in_order():
            on_disk = self.parts.new()
            self._data.hash_on(on_disk, part, buffer)
            if on_disk.hexdigest != received.hexdigest:
                found.add(part)
        return frozenset(found)
