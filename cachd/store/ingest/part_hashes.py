"""The parts of a file that have arrived, each with the hash of its bytes."""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping

from cachd.model import Extent
from cachd.store.digests import Checksum, PartHash
from cachd.store.ingest.part_lines import line_of


class PartHashes:
    """The part hashes of one ingest. Safe from any thread.

    Two parts overlap if two streams wrote the same bytes. Then neither hash may be that of the disk.
    """

    def __init__(self, check: Checksum | None) -> None:
        self._check = check
        self._lock = threading.Lock()
        self._extents: dict[PartHash, Extent] = {}  # a part that grows keeps its PartHash

    def new(self) -> PartHash:
        """The hash of a part of which no byte has arrived yet."""
        return PartHash(self._check)

    def record(self, part: Extent, hashed: PartHash) -> None:
        """Add a part, or the larger extent that an earlier `hashed` covers now."""
        with self._lock:
            self._extents[hashed] = part

    def replace(self, parts: Mapping[Extent, PartHash]) -> None:
        """Keep only these parts."""
        with self._lock:
            self._extents = {hashed: part for part, hashed in parts.items()}

    def forget(self, parts: Collection[Extent]) -> None:
        """Drop these parts."""
        with self._lock:
            self._extents = {hashed: part for hashed, part in self._extents.items() if part not in parts}

    def extents(self) -> frozenset[Extent]:
        """The extents that have a hash."""
        with self._lock:
            return frozenset(self._extents.values())

    def in_order(self) -> list[tuple[Extent, PartHash]]:
        """Every part with its hash, sorted by its start."""
        with self._lock:
            found = [(part, hashed) for hashed, part in self._extents.items()]
        return sorted(found, key=lambda item: item[0].start)

    def without_overlaps(self) -> dict[Extent, PartHash]:
        """The parts that overlap no other, in order."""
        alone: dict[Extent, PartHash] = {}
        reached = 0
        for part, hashed in self.in_order():
            if part.start >= reached:
                alone[part] = hashed
            else:
                alone = {p: h for p, h in alone.items() if p.stop <= part.start}
            reached = max(reached, part.stop)
        return alone

    def lines(self) -> str:
        """The lines of the parts that overlap no other."""
        return "".join(line_of(part, hashed) for part, hashed in self.without_overlaps().items())
