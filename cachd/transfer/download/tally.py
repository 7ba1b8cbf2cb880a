"""Counts how far a download is, for whoever shows the progress of a pull."""

from __future__ import annotations

import threading

from cachd.model import File
from cachd.transfer.waits import Waits


class Tally:
    """The figures of one download. Written by its threads, read by any thread.

    `resumed`: bytes that an earlier pull left, and that passed their check. `fetched`: bytes received from
    the sources since the download began. `hedged`: bytes of parts that another connection took over, because
    theirs was far slower. `waits`: set when an origin fails, cleared by the next byte.
    `is_waiting_for_space`: it is paused until other processes leave the disk enough free space. `is_over`: it
    has ended; the pulls learn of it once every thread has left.
    """

    def __init__(self, file: File) -> None:
        self.file = file
        self._lock = threading.Lock()
        self.resumed = self.fetched = self.hedged = self._forgotten = 0
        self.is_proven = self.is_waiting_for_space = self.is_over = False
        self.waits: Waits | None = None

    @property
    def received(self) -> int:
        """Bytes of the file that are on this node, resumed ones included. Bytes fetched twice count once."""
        if self.is_proven:
            return self.file.size
        return min(self.resumed + self.fetched - self._forgotten, self.file.size)

    def add(self, count: int) -> None:
        """Count bytes that were received."""
        with self._lock:
            self.fetched += count
            self.waits = None

    def forget(self, count: int) -> None:
        """Count received bytes as missing again: they are fetched once more."""
        with self._lock:
            self._forgotten += count

    def hedge(self, count: int) -> None:
        """Count bytes that another connection takes over."""
        with self._lock:
            self.hedged += count
