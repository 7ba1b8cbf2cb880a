"""One core for threads that take turns at the interpreter's lock.

A small file costs its thread more Python than waiting, so that each of its system calls hands the lock on.
Handed to a thread on another core that costs more than the file's own work; on the same core it is nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cachd.store.kernel import running_on

_LOOK_SECONDS = 1.0


class _Place(threading.local):
    core: int | None = None  # where the thread is held
    leads = False  # it was let go, and says where the others follow


class OneCore:
    """Threads that `gather` run on one core until they `scatter`. Safe from any thread, for itself alone.

    Which core is the scheduler's choice, made anew every second: one of them is free for a file's time, and
    the others follow it. Where affinity may not be set, nobody gathers.
    """

    def __init__(self) -> None:
        self._core: int | None = None
        self._look_at = 0.0
        self._mine = _Place()

    def gather(self) -> None:
        """Run where the others do, for what is short or mostly waits."""
        mine, now = self._mine, time.monotonic()
        if now >= self._look_at:
            self._look_at, mine.leads = now + _LOOK_SECONDS, True
            if mine.core is not None:
                self.scatter()  # until it gathers again: by then it is where there is room
                return
        if mine.leads:
            mine.leads, self._core = False, running_on()
        if self._core not in (None, mine.core) and _run_on({self._core}):
            mine.core = self._core

    def scatter(self) -> None:
        """Run wherever this process may."""
        if self._mine.core is not None and _run_on(os.sched_getaffinity(os.getpid())):
            self._mine.core = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Be gathered inside, with every thread that begins there."""
        self.gather()
        try:
            yield
        finally:
            self.scatter()


together = OneCore()


def _run_on(cores: set[int]) -> bool:
    """Whether the calling thread may from now on run on these alone."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # taken from this process meanwhile (cpuset), or forbidden (seccomp)
        return False
    return True
