"""Makes streams wait so that they receive no more than the bandwidth limits allow."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping

import structlog

from cachd.errors import Cancelled
from cachd.metrics import Metrics
from cachd.model import Limits
from cachd.policy.rate_limiter import RateLimiter
from cachd.sources.cancel import CancelToken

log = structlog.get_logger(__name__)

ALL = "all"
_NO_PREFIXES: Mapping[str, int] = {}


class Bandwidth:
    """The bandwidth limits of all streams. Safe from any thread; costs next to nothing without a limit."""

    def __init__(
        self,
        limits: Limits,
        metrics: Metrics,
        prefixes: Mapping[str, int] = _NO_PREFIXES,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics, self._clock = metrics, clock
        self._restarted = threading.Condition()
        self._generation = 0  # changes when every waiting stream must reserve again
        self._limiters: dict[str, RateLimiter] = {}
        self.limits = Limits()
        self.prefixes = _NO_PREFIXES
        if limits != self.limits or prefixes:
            self.change(limits, prefixes)

    def change(self, limits: Limits, prefixes: Mapping[str, int] | None = None) -> None:
        """Replace the limits, also for streams that wait already.

        `prefixes`: limits of entries of `sources`, in bytes per second; None leaves them unchanged.
        """
        with self._restarted:
            self.limits, now = limits, self._clock()
            self.prefixes = self.prefixes if prefixes is None else prefixes
            rates = self.rates()
            self._limiters = {
                source: self._limiters.get(source) or RateLimiter(rates[source], now) for source in rates
            }
            self._restart(rates)
        log.info("bandwidth limits", **rates)

    def rates(self) -> Mapping[str, int]:
        """Bytes per second by scheme and by prefix. The entry `all` limits all streams together."""
        every = self.limits.bytes_per_second
        return {**({ALL: every} if every else {}), **self.limits.sources, **self.prefixes}

    def allow(self, scheme: str, wanted: int, cancel_token: CancelToken, *, prefix: str = "") -> int:
        """Wait for the calling stream's slot. Returns how many of `wanted` bytes it may receive, at least 1.

        The limits of all streams, of `scheme` and of `prefix` apply together. No stream waits longer than it
        takes to serve every other stream once. Raises Cancelled as soon as `cancel_token` is cancelled.
        """
        limits = (ALL, scheme, prefix)
        if self._limiters.keys().isdisjoint(limits):
            return wanted
        waiting = _Waiting(self)
        began = self._clock()
        with cancel_token.reaches(waiting):
            count = self._wait_for_slot(limits, wanted, waiting)
        self._metrics.limited_seconds.labels(scheme).inc(self._clock() - began)
        return count

    def leave(self, waiting: _Waiting) -> None:
        """End one stream's wait. The streams behind it reserve again."""
        with self._restarted:
            waiting.is_over = True
            self._restart(self.rates())

    def _wait_for_slot(self, limits: tuple[str, ...], wanted: int, waiting: _Waiting) -> int:
        with self._restarted:
            while not waiting.is_over:
                generation, now = self._generation, self._clock()
                limiters = [self._limiters[each] for each in limits if each in self._limiters]
                count = min([wanted, *(limiter.slot_bytes for limiter in limiters)])
                due = now + max((limiter.reserve(count, now) for limiter in limiters), default=0.0)
                while generation == self._generation and (left := due - self._clock()) > 0:
                    self._restarted.wait(left)
                if generation == self._generation:
                    return count
            raise Cancelled("cancelled while it waited for the bandwidth limit")

    def _restart(self, rates: Mapping[str, int]) -> None:
        now = self._clock()
        for source, limiter in self._limiters.items():
            limiter.restart(rates[source], now)
        self._generation += 1
        self._restarted.notify_all()


class _Waiting:
    """One waiting stream. A cancel token may abort the wait."""

    def __init__(self, bandwidth: Bandwidth) -> None:
        self._bandwidth = bandwidth
        self.is_over = False

    def abort(self) -> None:
        self._bandwidth.leave(self)
