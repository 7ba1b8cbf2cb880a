"""How a source proves that it has a blob that is here from another one.

    samples   parts that it could not choose, compared with the blob
    the rest  when one differs or there are no ranges: the whole file, hashed as it passes; nothing is written

A source that lists the sha256 of somebody else's file gets nothing for that alone.
"""

from __future__ import annotations

import secrets

from cachd.model import Digest, Extent, File
from cachd.store.digests import in_order

SAMPLE_BYTES = 64 << 10
_SAMPLES = 4


class Proof:
    """One source's proof for one file: what is still to be asked for."""

    def __init__(self, file: File) -> None:
        self._size, self._digest = file.size, file.digest or file.blob
        self.samples = samples(file.size)
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


def samples(size: int) -> list[Extent]:
    """Parts of a file that nobody can foretell."""
    length = min(SAMPLE_BYTES, size)
    starts = sorted(secrets.randbelow(size - length + 1) for _ in range(_SAMPLES))
    return [Extent(start, start + length) for start in starts]
