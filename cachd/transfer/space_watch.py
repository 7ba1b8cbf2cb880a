"""Relieves the disk in a thread: evicts what is unused or in the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from cachd.errors import CachdError
from cachd.kernel.periodic import Periodic
from cachd.model import Percentage
from cachd.policy.eviction import bytes_over, largest_first
from cachd.store.capacity import Capacity
from cachd.store.store import Store
from cachd.transfer.evictor import Evictor
from cachd.transfer.plans import Plan, Planner
from cachd.transfer.usage import record_open_now, record_opens

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1.0
_CHECK_SECONDS = 60.0  # between two checks which snapshots some process has open
_SOON_SECONDS = 5.0  # the same when the kernel may not report every open and a process may be starting
_STARTING_SECONDS = 600.0  # a process may be starting this long after a model was published or asked for
_WAIT_SECONDS = 600.0  # after an eviction for pressure that freed too little


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """When cachd evicts. `automatic`: whether it evicts without being asked by an operator.

    When more than `high` of the space is taken, it evicts down to `low`. With `unused_seconds`, it also
    evicts snapshots that nobody used for so long.
    """

    high: Percentage
    low: Percentage
    unused_seconds: float
    automatic: bool


class SpaceWatch:
    """A thread that records uses, and evicts by `rules`."""

    def __init__(
        self,
        store: Store,
        planner: Planner,
        evictor: Evictor,
        rules: EvictionRules,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._planner, self._evictor = store, planner, evictor
        self._clock, self._now = clock, now
        self._rules = rules
        self._warned_short = False
        self._wait_until = 0.0
        self._checked_at, self._lost_opens = 0.0, False
        self._thread = Periodic("reclaim", self._tick)

    def start(self) -> None:
        """Start the thread. Its first check of open files waits until the daemon has started."""
        self._checked_at = self._clock()
        self._thread.start()

    def close(self) -> None:
        """Join the thread."""
        self._thread.close()
        self._store.usage_log.save()

    def check_usage(self) -> None:
        """Record a use of every snapshot that is open now; then evict what is unused for `unused_seconds`."""
        self._checked_at, self._lost_opens = self._clock(), False
        record_open_now(self._store, self._now())
        self._store.usage_log.save()
        if self._rules.unused_seconds and self._rules.automatic:
            with self._planner.lock:
                self._evictor.evict(self._planner.plan_unused(self._rules.unused_seconds), "unused")

    def relieve(self) -> None:
        """Under pressure, evict what is not protected, down to the low watermark.

        If only `limit_bytes` is exceeded, and would be still, nothing is evicted: that would help nobody.
        """
        found = self._store.space.bounded()
        over = self._over(found)
        if over <= 0:
            self._warned_short = False
            return
        if not self._rules.automatic or self._clock() < self._wait_until:
            return
        with self._planner.lock:
            before = self._store.space.bounded().free
            plan = self._planner.plan_ignoring_pulls(over)
            if not self._is_vain(plan, found):
                self._evictor.drop_partials(plan.partials)
                self._evictor.evict(plan.choices, "pressure")
            after = self._store.space.bounded().free
        self._report(plan, freed=after - before)

    def seconds_between_checks(self) -> float:
        """Seconds between two checks of which snapshots are open: fewer if the kernel may miss an open."""
        watch, usage_log = self._store.watch, self._store.usage_log
        self._lost_opens |= watch.lost_opens()
        is_starting = self._now() - usage_log.asked_at < _STARTING_SECONDS
        if self._lost_opens or (is_starting and not watch.sees_all_opens()):
            return _SOON_SECONDS
        return _CHECK_SECONDS

    def _tick(self) -> float:
        try:
            self._store.leases.expire(self._now())
            self._store.content.trash.empty_all()
            record_opens(self._store, self._now())
            if self._clock() >= self._checked_at + self.seconds_between_checks():
                self.check_usage()
            self.relieve()
        except (CachdError, OSError) as error:
            log.warning("reclaim failed", reason=str(error))
        return _TICK_SECONDS

    def _over(self, now: Capacity) -> int:
        """Bytes to free; 0 or less below the high watermark while no received bytes wait for space.

        Bytes that have not arrived do not count: a source may claim any size.
        """
        over = [self._store.space.waited_for(), self._disk_over(now)]
        if now.limit is not None:
            over.append(bytes_over(now.usage.total, now.limit, high=self._rules.high, low=self._rules.low))
        return max(over)

    def _disk_over(self, now: Capacity) -> int:
        """Bytes to free for the file system's sake, whatever `limit_bytes` is."""
        space = max(now.total - now.reserve_free, 0)
        taken = space - (now.free - now.reserve_free)
        return bytes_over(taken, space, high=self._rules.high, low=self._rules.low)

    def _is_vain(self, plan: Plan, now: Capacity) -> bool:
        """Whether models exceed `limit_bytes` even after the plan, and nothing else needs its bytes."""
        if now.limit is None or self._disk_over(now) > 0:
            return False
        return now.usage.total - plan.frees > now.limit

    def _report(self, plan: Plan, *, freed: int) -> None:
        """Warn when too little could be freed, or came free."""
        if not plan.is_enough and not self._warned_short:
            log.warning(
                "too little space can be freed: the other models are protected",
                short_bytes=plan.short - plan.frees,
                held_by=largest_first([c for c in plan.candidates if c.protected]),
            )
            self._warned_short = True
        if not self._store.reports_open_files and freed < plan.frees / 2:
            log.warning("eviction freed too little: a process has the files open", bytes=plan.frees)
            self._wait_until = self._clock() + _WAIT_SECONDS
