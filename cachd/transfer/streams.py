"""The pool of stream threads, shared fairly by the pulls."""

from __future__ import annotations

import heapq
import itertools
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.get_logger(__name__)

BUFFER_BYTES = 1 << 20

Task = Callable[[memoryview], None]


class Share:
    """One pull's claim on the streams: its waiting tasks, in order. A higher priority goes first."""

    def __init__(self, priority: int = 0) -> None:
        self.priority = priority
        self.tasks: deque[Task] = deque()
        self.running = 0


class Streams:
    """Threads that each own one page-aligned buffer and run one task at a time with it.

    Among the shares with the highest priority the one with the fewest running tasks is served next, in
    turn where they are equal: two pulls get half the streams each, whatever their sizes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._ready = threading.Condition()
        self._shares: list[Share] = []
        self._later: list[tuple[float, int, Share, Task]] = []
        self._sequence = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, name=f"stream-{i}", daemon=True) for i in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, share: Share, *tasks: Task) -> None:
        """Run tasks before any that wait in the share, in the order given."""
        with self._ready:
            share.tasks.extendleft(reversed(tasks))
            self._admit(share)
            self._ready.notify(len(tasks))

    def append(self, share: Share, *tasks: Task) -> None:
        """Run tasks after those that wait in the share."""
        with self._ready:
            share.tasks.extend(tasks)
            self._admit(share)
            self._ready.notify(len(tasks))

    def submit_later(self, share: Share, task: Task, seconds: float) -> None:
        """Run a task no sooner than in `seconds`; no stream is held meanwhile."""
        with self._ready:
            due = time.monotonic() + seconds
            heapq.heappush(self._later, (due, next(self._sequence), share, task))
            self._ready.notify_all()  # whoever waits now watches the clock, too

    def owes(self, share: Share) -> bool:
        """Whether a share that waits goes before this one, or has two streams less than it at the least."""
        with self._ready:
            return any(
                other.priority > share.priority
                or (other.priority == share.priority and other.running + 1 < share.running)
                for other in self._shares
            )

    def close(self) -> None:
        """Let running tasks end, drop the waiting ones, and join every thread."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _admit(self, share: Share) -> None:
        if share.tasks and share not in self._shares:
            self._shares.append(share)

    def _next(self) -> tuple[Share, Task] | None:
        """Wait for the task that is due; None once closed."""
        with self._ready:
            while not self._closed:
                now = time.monotonic()
                while self._later and self._later[0][0] <= now:
                    _, _, share, task = heapq.heappop(self._later)
                    share.tasks.appendleft(task)
                    self._admit(share)
                if self._shares:
                    share = min(self._shares, key=lambda s: (-s.priority, s.running))
                    task = share.tasks.popleft()
                    share.running += 1
                    self._shares.remove(share)  # to the end of the line, if there is more to do
                    self._admit(share)
                    return share, task
                self._ready.wait(self._later[0][0] - now if self._later else None)
            return None

    def _run(self) -> None:
        buffer = memoryview(mmap.mmap(-1, BUFFER_BYTES))
        while (work := self._next()) is not None:
            share, task = work
            try:
                task(buffer)
            except Exception:
                log.exception("a stream's task failed in a way it should not")
            finally:
                del task, work
                with self._ready:
                    share.running -= 1
