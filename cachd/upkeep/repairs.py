"""Repairs damaged models: quarantines them, and starts the pulls that fetch the damaged files again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from cachd.errors import CachdError
from cachd.metrics import Metrics
from cachd.model import File
from cachd.policy import backoff
from cachd.store.scrub import Replaced
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.transfer.pulls import Pulls

log = structlog.get_logger(__name__)


class Repairs:
    """Quarantines damaged models and starts their repair. Safe from any thread, except `retry`."""

    def __init__(
        self,
        store: Store,
        pulls: Pulls,
        scrub_log: ScrubLog,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._store, self._pulls = store, pulls
        self._scrub_log, self._metrics = scrub_log, metrics
        self._clock, self._now, self._chance = clock, now, chance
        self._tries: dict[str, tuple[int, float]] = {}  # by name: attempts, and when to retry (monotonic)

    def check(self, name: str) -> str | None:
        """Check that pods find every file of a ready model; if not, quarantine it and start its repair.

        Returns what is wrong; None when nothing is. Raises DiskFailed.
        """
        wrong = self._store.check(name, now=self._now())
        if wrong:
            self._metrics.verify_failures.labels("scrub").inc()
            self._repair(name)
        return wrong

    def repair_blob(self, file: File, wrong: str, inode: int) -> bool:
        """Quarantine the models that use a damaged blob, and start their repair.

        `inode`: the inode number of the damaged file; 0 if the file is missing. Returns False
        when the blob has been replaced meanwhile, or no model needs it.
        """
        try:
            names = self._store.quarantine(file, wrong, inode, now=self._now())
        except Replaced:
            return False
        self._scrub_log.forget(file.blob)
        self._metrics.verify_failures.labels("scrub").inc()
        log.error("blob damaged", path=file.path, blob=str(file.blob), wrong=wrong, models=names)
        for name in names:
            self._repair(name)
        return True

    def repair_copy(self, file: File, place: str, wrong: str, inode: int) -> bool:
        """Quarantine and repair the models that show copies of an intact blob; that at `place` is damaged.

        `inode`: its inode number. Returns False when the copy has been replaced or removed meanwhile.
        """
        try:
            names = self._store.quarantine_copy(file, place, wrong, inode, now=self._now())
        except Replaced:
            return False
        self._metrics.verify_failures.labels("scrub").inc()
        log.error("copy damaged", path=file.path, blob=str(file.blob), wrong=wrong, models=names)
        for name in names:
            self._repair(name)
        return True

    def retry(self) -> None:
        """Start the repair of each quarantined model that no pull repairs, each after a backoff.

        Call it from one thread only.
        """
        quarantined = {each.snapshot.name for each in self._store.names.quarantined()}
        self._tries = {name: tries for name, tries in self._tries.items() if name in quarantined}
        for name in quarantined:
            running = self._pulls.get(name)
            if running is not None and not running.done.done():
                continue
            attempts, due = self._tries.get(name, (0, 0.0))
            if self._clock() >= due:
                self._repair(name)
                seconds = backoff.delay(attempts + 1, requested=None, chance=self._chance())
                self._tries[name] = (attempts + 1, self._clock() + seconds)
            elif running is not None:
                running.retry_at = self._now() + due - self._clock()

    def _repair(self, name: str) -> None:
        """Start a pull of the files that the quarantined model lacks. A delete that comes first wins."""
        found = self._store.names.quarantine_of(name)
        if found is None:
            return
        try:
            with bound_contextvars(who="cachd:repair"):
                self._pulls.start_by_itself(found.snapshot.spec, repairs=True)
        except CachdError as error:
            log.warning("repair not started", name=name, reason=error.detail)
