"""Counts how far a download is."""

from __future__ import annotations

import threading

from cachd.transfer.waits import Waits


class Tally:
    """The byte counts of one download. Safe from any thread.

    `resumed`: bytes that an earlier pull left. `fetched`: bytes received since the download began. `waits`:
    set when an origin fails, cleared by the next byte.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self.resumed = self.fetched = self._forgotten = 0
        self.is_proven = False
        self.waits: Waits | None = None

    @property
    def received(self) -> int:
        """Bytes of the file that are on this node, resumed ones included. Bytes fetched twice count once."""
        if self.is_proven:
            return self._size
        return min(self.resumed + self.fetched - self._forgotten, self._size)

    def add(self, count: int) -> None:
        """Count bytes that were received."""
        with self._lock:
            self.fetched += count
            self.waits = None

    def forget(self, count: int) -> None:
        """Count received bytes as missing again: they are fetched once more."""
        with self._lock:
            self._forgotten += count
