"""Runs the sweep of leftovers: at the start, at intervals, and on request."""

from __future__ import annotations

import math
import threading
import time

import structlog

from cachd.kernel import threads
from cachd.metrics import Metrics
from cachd.store.store import Store
from cachd.store.sweep import KINDS, Leftover, remove
from cachd.transfer.pulls import Pulls

log = structlog.get_logger(__name__)

_FIRST_SECONDS = 1.0  # the daemon should answer requests first


class Sweeps:
    """A thread that sweeps at the start and every `interval_seconds`; with 0, only on request.

    Blobs and ingests of ended pulls are kept for `keep_seconds` after their last change, and after the start
    of the daemon, so that the next pull of the same model can resume from them.
    """

    def __init__(
        self, store: Store, pulls: Pulls, metrics: Metrics, *, interval_seconds: float, keep_seconds: float
    ) -> None:
        self._store, self._pulls, self._metrics = store, pulls, metrics
        self._interval_seconds, self._keep_seconds = interval_seconds, keep_seconds
        self._started = time.monotonic()
        self._sweeping = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweep", daemon=True)
        for kind in KINDS:
            metrics.swept_bytes.labels(kind)

    def start(self) -> None:
        if self._interval_seconds:
            threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

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
        is_young = time.monotonic() - self._started < self._keep_seconds
        return -math.inf if is_young else time.time() - self._keep_seconds

    def sweep(self, *, everything: bool = False) -> list[tuple[Leftover, int]]:
        """Remove the leftovers. Returns each with the bytes it freed: 0 if it came into use meanwhile."""
        with self._sweeping:
            swept = []
            for found in self.leftovers(everything=everything):
                if self._stop.is_set():
                    break
                freed = remove(found)
                self._metrics.swept_bytes.labels(found.kind).inc(freed)
                swept.append((found, freed))
            return swept

    def _run(self) -> None:
        seconds = min(_FIRST_SECONDS, self._interval_seconds)
        while not self._stop.wait(seconds):
            seconds = self._interval_seconds
            try:
                self.sweep()
            except Exception:
                log.exception("a sweep failed in a way it should not")
