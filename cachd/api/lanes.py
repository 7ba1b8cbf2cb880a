"""Threads for calls that cost much: each kind has a few of its own, and a call waits for one only so long.

A probe therefore never waits for a listing, nor a listing for an origin that is asked what a model needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterator
from concurrent import futures
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

from cachd.errors import CachdError, Unavailable
from cachd.transfer import threads

_RETRY_SECONDS = 2.0
_LEAVING = 8  # of those who waited for one pull are answered in one turn of the event loop
T = TypeVar("T")


class Lane:
    """At most `most` calls of one kind run at once, and no more than `callers` wait, for `patience_seconds`.

    Each runs inside of `during`. Used on the event loop alone. Its threads start with it.
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
        """What `work` returns or raises, in a thread. Raises Unavailable `busy`."""
        with self._caller():
            return await self._run(work, begun=lambda: None)

    async def shared(self, key: Hashable, work: Callable[[], T]) -> T:
        """The same, made once for all who ask for `key` before it is begun: what they get is never older
        than their question."""
        with self._caller():
            running = self._next.get(key)
            if running is None:
                running = asyncio.ensure_future(self._run(work, begun=partial(self._next.pop, key, None)))
                running.add_done_callback(partial(self._ended, key))
                self._next[key] = running
            return await asyncio.shield(running)  # a client that hangs up ends nobody else's

    def close(self) -> None:
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
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._done, work)
        finally:
            self._free.release()

    def _done(self, work: Callable[[], T]) -> T:
        with self._during():
            return work()

    def _ended(self, key: Hashable, running: asyncio.Task[Any]) -> None:
        if self._next.get(key) is running:
            del self._next[key]
        if not running.cancelled():
            running.exception()  # it may be that nobody is left to be told

    def _busy(self) -> CachdError:
        return Unavailable(
            f"{self._most} calls of this kind run already ({self._name}), and others wait",
            code="busy",
            hint="ask again later",
            retry_after=_RETRY_SECONDS,
        )


class Waits:
    """The calls that wait for pulls to end, for which no thread is needed: at most `most`."""

    def __init__(self, most: int) -> None:
        self._most, self._waiting = most, 0
        self._ends: dict[futures.Future[Any], asyncio.Future[Any]] = {}
        self._leaving = asyncio.Semaphore(_LEAVING)

    @contextmanager
    def one(self) -> Iterator[bool]:
        """Whether one more may wait; it is counted until it leaves."""
        may_wait = self._waiting < self._most
        self._waiting += may_wait
        try:
            yield may_wait
        finally:
            self._waiting -= may_wait

    async def end_of(self, done: futures.Future[Any]) -> None:
        """Return once a pull has ended, however it ended. All who wait for one pull share one callback of it,
        so that a client that asks again and again leaves nothing behind."""
        end = self._ends.get(done)
        if end is None:
            end = self._ends[done] = asyncio.wrap_future(done)
            end.add_done_callback(partial(self._ended, done))
        with suppress(CachdError):
            await asyncio.shield(end)
        async with self._leaving:  # a thousand answers in one turn of the loop would keep probes waiting
            await asyncio.sleep(0)

    def _ended(self, done: futures.Future[Any], end: asyncio.Future[Any]) -> None:
        self._ends.pop(done, None)
        if not end.cancelled():
            end.exception()


class Lanes:
    """The kinds of calls.

    Of `connections`, half may wait for pulls and an eighth for the lanes: the others stay for quick answers.
    Probes have no bound but a time, so that nobody's probes refuse another's.
    """

    def __init__(self, *, connections: int) -> None:
        callers = max(4, connections // 32)
        self.waits = Waits(connections // 2)
        self.probes = Lane("probe", 1, callers=connections, patience_seconds=60.0, during=nullcontext)
        self.reads = Lane("read", 2, callers=callers)
        self.scrapes = Lane("scrape", 1, callers=callers)
        self.resolves = Lane("resolve", 4, callers=callers)
        self.changes = Lane("change", 4, callers=callers, patience_seconds=60.0)

    def close(self) -> None:
        for lane in (self.probes, self.reads, self.scrapes, self.resolves, self.changes):
            lane.close()
