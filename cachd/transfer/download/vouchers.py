"""Remembers which origin sent which part, and decides whose parts are fetched again after a wrong digest.

A source publishes no hashes of parts, so a wrong digest does not say which part is wrong. If one origin
sent the complete file, that origin was wrong. If several origins sent it, one of them is asked for all parts
that it has not sent. A part that has the same hash as before then counts as sent by both. If the digest is
wrong again, that one origin has sent the complete file, and was wrong.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from cachd.model import Extent


class Vouchers:
    """The origins that sent each part of one file, with the same hash. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_part: dict[Extent, tuple[str, set[str]]] = {}  # hash and origins

    def note(self, part: Extent, hexdigest: str, origin: str) -> None:
        """An origin has sent a part, whose bytes have this hash."""
        with self._lock:
            before, origins = self._by_part.get(part, ("", set()))
            if before == hexdigest:
                origins.add(origin)
            else:
                self._by_part[part] = hexdigest, {origin}

    def of(self, part: Extent) -> set[str]:
        """The origins that sent the part as it is now; none if it came with an earlier pull."""
        with self._lock:
            return set(self._by_part.get(part, ("", set()))[1])

    def complete(self, parts: Collection[Extent]) -> set[str]:
        """The origins that sent every one of the parts."""
        found = [self.of(part) for part in parts]
        return set.intersection(*found) if found else set()

    def bytes_of(self, origin: str, parts: Collection[Extent]) -> int:
        """How many bytes of the parts this origin sent."""
        return sum(part.size for part in parts if origin in self.of(part))

    def not_of(self, origin: str, parts: Collection[Extent]) -> frozenset[Extent]:
        """The parts that this origin did not send."""
        return frozenset(part for part in parts if origin not in self.of(part))
