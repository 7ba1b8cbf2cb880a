"""Asks again for pulls that failed for a reason that may pass: a source that failed, or a lack of space."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import structlog
from structlog.contextvars import bound_contextvars

from cachd.errors import CachdError
from cachd.policy import backoff
from cachd.store.store import Store
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull

log = structlog.get_logger(__name__)


class Retries:
    """Starts a failed pull again 30 s after it ended, later after up to ten minutes, until it is removed.

    `is_tried`: whether somebody else tries the pull of a name again. `now`: seconds since the epoch.
    """

    def __init__(
        self,
        store: Store,
        pulls: Pulls,
        is_tried: Callable[[str], bool],
        *,
        chance: Callable[[], float] = random.random,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._pulls, self._is_tried = store, pulls, is_tried
        self._chance, self._now = chance, now

    def tick(self) -> None:
        """Start the pulls that are due. Call it from one thread only."""
        for pull in self._pulls.known():
            name = pull.spec.name
            if not pull.may_be_retried or self._is_tried(name) or self._store.names.quarantine_of(name):
                continue
            if pull.retry_at is None:
                self._plan(pull, pull.ended_at or self._now())
            elif self._now() >= pull.retry_at:
                self._retry(pull)

    def _plan(self, failed: Pull, since: float) -> None:
        """Set when a failed pull is asked again."""
        pause = backoff.before_retry(failed.retries + 1, chance=self._chance())
        failed.retry_at = min(since, self._now()) + pause  # min: the clock may have been set back
        self._store.changes.mark(failed.spec.name)

    def _retry(self, failed: Pull) -> None:
        spec, permit = failed.spec, failed.permit
        ready = self._store.names.get(spec.name)
        is_refresh = ready is not None and ready.spec == spec
        try:
            with bound_contextvars(who="cachd:retry"):
                self._pulls.start(
                    spec,
                    priority=failed.priority,
                    refresh=is_refresh,
                    replace=permit.replace,
                    pins=permit.pins,
                    retried=failed,
                )
        except CachdError as error:
            log.warning("failed pull not asked again", name=spec.name, reason=error.detail)
            failed.retries += 1
            self._plan(failed, self._now())
