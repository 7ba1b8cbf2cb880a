"""What every download works with."""

from __future__ import annotations

import threading

from cachd.metrics import Metrics
from cachd.transfer import threads
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.streams import BUFFER_BYTES, Streams

_COMMITTERS = 4


class Engine:
    """What every download works with: streams, limits, threads that hash or commit, metrics, patience."""

    def __init__(self, streams: Streams, bandwidth: Bandwidth, metrics: Metrics, *, retries: int) -> None:
        self.streams, self.bandwidth, self.metrics, self.retries = streams, bandwidth, metrics, retries
        # A digest is the longest of a pull's ways, and hashing leaves the interpreter to others: unlike
        # streams, not niced. More threads than cores would keep who asks whether a model is ready waiting.
        self.hashers = threads.pool(threads.CORES, "hash")
        self.committers = threads.pool(_COMMITTERS, "commit")  # they wait for the disk, not for a core
        self._buffers = threading.local()

    def hash_buffer(self) -> memoryview:
        """This thread's buffer to read back into."""
        if not hasattr(self._buffers, "buffer"):
            self._buffers.buffer = memoryview(bytearray(BUFFER_BYTES))
        buffer: memoryview = self._buffers.buffer
        return buffer

    def close(self) -> None:
        """Join every thread; downloads have ended before."""
        self.streams.close()
        for pool in (self.hashers, self.committers):
            pool.shutdown()
