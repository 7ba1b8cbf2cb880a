"""Lets concurrent pulls share one download per blob, and each of them supply bytes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from cachd.errors import Cancelled
from cachd.model import Digest, File
from cachd.store.content import ContentStore
from cachd.transfer.download.download import Download
from cachd.transfer.download.supplier import Supplier, Supply
from cachd.transfer.engine import Engine
from cachd.transfer.streams import StreamQuota


class Downloads:
    """The running downloads, at most one per blob and size that is fetched. Safe from any thread."""

    def __init__(
        self, content: ContentStore, engine: Engine, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._content, self._engine, self._clock = content, engine, clock
        self._lock = threading.Lock()
        self._closed = threading.Condition(self._lock)
        self._waiting = 0  # threads that wait for `_closed`
        self._running: dict[tuple[Digest, int], Download] = {}  # those that a pull may join
        self._all: set[Download] = set()
        self._shared: set[Download] = set()  # those that several pulls have joined
        self._interrupted = False

    def join(self, file: File, supply: Supply, *, prefix: str = "") -> Supplier:
        """Start the file's download, or join the running one with another supplier.

        The caller must `leave` it later. `prefix`: as in `Supplier`. Raises Cancelled after `interrupt`.
        """
        supplier = Supplier(file, supply, self._engine, prefix=prefix)
        with self._lock:
            while not (running := self._running_for(file)).join(supplier):
                self._shared.discard(running)
                self._waiting += 1
                while self._running.get(_key(file)) is running:  # it is over, and must close its ingest first
                    self._closed.wait()
                self._waiting -= 1
        return supplier

    def _running_for(self, file: File) -> Download:
        """The download of the file that may be joined, begun if there is none. The caller holds the lock."""
        if self._interrupted:
            raise Cancelled(f"{file.path}: cancelled before it began")
        running = self._running.get(_key(file))
        if running is None or running.is_closed_to_others:
            running = Download(file, self._content, self._engine, self._forget)
            self._running[_key(file)] = running
            self._all.add(running)
        else:
            self._shared.add(running)
        return running

    def are_served_by(self, location: str) -> bool:
        """Whether the origin of this ref or file answers a request of any download now."""
        return self._engine.streams.origins.of(location).is_serving

    def hasten(self, file: File) -> bool:
        """Begin the file's download before the others of its pulls, because somebody waits for this file.

        Returns False if there is no such download yet.
        """
        with self._lock:
            running = self._running.get(_key(file))
        if running is not None:
            running.hasten()
        return running is not None

    def claim(self, quota: StreamQuota) -> None:
        """Take streams from slow sources, for a pull that waits, and parts that another supplier can send.

        To be called regularly by every pull that waits. See `Streams.claim` and `Download.watch`.
        """
        self._engine.streams.claim(quota)
        with self._lock:
            shared = list(self._shared)
        for download in shared:
            download.watch(self._clock())

    def leave(self, joined: Sequence[Supplier]) -> None:
        """End suppliers of one pull. Cancels the downloads that no other pull wants, and waits for their end.

        The last ones first: they still wait for a stream, and would take one that becomes free.
        """
        for each in reversed(joined):
            if not each.has_ended:
                each.download.leave(each)
        if joined:
            joined[0].outcomes.wait_for_all()

    def interrupt(self) -> None:
        """Cancel every download without waiting. `join` raises Cancelled from now on."""
        with self._lock:
            self._interrupted = True
            running = list(self._all)
        for download in running:
            download.cancel()

    def _forget(self, download: Download) -> None:
        with self._lock:
            self._all.discard(download)
            self._shared.discard(download)
            if self._running.get(_key(download.file)) is download:
                del self._running[_key(download.file)]
            if self._waiting:
                self._closed.notify_all()


def _key(file: File) -> tuple[Digest, int]:
    """The blob and the size: all suppliers of a download state the same.

    If two sources state two sizes for one digest, one of them lies. Each has its own download, so that the
    liar fails alone.
    """
    return file.blob, file.size
