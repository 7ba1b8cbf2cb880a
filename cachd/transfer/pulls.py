"""Starts, joins and cancels pulls."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress

import structlog
from structlog.contextvars import bound_contextvars

from cachd.errors import CachdError, DaemonDied, InUse
from cachd.metrics import Metrics
from cachd.model import Manifest, ModelSpec, Snapshot
from cachd.sources.schemes import Sources
from cachd.transfer.admission import Admission
from cachd.transfer.attempt import PullContext
from cachd.transfer.endings import Endings
from cachd.transfer.newest import NewestPulls
from cachd.transfer.pending import PendingSpecs, crash_loop
from cachd.transfer.previews import Previews
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.transfer.runner import Runner
from cachd.transfer.running import RunningPulls

log = structlog.get_logger(__name__)

_CLOSE_SECONDS = 10.0


class Pulls:
    """All pulls: up to `at_once` run at a time, up to `queued` more wait. Safe from any thread.

    `previews`: what a pull would do.
    """

    def __init__(
        self, context: PullContext, sources: Sources, metrics: Metrics, *, at_once: int, queued: int
    ) -> None:
        self._context, self._metrics = context, metrics
        self._store = context.store
        self._running = RunningPulls()
        self._newest = NewestPulls(self._store)
        self._pending = PendingSpecs(self._store, self._running)
        self._admission = Admission(
            self._store,
            self._running,
            self._newest,
            is_configured=context.reclaim.keeps,
            at_once=at_once,
            queued=queued,
        )
        self._endings = Endings(self._store, self._running, self._newest, self._pending, metrics)
        self.previews = Previews(context, sources)
        self._runner = Runner(context, sources, metrics, self._endings, self._pending, at_once=at_once)

    # --- start ---

    def start(
        self,
        spec: ModelSpec,
        *,
        priority: int = 0,
        refresh: bool = False,
        replace: bool = False,
        pins: bool = False,
        repairs: bool = False,
        retried: Pull | None = None,
    ) -> Pull | None:
        """Start or join the pull of a spec; None when it is ready already. Waits for neither pull nor source.

        `refresh` resolves the ref again even if the spec is ready. `replace` allows the pull to take a name
        that is pinned or another model's, and stops a running pull of another spec under that name. `pins`:
        the caller pins the name. `repairs`, `retried`: None also if `Admission.may_begin` refuses. Raises
        InUse when the name may not move, Unavailable when too many pulls wait, NoSpace or DiskFailed.
        """
        with self._running.changing:
            if not self._admission.may_begin(spec, repairs=repairs, retried=retried):
                return None
            running = self._running.of(spec.name)
            if running is not None and running.spec == spec:
                self._metrics.joins.inc()
                running.note_join(pins=pins)
                return running
            self._admission.check_name(spec, refresh=refresh, replace=replace)
            is_ready = not refresh and self._admission.is_ready(spec)
            if running is None and is_ready:
                self._count_hit(spec.name)
                return None
            self._admission.check_queue(self._runner.waiting)
            wanted = Pull(spec, priority=priority, replace=replace, pins=pins, after=retried)
            started = self._put_in_place(wanted, running, is_ready=is_ready)
        if running is not None:
            log.info("pull replaced", name=spec.name, ref=str(running.spec.ref))
            self._runner.end_if_cancelled(running)
        if started is not None:
            self._begin(started)
        return started

    def start_by_itself(
        self, spec: ModelSpec, *, priority: int = 0, replace: bool = False, repairs: bool = False
    ) -> Pull | None:
        """Like `start`, for pulls that the daemon itself begins (repairs, listed models).

        Also raises DaemonDied when the daemon died too often during this spec's pull.
        """
        known = self._newest.of(spec.name)
        if known is not None and known.spec == spec and isinstance(known.error, DaemonDied):
            raise known.error
        return self.start(spec, priority=priority, replace=replace, repairs=repairs)

    def resume(self) -> None:
        """Resume the pulls that were unfinished when the daemon last ended.

        One in a crash loop stays on disk, and is shown as failed until somebody asks for it or deletes it. So
        are those that failed before.
        """
        for found in self._pending.all():
            if error := crash_loop(found):
                log.error("pull not resumed", name=found.spec.name, code=error.code, reason=error.detail)
                self.show_as_failed(found.spec, error)
                continue
            log.info("pull resumed", name=found.spec.name, ref=str(found.spec.ref))
            with bound_contextvars(who="cachd:restart"), self._running.changing:
                resumed = self._admit(Pull(found.spec, replace=found.replace, pins=found.pins))
            self._runner.start(resumed)
        self._endings.show_earlier()
        self._endings.sweep()

    @property
    def are_stopping(self) -> bool:
        """Whether the daemon is stopping its pulls; the next start resumes them."""
        return self._running.is_closed

    def get(self, name: str) -> Pull | None:
        """The newest pull of a name since the daemon started. None if its snapshot is no longer ready."""
        return self._newest.shown(name)

    def known(self) -> list[Pull]:
        """The newest pull of each name, as `get` returns it."""
        return self._newest.all_shown()

    def running(self) -> list[Pull]:
        """The pulls that have not ended."""
        return self._running.all()

    def awaited(self, name: str) -> Pull | None:
        """The unfinished pull of a name, if any; notes that somebody waits for it."""
        return self._newest.awaited(name, self._context.clock())

    def at_work(self) -> list[Pull]:
        """The pulls that have a thread: those with a slot, and those that lent theirs."""
        return self._runner.at_work()

    # --- end ---

    def cancel(self, name: str, *, force: bool = False) -> Pull | None:
        """Cancel the name's pull without waiting for its end; None when there is none.

        Raises NotFound for an unknown name. Unless `force`, raises InUse when the configuration lists the
        name, or its model is pinned or in use.
        """
        known = self._newest.of(name)
        self._admission.check_cancel(name, force=force)
        if known is not None:
            known.cancel()
            self._runner.end_if_cancelled(known)
        return known

    def stop(self, name: str) -> Pull:
        """Cancel a running pull without waiting for its end. Snapshot and bytes stay. Raises NotFound."""
        running = self._admission.running(name)
        running.cancel()
        self._runner.end_if_cancelled(running)
        return running

    def delete(self, name: str, *, force: bool = False) -> int:
        """Cancel the name's pull, wait for its end, and withdraw its snapshot. Returns the bytes freed.

        No repair of the name starts meanwhile. Raises as `cancel` does.
        """
        with self._running.without_repairs(name):
            known = self.cancel(name, force=force)
            if known is not None:
                wait([known.done])
            freed = self._store.withdraw(name, force=force) if self._store.names.has(name) else 0
        self._store.names.forget_eviction(name)
        if known is not None:
            self._newest.drop_if_newest(known)
            self._store.pins.remove(name)
            self._store.changes.mark(name)
            self._pending.delete(name)  # may raise: the caller must know that the next start would resume it
            if known.progress.manifest:
                freed += self._store.content.removal.free(known.progress.manifest, [name])
        log.info("deleted", name=name, freed_bytes=freed)
        return freed

    def rollback(self, name: str) -> Snapshot:
        """Point a name at its previous snapshot, without asking any source. Raises InUse while the name is
        being pulled, NotFound when no previous snapshot is left."""
        with self._running.without_repairs(name):
            running = self._running.of(name)
            if running is not None and running.progress.state is State.publishing:
                wait([running.done])
            elif running is not None:
                raise _would_undo_rollback(running.spec)
            return self._store.rollback(name, now=self._context.now())

    def end_refused(self, check: Callable[[Manifest], None]) -> None:
        """Fail every running pull whose manifest `check` refuses by raising a CachdError."""
        for running in self.running():
            running.refuse_by(check)

    def show_as_failed(self, spec: ModelSpec, error: CachdError) -> None:
        """Show a model as a failed pull with this error, unless its name is being pulled."""
        with self._running.changing:
            if self._running.of(spec.name) is None:
                self._endings.show(Pull.failed(spec, error))

    def interrupt(self) -> None:
        """Cancel every pull without waiting. The next start of the daemon resumes them."""
        for each in self._running.close():
            each.cancel()
        self.previews.interrupt()
        self._runner.interrupt()
        self._context.downloads.interrupt()

    def close(self) -> None:
        """Interrupt every pull and join the threads, for at most `_CLOSE_SECONDS` in all."""
        self.interrupt()
        self._runner.join(_CLOSE_SECONDS)
        for left in self.running():
            with suppress(CachdError):
                self._pending.note_clean_stop(left.spec.name)

    def _count_hit(self, name: str) -> None:
        """Count a request whose spec is ready."""
        self._metrics.hits.inc()
        if snapshot := self._store.names.get(name):
            self._metrics.saved_bytes.inc(snapshot.size)
        self._store.usage_log.used(name, self._context.now())
        newest = self._newest.of(name)
        if newest is not None and newest.error is not None:
            self._newest.drop(name)  # a later pull of another spec failed: that failure no longer matters
            with suppress(CachdError):
                self._pending.delete(name)

    def _put_in_place(self, asked: Pull, running: Pull | None, *, is_ready: bool) -> Pull | None:
        """Register a pull in place of the running one of its name, which is cancelled.

        None if the spec is ready and the running pull can no longer change that.
        """
        if running is not None:
            self._running.remove(running)
            running.cancel()  # point of no return
            if running.permit.revoke() and is_ready:
                self._count_hit(asked.spec.name)
                self._newest.drop(asked.spec.name)  # the ready snapshot is not the cancelled pull's result
                return None
        return self._admit(asked)

    def _admit(self, pull: Pull) -> Pull:
        """Register a pull under its name. The caller holds `changing`."""
        name = pull.spec.name
        self._metrics.misses.inc()
        self._store.usage_log.set_priority(name, pull.priority)
        self._running.add(pull)
        self._store.content.owners.expect(name)
        self._newest.add(pull)
        self._store.changes.mark(name)
        return pull

    def _begin(self, started: Pull) -> None:
        """Write the pull's spec to disk before the caller learns that it runs; then queue it."""
        try:
            self._pending.record(started)
        except CachdError as error:
            self._endings.end(started, State.failed, error)
            raise
        self._runner.start(started)


def _would_undo_rollback(spec: ModelSpec) -> InUse:
    return InUse(
        f"{spec.name} is being pulled from {spec.ref}, which would undo the rollback",
        code="name_busy",
        hint="wait for that pull, then roll back",
    )
