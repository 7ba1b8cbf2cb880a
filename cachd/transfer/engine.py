"""Holds what all downloads share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cachd.kernel import threads
from cachd.metrics import Metrics
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.events import Meters
from cachd.transfer.streams import BUFFER_BYTES, Streams

_COMMITTERS = 4


class Engine:
    """The streams, bandwidth limits, metrics, and hashing and committing threads of all downloads.

    `retries`: how often a part may fail without progress. `listeners`: what the events of downloads are
    reported to, by origin. Raises Busy when the system refuses a thread.
    """

    def __init__(
        self,
        streams: Streams,
        bandwidth: Bandwidth,
        metrics: Metrics,
        *,
        retries: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.streams, self.bandwidth, self.retries, self.clock = streams, bandwidth, retries, clock
        self.listeners = Meters(metrics)
        # Hashing is on the critical path of a pull, so its threads are not niced as the streams are. Hashing
        # releases the GIL, so more threads than cores would take the cores that API requests need.
        self.hashers = threads.pool(threads.CORES, "hash")
        self.committers = threads.pool(_COMMITTERS, "commit")  # these wait for the disk, not for a core
        self._buffers = threading.local()

    def hash_buffer(self) -> memoryview:
        """The calling thread's buffer for reading a file back."""
        if not hasattr(self._buffers, "buffer"):
            self._buffers.buffer = memoryview(bytearray(BUFFER_BYTES))
        buffer: memoryview = self._buffers.buffer
        return buffer

    def close(self) -> None:
        """Join every thread. All downloads must have ended before."""
        self.streams.close()
        for pool in (self.hashers, self.committers):
            pool.shutdown()
