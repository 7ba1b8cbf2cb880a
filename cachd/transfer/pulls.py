"""Pulls in flight: joined, ordered by priority, cancelled, remembered across restarts."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from urllib.parse import urlsplit

import structlog

from cachd.errors import CachdError, Cancelled, DiskFailed, InUse, Unavailable
from cachd.metrics import Metrics, size_class
from cachd.model import Manifest, ModelSpec, Ref, Snapshot
from cachd.policy import backoff
from cachd.sources.schemes import Sources
from cachd.sources.source import CancelToken
from cachd.store.catalog import Remembered
from cachd.store.permit import Permit, name_taken, replaced
from cachd.store.snapshots import no_such_model
from cachd.transfer import threads
from cachd.transfer.line import Line, Slot
from cachd.transfer.progress import Progress
from cachd.transfer.pull import NotYet, PullContext, pull
from cachd.transfer.streams import StreamQuota
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

SET_ASIDE = "set_aside"
MOST_REMEMBERED = 1000  # ended pulls that are still told of, the oldest forgotten first
MOST_REMEMBERED_BYTES = 16 << 20  # and what these may take in memory, roughly
_PULL_BYTES, _FILE_BYTES = 4000, 1000  # of one, and of each file of its manifest, roughly
_MOST_DEATHS = 3  # of the daemon in a row, each with a pull at work, before that is begun by itself no more
_CLOSE_SECONDS = 10.0
_RETRY_SECONDS = 60.0
_RESOLVE_RETRIES = 4
_ANSWER_SECONDS = 60.0


class Pull:
    """One running request to make a model ready. `done` resolves to its snapshot, or carries why not."""

    def __init__(
        self, spec: ModelSpec, *, priority: int = 0, replace: bool = False, pins: bool = False
    ) -> None:
        self.spec = spec
        self.permit = Permit(replace=replace, pins=pins)
        self.progress = Progress()
        self.quota = StreamQuota(priority)
        self.error: CachdError | None = None
        self.refusal: CachdError | None = None  # why it was told to stop, when the operator refuses it
        self.done: Future[Snapshot] = Future()
        self.done.set_running_or_notify_cancel()  # a waiter that goes away cancels nothing
        self.scheme, self.host, self.priority = spec.ref.scheme, _host(spec.ref), priority
        self.began: float | None = None  # by the monotonic clock
        self.resolve_failures = 0


def _host(ref: Ref) -> str:
    """Whom the pulls of a ref ask: a web server by its name and port; each other scheme is one."""
    return urlsplit(ref.base).netloc or ref.scheme if ref.scheme in ("http", "https") else ref.scheme


class Pulls:
    """Runs pulls, `at_once` at a time while `queued` may wait. Safe from any thread."""

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
        self._ended_bytes: dict[str, int] = {}  # what each that ended takes in memory, the oldest first
        self._closed = False
        self._remembering = threading.Lock()  # of pending on disk, so that none is forgotten for another
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
        """Start or join the pull of a spec; None when it is ready already. Asks no source, and never waits.

        `refresh` resolves the ref again though it is ready. `replace` moves a name that is another model's,
        or pinned, and stops the pull of another spec that runs under it. `pins`: the name is to be pinned at
        what this pull brings. Raises InUse when the name may not move, Unavailable when too many wait,
        NoSpace or DiskFailed when it cannot be kept.
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
            self._check_space()
            started = None
            if running is None or not self._take_place_of(running) or not is_ready:
                started = self._admit(spec, priority, replace=replace, pins=pins)
            else:
                self._count_hit(spec.name)
                self._drop(spec.name)  # the pull that was stopped: what is ready is another's
        if running is not None:
            self._end_replaced(running)
        if started is not None:
            self._begin(started)
        return started

    def resume(self) -> None:
        """Go on with the pulls that an earlier life of the daemon did not finish."""
        for found in self._store.remembered():
            if found.began >= _MOST_DEATHS:
                self._set_aside(found)
                continue
            log.info("pull resumed", name=found.spec.name, ref=str(found.spec.ref))
            with self._changed:
                started = self._admit(found.spec, priority=0, replace=found.replace, pins=found.pins)
            self._queue(started)
        self._sweep()

    def start_by_itself(self, spec: ModelSpec, *, priority: int = 0, replace: bool = False) -> Pull | None:
        """As `start`, where nobody has asked just now. Raises what set the spec's pull aside, if it was."""
        known = self._latest.get(spec.name)
        if known is not None and known.spec == spec and known.error and known.error.code == SET_ASIDE:
            raise known.error
        return self.start(spec, priority=priority, replace=replace)

    @property
    def are_stopping(self) -> bool:
        """Whether what runs is being stopped, to go on at the next start."""
        return self._closed

    def get(self, name: str) -> Pull | None:
        """The newest pull of a name since the daemon started, running or ended, unless what it brought was
        evicted since."""
        found = self._latest.get(name)
        return None if found is None or self._is_undone(found) else found

    def running(self) -> list[Pull]:
        with self._changed:
            return list(self._running.values())

    def running_for(self, name: str) -> Pull | None:
        """The pull of a name that has not ended."""
        found = self._latest.get(name)
        return None if found is None or found.done.done() else found

    def at_work(self) -> list[Pull]:
        """Those of the running pulls that have begun, and wait for nothing but their origin."""
        return self._line.at_work()

    def known(self) -> list[Pull]:
        """The newest pull of each name."""
        with self._changed:
            return [pull for _, pull in sorted(self._latest.items()) if not self._is_undone(pull)]

    def resolve(self, spec: ModelSpec) -> Manifest:
        """Ask the spec's source what it is now, for somebody who waits for it. Raises CachdError."""
        source = self._sources.of(spec.ref)
        whole = self._context.resolves.resolve(source, spec.ref, self._stopping, seconds=_ANSWER_SECONDS)
        return whole.select(spec.include, spec.exclude)

    def cancel(self, name: str, *, force: bool = False) -> Pull | None:
        """Tell the name's pull to stop, and do not wait for it; None when there was none.

        Raises NotFound, or InUse when the configuration lists the name, it is pinned or its model open, and
        not forced.
        """
        known = self._latest.get(name)
        snapshots = self._store.snapshots
        if known is None and not (snapshots.has(name) or snapshots.was_evicted(name)):
            raise no_such_model(name)
        if not force and self._context.reclaim.keeps(name):
            raise InUse(
                f"the configuration lists {name}: it would come back at the next start or change of the file",
                code="configured",
                hint="take it out of the file, or force (--force, force=true)",
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
        """Cancel the name's pull, wait for its end, withdraw its snapshot and free its bytes; how many.

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
            self._forget(name)  # told here when it cannot be, lest the next start asks for it again
            if known.progress.manifest:
                freed += self._store.content.free(known.progress.manifest, [name])
        return freed

    def rollback(self, name: str) -> Snapshot:
        """Let a name lead to what it led to before, with no byte of any source.

        Raises InUse while the name is being pulled, NotFound when nothing of before is here.
        """
        with self._changed:
            running = self._running.get(name)
        if running is not None and running.progress.state == "publishing":
            wait([running.done])
        elif running is not None:
            raise InUse(
                f"{name} is being pulled from {running.spec.ref}, which would take its place",
                code="name_busy",
                hint="wait for that pull, then roll it back",
            )
        return self._store.snapshots.rollback(name, now=time.time())

    def end_refused(self, check: Callable[[Manifest], None]) -> None:
        """Let every running pull fail for good whose manifest `check` raises for."""
        for running in self.running():
            manifest = running.progress.manifest
            try:
                check(manifest) if manifest else None
            except CachdError as refusal:
                running.refusal = refusal
                running.progress.cancel_token.cancel()

    def was_refused(self, spec: ModelSpec, refusal: CachdError) -> None:
        """Tell who asks for a spec why it is not here any more, unless it is pulled again."""
        ended = Pull(spec)
        ended.error, ended.progress.state = refusal, "failed"
        ended.done.set_exception(refusal)
        with self._changed:
            if spec.name not in self._running:
                self._latest[spec.name] = ended
        self._store.snapshots.changes.mark(spec.name)

    def interrupt(self) -> None:
        """Tell every pull to stop where it is; they go on when the daemon starts again."""
        with self._changed:
            self._closed = True
            running = list(self._running.values())
        for each in running:
            each.progress.cancel_token.cancel()
        self._stopping.cancel()
        self._line.close()
        self._context.downloads.interrupt()

    def close(self) -> None:
        """Interrupt every pull and join its thread; one that a source or the disk holds up is left behind."""
        self.interrupt()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("a source or the disk keeps a pull waiting: left behind", thread=thread.name)
        for left in self.running():
            with suppress(CachdError):
                self._store.ends_well(left.spec.name)

    # --- inside ---

    def _set_aside(self, found: Remembered) -> None:
        """Show a pull as failed with which the daemon died again and again, and leave it alone. It stays
        remembered so, until somebody asks for it again or deletes it."""
        aside = Pull(found.spec, replace=found.replace, pins=found.pins)
        aside.error = CachdError(
            f"{found.spec.name}: the daemon died {found.began} times in a row while it pulled this",
            code=SET_ASIDE,
            hint="see the daemon's log and memory limit, then ask for it again (cachd pull)",
            deaths=found.began,
        )
        aside.progress.state = "failed"
        aside.done.set_exception(aside.error)
        log.error("pull set aside", name=found.spec.name, ref=str(found.spec.ref), deaths=found.began)
        with self._changed:
            self._latest[found.spec.name] = aside
            self._tell_of(aside)
        self._store.snapshots.changes.mark(found.spec.name)

    def _is_undone(self, ended: Pull) -> bool:
        return ended.progress.state == "ready" and self._store.snapshots.get(ended.spec.name) is None

    def _is_ready(self, spec: ModelSpec) -> bool:
        ready = self._store.snapshots.get(spec.name)
        return ready is not None and ready.spec == spec

    def _count_hit(self, name: str) -> None:
        """What is asked for is ready. Called with the lock."""
        self._metrics.hits.inc()
        self._store.usage_log.used(name, time.time())
        latest = self._latest.get(name)
        if latest is not None and latest.error is not None:
            self._drop(name)  # what failed since was about another spec, and is over

    def _check_name(self, spec: ModelSpec, running: Pull | None, *, refresh: bool) -> None:
        """Raises InUse when the name may not move to what is asked: see `Permit`. Called with the lock.

        A pull that failed and left nothing owns no name, unless that is pinned.
        """
        if running is not None:
            if not running.spec.is_of_same_model(spec):
                raise name_taken(spec, running.spec, "is being pulled from")
            raise InUse(
                f"{spec.name} is being pulled from {running.spec}",
                code="name_busy",
                hint="wait for it, stop it (--replace, replace: true), or take another name",
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
        """Let another pull have the name; False when this one publishes first. Called with the lock."""
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
                permit = started.permit  # durable before anybody is told that it runs
                self._store.remember(started.spec, replace=permit.replace, pins=permit.pins)
        except CachdError as error:
            self._ended(started, "failed", time.monotonic(), error)
            raise
        self._queue(started)

    def _forget(self, name: str) -> None:
        """Ask for nothing at the next start that ended, or was replaced, unless another is pulled now."""
        with self._remembering:
            if name not in self._running:
                self._store.forget(name)

    def _check_space(self) -> None:
        """Raises Unavailable when the daemon stops, or as many pulls wait as may. Called with the lock."""
        if self._closed:
            raise Unavailable("the daemon is stopping", code="stopping", retry_after=_RETRY_SECONDS)
        if len(self._running) >= self._most:
            raise Unavailable(
                f"{len(self._line)} pulls are waiting, and {self._queued} may",
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
        """Tell nothing of the newest pull of a name any more. Called with the lock."""
        self._latest.pop(name, None)
        self._ended_bytes.pop(name, None)

    def _tell_of(self, ended: Pull) -> None:
        """Go on telling of a pull that ended, and of no more than may be. Called with the lock."""
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
        self._leave_if_cancelled(started)  # while its spec was written

    def _leave_if_cancelled(self, waiting: Pull) -> None:
        if waiting.progress.cancel_token.is_cancelled and self._line.leave(waiting):
            self._cancelled(waiting)

    def _cancelled(self, waiting: Pull) -> None:
        when = "while it waited" if waiting.began else "before it began"
        reason = Cancelled(f"{waiting.spec.name}: cancelled {when}")
        self._ended(waiting, "cancelled", waiting.began or time.monotonic(), reason)

    def _queue_later(self, pull: Pull, error: Unavailable) -> None:
        """Try a pull again after a while whose source is briefly away; its slot is another's until then."""
        pull.resolve_failures += 1
        seconds = backoff.delay(
            pull.resolve_failures,
            told=error.retry_after,
            chance=random.random(),  # noqa: S311
        )
        log.info("resolve asked again", name=pull.spec.name, code=error.code, in_seconds=round(seconds, 1))
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
                del next_pull  # with every download it made, which would stay until the thread's next pull

    def _pull(self, running: Pull) -> Unavailable | None:
        """Run a pull to its end; or the reason why it must be tried again later."""
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
        """Count this life of the daemon against the pull until one of them has ended."""
        with self._remembering, suppress(CachdError):  # a full disk: the pull may make room
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
            if not self._closed or state != "cancelled":  # what a stop cancels goes on after the start
                self._forget(spec.name)
            else:
                self._store.ends_well(spec.name)
        if isinstance(outcome, DiskFailed):
            self._metrics.disk_failures.inc()
        if isinstance(outcome, CachdError):  # its frames would keep all that the pull had in memory
            outcome.__traceback__ = outcome.__cause__ = outcome.__context__ = None
            running.error = outcome
        progress.end()
        progress.state = state  # after the error: who reads a failure finds its reason
        with self._changed:
            self._tell_of(running)
        self._store.snapshots.changes.mark(spec.name)
        if isinstance(outcome, CachdError):
            running.done.set_exception(outcome)
        else:
            running.done.set_result(outcome)
            self._sweep()

    def _sweep(self) -> None:
        """Free what a newer snapshot replaced, once nobody reads it and no pull is about to publish it."""
        try:
            self._store.snapshots.sweep(keep={pull.spec.ref.base for pull in self.running()})
        except (CachdError, OSError, ValueError) as error:
            log.warning("sweep failed", reason=repr(error))
