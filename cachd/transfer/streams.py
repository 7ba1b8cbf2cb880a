"""Shares the stream threads fairly among the pulls, and adapts their number to the throughput."""

from __future__ import annotations

import heapq
import itertools
import math
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

import structlog

from cachd.kernel import threads
from cachd.policy.concurrency import Concurrency
from cachd.policy.short_tasks import ShortTasks
from cachd.sources.cancel import CancelToken
from cachd.transfer.origins import Origin, Origins

log = structlog.get_logger(__name__)

BUFFER_BYTES, FAST_BUFFER_BYTES = 1 << 20, 2 << 20
MEASURED_SECONDS, SETTLED_SECONDS = 0.5, 0.2
NICENESS = 10  # of threads that move bytes: hashing and API requests run first
_FIRST_COUNTS = (4, 16)  # bounds of the number of streams to begin with
_FAST = 8  # streams with the larger buffer; when more than these work, each of them receives little

Task = Callable[[memoryview], None]
FIRST_READ_BYTES, QUICK_SECONDS = 256 << 10, 1 / 16
SLOW_SECONDS, SLOW_BYTES_PER_SECOND = 5.0, 64 << 10


class StreamQuota:
    """One pull's work for the stream threads. Quotas with a higher priority are served first.

    `tasks`: those that wait, in order. `running`: how many run. `files`: the pull's unfinished downloads.
    `to_begin`: how many more it is about to begin; only the pull's thread changes it. `short`: how many tasks
    are enough while they are short. `server`: where its bytes come from, once that is known. `read_bytes`:
    the most that a stream receives at once, so that a slow request is noticed. `has_pace`: it follows from
    the measured pace of the pull's requests.
    """

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.tasks: deque[Task] = deque()
        self.running = 0
        self.short = ShortTasks()
        self.files = self.to_begin = 0
        self.server: Origin | None = None
        self.read_bytes, self.has_pace = FIRST_READ_BYTES, False

    def set_pace(self, read_bytes: int) -> None:
        """Set `read_bytes` from the measured pace of the pull's requests."""
        self.read_bytes, self.has_pace = read_bytes, True

    def note_read(self, count: int, seconds: float) -> None:
        """Let streams receive more at once after a full and quick read, until the pace is measured."""
        if seconds < QUICK_SECONDS and count == self.read_bytes < BUFFER_BYTES and not self.has_pace:
            self.read_bytes = 2 * count

    def may_run(self, now: float) -> bool:
        """Whether one more of its tasks may run: its origin takes a request, and another thread is of use."""
        is_allowed = self.server is None or self.server.allows()
        return is_allowed and not self.short.are_enough(self.running, now)

    def waits(self, now: float) -> float:
        """Seconds until the answer of `may_run` may change without the end of a task."""
        is_limited = self.server is not None and self.server.most is not None
        return min(
            self.server.raised_in if self.server and is_limited else math.inf,
            self.short.seconds_left(now) or math.inf,
        )


class Asking(CancelToken):
    """The cancel token of a stream's request to an origin. While entered, it is listed, and `Streams.claim`
    may take the stream.

    `is_taken`: the stream was taken for another quota, and this token cancelled. `began`: when it was sent.
    `opened`: when the answer began, 0 before. `wanted`: bytes that the stream waits for at most.
    """

    __slots__ = (
        *("_before", "_counts", "_first", "_is_slow", "_listed", "_seconds", "_since", "_thread"),
        *("began", "is_taken", "opened", "quota", "wanted"),
    )

    def __init__(
        self,
        quota: StreamQuota,
        seconds: float,
        listed: dict[int, Asking],
        counts: dict[int, int],
        *,
        now: float,
    ) -> None:
        super().__init__()
        self.quota, self.is_taken = quota, False
        self._seconds, self._listed = seconds, listed
        self._counts, self._thread = counts, threading.get_ident()
        self.began = self._since = now
        self._first = self._before = counts[self._thread]
        self.opened, self.wanted = 0.0, 0
        self._is_slow = False

    def __enter__(self) -> Self:
        self._listed[threading.get_ident()] = self
        return self

    def __exit__(self, *exception: object) -> None:
        del self._listed[threading.get_ident()]

    @property
    def received(self) -> int:
        """Bytes that the request has received. Only to be read while it runs."""
        return self._counts[self._thread] - self._first

    def is_slow(self, received: int, now: float) -> bool:
        """Whether the request hardly received a byte in the last measured interval.

        `received`: bytes that its thread has received so far. `now`: monotonic seconds.
        """
        elapsed = now - self._since
        if elapsed >= self._seconds:
            self._is_slow = received - self._before < SLOW_BYTES_PER_SECOND * elapsed
            self._since, self._before = now, received
        return self._is_slow

    def take(self) -> None:
        """Abort the request. Its thread gives the stream to another quota, and continues this work later."""
        self.is_taken = True
        self.cancel()


