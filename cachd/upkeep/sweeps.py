"""Runs the sweep of leftovers: at the start, at intervals, and on request."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from cachd.kernel.periodic import Periodic
from cachd.metrics import Metrics
from cachd.store.store import Store
from cachd.store.sweep import KINDS, Leftover, remove
from cachd.transfer.pulls import Pulls

_FIRST_SECONDS = 1.0  # the daemon should answer requests first


class Sweeps:
    """A thread that sweeps at the start and every `interval_seconds`; with 0, only on request.

    Blobs and ingests of ended pulls are kept for `keep_seconds` after their last change, and after the start
    of the daemon, so that the next pull of the same model can resume from them.
    """

    def __init__(
        self,
        store: Store,
        pulls: Pulls,
        metrics: Metrics,
        *,
        interval_seconds: float,
        keep_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._pulls, self._metrics = store, pulls, metrics
        self._clock, self._now = clock, now
        self._interval_seconds, self._keep_seconds = interval_seconds, keep_seconds
        self._started = clock()
        self._sweeping = threading.Lock()
        self._thread = Periodic("sweep", self._run, retry_seconds=interval_seconds)
        for kind in KINDS:
            metrics.swept_bytes.labels(kind)

    def start(self) -> None:
        """Start the thread, unless sweeps are only made on request."""
        if self._interval_seconds:
            self._thread.start(after=min(_FIRST_SECONDS, self._interval_seconds))

    def close(self) -> None:
        """Join the thread."""
        self._thread.close()

    def leftovers(self, *, everything: bool = False) -> list[Leftover]:
        """What a sweep would remove now. `everything`: also what changed within `keep_seconds`."""
        running = self._pulls.running()
        return list(
            self._store.sweep.leftovers(
                before=math.inf if everything else self._kept_since(),
                keep={pull.spec.ref.base for pull in running},
                pulls_known=all(pull.progress.manifest for pull in running),
            )
        )

    def _kept_since(self) -> float:
        """Leftovers whose last change was before this time (seconds since the epoch) may be removed."""
        is_young = self._clock() - self._started < self._keep_seconds
        return -math.inf if is_young else self._now() - self._keep_seconds

    def sweep(self, *, everything: bool = False) -> list[tuple[Leftover, int]]:
        """Remove the leftovers. Returns each with the bytes it freed: 0 if it came into use meanwhile."""
        with self._sweeping:
            swept = []
            for found in self.leftovers(everything=everything):
                if self._thread.is_stopping:
                    break
                freed = remove(found)
                self._metrics.swept_bytes.labels(found.kind).inc(freed)
                swept.append((found, freed))
            self._store.content.proven.drop_stale()
            return swept

    def _run(self) -> float:
        self.sweep()
        return self._interval_seconds
