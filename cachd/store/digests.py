"""Computes digests: of a complete file, of its bytes in order, of its parts.

A cryptographic digest needs a file's bytes in order. A CRC does not: the CRC of a file is computed from the
CRCs of its parts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Protocol

import xxhash

from cachd.errors import Corrupt
from cachd.model import Digest, File


class Hasher(Protocol):
    """Takes a file's bytes in order and returns its Digest."""

    def update(self, view: memoryview) -> None:
        """Hash the next bytes."""

    def digest(self) -> Digest:
        """The digest of the bytes so far."""


class _InOrder:
    def __init__(self, algorithm: str, size: int) -> None:
        self._algorithm, self._hash = algorithm, _begun(algorithm, size)

    def update(self, view: memoryview) -> None:
        self._hash.update(view)

    def digest(self) -> Digest:
        return Digest(self._algorithm, self._hash.hexdigest())


def _begun(algorithm: str, size: int) -> hashlib._Hash:
    """The hash of a file of `size` bytes before its first byte."""
    if algorithm == "sha256":
        return hashlib.sha256()  # quicker than by its name
    begun = hashlib.new(algorithm.removeprefix("git-"), usedforsecurity=False)
    if algorithm == "git-sha1":
        begun.update(b"blob %d\0" % size)  # git hashes a header first (man git-hash-object)
    return begun


NO_SHA256 = Digest("sha256", "0" * 64)  # stands for the algorithm where no value is known yet


def in_order(digest: Digest, size: int) -> Hasher:
    """A new hasher for a file of `size` bytes. `digest` names the algorithm, which must not be a CRC."""
    return _InOrder(digest.algorithm, size)


class Checksum:
    """A cyclic redundancy check (CRC). The CRC of a file can be combined from the CRCs of its parts."""

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
        """The checksum of a file. `parts`: (checksum, size in bytes) of each part, in order."""
        value = 0
        for checksum, size in parts:
            value = self._join(value, checksum, size)
        return Digest(self.algorithm, f"{value:0{self.bits // 4}x}")


_ENOUGH_BITS = 64  # a damaged part passes with a probability of 1 in 2**64
_CHECKSUM_BITS = {"crc64nvme": 64, "crc32c": 32, "crc32": 32}


def checksum(digest: Digest | None) -> Checksum | None:
    """The CRC algorithm of `digest`; None when it is no CRC."""
    if digest is None or digest.algorithm not in _CHECKSUM_BITS:
        return None
    from awscrt import checksums  # only here: it takes long to import, and few models have a CRC

    name = digest.algorithm
    return Checksum(
        name, _CHECKSUM_BITS[name], getattr(checksums, name), getattr(checksums, f"combine_{name}")
    )


class _Checked:
    """The CRC of a file whose bytes come in order, as a Hasher."""

    def __init__(self, check: Checksum, size: int) -> None:
        self._check, self._size, self._value = check, size, 0

    def update(self, view: memoryview) -> None:
        self._value = self._check.add(view, self._value)

    def digest(self) -> Digest:
        return self._check.joined([(self._value, self._size)])


def hasher_of(digest: Digest, size: int) -> Hasher:
    """A new hasher for a file of `size` bytes. `digest` names the algorithm: any, also a CRC."""
    check = checksum(digest)
    return _Checked(check, size) if check else in_order(digest, size)


def digest_of(digest: Digest, content: memoryview) -> Digest:
    """The digest of a file's complete content. `digest` names the algorithm."""
    if check := checksum(digest):
        return check.joined([(check.add(content, 0), len(content))])
    complete = _begun(digest.algorithm, len(content))
    complete.update(content)
    return Digest(digest.algorithm, complete.hexdigest())


class PartHash:
    """The hash of one part, by which a resume or a scrub recognises the part's bytes.

    `check`: the CRC algorithm of the file, None if its digest is no CRC. `checksum`: the part's CRC by that
    algorithm, from which the file's is combined. `hexdigest` is this CRC if it has at least 64 bits, else an
    xxh3-128.
    """

    def __init__(self, check: Checksum | None) -> None:
        self._check = check
        self._xxh3 = None if check and check.bits >= _ENOUGH_BITS else xxhash.xxh3_128()
        self.checksum = 0

    def update(self, view: memoryview) -> None:
        """Hash the next bytes of the part."""
        if self._xxh3:
            self._xxh3.update(view)
        if self._check:
            self.checksum = self._check.add(view, self.checksum)

    def copy(self) -> PartHash:
        """A copy of the hash of the bytes so far. Later updates do not change it."""
        copied = PartHash(self._check)
        copied.checksum = self.checksum
        copied._xxh3 = self._xxh3.copy() if self._xxh3 else None
        return copied

    @property
    def hexdigest(self) -> str:
        """The hash of the bytes so far, as a part line contains it."""
        if self._xxh3:
            return self._xxh3.hexdigest()
        return f"{self.checksum:016x}"


def corrupt(file: File, got: Digest | None, expected: Digest | None = None) -> Corrupt:
    """The error for content with a wrong digest. `expected`: by default the digest that the source states."""
    expected = expected or file.digest
    return Corrupt(
        f"{file.path}: expected {expected}, got {got} ({file.size} bytes from {file.origin})",
        hint="nothing was published; if it happens again, the source or the network to it corrupts data",
        file=file.path,
        expected=str(expected),
        got=str(got),
    )
