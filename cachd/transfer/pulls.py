"""Runs pulls: joins equal requests, orders them by priority, cancels them, resumes them after a restart."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from urllib.parse import urlsplit

import structlog

from cachd.errors import CachdError, Cancelled, DaemonDied, DiskFailed, InUse, Unavailable
from cachd.kernel import threads
from cachd.metrics import Metrics, size_class
from cachd.model import Manifest, ModelSpec, Ref, Snapshot
from cachd.policy import backoff
from cachd.sources.schemes import Sources
from cachd.sources.source import CancelToken
from cachd.store.catalog import Remembered
from cachd.store.permit import Permit, name_taken, replaced
from cachd.store.snapshots import no_such_model
from cachd.transfer.line import Line, Slot
from cachd.transfer.progress import Progress
from cachd.transfer.pull import NotYet, PullContext, pull
from cachd.transfer.streams import StreamQuota
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

SET_ASIDE = "set_aside"
MOST_REMEMBERED = 1000  # ended pulls that the API still shows; the oldest is forgotten first
MOST_REMEMBERED_BYTES = 16 << 20  # estimated memory that these may take together
_PULL_BYTES, _FILE_BYTES = 4000, 1000  # estimated memory of an ended pull, and of each file of its manifest
_MOST_DEATHS = 3  # after so many daemon deaths in a row during a pull, a restart no longer resumes it
_CLOSE_SECONDS = 10.0
_RETRY_SECONDS = 60.0
_RESOLVE_RETRIES = 4
_ANSWER_SECONDS = 60.0


class Pull:
    """One request to make a model ready. `done` resolves to its snapshot, or raises the CachdError."""

    def __init__(
        self, spec: ModelSpec, *, priority: int = 0, replace: bool = False, pins: bool = False
    ) -> None:
        self.spec = spec
        self.permit = Permit(replace=replace, pins=pins)
        self.progress = Progress()
        self.quota = StreamQuota(priority)
        self.error: CachdError | None = None
        self.refusal: CachdError | None = None  # set when it is stopped because the operator refuses a digest
        self.done: Future[Snapshot] = Future()
        self.done.set_running_or_notify_cancel()  # so that no waiter can cancel the future
        self.scheme, self.host, self.priority = spec.ref.scheme, _host(spec.ref), priority
        self.began: float | None = None  # monotonic clock
        self.resolve_failures = 0


def _host(ref: Ref) -> str:
    """The origin that pulls of a ref share: host and port of a web server; else the scheme."""
    return urlsplit(ref.base).netloc or ref.scheme if ref.scheme in ("http", "https") else ref.scheme


class Pulls:
    """Runs up to `at_once` pulls at a time; up to `queued` more may wait. Safe from any thread."""

    def __init__(
        self,
        context: PullContext,
        sources: Sources,
        metrics: Metrics,
        *,
        at_once: int,
        queued: int,
    ) -> None:
        self._context, self._sources, self._metrics = context, sources, metrics
        self._store = context.store
        self._most, self._queued = at_once + queued, queued
        self._line: Line[Pull] = Line(at_once, metrics.pull_queue_length.set)
        self._changed = threading.Lock()
        self._stopping = CancelToken()
        self._running: dict[str, Pull] = {}
        self._latest: dict[str, Pull] = {}
        self._ended_bytes: dict[str, int] = {}  # estimated memory of each ended pull, by name, oldest first
        self._closed = False
        self._remembering = threading.Lock()  # guards pending/ on disk: no newer spec of a name is deleted
        self._threads = [
            threading.Thread(target=self._run, name=f"pull-{i}", daemon=True)
            for i in range(self._line.threads)
        ]
        threads.start(self._threads)

    def start(
        self,
        spec: ModelSpec,
        *,
        priority: int = 0,
        refresh: bool = False,
        replace: bool = False,
        pins: bool = False,
    ) -> Pull | None:
        """Start or join the pull of a spec; None when it is ready already. Waits for neither pull nor source.

        `refresh` resolves the ref again even if the spec is ready. `replace` allows the pull to take a name
        that is pinned or belongs to another model, and stops a running pull of another spec under that name.
        `pins` says that the caller pins the name to the result. Raises InUse when the name may not move,
        Unavailable when too many pulls wait, NoSpace or DiskFailed when the spec cannot be written to disk.
        """
        with self._changed:
            running = self._running.get(spec.name)
            if running is not None and running.spec == spec:
                self._metrics.joins.inc()
                running.permit.pins |= pins
                return running
            if not replace:
                self._check_name(spec, running, refresh=refresh)
            self._store.snapshots.check_hub_folder(spec)
            is_ready = not refresh and self._is_ready(spec)
            if running is None and is_ready:
                self._count_hit(spec.name)
                return None
            self._check_queue()
            started = None
            if running is None or not self._take_place_of(running) or not is_ready:
                started = self._admit(spec, priority, replace=replace, pins=pins)
            else:
                self._count_hit(spec.name)
                self._drop(spec.name)  # the stopped pull: the ready snapshot is not its result
        if running is not None:
            self._end_replaced(running)
        if started is not None:
            self._begin(started)
        return started

    def resume(self) -> None:
        """Resume the pulls that were unfinished when the daemon last ended."""
        for found in self._store.remembered():
            if found.began >= _MOST_DEATHS:
                self._show_as_failed(found)
                continue
            log.info("pull resumed", name=found.spec.name, ref=str(found.spec.ref))
            with self._changed:
                started = self._admit(found.spec, priority=0, replace=found.replace, pins=found.pins)
            self._queue(started)
        self._sweep()

    def start_by_itself(self, spec: ModelSpec, *, priority: int = 0, replace: bool = False) -> Pull | None:
        """Like `start`, for pulls that the daemon itself begins (repairs, listed models).

        Also raises the `set_aside` error when the daemon died too often during this spec's pull.
        """
        known = self._latest.get(spec.name)
        if known is not None and known.spec == spec and known.error and known.error.code == SET_ASIDE:
            raise known.error
        return self.start(spec, priority=priority, replace=replace)

    @property
    def are_stopping(self) -> bool:
        """Whether the daemon is stopping its pulls; the next start resumes them."""
        return self._closed

    def get(self, name: str) -> Pull | None:
        """The newest pull of a name since the daemon started, running or ended. None if its snapshot is no
        longer ready."""
        found = self._latest.get(name)
        return None if found is None or self._is_undone(found) else found

    def running(self) -> list[Pull]:
        with self._changed:
            return list(self._running.values())

    def running_for(self, name: str) -> Pull | None:
        """The unfinished pull of a name, if any."""
        found = self._latest.get(name)
        return None if found is None or found.done.done() else found

    def at_work(self) -> list[Pull]:
        """The pulls that have a thread: those with a slot, and those that lent theirs."""
        return self._line.at_work()

    def known(self) -> list[Pull]:
        """The newest pull of each name, as `get` returns it."""
        with self._changed:
            return [pull for _, pull in sorted(self._latest.items()) if not self._is_undone(pull)]

    def resolve(self, spec: ModelSpec) -> Manifest:
        """Ask the source for the spec's current manifest, within `_ANSWER_SECONDS`. Raises CachdError."""
        source = self._sources.of(spec.ref)
        manifest = self._context.resolves.resolve(source, spec.ref, self._stopping, seconds=_ANSWER_SECONDS)
        return manifest.select(spec.include, spec.exclude)

    def cancel(self, name: str, *, force: bool = False) -> Pull | None:
        """Cancel the name's pull without waiting for its end; None when there is none.

        Raises NotFound for an unknown name. Unless `force`, raises InUse when the configuration lists the
        name, or its model is pinned or in use.
        """
        known = self._latest.get(name)
        snapshots = self._store.snapshots
        if known is None and not (snapshots.has(name) or snapshots.was_evicted(name)):
            raise no_such_model(name)
        if not force and self._context.reclaim.keeps(name):
            raise InUse(
                f"the configuration lists {name}: it would come back at the next start or change of the file",
                code="configured",
                hint="remove it from the file, or force (--force, force=true)",
            )
        if not force:
            self._store.snapshots.check_unused(name)
        if known is None:
            return None
        known.progress.cancel_token.cancel()
        if self._line.leave(known):
            self._cancelled(known)
        return known

    def delete(self, name: str, *, force: bool = False) -> int:
        """Cancel the name's pull, wait for its end, and withdraw its snapshot. Returns the bytes freed.

        Raises as `cancel` does.
        """
        known = self.cancel(name, force=force)
        if known is not None:
            wait([known.done])
        snapshots = self._store.snapshots
        freed = snapshots.withdraw(name, force=force) if snapshots.has(name) else 0
        snapshots.forget_eviction(name)
        if known is not None:
            with self._changed:
                if self._latest.get(name) is known:
                    self._drop(name)
            snapshots.unpin(name)
            snapshots.changes.mark(name)
            self._forget(name)  # may raise: the caller must know that the next start would pull it again
            if known.progress.manifest:
                freed += self._store.content.free(known.progress.manifest, [name])
        return freed

    def rollback(self, name: str) -> Snapshot:
        """Point a name at its previous snapshot, without asking any source.

        Raises InUse while the name is being pulled, NotFound when no previous snapshot is left.
        """
        with self._changed:
            running = self._running.get(name)
        if running is not None and running.progress.state == "publishing":
            wait([running.done])
        elif running is not None:
            raise InUse(
                f"{name} is being pulled from {running.spec.ref}, which would undo the rollback",
                code="name_busy",
                hint="wait for that pull, then roll back",
            )
        return self._store.snapshots.rollback(name, now=time.time())

    def end_refused(self, check: Callable[[Manifest], None]) -> None:
        """Fail every running pull whose manifest `check` refuses by raising a CachdError."""
        for running in self.running():
            manifest = running.progress.manifest
            try:
                check(manifest) if manifest else None
            except CachdError as refusal:
                running.refusal = refusal
                running.progress.cancel_token.cancel()

    def was_refused(self, spec: ModelSpec, refusal: CachdError) -> None:
        """Show a withdrawn model as a failed pull with this error, unless its name is being pulled."""
        ended = Pull(spec)
        ended.error, ended.progress.state = refusal, "failed"
        ended.done.set_exception(refusal)
        with self._changed:
            if spec.name not in self._running:
                self._latest[spec.name] = ended
        self._store.snapshots.changes.mark(spec.name)

    def interrupt(self) -> None:
        """Cancel every pull without waiting. The next start of the daemon resumes them."""
        with self._changed:
            self._closed = True
            running = list(self._running.values())
        for each in running:
            each.progress.cancel_token.cancel()
        self._stopping.cancel()
        self._line.close()
        self._context.downloads.interrupt()

    def close(self) -> None:
        """Interrupt every pull and join the threads, for at most `_CLOSE_SECONDS` in all."""
        self.interrupt()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("pull thread did not end: a source or the disk hangs", thread=thread.name)
        for left in self.running():
            with suppress(CachdError):
                self._store.ends_well(left.spec.name)

    # --- inside ---

    def _show_as_failed(self, found: Remembered) -> None:
        """Do not resume a pull during which the daemon died too often; show it as failed.

        It stays on disk, and is shown so after each restart, until somebody asks for it again or deletes it.
        """
        failed = Pull(found.spec, replace=found.replace, pins=found.pins)
        failed.error = DaemonDied(
            f"{found.spec.name}: the daemon died {found.began} times in a row during this pull",
            code=SET_ASIDE,
            hint="see the daemon's log and memory limit, then ask for it again (cachd pull)",
            deaths=found.began,
        )
        failed.progress.state = "failed"
        failed.done.set_exception(failed.error)
        log.error("pull not resumed", name=found.spec.name, ref=str(found.spec.ref), deaths=found.began)
        with self._changed:
            self._latest[found.spec.name] = failed
            self._keep_ended(failed)
        self._store.snapshots.changes.mark(found.spec.name)

    def _is_undone(self, ended: Pull) -> bool:
        """Whether the snapshot of a successful pull is no longer ready: deleted, evicted or quarantined."""
        return ended.progress.state == "ready" and self._store.snapshots.get(ended.spec.name) is None

    def _is_ready(self, spec: ModelSpec) -> bool:
        ready = self._store.snapshots.get(spec.name)
        return ready is not None and ready.spec == spec

    def _count_hit(self, name: str) -> None:
        """Count a request whose spec is ready. Called with the lock."""
        self._metrics.hits.inc()
        self._store.usage_log.used(name, time.time())
        latest = self._latest.get(name)
        if latest is not None and latest.error is not None:
            self._drop(name)  # a later pull of another spec failed: that failure no longer matters

    def _check_name(self, spec: ModelSpec, running: Pull | None, *, refresh: bool) -> None:
        """Raises InUse when the name may not move to the spec (see `Permit`). Called with the lock.

        A failed pull without a snapshot owns its name only if the name is pinned.
        """
        if running is not None:
            if not running.spec.is_of_same_model(spec):
                raise name_taken(spec, running.spec, "is being pulled from")
            raise InUse(
                f"{spec.name} is being pulled from {running.spec}",
                code="name_busy",
                hint="wait for it, stop it (--replace, replace: true), or use another name",
            )
        owner, latest = self._store.snapshots.owner(spec.name), self._latest.get(spec.name)
        is_pinned = self._store.snapshots.is_pinned(spec.name)
        if owner is None and is_pinned and latest is not None:
            owner = latest.spec
        if owner is not None and not owner.is_of_same_model(spec):
            raise name_taken(spec, owner)
        is_here = self._store.snapshots.get(spec.name) is not None
        if owner is not None and is_pinned and (owner != spec or (refresh and is_here)):
            raise name_taken(spec, owner, "is pinned at")

    def _take_place_of(self, running: Pull) -> bool:
        """Cancel a pull that another replaces; False when it is already publishing. Called with the lock."""
        del self._running[running.spec.name]
        running.progress.cancel_token.cancel()
        return running.permit.revoke()

    def _end_replaced(self, running: Pull) -> None:
        log.info("pull replaced", name=running.spec.name, ref=str(running.spec.ref))
        if self._line.leave(running):
            self._cancelled(running)

    def _begin(self, started: Pull) -> None:
        try:
            with self._remembering:
                permit = started.permit  # written to disk before the caller learns that the pull runs
                self._store.remember(started.spec, replace=permit.replace, pins=permit.pins)
        except CachdError as error:
            self._ended(started, "failed", time.monotonic(), error)
            raise
        self._queue(started)

    def _forget(self, name: str) -> None:
        """Delete the name's spec from pending/, so that no restart resumes it, unless a pull of it runs."""
        with self._remembering:
            if name not in self._running:
                self._store.forget(name)

    def _check_queue(self) -> None:
        """Raises Unavailable when the daemon is stopping or the queue is full. Called with the lock."""
        if self._closed:
            raise Unavailable("the daemon is stopping", code="stopping", retry_after=_RETRY_SECONDS)
        if len(self._running) >= self._most:
            raise Unavailable(
                f"{len(self._line)} pulls are waiting, and at most {self._queued} may wait",
                code="queue_full",
                hint="ask again later, or raise queued_pulls",
                retry_after=_RETRY_SECONDS,
            )

    def _admit(self, spec: ModelSpec, priority: int, *, replace: bool, pins: bool) -> Pull:
        """Register a pull under its name. Called with the lock."""
        self._metrics.misses.inc()
        self._store.usage_log.set_priority(spec.name, priority)
        started = Pull(spec, priority=priority, replace=replace, pins=pins)
        self._running[spec.name] = started
        self._store.content.expect(spec.name)
        self._drop(spec.name)
        self._latest[spec.name] = started
        self._store.snapshots.changes.mark(spec.name)
        return started

    def _drop(self, name: str) -> None:
        """Forget the newest pull of a name. Called with the lock."""
        self._latest.pop(name, None)
        self._ended_bytes.pop(name, None)

    def _keep_ended(self, ended: Pull) -> None:
        """Keep an ended pull for the API; forget the oldest ones over the limits. Called with the lock."""
        name, spec, manifest = ended.spec.name, ended.spec, ended.progress.manifest
        if self._latest.get(name) is not ended:
            return
        texts = (*spec.include, *spec.exclude, str(ended.error or ""), str(ended.error and ended.error.facts))
        files = len(manifest.files) if manifest else 0
        size = _PULL_BYTES + files * _FILE_BYTES + 4 * sum(map(len, texts))
        self._ended_bytes[name] = self._ended_bytes.pop(name, 0) or size
        while len(self._ended_bytes) > MOST_REMEMBERED or (
            sum(self._ended_bytes.values()) > MOST_REMEMBERED_BYTES and len(self._ended_bytes) > 1
        ):
            oldest = next(iter(self._ended_bytes))
            self._drop(oldest)
            self._store.snapshots.changes.mark(oldest)

    def _queue(self, started: Pull) -> None:
        self._line.add(started)
        self._leave_if_cancelled(started)  # it may have been cancelled while its spec was written

    def _leave_if_cancelled(self, waiting: Pull) -> None:
        if waiting.progress.cancel_token.is_cancelled and self._line.leave(waiting):
            self._cancelled(waiting)

    def _cancelled(self, waiting: Pull) -> None:
        when = "while it waited" if waiting.began else "before it began"
        reason = Cancelled(f"{waiting.spec.name}: cancelled {when}")
        self._ended(waiting, "cancelled", waiting.began or time.monotonic(), reason)

    def _queue_later(self, pull: Pull, error: Unavailable) -> None:
        """Queue a pull again, after a backoff, because its source is temporarily unavailable."""
        pull.resolve_failures += 1
        seconds = backoff.delay(
            pull.resolve_failures,
            told=error.retry_after,
            chance=random.random(),  # noqa: S311
        )
        log.info(
            "resolve will be retried", name=pull.spec.name, code=error.code, in_seconds=round(seconds, 1)
        )
        pull.progress.waits_for(Waits(Reason.origin, time.time() + seconds, error.detail))
        self._store.snapshots.changes.mark(pull.spec.name)
        self._line.add_later(pull, seconds)
        self._leave_if_cancelled(pull)

    def _run(self) -> None:
        while (next_pull := self._line.next()) is not None:
            self._metrics.pulls_in_progress.inc()
            self._store.snapshots.changes.mark(next_pull.spec.name)
            not_yet: Unavailable | None = None
            try:
                not_yet = self._pull(next_pull)
            finally:
                self._metrics.pulls_in_progress.dec()
                self._line.ended(next_pull)
                if not_yet is not None:
                    self._queue_later(next_pull, not_yet)
                del next_pull  # or it and its downloads stay in memory until this thread's next pull

    def _pull(self, running: Pull) -> Unavailable | None:
        """Run a pull. None when it has ended; else the reason to try it again later."""
        spec, progress = running.spec, running.progress
        began = running.began = running.began or time.monotonic()
        try:
            if progress.cancel_token.is_cancelled:
                raise Cancelled(f"{spec.name}: cancelled before it began")
            self._begins(running)
            source = self._sources.of(spec.ref)
            snapshot = pull(
                spec,
                source,
                self._context,
                quota=running.quota,
                progress=progress,
                permit=running.permit,
                slot=Slot(self._line, running, progress.cancel_token),
            )
        except NotYet as later:
            if running.resolve_failures < _RESOLVE_RETRIES:
                return later.reason
            self._ended(running, "failed", began, later.reason)
        except CachdError as error:
            state = "cancelled" if progress.cancel_token.is_cancelled and not running.refusal else "failed"
            error = running.refusal or error
            if error.code == "refused_digest" and progress.manifest:
                with suppress(CachdError):  # a sweep tries again
                    self._store.content.free(progress.manifest, [spec.name])
            self._ended(running, state, began, error)
        except Exception as error:
            log.exception("a pull failed in a way it should not", name=spec.name)
            internal = CachdError(f"{spec.name}: {type(error).__name__}", hint="see the daemon's log")
            self._ended(running, "failed", began, internal)
        else:
            self._metrics.last_pull.set(snapshot.published_at)
            self._ended(running, "ready", began, snapshot)
        return None

    def _begins(self, running: Pull) -> None:
        """Note on disk that this run of the daemon began the pull. If the daemon dies, the note counts as a
        death during it."""
        with self._remembering, suppress(CachdError):  # on a full disk the pull itself may free space
            if self._running.get(running.spec.name) is running:
                self._store.begins(running.spec.name)

    def _ended(self, running: Pull, state: str, began: float, outcome: Snapshot | CachdError) -> None:
        spec, progress, now = running.spec, running.progress, running.progress.now
        if state == "cancelled" and running.permit.is_revoked:
            outcome = replaced(spec)
        seconds = time.monotonic() - began
        self._metrics.pull_seconds.labels(state, size_class(progress.total)).observe(seconds)
        log.info(
            "pull ended",
            name=spec.name,
            ref=str(spec.ref),
            state=state,
            seconds=round(seconds, 2),
            size_bytes=progress.total,
            fetched_bytes=now.fetched,
            resumed_bytes=now.resumed,
            code=outcome.code if isinstance(outcome, CachdError) else "",
            detail=outcome.detail if isinstance(outcome, CachdError) else "",
            withheld=dict(outcome.withheld) if isinstance(outcome, CachdError) else {},
        )
        self._context.reclaim.pulled(spec, outcome, fetched=now.fetched, seconds=seconds)
        with self._changed:
            if self._running.get(spec.name) is running:
                del self._running[spec.name]
        self._store.content.expect_no_more(spec.name)
        with suppress(CachdError):
            if not self._closed or state != "cancelled":  # the next start resumes what the stop cancelled
                self._forget(spec.name)
            else:
                self._store.ends_well(spec.name)
        if isinstance(outcome, DiskFailed):
            self._metrics.disk_failures.inc()
        if isinstance(outcome, CachdError):  # the traceback's frames would keep the pull's memory alive
            outcome.__traceback__ = outcome.__cause__ = outcome.__context__ = None
            running.error = outcome
        progress.end()
        progress.state = state  # set after the error, so that a reader of a failed state finds its error
        with self._changed:
            self._keep_ended(running)
        self._store.snapshots.changes.mark(spec.name)
        if isinstance(outcome, CachdError):
            running.done.set_exception(outcome)
        else:
            running.done.set_result(outcome)
            self._sweep()

    def _sweep(self) -> None:
        """Remove replaced snapshots that nobody reads, except those that a running pull may publish again."""
        try:
            self._store.snapshots.sweep(keep={pull.spec.ref.base for pull in self.running()})
        except (CachdError, OSError, ValueError) as error:
            log.warning("sweep failed", reason=repr(error))
