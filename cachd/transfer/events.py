"""What downloads report while they run, and the listener that counts it for the metrics."""

from __future__ import annotations

from typing import Protocol

from cachd.errors import CachdError
from cachd.metrics import Metrics


class Listener(Protocol):
    """Hears of the events of all downloads from the sources of one scheme. Any thread may call it."""

    def received(self, count: int) -> None:
        """A stream received `count` bytes."""

    def resumed(self, count: int) -> None:
        """A download found `count` bytes that an earlier one left."""

    def answered(self) -> None:
        """A source answered a request for bytes of a file."""

    def refused(self, error: CachdError) -> None:
        """A request for bytes of a file failed."""

    def retried(self, error: CachdError) -> None:
        """A request that failed will be repeated."""

    def hedged(self, count: int) -> None:
        """Another connection takes over the last `count` bytes of a part, because its own is far slower."""

    def mismatched(self, reason: str, count: int) -> None:
        """A file had a wrong digest: `count` bytes are fetched again. `reason`: `disk` or `source`."""


class Meter:
    """Counts the events of one scheme in the metrics. Implements `Listener`."""

    def __init__(self, metrics: Metrics, scheme: str) -> None:
        self._metrics, self._scheme = metrics, scheme
        self.received = metrics.download_bytes.labels(
            scheme
        ).inc  # without a call between: it is called often
        self.resumed = metrics.resumed_bytes.inc
        self.hedged = metrics.hedged_bytes.inc
        self.answered = metrics.origin_requests.labels(scheme, "2xx").inc

    def refused(self, error: CachdError) -> None:
        """See `Listener`."""
        status = error.origin_status
        code_class = f"{status // 100}xx" if isinstance(status, int) else "broken"
        self._metrics.origin_requests.labels(self._scheme, code_class).inc()

    def retried(self, error: CachdError) -> None:
        """See `Listener`."""
        self._metrics.origin_retries.labels(error.code).inc()

    def mismatched(self, reason: str, count: int) -> None:
        """See `Listener`."""
        self._metrics.verify_failures.labels("pull").inc()
        self._metrics.refetched_bytes.labels(reason).inc(count)


class Meters(dict[str, Listener]):
    """The meter of each scheme, made when it is first looked up."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self._metrics = metrics

    def __missing__(self, scheme: str) -> Listener:
        meter = self[scheme] = Meter(self._metrics, scheme)
        return meter
