"""What downloads report while they run, and the listener that counts it for the metrics."""

from __future__ import annotations

import threading
from typing import Protocol

from cachd.errors import CachdError, Unavailable
from cachd.metrics import CODE_CLASSES, MAX_ORIGINS, OTHER_ORIGINS, Metrics
from cachd.model import Ref
from cachd.transfer.origins import origin_name

_WEB = ("http", "https")


class Listener(Protocol):
    """Hears of the events of all downloads from one origin. Any thread may call it."""

    def received(self, count: int, seconds: float) -> None:
        """A stream received `count` bytes within `seconds`."""

    def resumed(self, count: int) -> None:
        """A download found `count` bytes that an earlier one left."""

    def answered(self, seconds: float) -> None:
        """A source answered a request for bytes of a file after `seconds`."""

    def refused(self, error: CachdError) -> None:
        """A request for bytes of a file failed."""

    def failed(self, error: CachdError) -> None:
        """The source could not resolve a ref, or an answer of it broke off."""

    def retried(self, error: CachdError) -> None:
        """A request that failed will be repeated."""

    def hedged(self, count: int) -> None:
        """Another connection takes over the last `count` bytes of a part, because its own is far slower."""

    def mismatched(self, reason: str, count: int) -> None:
        """A file had a wrong digest: `count` bytes are fetched again. `reason`: `disk` or `source`."""


class Meter:
    """Counts the events of one origin in the metrics. Implements `Listener`.

    `origin`: the value of the label; `scheme`: that of its refs.
    """

    def __init__(self, metrics: Metrics, scheme: str, origin: str) -> None:
        self._metrics, self._scheme, self._origin = metrics, scheme, origin
        # These are called often, so what can be looked up before is.
        self._bytes = metrics.download_bytes.labels(scheme).inc
        self._origin_bytes = metrics.origin_bytes.labels(origin).inc
        self._receive_seconds = metrics.origin_receive_seconds.labels(origin).inc
        self._answers = metrics.origin_requests.labels(scheme, "2xx").inc
        self._answer_seconds = metrics.origin_answer_seconds.labels(origin).observe
        for code_class in CODE_CLASSES:  # a rate over a series that begins with its first event misses it
            metrics.origin_failures.labels(origin, code_class)
        self.resumed = metrics.resumed_bytes.inc
        self.hedged = metrics.hedged_bytes.inc

    def received(self, count: int, seconds: float) -> None:
        """See `Listener`."""
        self._bytes(count)
        self._origin_bytes(count)
        self._receive_seconds(seconds)

    def answered(self, seconds: float) -> None:
        """See `Listener`."""
        self._answers()
        self._answer_seconds(seconds)

    def refused(self, error: CachdError) -> None:
        """See `Listener`."""
        self._metrics.origin_requests.labels(self._scheme, _code_class(error)).inc()
        self.failed(error)

    def failed(self, error: CachdError) -> None:
        """See `Listener`. A cancelled request and a ref that is forbidden are no failures of the origin."""
        if isinstance(error, Unavailable) or error.origin_status is not None:
            self._metrics.origin_failures.labels(self._origin, _code_class(error)).inc()

    def retried(self, error: CachdError) -> None:
        """See `Listener`."""
        self._metrics.origin_retries.labels(error.code).inc()

    def mismatched(self, reason: str, count: int) -> None:
        """See `Listener`."""
        self._metrics.verify_failures.labels("pull").inc()
        self._metrics.refetched_bytes.labels(reason).inc(count)


class Meters:
    """The meter of each origin, made when it is first looked up. Safe from any thread.

    An origin is what everybody sees in a ref; a mirror that serves it is not shown. The first MAX_ORIGINS
    have meters of their own.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._lock = metrics, threading.Lock()
        self._own: dict[str, Listener] = {}
        self._others: dict[str, Listener] = {}  # by scheme

    def of(self, ref: Ref) -> Listener:
        """The meter of the ref's origin."""
        origin = _origin(ref)
        with self._lock:
            if origin in self._own:
                return self._own[origin]
            if len(self._own) < MAX_ORIGINS:
                return self._own.setdefault(origin, Meter(self._metrics, ref.scheme, origin))
            if ref.scheme not in self._others:
                self._others[ref.scheme] = Meter(self._metrics, ref.scheme, OTHER_ORIGINS)
            return self._others[ref.scheme]


def _origin(ref: Ref) -> str:
    """The value of the label: host and port of a web server, `s3://bucket`, else the scheme."""
    if ref.scheme in _WEB:
        return origin_name(ref.base).partition("://")[2]
    return origin_name(ref.base) if ref.scheme == "s3" else ref.scheme


def _code_class(error: CachdError) -> str:
    """The class of an error's HTTP status, such as `5xx`; `broken` without one."""
    status = error.origin_status
    return f"{status // 100}xx" if isinstance(status, int) else "broken"
