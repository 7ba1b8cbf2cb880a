"""Pulls in flight: joined, ordered by priority, cancelled, remembered across restarts."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter
from concurrent.futures import Future, wait
from contextlib import suppress

import structlog

from cachd.errors import CachdError, Cancelled, DiskFailed, InUse, Unavailable
from cachd.metrics import Metrics, size_class
from cachd.model import Manifest, Snapshot, Wish
from cachd.sources.schemes import Sources
from cachd.store.permit import Permit, name_taken, replaced
from cachd.store.snapshots import no_such_model
from cachd.transfer import threads
from cachd.transfer.progress import Progress
from cachd.transfer.pull import Means, pull
from cachd.transfer.streams import Share

log = structlog.get_logger(__name__)

MOST_REMEMBERED = 10_000  # ended pulls that are still told of
_CLOSE_SECONDS = 10.0
_RETRY_SECONDS = 60.0


class Pull:
    """One running request to make a wish come true. `done` resolves to its snapshot, or carries why not."""

    def __init__(self, wish: Wish, *, priority: int = 0, replace: bool = False) -> None:
        self.wish = wish
        self.permit = Permit(replace=replace)
        self.progress = Progress()
        self.share = Share(priority)
        self.error: CachdError | None = None
        self.done: Future[Snapshot] = Future()
        self.done.set_running_or_notify_cancel()  # a waiter that goes away cancels nothing


class _Line:
    """The pulls that wait. Who is next: the highest priority; then the source that has the fewest at work,
    so that a slow one keeps no other waiting; then who came first. Not safe from threads by itself."""

    def __init__(self) -> None:
        self._by_source: dict[str, list[tuple[int, int, Pull]]] = {}
        self._at_work: Counter[str] = Counter()
        self._sequence = itertools.count()

    def __len__(self) -> int:
        return sum(map(len, self._by_source.values()))

    def add(self, pull: Pull) -> None:
        line = self._by_source.setdefault(pull.wish.ref.scheme, [])
        heapq.heappush(line, (-pull.share.priority, next(self._sequence), pull))

    def next(self) -> Pull:
        """The pull whose turn it is; its source has one more at work until `ended`."""

        def order(source: str) -> tuple[int, int, int]:
            priority, sequence, _ = self._by_source[source][0]
            return priority, self._at_work[source], sequence

        source = min(self._by_source, key=order)
        _, _, pull = heapq.heappop(self._by_source[source])
        if not self._by_source[source]:
            del self._by_source[source]
        self._at_work[source] += 1
        return pull

    def ended(self, pull: Pull) -> None:
        self._at_work[pull.wish.ref.scheme] -= 1

    def leave(self, pull: Pull) -> bool:
        """Take a pull out of the line; whether it was in it."""
        source = pull.wish.ref.scheme
        line = self._by_source.get(source, [])
        stay = [entry for entry in line if entry[2] is not pull]
        if len(stay) == len(line):
            return False
        heapq.heapify(stay)
        self._by_source[source] = stay
        if not stay:
            del self._by_source[source]
        return True


class Pulls:
    """Runs pulls, `at_once` at a time while `queued` may wait. Safe from any thread."""

    def __init__(
        self,
        means: Means,
        sources: Sources,
        metrics: Metrics,
        *,
        at_once: int,
        queued: int,
    ) -> None:
        self._means, self._sources, self._metrics = means, sources, metrics
        self._store = means.store
        self._most, self._queued = at_once + queued, queued
        self._line = _Line()
        self._changed = threading.Condition()
        self._running: dict[str, Pull] = {}
        self._at_work: set[Pull] = set()
        self._latest: dict[str, Pull] = {}
        self._closed = False
        self._remembering = threading.Lock()  # of wishes on disk, so that none is forgotten for another
        self._threads = [
            threading.Thread(target=self._run, name=f"pull-{i}", daemon=True) for i in range(at_once)
        ]
        threads.start(self._threads)

    def start(
        self, wish: Wish, *, priority: int = 0, refresh: bool = False, replace: bool = False
    ) -> Pull | None:
        """Start or join the pull of a wish; None when it is ready already. Asks no source, and never waits.

        `refresh` resolves the ref again though it is ready. `replace` moves a name that is another model's,
        or pinned, and stops the pull of another wish that runs under it. Raises InUse when the name may not
        move, Unavailable when too many wait, NoSpace or DiskFailed when it cannot be kept.
        """
        with self._changed:
            running = self._running.get(wish.name)
            if running is not None and running.wish == wish:
                self._metrics.joins.inc()
                return running
            if not replace:
                self._check_name(wish, running, refresh=refresh)
            is_ready = not refresh and self._is_ready(wish)
            if running is None and is_ready:
                self._count_hit(wish.name)
                return None
            self._check_room()
            started = None
            if running is None or not self._take_place_of(running) or not is_ready:
                started = self._admit(wish, priority, replace=replace)
            else:
                self._count_hit(wish.name)
                del self._latest[wish.name]  # the pull that was stopped: what is ready is another's
        if running is not None:
            self._end_replaced(running)
        if started is not None:
            self._begin(started)
        return started

    def resume(self) -> None:
        """Go on with the pulls that an earlier life of the daemon did not finish."""
        for wish in self._store.remembered():
            log.info("pull resumed", name=wish.name, ref=str(wish.ref))
            with self._changed:
                started = self._admit(wish, priority=0, replace=True)  # it was allowed to before
            self._queue(started)
        self._sweep()

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
        """Those of the running pulls that wait for no turn."""
        with self._changed:
            return list(self._at_work)

    def known(self) -> list[Pull]:
        """The newest pull of each name."""
        with self._changed:
            return [pull for _, pull in sorted(self._latest.items()) if not self._is_undone(pull)]

    def resolve(self, wish: Wish) -> Manifest:
        """Ask the wish's source what it is now. Raises CachdError."""
        source = self._sources.of(wish.ref.scheme)
        return source.resolve(wish.ref).select(wish.include, wish.exclude)

    def cancel(self, name: str, *, force: bool = False) -> Pull | None:
        """Tell the name's pull to stop, and do not wait for it; None when there was none.

        Raises NotFound, or InUse when the configuration lists the name, it is pinned or its model open, and
        not forced.
        """
        known = self._latest.get(name)
        if known is None and not self._store.snapshots.has(name):
            raise no_such_model(name)
        if not force and self._means.reclaim.keeps(name):
            raise InUse(
                f"the configuration lists {name}: it would come back at the next start or change of the file",
                code="configured",
                mend="take it out of the file, or force (--force, force=true)",
            )
        if not force:
            self._store.snapshots.check_unused(name)
        if known is None:
            return None
        known.progress.cancelled.set()
        with self._changed:
            waited = self._line.leave(known)
            self._metrics.pull_queue_length.set(len(self._line))
        if waited:
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
        if known is not None:
            with self._changed:
                if self._latest.get(name) is known:
                    del self._latest[name]
            snapshots.unpin(name)
            snapshots.changes.mark(name)
            self._forget(name)  # told here when it cannot be, lest the next start asks for it again
            if known.progress.manifest:
                freed += self._store.content.free(known.progress.manifest)
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
                f"{name} is being pulled from {running.wish.ref}, which would take its place",
                code="name_busy",
                mend="wait for that pull, then roll it back",
            )
        return self._store.snapshots.rollback(name, now=time.time())

    def interrupt(self) -> None:
        """Tell every pull to stop where it is; they go on when the daemon starts again."""
        with self._changed:
            self._closed = True
            for running in self._running.values():
                running.progress.cancelled.set()
            self._changed.notify_all()
        self._means.downloads.interrupt()

    def close(self) -> None:
        """Interrupt every pull and join its thread; one that a source or the disk holds up is left behind."""
        self.interrupt()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("a source or the disk keeps a pull waiting: left behind", thread=thread.name)

    # --- inside ---

    def _is_undone(self, ended: Pull) -> bool:
        return ended.progress.state == "ready" and self._store.snapshots.get(ended.wish.name) is None

    def _is_ready(self, wish: Wish) -> bool:
        ready = self._store.snapshots.get(wish.name)
        return ready is not None and ready.wish == wish

    def _count_hit(self, name: str) -> None:
        """What is asked for is ready. Called with the lock."""
        self._metrics.hits.inc()
        self._store.uses.used(name, time.time())
        latest = self._latest.get(name)
        if latest is not None and latest.error is not None:
            del self._latest[name]  # what failed since was about another wish, and is over

    def _check_name(self, wish: Wish, running: Pull | None, *, refresh: bool) -> None:
        """Raises InUse when the name may not move to what is asked: see `Permit`. Called with the lock.

        A pull that failed and left nothing owns no name, unless that is pinned.
        """
        if running is not None:
            if not running.wish.is_of_same_model(wish):
                raise name_taken(wish, running.wish, "is being pulled from")
            raise InUse(
                f"{wish.name} is being pulled from {running.wish}",
                code="name_busy",
                mend="wait for it, stop it (--replace, replace: true), or take another name",
            )
        owner, latest = self._store.snapshots.owner(wish.name), self._latest.get(wish.name)
        is_pinned = self._store.snapshots.is_pinned(wish.name)
        if owner is None and is_pinned and latest is not None:
            owner = latest.wish
        if owner is not None and not owner.is_of_same_model(wish):
            raise name_taken(wish, owner)
        is_here = self._store.snapshots.get(wish.name) is not None
        if owner is not None and is_pinned and (owner != wish or (refresh and is_here)):
            raise name_taken(wish, owner, "is pinned at")

    def _take_place_of(self, running: Pull) -> bool:
        """Let another pull have the name; False when this one publishes first. Called with the lock."""
        del self._running[running.wish.name]
        running.progress.cancelled.set()
        return running.permit.revoke()

    def _end_replaced(self, running: Pull) -> None:
        with self._changed:
            waited = self._line.leave(running)
            self._metrics.pull_queue_length.set(len(self._line))
        log.info("pull replaced", name=running.wish.name, ref=str(running.wish.ref))
        if waited:
            self._cancelled(running)

    def _begin(self, started: Pull) -> None:
        try:
            with self._remembering:
                self._store.remember(started.wish)  # durable before anybody is told that it runs
        except CachdError as error:
            self._ended(started, "failed", time.monotonic(), error)
            raise
        self._queue(started)

    def _forget(self, name: str) -> None:
        """Ask for nothing at the next start that ended, or was replaced, unless another is pulled now."""
        with self._remembering:
            if name not in self._running:
                self._store.forget(name)

    def _check_room(self) -> None:
        """Raises Unavailable when the daemon stops, or as many pulls wait as may. Called with the lock."""
        if self._closed:
            raise Unavailable("the daemon is stopping", code="stopping", retry_after=_RETRY_SECONDS)
        if len(self._running) >= self._most:
            raise Unavailable(
                f"{len(self._line)} pulls are waiting, and {self._queued} may",
                code="queue_full",
                mend="ask again later, or raise queued_pulls",
                retry_after=_RETRY_SECONDS,
            )

    def _admit(self, wish: Wish, priority: int, *, replace: bool) -> Pull:
        """Register a pull under its name. Called with the lock."""
        self._metrics.misses.inc()
        self._store.uses.set_priority(wish.name, priority)
        started = Pull(wish, priority=priority, replace=replace)
        self._running[wish.name] = started
        if len(self._latest) >= MOST_REMEMBERED:
            self._latest = {n: p for n, p in self._latest.items() if not p.done.done()}
        self._latest[wish.name] = started
        self._store.snapshots.changes.mark(wish.name)
        return started

    def _queue(self, started: Pull) -> None:
        with self._changed:
            cancelled = started.progress.cancelled.is_set()  # while its wish was written
            if not cancelled:
                self._line.add(started)
                self._metrics.pull_queue_length.set(len(self._line))
                self._changed.notify()
        if cancelled:
            self._cancelled(started)

    def _cancelled(self, waiting: Pull) -> None:
        reason = Cancelled(f"{waiting.wish.name}: cancelled before it began")
        self._ended(waiting, "cancelled", time.monotonic(), reason)

    def _run(self) -> None:
        while (next_pull := self._next()) is not None:
            self._metrics.pulls_in_progress.inc()
            self._store.snapshots.changes.mark(next_pull.wish.name)
            try:
                self._pull(next_pull)
            finally:
                self._metrics.pulls_in_progress.dec()
                with self._changed:
                    self._line.ended(next_pull)
                    self._at_work.discard(next_pull)
                del next_pull  # with every download it made, which would stay until the thread's next pull

    def _next(self) -> Pull | None:
        with self._changed:
            while not self._line and not self._closed:
                self._changed.wait()
            if not self._line:
                return None
            found = self._line.next()
            self._at_work.add(found)
            self._metrics.pull_queue_length.set(len(self._line))
            return found

    def _pull(self, running: Pull) -> None:
        wish, began = running.wish, time.monotonic()
        progress = running.progress
        try:
            if progress.cancelled.is_set():
                raise Cancelled(f"{wish.name}: cancelled before it began")
            source = self._sources.of(wish.ref.scheme)
            snapshot = pull(
                wish, source, self._means, share=running.share, progress=progress, permit=running.permit
            )
        except CachdError as error:
            state = "cancelled" if progress.cancelled.is_set() else "failed"
            self._ended(running, state, began, error)
        except Exception as error:
            log.exception("a pull failed in a way it should not", name=wish.name)
            internal = CachdError(f"{wish.name}: {type(error).__name__}", mend="see the daemon's log")
            self._ended(running, "failed", began, internal)
        else:
            self._metrics.last_pull.set(snapshot.published_at)
            self._ended(running, "ready", began, snapshot)

    def _ended(self, running: Pull, state: str, began: float, outcome: Snapshot | CachdError) -> None:
        wish, progress = running.wish, running.progress
        if state == "cancelled" and running.permit.is_revoked:
            outcome = replaced(wish)
        seconds = time.monotonic() - began
        self._metrics.pull_seconds.labels(state, size_class(progress.total)).observe(seconds)
        log.info(
            "pull ended",
            name=wish.name,
            ref=str(wish.ref),
            state=state,
            seconds=round(seconds, 2),
            size_bytes=progress.total,
            fetched_bytes=progress.fetched,
            resumed_bytes=progress.resumed,
            code=outcome.code if isinstance(outcome, CachdError) else "",
            detail=outcome.detail if isinstance(outcome, CachdError) else "",
            withheld=dict(outcome.withheld) if isinstance(outcome, CachdError) else {},
        )
        self._means.reclaim.pulled(wish, outcome, fetched=progress.fetched, seconds=seconds)
        with self._changed:
            if self._running.get(wish.name) is running:
                del self._running[wish.name]
        with suppress(CachdError):
            if not self._closed or state != "cancelled":  # what a stop cancels goes on after the start
                self._forget(wish.name)
        if isinstance(outcome, DiskFailed):
            self._metrics.disk_failures.inc()
        running.error = outcome if isinstance(outcome, CachdError) else None
        progress.state = state  # after the error: who reads a failure finds its reason
        self._store.snapshots.changes.mark(wish.name)
        if isinstance(outcome, CachdError):
            running.done.set_exception(outcome)
        else:
            running.done.set_result(outcome)
            self._sweep()

    def _sweep(self) -> None:
        """Free what a newer snapshot replaced, once nobody reads it and no pull is about to publish it."""
        try:
            self._store.snapshots.sweep(keep={pull.wish.ref.base for pull in self.running()})
        except (CachdError, OSError, ValueError) as error:
            log.warning("sweep failed", reason=repr(error))
