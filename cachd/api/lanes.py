"""Runs expensive API calls in small thread pools, one pool for each kind of call, with bounded waiting.

A probe therefore never waits for a listing, and a listing never waits for a slow origin.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Hashable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

from cachd.errors import Busy, CachdError
from cachd.kernel import threads

_RETRY_SECONDS = 2.0
_PREFLIGHTS = 4  # that run or wait: one of a hostile model takes seconds
_LEAVING = 8  # waiters answered in one iteration of the event loop when a pull ends
T = TypeVar("T")


class Lane:
    """A pool of `most` threads for one kind of call.

    At most `callers` calls run or wait at once, and none waits longer than `patience_seconds` for a thread.
    Each call runs inside `during`. Used only on the event loop. All threads start with the lane.
    """

    def __init__(
        self,
        name: str,
        most: int,
        *,
        callers: int,
        patience_seconds: float = 10.0,
        during: Callable[[], AbstractContextManager[None]] = threads.in_brief_turns,
    ) -> None:
        self._name, self._most, self._most_callers = name, most, callers
        self._patience_seconds, self._during = patience_seconds, during
        self._threads = threads.pool(most, name)
        self._free = asyncio.Semaphore(most)
        self._callers = 0
        self._next: dict[Hashable, asyncio.Task[Any]] = {}

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` in a thread; its result or exception. Raises Busy `busy` when none is free."""
        with self._caller():
            return await self._run(work, begun=lambda: None)

    async def shared(self, key: Hashable, work: Callable[[], T]) -> T:
        """As `run`, but calls with the same `key` share one run.

        A call joins only a run that has not started, so the result is never older than the call.
        """
        with self._caller():
            running = self._next.get(key)
            if running is None:
                running = asyncio.ensure_future(self._run(work, begun=partial(self._next.pop, key, None)))
                running.add_done_callback(partial(self._ended, key))
                self._next[key] = running
            return await asyncio.shield(running)  # a client that hangs up must not cancel it for the others

    def close(self) -> None:
        """Drop the calls that wait. Does not wait for those that run."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _caller(self) -> Iterator[None]:
        if self._callers >= self._most_callers:
            raise self._busy()
        self._callers += 1
        try:
            yield
        finally:
            self._callers -= 1

    async def _run(self, work: Callable[[], T], *, begun: Callable[[], object]) -> T:
        try:
            async with asyncio.timeout(self._patience_seconds):
                await self._free.acquire()
        except TimeoutError:
            raise self._busy() from None
        try:
            begun()
            # The context has who asked, which the log lines of the work name.
            done = partial(contextvars.copy_context().run, self._do, work)
            return await asyncio.get_running_loop().run_in_executor(self._threads, done)
        finally:
            self._free.release()

    def _do(self, work: Callable[[], T]) -> T:
        with self._during():
            return work()

    def _ended(self, key: Hashable, running: asyncio.Task[Any]) -> None:
        if self._next.get(key) is running:
            del self._next[key]
        if not running.cancelled():
            running.exception()  # retrieved here, or asyncio would log it when all callers have gone

    def _busy(self) -> CachdError:
        return Busy(
            f"too many {self._name} calls: {self._most} run at once, and others already wait",
            code="busy",
            hint="try again later",
            retry_after=_RETRY_SECONDS,
        )


class Waits:
    """The calls that wait, for pulls or for events: at most `most`. They need no thread."""

    def __init__(self, most: int) -> None:
        self._most, self._waiting = most, 0
        self._ends: dict[futures.Future[Any], asyncio.Future[Any]] = {}
        self._leaving = asyncio.Semaphore(_LEAVING)

    @contextmanager
    def one(self) -> Iterator[bool]:
        """Yields whether one more call may wait, and counts it while inside."""
        may_wait = self._waiting < self._most
        self._waiting += may_wait
        try:
            yield may_wait
        finally:
            self._waiting -= may_wait

    async def end_of(self, done: futures.Future[Any]) -> None:
        """Return when a pull has ended, successfully or not.

        All calls that wait for one pull share one callback on its future, so repeated calls leave nothing
        behind.
        """
        end = self._ends.get(done)
        if end is None:
            end = self._ends[done] = asyncio.wrap_future(done)
            end.add_done_callback(partial(self._ended, done))
        with suppress(CachdError):
            await asyncio.shield(end)
        async with self._leaving:  # answer a few at a time: a thousand answers at once would delay probes
            await asyncio.sleep(0)

    def _ended(self, done: futures.Future[Any], end: asyncio.Future[Any]) -> None:
        self._ends.pop(done, None)
        if not end.cancelled():
            end.exception()


class Lanes:
    """One lane for each kind of expensive call, and the waits for pulls.

    Of `connections`, half may wait for pulls, an eighth for the four bounded lanes, and a thirty-second may
    listen to events; the others remain for quick answers. Probes are bounded only in time, so that one
    client's probes never crowd out another's.
    """

    def __init__(self, *, connections: int) -> None:
        callers = max(4, connections // 32)
        self.waits, self.listeners = Waits(connections // 2), Waits(callers)
        self.probes = Lane("probe", 1, callers=connections, patience_seconds=60.0, during=nullcontext)
        self.reads = Lane("read", 2, callers=callers)
        self.scrapes = Lane("scrape", 1, callers=callers)
        self.resolves = Lane("resolve", 4, callers=callers)
        self.changes = Lane("change", 4, callers=callers, patience_seconds=60.0)
        self.preflights = Lane("preflight", 1, callers=_PREFLIGHTS, patience_seconds=60.0)

    def close(self) -> None:
        """Close every lane."""
        of_reads = (self.probes, self.reads, self.scrapes, self.preflights)
        for lane in (*of_reads, self.resolves, self.changes):
            lane.close()
