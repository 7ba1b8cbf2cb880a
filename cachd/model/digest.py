"""Defines extents of files and digests of their content."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from cachd.errors import Invalid

_HEX_DIGITS = {
    "sha256": 64,
    "git-sha1": 40,
    "sha1": 40,
    "crc64nvme": 16,
    "crc32c": 8,
    "crc32": 8,
    "origin": 64,
}
_HEX = frozenset("0123456789abcdef")
_WITHIN_ONE_SOURCE = frozenset({"sha256", "git-sha1", "sha1"})
# By how hard it is to find other bytes with the same digest, the easiest first.
STRENGTHS = ("crc32", "crc32c", "crc64nvme", "sha1", "git-sha1", "sha256")


@dataclass(frozen=True, slots=True)
class Extent:
    """A half-open byte interval `[start, stop)`."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"extent [{self.start}, {self.stop}) is not an interval of a file")

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Digest:
    r"""A digest of content, written `algorithm:hex`.

    Algorithms: sha256; git-sha1 (SHA-1 of `blob <size>\0` and the content); sha1, crc64nvme, crc32c and
    crc32 as in S3's checksums. `origin` is not an algorithm: such a digest names a blob that belongs to one
    source (see `File.blob`).
    """

    algorithm: str
    hex: str

    def __post_init__(self) -> None:
        digits = _HEX_DIGITS.get(self.algorithm)
        if digits is None:
            raise Invalid(f"digest algorithm {self.algorithm!r:.40} is not known", code="bad_digest")
        if len(self.hex) != digits or not _HEX.issuperset(self.hex):
            raise Invalid(
                f"{self.hex!r:.140} is not a {self.algorithm} digest",
                code="bad_digest",
                hint=f"give {digits} lower-case hexadecimal digits",
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `algorithm:hex`; upper-case digits become lower-case. Raises Invalid."""
        algorithm, _, digits = text.partition(":")
        return cls(algorithm, digits.lower())

    def __hash__(self) -> int:
        return hash(self.hex)  # a string caches its hash

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    @property
    def names_content(self) -> bool:
        """Whether equal digests mean equal bytes, whoever states them.

        SHA-1 has practical collisions (https://shattered.io), and those of a CRC are trivial to make.
        """
        return self.algorithm == "sha256"

    @property
    def names_content_of_a_source(self) -> bool:
        """Whether equal digests from one source count as equal bytes for that source."""
        return self.algorithm in _WITHIN_ONE_SOURCE