class Streams:
    """Threads that each own one page-aligned buffer and run one task at a time with it.

    Among the quotas with the highest priority, the one with the fewest running tasks is served next; equal
    ones alternate. So two pulls get half of the streams each, whatever their sizes. A waiting quota may
    `claim` a stream of another one whose origin hardly sends.

    `at_work`, how many threads may take a task, adapts to the measured throughput (policy/concurrency.py).
    The first threads work and the others are parked, so that a few connections stay in steady use instead of
    many in rare use.
    """

    def __init__(
        self,
        most: int,
        *,
        first: int | None = None,
        changed: Callable[[int], None] = lambda _: None,
        cores: float = threads.CORES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.most, self._cores, self._clock = most, cores, clock
        self._lock = threading.RLock()  # entered itself: through a condition it would take two more calls
        self._ready, self._parked = threading.Condition(self._lock), threading.Condition(self._lock)
        self._concurrency = Concurrency(first or _first(), most)
        self._changed = changed
        changed(self.at_work)
        self._busy = 0
        self._received: dict[int, int] = {}  # bytes by thread; each thread writes only its own entry
        self._interval: tuple[float, int, float] | None = None  # (time, bytes, CPU seconds) at its start
        self._measure_at = 0.0
        self._quotas: list[StreamQuota] = []
        self._later: list[tuple[float, int, StreamQuota, Task]] = []
        self._sequence = itertools.count()
        self._closed = False
        self.origins = Origins()
        self._places: dict[int, int] = {}
        self._asking: dict[int, Asking] = {}  # by thread; each thread writes only its own entry
        self._threads = [
            threading.Thread(target=self._run, args=(i,), name=f"stream-{i}", daemon=True)
            for i in range(most)
        ]
        threads.start(self._threads)

    def waits_for(self, count: int) -> None:
        """Note that the calling stream waits for at most `count` bytes of an answer."""
        asking = self._asking[threading.get_ident()]
        asking.wanted = count
        asking.opened = asking.opened or self._clock()

    @property
    def at_work(self) -> int:
        """How many streams may run a task at once now."""
        return self._concurrency.count

    def received(self, count: int) -> None:
        """Count bytes that the calling stream received. At the end of an interval, adapt `at_work`."""
        self._received[threading.get_ident()] += count
        now = self._clock()
        if now >= self._measure_at:
            with self._lock:
                self._measure(now)

    def _measure(self, now: float) -> None:
        """Measure an interval in which all streams at work were busy, then adapt `at_work`."""
        total, used = sum(self._received.values()), time.process_time()
        if self._busy < self.at_work or not self._quotas:  # not enough work: the rate says nothing
            self._interval, self._measure_at = None, now + SETTLED_SECONDS
        elif self._interval is None:
            self._interval, self._measure_at = (now, total, used), now + MEASURED_SECONDS
        elif now >= self._measure_at:
            since, before, used_before = self._interval
            count, took = self.at_work, now - since
            busy = (used - used_before) / took / self._cores
            if self._concurrency.measured((total - before) / took, busy) == count:
                self._interval, self._measure_at = (now, total, used), now + MEASURED_SECONDS
                return
            self._interval, self._measure_at = None, now + SETTLED_SECONDS
            self._changed(self.at_work)
            self._parked.notify_all()
            self._ready.notify_all()

    def more_files(self, quota: StreamQuota, count: int) -> None:
        """Change the number of the quota's unfinished downloads by `count`, which may be negative."""
        with self._lock:
            quota.files += count

    def has_a_file_each(self, quota: StreamQuota) -> bool:
        """Whether the pull has at least one unfinished download for every stream at work."""
        most = quota.server.most if quota.server else None
        return quota.files + quota.to_begin >= min(self.at_work, most or self.at_work)

    def submit(self, quota: StreamQuota, *tasks: Task) -> None:
        """Queue tasks before those that wait in the quota, in the given order."""
        with self._lock:
            quota.tasks.extendleft(reversed(tasks))
            self._queued(quota, len(tasks))

    def append(self, quota: StreamQuota, *tasks: Task) -> None:
        """Queue tasks after those that wait in the quota."""
        with self._lock:
            quota.tasks.extend(tasks)
            self._queued(quota, len(tasks))

    def submit_later(self, quota: StreamQuota, task: Task, seconds: float) -> None:
        """Queue a task in `seconds` from now, before those that wait in the quota."""
        with self._lock:
            due = self._clock() + seconds
            heapq.heappush(self._later, (due, next(self._sequence), quota, task))
            self._ready.notify_all()  # waiting threads must now wake up at this time

    @property
    def is_one_too_many(self) -> bool:
        """Whether the calling stream should end its task because `at_work` was lowered."""
        return self._places.get(threading.get_ident(), 0) >= self.at_work

    def should_yield(self, quota: StreamQuota) -> bool:
        """Whether the calling stream should end its task: there are too many streams; or a waiting quota has
        a higher priority, or the same priority and at least two fewer running tasks."""
        with self._lock:
            now = self._clock()
            return self.is_one_too_many or any(
                other.priority > quota.priority
                or (other.priority == quota.priority and other.running + 1 < quota.running)
                for other in self._quotas
                if other.may_run(now) or other.server is quota.server
            )

    def asking(self, quota: StreamQuota, seconds: float = SLOW_SECONDS) -> Asking:
        """A context in which the calling stream asks an origin. `claim` may take the stream for another quota
        when the origin hardly sends for `seconds`."""
        return Asking(quota, seconds, self._asking, self._received, now=self._clock())

    def claim(self, quota: StreamQuota) -> None:
        """If tasks of the quota wait and all streams are busy, take a slow stream from another quota."""
        with self._lock:
            now = self._clock()
            if quota not in self._quotas or self._busy < self.at_work or not quota.may_run(now):
                return
            asking = [(each, self._received[thread]) for thread, each in list(self._asking.items())]
            slow = [each for each, received in asking if each.is_slow(received, now)]
            found = [each for each in slow if not each.is_taken and _goes_before(quota, each.quota)]
            taken = max(found, key=lambda each: each.quota.running, default=None)
        if taken is not None:
            log.info("slow stream taken for another pull", running=taken.quota.running)
            taken.take()

    def close(self) -> None:
        """Drop the waiting tasks, let the running ones end, and join every thread."""
        with self._lock:
            self._closed = True
            self._ready.notify_all()
            self._parked.notify_all()
        for thread in self._threads:
            thread.join()

    def _queued(self, quota: StreamQuota, count: int) -> None:
        """Wake threads for new tasks; one thread that waits for the quota if none of them may run now."""
        was_known = quota in self._quotas
        self._admit(quota)
        if quota.may_run(self._clock()):
            self._ready.notify(count)
        elif not was_known:
            self._ready.notify()

    def _admit(self, quota: StreamQuota) -> None:
        if quota.tasks and quota not in self._quotas:
            self._quotas.append(quota)

    def _next(self, place: int) -> tuple[StreamQuota, Origin | None, Task] | None:
        """Wait until thread number `place` may work and there is a task for it; None once closed."""
        with self._lock:
            while not self._closed:
                if place >= self.at_work:
                    self._ready.notify()  # this thread may not work: pass the wake-up on
                    self._parked.wait()
                    continue
                now = self._clock()
                while self._later and self._later[0][0] <= now:
                    _, _, quota, task = heapq.heappop(self._later)
                    quota.tasks.appendleft(task)
                    self._admit(quota)
                if may_run := [quota for quota in self._quotas if quota.may_run(now)]:
                    quota = min(may_run, key=lambda q: (-q.priority, q.running))
                    task = quota.tasks.popleft()
                    quota.running += 1
                    self._busy += 1
                    self._quotas.remove(quota)  # if it has more tasks, `_admit` puts it last
                    self._admit(quota)
                    if quota.server:
                        quota.server.begin()
                    return quota, quota.server, task
                waits = [quota.waits(now) for quota in self._quotas]
                waits += [due - now for due, *_ in self._later[:1]]
                wait = min(waits, default=math.inf)
                self._ready.wait(wait if wait < math.inf else None)
            return None

    def _run(self, place: int) -> None:
        os.nice(NICENESS)
        self._places[threading.get_ident()] = place
        self._received[threading.get_ident()] = 0
        buffer = memoryview(mmap.mmap(-1, FAST_BUFFER_BYTES if place < _FAST else BUFFER_BYTES))
        while (work := self._next(place)) is not None:
            quota, server, task = work
            began, used = self._clock(), time.thread_time()
            try:
                task(buffer)
            except Exception:
                log.exception("a stream's task failed in a way it should not")
            finally:
                del task, work
                with self._lock:
                    now = self._clock()
                    quota.short.ended(now - began, time.thread_time() - used, now)
                    quota.running -= 1
                    self._busy -= 1
                    if server is not None:
                        server.end()
                        if server.most is not None:
                            self._ready.notify()  # a task that waits for the same origin may run


def _goes_before(waiting: StreamQuota, quota: StreamQuota) -> bool:
    """Whether a waiting quota should get a stream of the slow one."""
    if waiting.priority != quota.priority:
        return waiting.priority > quota.priority
    return not waiting.running or waiting.running + 1 < quota.running


def _first() -> int:
    """How many streams work at first: one per core, within bounds that suit a fast origin."""
    least, most = _FIRST_COUNTS
    return min(max(threads.CORES, least), most)
