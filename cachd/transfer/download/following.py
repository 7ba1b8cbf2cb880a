"""Lets the digest of a file follow its bytes.

While a pull has at least one file per stream, each stream fetches one file, part after part, and hashes the
bytes as they arrive, while they are in the processor's cache. Hashing limits a pull of many shards on few
cores. When there are fewer files than streams, several streams share a file and a hashing thread hashes it.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from cachd.store.ingest import Ingest
from cachd.transfer.engine import Engine

if TYPE_CHECKING:
    from cachd.transfer.download.download import Download

_FOLLOW_BYTES = 4 << 20


class Following:
    """The digest of one ingest, computed by one thread at a time: a stream's, or a hashing thread.

    idle --join_in: a stream hashes what it receives--> busy --leave--> idle
    idle --go_on: a hashing thread reads bytes back --> busy --_follow: caught up--> idle
    """

    def __init__(self, ingest: Ingest, download: Download, engine: Engine) -> None:
        self._ingest, self._download, self._engine = ingest, download, engine
        self._lock = threading.Lock()
        self._is_busy = False

    def join_in(self, offset: int) -> bool:
        """Whether the calling stream shall hash the bytes that it receives from `offset` on.

        If so, it must `leave` afterwards.
        """
        with self._lock:
            if self._is_busy or not self._ingest.takes_from(offset):
                return False
            self._is_busy = True
            return True

    def leave(self) -> None:
        """The calling stream hashes no more."""
        with self._lock:
            self._is_busy = False

    def go_on(self) -> None:
        """Let a hashing thread hash the bytes received so far, if they are worth its while."""
        with self._lock:
            if self._is_busy or not (self._ingest.behind >= _FOLLOW_BYTES or self._ingest.is_received):
                return
            self._is_busy = True
        self._engine.hashers.submit(self._follow)

    def _follow(self) -> None:
        """Hash the bytes received so far. The commit follows when the last thread leaves a hashed file."""
        with self._download.inside() as inside:
            if not inside:
                return
            while not self._download.tally.is_over:
                self._ingest.follow(self._engine.hash_buffer())
                with self._lock:
                    if not self._ingest.behind:
                        self._is_busy = False
                        break
