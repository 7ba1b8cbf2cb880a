"""Runs the queued pulls in threads."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress

import structlog

from cachd.errors import CachdError, Unavailable
from cachd.kernel import threads
from cachd.metrics import Metrics
from cachd.policy import backoff
from cachd.sources.failures import BUSY
from cachd.sources.pauses import is_pause
from cachd.sources.schemes import Sources
from cachd.transfer.attempt import Attempt, NotYet, PullContext
from cachd.transfer.endings import Endings
from cachd.transfer.pending import PendingSpecs
from cachd.transfer.progress import State
from cachd.transfer.pull import pull
from cachd.transfer.request import Pull
from cachd.transfer.slots import Slot, SlotQueue
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

_RESOLVE_RETRIES = 4


class Runner:
    """Threads that take pulls from the queue and attempt them until they end.

    start ──> queued ──(a slot)──> attempted ──> ended
                ^                      │
                └────_retry_later──────┘
    """

    def __init__(
        self,
        context: PullContext,
        sources: Sources,
        metrics: Metrics,
        endings: Endings,
        pending: PendingSpecs,
        *,
        at_once: int,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._context, self._sources, self._metrics = context, sources, metrics
        self._changes = context.store.changes
        self._endings, self._pending = endings, pending
        self._clock, self._now, self._chance = context.clock, context.now, chance
        self._queue: SlotQueue[Pull] = SlotQueue(at_once, metrics.pull_queue_length.set)
        self._threads = [
            threading.Thread(target=self._run, name=f"pull-{i}", daemon=True)
            for i in range(self._queue.threads)
        ]
        threads.start(self._threads)

    @property
    def waiting(self) -> int:
        """How many pulls wait for a slot."""
        return len(self._queue)

    def at_work(self) -> list[Pull]:
        """The pulls that have a thread: those with a slot, and those that lent theirs."""
        return self._queue.at_work()

    def start(self, pull: Pull) -> None:
        """Queue a pull, and run it when it has a slot."""
        log.info("pull asked", name=pull.spec.name, ref=str(pull.spec.ref), who=pull.asked_by)
        self._queue.add(pull)
        self.end_if_cancelled(pull)  # it may have been cancelled while its spec was written

    def end_if_cancelled(self, pull: Pull) -> None:
        """End a cancelled pull if it is queued. One that has a thread ends there."""
        if pull.is_cancelled and self._queue.leave(pull):
            self._endings.end_cancelled(pull)

    def interrupt(self) -> None:
        """Give out no more slots."""
        self._queue.close()

    def join(self, seconds: float) -> None:
        """Wait for the end of the threads after `interrupt`, for at most `seconds` in all."""
        deadline = self._clock() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - self._clock()))
            if thread.is_alive():
                log.warning("pull thread did not end: a source or the disk hangs", thread=thread.name)

    def _run(self) -> None:
        while (next_pull := self._queue.next()) is not None:
            self._metrics.pulls_in_progress.inc()
            self._changes.mark(next_pull.spec.name)
            not_yet: Unavailable | None = None
            try:
                not_yet = self._attempt(next_pull)
            finally:
                self._metrics.pulls_in_progress.dec()
                self._queue.end(next_pull)
                if not_yet is not None:
                    self._retry_later(next_pull, not_yet)
                del next_pull  # or it and its downloads stay in memory until this thread's next pull

    def _attempt(self, running: Pull) -> Unavailable | None:
        """Attempt a pull once. None when it has ended; else the reason to try it again later."""
        try:
            if running.is_cancelled:
                raise running.cancelled()
            self._note_begin(running)
            snapshot = pull(self._attempt_of(running))
        except NotYet as later:
            if running.failed_resolves < _RESOLVE_RETRIES or self._is_no_failure(running, later.reason):
                return later.reason
            self._endings.end(running, State.failed, later.reason)
        except CachdError as error:
            self._end_failed(running, error)
        except Exception as error:
            log.exception("a pull failed in a way it should not", name=running.spec.name)
            internal = CachdError(f"{running.spec.name}: {type(error).__name__}", hint="see the daemon's log")
            self._endings.end(running, State.failed, internal)
        else:
            self._metrics.last_pull.set(snapshot.published_at)
            self._endings.end(running, State.ready, snapshot)
        return None

    def _note_begin(self, running: Pull) -> None:
        """Record that an attempt begins, and log the first one."""
        if running.began is None:
            running.began, running.began_at = self._clock(), self._now()
            spec = running.spec
            log.info("pull began", name=spec.name, ref=str(spec.ref), who=running.asked_by)
        self._pending.note_begin(running)

    def _attempt_of(self, running: Pull) -> Attempt:
        return Attempt(
            spec=running.spec,
            source=self._sources.of(running.spec.ref),
            slot=Slot(self._queue, running, running.progress.cancel_token),
            progress=running.progress,
            quota=running.quota,
            permit=running.permit,
            context=self._context,
        )

    def _end_failed(self, running: Pull, error: CachdError) -> None:
        state, error = running.failure(error)
        manifest = running.progress.manifest
        if error.code == "refused_digest" and manifest:
            with suppress(CachdError):  # a sweep tries again
                self._context.store.content.removal.free(manifest, [running.spec.name])
        self._endings.end(running, state, error)

    def _is_no_failure(self, pull: Pull, error: Unavailable) -> bool:
        """Whether the error counts as none: the origin wants a pause, or is busy serving other pulls."""
        is_busy = error.origin_status in BUSY and self._context.downloads.are_served_by(pull.spec.ref.base)
        return is_busy or is_pause(error)

    def _retry_later(self, pull: Pull, error: Unavailable) -> None:
        """Queue a pull again, after a backoff, because its source is temporarily unavailable."""
        pull.failed_resolves += not self._is_no_failure(pull, error)
        failures = max(pull.failed_resolves, 1)
        seconds = backoff.delay(failures, requested=error.retry_after, chance=self._chance())
        log.info(
            "resolve will be retried", name=pull.spec.name, code=error.code, in_seconds=round(seconds, 1)
        )
        pull.progress.await_retry(Waits(Reason.origin, self._now() + seconds, error.detail))
        self._changes.mark(pull.spec.name)
        self._queue.add_later(pull, seconds)
        self.end_if_cancelled(pull)
