"""Carries out planned evictions."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import structlog

from cachd.errors import InUse, NotFound
from cachd.metrics import Metrics
from cachd.policy.eviction import Choice
from cachd.store.store import Store
from cachd.store.sweep import Leftover, remove

log = structlog.get_logger(__name__)

_MAX_EVICTIONS = 1000  # shown by the API


@dataclass(frozen=True, slots=True)
class Eviction:
    """A snapshot that was evicted at `at` (seconds since the epoch).

    `reason`: pull, pressure, unused or asked. `why`: the policy's explanation. `frees`: bytes of disk that
    the eviction was expected to free. `freed`: bytes that it did free.
    """

    at: float
    manifest: str
    names: tuple[str, ...]
    reason: str
    why: str
    frees: int
    freed: int


class Evictor:
    """Carries out what was planned. The caller holds `Planner.lock`."""

    def __init__(self, store: Store, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self._store, self._metrics, self._clock = store, metrics, clock
        self._evicted: deque[Eviction] = deque(maxlen=_MAX_EVICTIONS)

    def evicted(self) -> list[Eviction]:
        """The last evictions, newest first."""
        return list(reversed(self._evicted))

    def evict(self, choices: Sequence[Choice], reason: str) -> list[Eviction]:
        """Evict snapshots, skipping those that were removed or came into use since they were chosen."""
        return [done for choice in choices if (done := self._evict(choice, reason)) is not None]

    def drop_partials(self, partials: Iterable[Leftover]) -> int:
        """Remove partial downloads of ended pulls. Returns the bytes freed."""
        freed = 0
        for found in partials:
            size = remove(found)
            self._metrics.swept_bytes.labels(found.kind).inc(size)
            freed += size
        return freed

    def _evict(self, choice: Choice, reason: str) -> Eviction | None:
        candidate = choice.candidate
        try:
            freed = self._store.evict(candidate.manifest)  # point of no return
        except (InUse, NotFound) as error:
            log.info("eviction skipped", manifest=candidate.manifest, reason=error.detail)
            return None
        log.info(
            "evicted",
            names=list(candidate.names),
            manifest=candidate.manifest,
            reason=reason,
            why=choice.why,
            freed_bytes=freed,
        )
        self._metrics.evictions.labels(reason).inc()
        self._metrics.evicted_bytes.inc(freed)
        eviction = Eviction(
            self._clock(), candidate.manifest, candidate.names, reason, choice.why, choice.frees, freed
        )
        self._evicted.append(eviction)
        return eviction
