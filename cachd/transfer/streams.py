"""The pool of stream threads, shared fairly by the pulls; as many at work as bring the most."""

from __future__ import annotations

import heapq
import itertools
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

import structlog

from cachd.policy.concurrency import Concurrency
from cachd.sources.source import CancelToken
from cachd.transfer import threads

log = structlog.get_logger(__name__)

BUFFER_BYTES, FAST_BUFFER_BYTES = 1 << 20, 2 << 20
MEASURED_SECONDS, SETTLED_SECONDS = 0.5, 0.2
NICENESS = 10  # of a thread that moves bytes: the digest and whoever asks whether a model is ready go first
_FIRST_COUNTS = (4, 16)
_FAST = 8  # streams with the larger buffer: more are at work only where each gets little

Task = Callable[[memoryview], None]
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 5.0, 64 << 10


class StreamQuota:
    """One pull's claim on the streams: its waiting tasks, in order. A higher priority goes first."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.tasks: deque[Task] = deque()
        self.running = 0
        self.files = 0  # on their way


class Asking:
    """A stream's request to an origin, listed by its thread while it is entered.

    `is_taken`: the stream is wanted by another share; `cancel_token` ended it.
    """

    __slots__ = ("_before", "_is_slow", "_listed", "_seconds", "_since", "cancel_token", "is_taken", "quota")

    def __init__(self, quota: StreamQuota, seconds: float, listed: dict[int, Asking], received: int) -> None:
        self.quota, self.cancel_token, self.is_taken = quota, CancelToken(), False
        self._seconds, self._listed = seconds, listed
        self._since, self._before, self._is_slow = time.monotonic(), received, False

    def __enter__(self) -> Self:
        self._listed[threading.get_ident()] = self
        return self

    def __exit__(self, *exception: object) -> None:
        del self._listed[threading.get_ident()]

    def is_slow(self, received: int, now: float) -> bool:
        """Whether next to nothing came in the last stretch that was measured."""
        elapsed = now - self._since
        if elapsed >= self._seconds:
            self._is_slow = received - self._before < SLOW_BYTES_PER_SECOND * elapsed
            self._since, self._before = now, received
        return self._is_slow

    def take(self) -> None:
        self.is_taken = True
        self.cancel_token.cancel()


class Streams:
    """Threads that each own one page-aligned buffer and run one task at a time with it.

    Among the shares with the highest priority the one with the fewest running tasks is served next, in
    turn where they are equal: two pulls get half the streams each, whatever their sizes. One that waits may
    `claim` the stream of another whose origin hardly sends.

    How many threads may take a task, `at_work`, follows what they bring (policy/concurrency.py): the first of
    them work, the others are parked, so that few connections stay warm instead of many cold.
    """

    def __init__(
        self, most: int, *, first: int | None = None, changed: Callable[[int], None] = lambda _: None
    ) -> None:
        self.most = most
        lock = threading.RLock()
        self._ready, self._parked = threading.Condition(lock), threading.Condition(lock)
        self._concurrency = Concurrency(first or _first(), most)
        self._changed = changed
        changed(self.at_work)
        self._busy = 0
        self._received: dict[int, int] = {}  # bytes by thread, each its only writer
        self._settled: tuple[float, int, float] | None = None  # (time, bytes, CPU) since when all are at work
        self._look_at = 0.0
        self._quotas: list[StreamQuota] = []
        self._later: list[tuple[float, int, StreamQuota, Task]] = []
        self._sequence = itertools.count()
        self._closed = False
        self._places: dict[int, int] = {}
        self._asking: dict[int, Asking] = {}  # by thread, each its only writer
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"stream-{i}", daemon=True)
            for i in range(most)
        ]
        threads.start(self._threads)

    @property
    def at_work(self) -> int:
        """How many streams may have a task at once, now."""
        return self._concurrency.count

    def received(self, count: int) -> None:
        """Count bytes that the calling stream received; now and then, change how many are at work."""
        self._received[threading.get_ident()] += count
        now = time.monotonic()
        if now >= self._look_at:
            with self._ready:
                self._look(now)

    def _look(self, now: float) -> None:
        total, used = sum(self._received.values()), time.process_time()
        if self._busy < self.at_work or not self._quotas:  # too little to do: this says nothing
            self._settled, self._look_at = None, now + SETTLED_SECONDS
        elif self._settled is None:
            self._settled, self._look_at = (now, total, used), now + MEASURED_SECONDS
        elif now >= self._look_at:
            since, before, used_before = self._settled
            count, took = self.at_work, now - since
            busy = (used - used_before) / took / threads.CORES
            if self._concurrency.measured((total - before) / took, busy) == count:
                self._settled, self._look_at = (now, total, used), now + MEASURED_SECONDS
                return
            self._settled, self._look_at = None, now + SETTLED_SECONDS
            self._changed(self.at_work)
            self._parked.notify_all()
            self._ready.notify_all()

    def more_files(self, quota: StreamQuota, count: int) -> None:
        """Count so many files more on their way, or fewer."""
        with self._ready:
            quota.files += count

    def has_a_file_each(self, quota: StreamQuota) -> bool:
        """Whether there are files enough of this pull for every stream at work to have its own."""
        return quota.files >= self.at_work

    def submit(self, quota: StreamQuota, *tasks: Task) -> None:
        """Run tasks before any that wait in the share, in the order given."""
        with self._ready:
            quota.tasks.extendleft(reversed(tasks))
            self._admit(quota)
            self._ready.notify(len(tasks))

    def append(self, quota: StreamQuota, *tasks: Task) -> None:
        """Run tasks after those that wait in the share."""
        with self._ready:
            quota.tasks.extend(tasks)
            self._admit(quota)
            self._ready.notify(len(tasks))

    def submit_later(self, quota: StreamQuota, task: Task, seconds: float) -> None:
        """Run a task no sooner than in `seconds`; no stream is held meanwhile."""
        with self._ready:
            due = time.monotonic() + seconds
            heapq.heappush(self._later, (due, next(self._sequence), quota, task))
            self._ready.notify_all()  # whoever waits now watches the clock, too

    @property
    def is_one_too_many(self) -> bool:
        """Whether the calling stream should end its task because fewer are to be at work."""
        return self._places.get(threading.get_ident(), 0) >= self.at_work

    def should_yield(self, quota: StreamQuota) -> bool:
        """Whether the calling stream should end its task: there are too many, or a share that waits goes
        before this one or has two streams less than it at the least."""
        with self._ready:
            return self.is_one_too_many or any(
                other.priority > quota.priority
                or (other.priority == quota.priority and other.running + 1 < quota.running)
                for other in self._quotas
            )

    def asking(self, quota: StreamQuota, seconds: float = SLOW_SECONDS) -> Asking:
        """Inside, the calling stream asks an origin, and may be taken away when that hardly sends so long."""
        return Asking(quota, seconds, self._asking, self._received[threading.get_ident()])

    def claim(self, quota: StreamQuota) -> None:
        """If the share's tasks wait for a stream, take one from a share that has more and that is slow."""
        with self._ready:
            if quota not in self._quotas or self._busy < self.at_work:
                return
            now = time.monotonic()
            asking = [(each, self._received[thread]) for thread, each in list(self._asking.items())]
            slow = [each for each, received in asking if each.is_slow(received, now)]
            found = [each for each in slow if not each.is_taken and _goes_before(quota, each.quota)]
            taken = max(found, key=lambda each: each.quota.running, default=None)
        if taken is not None:
            log.info("a slow stream is taken for another pull", running=taken.quota.running)
            taken.take()

    def close(self) -> None:
        """Let running tasks end, drop the waiting ones, and join every thread."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
            self._parked.notify_all()
        for thread in self._threads:
            thread.join()

    def _admit(self, quota: StreamQuota) -> None:
        if quota.tasks and quota not in self._quotas:
            self._quotas.append(quota)

    def _next(self, place: int) -> tuple[StreamQuota, Task] | None:
        """Wait for the task that is due, and for a place among those at work; None once closed."""
        with self._ready:
            while not self._closed:
                if place >= self.at_work:
                    self._ready.notify()  # what woke this one is for another
                    self._parked.wait()
                    continue
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    _, _, quota, task = heapq.heappop(self._later)
                    quota.tasks.appendleft(task)
                    self._admit(quota)
                if self._quotas:
                    quota = min(self._quotas, key=lambda s: (-s.priority, s.running))
                    task = quota.tasks.popleft()
                    quota.running += 1
                    self._busy += 1
                    self._quotas.remove(quota)  # to the end of the line, if there is more to do
                    self._admit(quota)
                    return quota, task
                self._ready.wait(self._later[0][0] - now if self._later else None)
            return None

    def _run(self, place: int) -> None:
        os.nice(NICENESS)
        self._places[threading.get_ident()] = place
        self._received[threading.get_ident()] = 0
        buffer = memoryview(mmap.mmap(-1, FAST_BUFFER_BYTES if place < _FAST else BUFFER_BYTES))
        while (work := self._next(place)) is not None:
            quota, task = work
            try:
                task(buffer)
            except Exception:
                log.exception("a stream's task failed in a way it should not")
            finally:
                del task, work
                with self._ready:
                    quota.running -= 1
                    self._busy -= 1


def _goes_before(waiting: StreamQuota, quota: StreamQuota) -> bool:
    """Whether a share that waits should have one of the streams of a share that is slow."""
    if waiting.priority != quota.priority:
        return waiting.priority > quota.priority
    return not waiting.running or waiting.running + 1 < quota.running


def _first() -> int:
    """How many to begin with: one a core, but enough for a fast origin."""
    least, most = _FIRST_COUNTS
    return min(max(threads.CORES, least), most)
