"""Sends the bytes of files: of a ready snapshot, or of a file that is still being pulled.

A client must never end with a file that was not verified. While a file is pulled, its bytes are sent under
the address of one attempt (store/ingest/offer.py), as they are synced. Its end is held back until the digest
is right. If the digest is wrong, the connection is cut, and the address answers 410 from then on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachd.errors import CachdError
from cachd.kernel import durable
from cachd.model import Extent, File
from cachd.serve.answer import Aborted, Sink
from cachd.store.content import ContentStore
from cachd.store.ingest import Offer
from cachd.transfer.request import Pull

_CHECK_SECONDS = 0.5  # how often the pull, the client and the daemon are checked
_STALL_SECONDS = 3600.0  # without a new byte


@dataclass(frozen=True, slots=True)
class ReadyBody:
    """An extent of a file of a ready snapshot. `path`: in its view, so that the open counts as a use.

    The open file keeps the snapshot from being evicted.
    """

    path: Path
    extent: Extent
    content: ContentStore

    @property
    def size(self) -> int:
        """See `Body`."""
        return self.extent.size

    @property
    def waits(self) -> bool:
        """See `Body`."""
        return False

    def send(self, sink: Sink) -> None:
        """See `Body`."""
        try:
            with _opened(self.path, self.content) as fd:
                sink.send_file(fd, self.extent.start, self.extent.size)
        except CachdError as error:
            raise Aborted(str(error)) from error
        except FileNotFoundError as error:
            raise Aborted(f"{self.path.name} was removed meanwhile") from error


@contextmanager
def _opened(path: Path, content: ContentStore) -> Iterator[int]:
    """A descriptor of the file. It is opened while no thread asks the kernel which files are open."""
    with durable.disk_errors(path):
        with content.reads.reading():
            fd = durable.open_file(path, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class ArrivingBody:
    """An extent of a file that `pull` fetches. `attempt`: whose bytes the client has, if it has some.

    Without an attempt, nothing is sent before the file is verified. `hasten`: fetches the file before the
    others of its pull; False if its download has not begun.
    """

    file: File
    extent: Extent
    offer: Offer
    pull: Pull
    content: ContentStore
    hasten: Callable[[File], bool]
    attempt: int | None = None
    clock: Callable[[], float] = time.monotonic

    @property
    def size(self) -> int:
        """See `Body`."""
        return self.extent.size

    @property
    def waits(self) -> bool:
        """See `Body`."""
        return True

    def send(self, sink: Sink) -> None:
        """See `Body`."""
        at, since, changes, is_hastened = self.extent.start, self.clock(), -1, False
        while at < self.extent.stop:
            sink.check()
            self.offer.follow(at)
            sent = self._send_some(sink, at)
            if sent:
                at, since = at + sent, self.clock()
                continue
            self._check_pull(at, self.clock() - since)
            is_hastened = is_hastened or self.hasten(self.file)
            changes = self.offer.wait(changes, _CHECK_SECONDS)

    def _send_some(self, sink: Sink, at: int) -> int:
        """Send what may be sent now from `at` on. Returns the number of bytes. Raises Aborted."""
        if is_here(self.content, self.file):
            if self.attempt is not None and not self.offer.is_right(self.attempt):
                raise Aborted(f"{self.file.path}: the bytes of attempt {self.attempt} were wrong")
            return self._send_from(sink, self.content.path(self.file.blob), Extent(at, self.extent.stop))
        if self.attempt is None or self.extent.stop < self.file.size:
            return 0
        if (claimed := self.offer.claim()) is None:
            return 0
        if claimed != self.attempt:
            raise Aborted(f"{self.file.path}: the bytes of attempt {self.attempt} were wrong")
        stop = self.offer.until(claimed, at)
        if stop is None or stop <= at:
            return 0
        return self._send_from(sink, self.offer.data, Extent(at, stop))

    def _send_from(self, sink: Sink, path: Path, extent: Extent) -> int:
        try:
            with _opened(path, self.content) as fd:
                sink.send_file(fd, extent.start, extent.size)
        except FileNotFoundError:  # the ingest became the blob meanwhile
            return 0
        except CachdError as error:
            raise Aborted(str(error)) from error
        return extent.size

    def _check_pull(self, at: int, waited: float) -> None:
        """Raises Aborted when the pull brings no more bytes."""
        if self.pull.error is not None and not is_here(self.content, self.file):
            raise Aborted(f"{self.file.path}: {self.pull.error}")
        if waited > _STALL_SECONDS:
            raise Aborted(f"{self.file.path}: no byte arrived after byte {at} for {waited:.0f} s")


def is_here(content: ContentStore, file: File) -> bool:
    """Whether the verified bytes of a file are here, and its source may use them."""
    return content.has(file) and content.proven.has(file)
