"""The downloads in flight: one transfer a blob, however many pulls ask for it."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait

from cachd.model import Digest, File
from cachd.sources.source import Source
from cachd.store.content import ContentStore
from cachd.store.space import Reservation
from cachd.transfer.download import Download
from cachd.transfer.engine import Engine
from cachd.transfer.streams import Share


class Downloads:
    """The downloads in flight, one a blob however many pulls ask for it."""

    def __init__(self, content: ContentStore, engine: Engine) -> None:
        self._content, self._engine = content, engine
        self._lock = threading.Lock()
        self._running: dict[Digest, Download] = {}

    def join(
        self,
        file: File,
        source: Source,
        share: Share,
        *,
        scheme: str,
        reservation: Reservation,
    ) -> Download:
        """Start the file's download, or join the one that runs. Every join is owed a `leave`."""
        while True:
            with self._lock:
                running = self._running.get(file.blob)
                if running is None or running.done.done():
                    download = Download(scheme, source, file, self._content, self._engine, reservation)
                    self._running[file.blob] = download
                    break
                if running.askers:
                    running.askers += 1
                    running.share_with(reservation)
                    return running
            wait([running.done])  # the last asker left it: let it close its ingest first
        download.done.add_done_callback(lambda done: self._forget(file, done))  # no way back: it goes at once
        download.start(share)
        return download

    def leave(self, download: Download) -> None:
        """Want it no more. The last asker to leave cancels it; returns when it has ended, then."""
        with self._lock:
            download.askers -= 1
            last = not download.askers
        if last and not download.done.done():
            download.cancel()
            wait([download.done])

    def _forget(self, file: File, done: Future[None]) -> None:
        with self._lock:
            running = self._running.get(file.blob)
            if running is not None and running.done is done:
                del self._running[file.blob]
