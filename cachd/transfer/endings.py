"""Ends pulls: records the outcome everywhere, then wakes the waiters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from cachd.errors import CachdError, DiskFailed, NoSpace, TooBig, Unavailable
from cachd.metrics import Metrics, size_class
from cachd.store.permit import replaced
from cachd.store.store import Store
from cachd.transfer.newest import NewestPulls
from cachd.transfer.pending import PendingSpecs
from cachd.transfer.progress import State
from cachd.transfer.request import Outcome, Pull
from cachd.transfer.running import RunningPulls
from cachd.transfer.usage import record_pull

log = structlog.get_logger(__name__)


class Endings:
    """The last step of every pull. Safe from any thread."""

    def __init__(
        self,
        store: Store,
        running: RunningPulls,
        newest: NewestPulls,
        pending: PendingSpecs,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._metrics, self._clock, self._now = store, metrics, clock, now
        self._running, self._newest, self._pending = running, newest, pending

    def end(self, pull: Pull, state: State, outcome: Outcome) -> None:
        """End a pull as ready, failed or cancelled. The outcome is its snapshot or its error.

        A pull that is cancelled because the daemon stops ends as queued: the next start resumes it.
        """
        name = pull.spec.name
        if state is State.cancelled and pull.permit.is_revoked:
            outcome = replaced(pull.spec)
        elif state is State.cancelled and self._running.is_closed:
            state, outcome = State.queued, _interrupted(pull)
        self._running.remove(pull)
        self._store.content.owners.expect_no_more(name)
        pull.ended_at = self._now()
        self._settle_pending(pull, state, outcome)
        pull.end(state, outcome)
        self._forget(self._newest.count_ended(pull))
        self._record(pull, state, outcome)  # whoever hears of the end finds the pull ended
        self._store.changes.mark(name)
        pull.wake(outcome)
        if state is State.ready:
            self.sweep()

    def end_cancelled(self, waiting: Pull) -> None:
        """End a cancelled pull that has left the queue."""
        self.end(waiting, State.cancelled, waiting.cancelled())

    def sweep(self) -> None:
        """Remove replaced snapshots that nobody reads, except those that a running pull may publish again."""
        try:
            self._store.sweep_snapshots(keep={pull.spec.ref.base for pull in self._running.all()})
        except (CachdError, OSError, ValueError) as error:
            log.warning("sweep failed", reason=repr(error))

    def _record(self, pull: Pull, state: State, outcome: Outcome) -> None:
        """Write the outcome to the metrics, the log and the usage log."""
        spec, progress, now = pull.spec, pull.progress, pull.progress.now
        seconds = self._clock() - pull.began if pull.began is not None else 0.0
        ended_as = "interrupted" if state is State.queued else state
        self._metrics.pull_seconds.labels(ended_as, size_class(progress.total)).observe(seconds)
        if pull.awaited_since is not None:
            waited = self._clock() - pull.awaited_since
            self._metrics.ready_wait_seconds.labels(ended_as).observe(waited)
        if state is State.ready:
            self._metrics.saved_bytes.inc(pull.joins * progress.total)
        if isinstance(outcome, DiskFailed):
            self._metrics.disk_failures.inc()
        if isinstance(outcome, NoSpace | TooBig):
            self._metrics.no_space.inc()
        error = outcome if isinstance(outcome, CachdError) else None
        log.info(
            "pull ended",
            name=spec.name,
            ref=str(spec.ref),
            who=pull.asked_by,
            state=ended_as,
            revision=progress.manifest.revision if progress.manifest else None,
            seconds=round(seconds, 2),
            size_bytes=progress.total,
            fetched_bytes=now.fetched,
            resumed_bytes=now.resumed,
            hedged_bytes=now.hedged,
            code=error.code if error else "",
            detail=error.detail if error else "",
            withheld=dict(error.withheld) if error else {},
        )
        record_pull(
            self._store.usage_log, spec, outcome, fetched=now.fetched, seconds=seconds, now=self._now()
        )

    def show_earlier(self) -> None:
        """Show the pulls that failed before this daemon started."""
        for failed in self._pending.failed():
            if self._newest.of(failed.spec.name) is None:
                self.show(failed)

    def show(self, failed: Pull) -> None:
        """Show a pull that has failed."""
        self._newest.add(failed)
        self._forget(self._newest.count_ended(failed))
        self._store.changes.mark(failed.spec.name)

    def _settle_pending(self, pull: Pull, state: State, outcome: Outcome) -> None:
        """Keep on disk what the next start has to know of a pull that ends."""
        name = pull.spec.name
        with suppress(CachdError):
            if self._running.is_closed and state in (State.queued, State.cancelled):
                self._pending.note_clean_stop(name)
            elif isinstance(outcome, CachdError) and self._newest.of(name) is pull:
                self._pending.fail(pull, state, outcome)
            else:
                self._pending.delete(name)

    def _forget(self, names: Sequence[str]) -> None:
        """Delete the records of failed pulls that are no longer shown."""
        for name in names:
            with suppress(CachdError):
                self._pending.delete_failure(name)


def _interrupted(pull: Pull) -> Unavailable:
    progress = pull.progress
    return Unavailable(
        f"{pull.spec.name}: interrupted by a stop at {progress.done} of {progress.total} bytes",
        code="interrupted",
        hint="the next start of the daemon, or cachd pull --direct, resumes the pull",
    )
