"""What bytes hash to: a file's digest as its bytes pass in order, a checksum put together from its parts'."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash

from cachd.model import Digest


class Hasher(Protocol):
    """What takes a file's bytes in order and ends in its Digest."""

    def update(self, view: memoryview) -> None: ...

    def digest(self) -> Digest: ...


class _InOrder:
    def __init__(self, algorithm: str, size: int) -> None:
        self._algorithm = algorithm
        self._hash = hashlib.new(algorithm.removeprefix("git-"), usedforsecurity=False)
        if algorithm == "git-sha1":
            self._hash.update(b"blob %d\0" % size)  # git hashes a header first (man git-hash-object)

    def update(self, view: memoryview) -> None:
        self._hash.update(view)

    def digest(self) -> Digest:
        return Digest(self._algorithm, self._hash.hexdigest())


NO_SHA256 = Digest("sha256", "0" * 64)  # says which algorithm


def in_order(digest: Digest, size: int) -> Hasher:
    """Begin the digest of a file of `size` bytes by the algorithm that `digest` names."""
    return _InOrder(digest.algorithm, size)


class Checksum:
    """A cyclic redundancy check: that of a whole follows from those of its parts."""

    def __init__(
        self,
        algorithm: str,
        bits: int,
        add: Callable[[memoryview, int], int],
        join: Callable[[int, int, int], int],
    ) -> None:
        self.algorithm, self.bits, self.add = algorithm, bits, add
        self._join = join

    def joined(self, parts: Iterable[tuple[int, int]]) -> Digest:
        """Of a file, from (checksum, size in bytes) of its parts in order."""
        value = 0
        for checksum, size in parts:
            value = self._join(value, checksum, size)
        return Digest(self.algorithm, f"{value:0{self.bits // 4}x}")


_ENOUGH_BITS = 64  # for one damaged part in 2**64 to pass
_CHECKSUM_BITS = {"crc64nvme": 64, "crc32c": 32, "crc32": 32}


def checksum(digest: Digest | None) -> Checksum | None:
    """The check behind `digest`; None for one that needs all bytes in order."""
    if digest is None or digest.algorithm not in _CHECKSUM_BITS:
        return None
    from awscrt import checksums  # takes long to load, and few models have such a digest

    name = digest.algorithm
    return Checksum(
        name, _CHECKSUM_BITS[name], getattr(checksums, name), getattr(checksums, f"combine_{name}")
    )


class _Checked:
    """A checksum of bytes that come in order."""

    def __init__(self, check: Checksum, size: int) -> None:
        self._check, self._size, self._value = check, size, 0

    def update(self, view: memoryview) -> None:
        self._value = self._check.add(view, self._value)

    def digest(self) -> Digest:
        return self._check.joined([(self._value, self._size)])


def hasher_of(digest: Digest, size: int) -> Hasher:
    """Begin the digest of a file of `size` bytes, all in order, by whichever algorithm `digest` names."""
    check = checksum(digest)
    return _Checked(check, size) if check else in_order(digest, size)


def of_whole(digest: Digest, content: memoryview) -> Digest:
    """The digest of a file's whole content by the algorithm that `digest` names."""
    hasher = hasher_of(digest, len(content))
    hasher.update(content)
    return hasher.digest()


class PartHash:
    """What the journal knows a part again by: the checksum that the file's is joined of, or xxh3-128 where
    there is none or it is too short for that.
    """

    def __init__(self, whole: Checksum | None) -> None:
        self._whole = whole
        self._xxh3 = None if whole and whole.bits >= _ENOUGH_BITS else xxhash.xxh3_128()
        self.checksum = 0

    def update(self, view: memoryview) -> None:
        if self._xxh3:
            self._xxh3.update(view)
        if self._whole:
            self.checksum = self._whole.add(view, self.checksum)

    def copy(self) -> PartHash:
        """The same of the bytes so far, which later ones do not change."""
        copied = PartHash(self._whole)
        copied.checksum = self.checksum
        copied._xxh3 = self._xxh3.copy() if self._xxh3 else None
        return copied

    @property
    def hexdigest(self) -> str:
        if self._xxh3:
            return self._xxh3.hexdigest()
        return f"{self.checksum:016x}"
