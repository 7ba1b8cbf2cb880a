"""Lets concurrent pulls share one download per blob."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, wait

from cachd.errors import Cancelled
from cachd.model import Digest, File
from cachd.sources.source import Source
from cachd.store.content import ContentStore
from cachd.store.space import Reservation
from cachd.transfer.download import Download
from cachd.transfer.engine import Engine
from cachd.transfer.streams import StreamQuota


class Downloads:
    """The running downloads, at most one per blob. Safe from any thread."""

    def __init__(self, content: ContentStore, engine: Engine) -> None:
        self._content, self._engine = content, engine
        self._lock = threading.Lock()
        self._running: dict[Digest, Download] = {}
        self._interrupted = False

    def join(
        self,
        file: File,
        source: Source,
        quota: StreamQuota,
        *,
        scheme: str,
        reservation: Reservation,
        prefix: str = "",
    ) -> Download:
        """Start the file's download, or join the running one. The caller must `leave` it later.

        `scheme` and `prefix` select the bandwidth limits. `prefix` names the entry of `sources` whose limit
        applies to the file; it is empty if none does. Raises Cancelled after `interrupt`.
        """
        while True:
            with self._lock:
                if self._interrupted:
                    raise Cancelled(f"{file.path}: cancelled before it began")
                running = self._running.get(file.blob)
                if running is None or running.done.done():
                    download = Download(
                        scheme, source, file, self._content, self._engine, reservation, prefix=prefix
                    )
                    self._running[file.blob] = download
                    break
                if running.callers:
                    running.callers += 1
                    running.share_with(reservation)
                    return running
            wait([running.done])  # its last caller has left: it must close its ingest first
        download.done.add_done_callback(lambda done: self._forget(file, done))
        download.start(quota)
        return download

    def claim(self, quota: StreamQuota) -> None:
        """See `Streams.claim`."""
        self._engine.streams.claim(quota)

    def leave(self, joined: Sequence[Download]) -> None:
        """Give up joined downloads. Cancels those that no other caller wants, and waits for their end."""
        with self._lock:
            for download in joined:
                download.callers -= 1
            unwanted = [download for download in joined if not download.callers]
        _cancel(unwanted)
        wait([download.done for download in unwanted])

    def interrupt(self) -> None:
        """Cancel every download without waiting. `join` raises Cancelled from now on."""
        with self._lock:
            self._interrupted = True
            running = list(self._running.values())
        _cancel(running)

    def _forget(self, file: File, done: Future[None]) -> None:
        with self._lock:
            running = self._running.get(file.blob)
            if running is not None and running.done is done:
                del self._running[file.blob]


def _cancel(downloads: Sequence[Download]) -> None:
    """Cancel the last first: they still wait for a stream, and would take one that becomes free."""
    for download in reversed(downloads):
        download.cancel()
