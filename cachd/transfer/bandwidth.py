"""The limits in force: where streams wait before they receive more."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

import structlog

from cachd.errors import Cancelled
from cachd.metrics import Metrics
from cachd.model import Limits
from cachd.policy.rate_limiter import RateLimiter
from cachd.sources.source import CancelToken

log = structlog.get_logger(__name__)

ALL = "all"
_NO_PREFIXES: Mapping[str, int] = {}


class Bandwidth:
    """Shared by all streams. Without a limit it costs one look."""

    def __init__(self, limits: Limits, metrics: Metrics, prefixes: Mapping[str, int] = _NO_PREFIXES) -> None:
        self._metrics = metrics
        self._anew = threading.Condition()
        self._line = 0  # another one whenever all who wait must stand in line anew
        self._limiters: dict[str, RateLimiter] = {}
        self.limits = Limits()
        self.prefixes = _NO_PREFIXES
        if limits != self.limits or prefixes:
            self.change(limits, prefixes)

    def change(self, limits: Limits, prefixes: Mapping[str, int] | None = None) -> None:
        """Let these limits hold from now on, for those who wait already, too.

        `prefixes` are those of the entries of `sources`, in bytes a second; None leaves them as they are.
        """
        with self._anew:
            self.limits, now = limits, time.monotonic()
            self.prefixes = self.prefixes if prefixes is None else prefixes
            rates = self.rates()
            self._limiters = {
                source: self._limiters.get(source) or RateLimiter(rates[source], now) for source in rates
            }
            self._restart(rates)
        log.info("bandwidth limits", **rates)

    def rates(self) -> Mapping[str, int]:
        """Bytes a second by source and by prefix; `all` is the limit of all together."""
        every = self.limits.bytes_per_second
        return {**({ALL: every} if every else {}), **self.limits.sources, **self.prefixes}

    def allow(self, scheme: str, wanted: int, cancel_token: CancelToken, *, prefix: str = "") -> int:
        """Wait for a stream's turn; how many of the bytes it wants it may receive now, one at least.

        The limits of all, of the scheme and of `prefix` hold together.

        Raises Cancelled as soon as `cancel_token` is cancelled. No stream waits longer than one turn of every
        other stream takes.
        """
        limits = (ALL, scheme, prefix)
        if self._limiters.keys().isdisjoint(limits):
            return wanted
        waiting = _Waiting(self)
        began = time.monotonic()
        with cancel_token.reaches(waiting):
            count = self._turn(limits, wanted, waiting)
        self._metrics.limited_seconds.labels(scheme).inc(time.monotonic() - began)
        return count

    def leave(self, waiting: _Waiting) -> None:
        """Let one who waits go, and those behind it move up."""
        with self._anew:
            waiting.is_over = True
            self._restart(self.rates())

    def _turn(self, limits: tuple[str, ...], wanted: int, waiting: _Waiting) -> int:
        with self._anew:
            while not waiting.is_over:
                line, now = self._line, time.monotonic()
                limiters = [self._limiters[each] for each in limits if each in self._limiters]
                count = min([wanted, *(limiter.turn_bytes for limiter in limiters)])
                due = now + max((limiter.reserve(count, now) for limiter in limiters), default=0.0)
                while line == self._line and (left := due - time.monotonic()) > 0:
                    self._anew.wait(left)
                if line == self._line:
                    return count
            raise Cancelled("cut while it waited for its turn")

    def _restart(self, rates: Mapping[str, int]) -> None:
        now = time.monotonic()
        for source, limiter in self._limiters.items():
            limiter.restart(rates[source], now)
        self._line += 1
        self._anew.notify_all()


class _Waiting:
    """One stream that waits for its turn; a cut ends that."""

    def __init__(self, bandwidth: Bandwidth) -> None:
        self._bandwidth = bandwidth
        self.is_over = False

    def abort(self) -> None:
        self._bandwidth.leave(self)
