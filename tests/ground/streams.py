"""Does work on a stream of an engine, as downloads do."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from cachd.transfer.streams import StreamQuota, Streams

PATIENCE_SECONDS = 120.0


def done_on_stream(streams: Streams, quota: StreamQuota, work: Callable[[memoryview], object]) -> None:
    """Do it on a stream, with the stream's buffer, and wait until it is done. Raises what it raises."""
    done = Future[None]()

    def task(buffer: memoryview) -> None:
        try:
            work(buffer)
        except Exception as error:  # noqa: BLE001 `result` raises it
            done.set_exception(error)
        else:
            done.set_result(None)

    streams.submit(quota, task)
    done.result(PATIENCE_SECONDS)
