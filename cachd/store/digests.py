"""A file's digest, computed as its bytes pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

from cachd.model import Digest


class Hasher(Protocol):
    """What takes bytes in order and ends in a Digest."""

    def update(self, view: memoryview) -> None: ...

    def digest(self) -> Digest: ...


class _Cryptographic:
    def __init__(self, algorithm: str, size: int) -> None:
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm.removeprefix("git-"), usedforsecurity=False)
        if algorithm == "git-sha1":
            self._hash.update(b"blob %d\0" % size)  # git hashes a header first (man git-hash-object)

    def update(self, view: memoryview) -> None:
        self._hash.update(view)

    def digest(self) -> Digest:
        return Digest(self._algorithm, self._hash.hexdigest())


class _Cyclic:
    def __init__(self, algorithm: str, crc: Callable[[memoryview, int], int], bits: int) -> None:
        self._algorithm, self._crc, self._digits = algorithm, crc, bits // 4
        self._value = 0

    def update(self, view: memoryview) -> None:
        self._value = self._crc(view, self._value)

    def digest(self) -> Digest:
        return Digest(self._algorithm, f"{self._value:0{self._digits}x}")


def hasher(algorithm: str, size: int) -> Hasher:
    """Begin the digest of a file of `size` bytes."""
    if not algorithm.startswith("crc"):
        return _Cryptographic(algorithm, size)
    from awscrt import checksums  # takes long to load, and most models have no such digest

    if algorithm == "crc64nvme":
        return _Cyclic(algorithm, checksums.crc64nvme, 64)
    if algorithm == "crc32c":
        return _Cyclic(algorithm, checksums.crc32c, 32)
    return _Cyclic(algorithm, checksums.crc32, 32)
