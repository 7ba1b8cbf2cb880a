"""Checks that a source really has a blob that another source brought.

    samples        random parts of the file from this source are compared with the blob
    complete file  if a sample differs, or the source serves no ranges: the complete file is fetched and
                   hashed; nothing is written

A source that merely lists the sha256 of another source's file gets no access to the blob. One that knows
half of the file cannot answer this many random samples, and gets few attempts (store/proven.py).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable

from cachd.model import Digest, Extent, File
from cachd.store.digests import in_order

_SAMPLE_BYTES = 16 << 10
_SAMPLES = 32


class Proof:
    """One source's proof for one file. `samples`: parts still to compare. `reached`: bytes hashed so far.

    `below` gives a number below its argument that no source can foresee.
    """

    def __init__(
        self, file: File, *, by_samples: bool, below: Callable[[int], int] = secrets.randbelow
    ) -> None:
        self._size, self._digest = file.size, file.digest or file.blob
        self.samples = _samples(file.size, below) if by_samples else []
        self.has_ranges = True
        self.begin()

    def begin(self) -> None:
        """Start hashing the file from its first byte."""
        self.reached = 0
        self._hasher = in_order(self._digest, self._size)

    def take(self, view: memoryview) -> None:
        """Hash the next bytes of the file."""
        self._hasher.update(view)
        self.reached += len(view)

    @property
    def rest(self) -> Extent:
        """The bytes that are not hashed yet."""
        return Extent(self.reached, self._size)

    def digest(self) -> Digest:
        """The digest of the file as the source sent it."""
        return self._hasher.digest()


def _samples(size: int, below: Callable[[int], int]) -> list[Extent]:
    """Random parts of a file; none if the file is at most twice their size: then it is fetched completely."""
    if size <= 2 * _SAMPLES * _SAMPLE_BYTES:
        return []
    starts = (below(size - _SAMPLE_BYTES + 1) for _ in range(_SAMPLES))
    return [Extent(start, start + _SAMPLE_BYTES) for start in starts]
