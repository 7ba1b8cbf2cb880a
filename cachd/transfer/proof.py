"""How a source proves that it has a blob that is here from another one.

    samples   parts that it could not choose, compared with the blob
    the rest  when one differs or there are no ranges: the whole file, hashed as it passes; nothing is written

A source that lists the sha256 of somebody else's file gets nothing for that alone. Whoever knows half of the
file cannot show so many samples, and does not get many tries (store/proven.py).
"""

from __future__ import annotations

import secrets

from cachd.model import Digest, Extent, File
from cachd.store.digests import in_order

_SAMPLE_BYTES = 16 << 10
_SAMPLES = 32


class Proof:
    """One source's proof for one file: what is still to be asked for."""

    def __init__(self, file: File, *, by_samples: bool) -> None:
        self._size, self._digest = file.size, file.digest or file.blob
        self.samples = _samples(file.size) if by_samples else []
        self.has_ranges = True
        self.begin()

    def begin(self) -> None:
        """Hash the file from its first byte on."""
        self.reached = 0
        self._hasher = in_order(self._digest, self._size)

    def take(self, view: memoryview) -> None:
        """The next bytes of the file."""
        self._hasher.update(view)
        self.reached += len(view)

    @property
    def rest(self) -> Extent:
        return Extent(self.reached, self._size)

    def digest(self) -> Digest:
        return self._hasher.digest()


def _samples(size: int) -> list[Extent]:
    """Parts of a file that nobody can foretell; none of one that is little more than they are."""
    if size <= 2 * _SAMPLES * _SAMPLE_BYTES:
        return []
    starts = (secrets.randbelow(size - _SAMPLE_BYTES + 1) for _ in range(_SAMPLES))
    return [Extent(start, start + _SAMPLE_BYTES) for start in starts]
