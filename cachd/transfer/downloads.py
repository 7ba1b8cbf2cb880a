"""Lets concurrent pulls share one download per blob, and each of them supply bytes of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait

from cachd.errors import Cancelled, Unavailable
from cachd.model import Digest, File
from cachd.sources.source import Source
from cachd.store.content import ContentStore
from cachd.store.space import Reservation
from cachd.transfer.download.download import Download
from cachd.transfer.download.supplier import Supplier
from cachd.transfer.engine import Engine
from cachd.transfer.streams import StreamQuota


class Downloads:
    """The running downloads, at most one per blob that is fetched. Safe from any thread."""

    def __init__(
        self, content: ContentStore, engine: Engine, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._content, self._engine, self._clock = content, engine, clock
        self._lock = threading.Lock()
        self._running: dict[Digest, Download] = {}  # those that a pull may join
        self._all: set[Download] = set()
        self._shared: set[Download] = set()  # those that several pulls have joined
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
    ) -> Supplier:
        """Start the file's download, or join the running one with another supplier.

        The caller waits for `done` of the supplier, and must `leave` it later. `scheme` and `prefix` select
        the bandwidth limits. `prefix` names the entry of `sources` whose limit applies to the file; it is
        empty if none does. Raises Cancelled after `interrupt`, and Unavailable while another pull fetches a
        file of this digest that has another size.
        """
        supplier = Supplier(
            file, source, quota, self._engine, scheme=scheme, prefix=prefix, reservation=reservation
        )
        while (ending := self._join(supplier)) is not None:
            wait([each.done for each in ending])  # it must close its ingest first
        return supplier

    def _join(self, supplier: Supplier) -> Sequence[Supplier] | None:
        """Let a supplier join. Returns None, or the suppliers of a download that must end before."""
        file = supplier.file
        with self._lock:
            if self._interrupted:
                raise Cancelled(f"{file.path}: cancelled before it began")
            running = self._running.get(file.blob)
            if running is None or running.is_closed_to_others:
                running = Download(file, self._content, self._engine, self._forget)
                self._running[file.blob] = running
                self._all.add(running)
            elif running.file.size != file.size:
                raise Unavailable(
                    f"{file.path}: {file.origin} states {file.size} bytes for {file.digest}, and another pull"
                    f" fetches {running.file.size} bytes from {running.file.origin}",
                    hint="one of the two sources is wrong: retry when the other pull has ended, or cancel it",
                )
            else:
                self._shared.add(running)
            if running.join(supplier):
                return None
            self._shared.discard(running)
            return list(running.schedule.suppliers)

    def are_served_by(self, location: str) -> bool:
        """Whether the origin of this ref or file answers a request of any download now."""
        return self._engine.streams.origins.of(location).is_serving

    def claim(self, quota: StreamQuota) -> None:
        """Give a waiting pull what a slow source keeps: streams, and parts of files that others supply, too.

        To be called regularly by every pull that waits. See `Streams.claim` and `Download.watch`.
        """
        self._engine.streams.claim(quota)
        with self._lock:
            shared = list(self._shared)
        for download in shared:
            download.watch(self._clock())

    def leave(self, joined: Sequence[Supplier]) -> None:
        """End suppliers. Cancels the downloads that no other pull wants, and waits for their end.

        The last ones first: they still wait for a stream, and would take one that becomes free.
        """
        unfinished = [each for each in reversed(joined) if not each.done.done()]
        for each in unfinished:
            each.download.leave(each)
        wait([each.done for each in unfinished])

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
            if self._running.get(download.file.blob) is download:
                del self._running[download.file.blob]
