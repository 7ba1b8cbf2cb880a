"""Keeps threads that compete for the interpreter's lock (GIL) on one core.

For a small file, a thread runs mostly Python code, and each of its system calls passes the GIL to another
thread. Passing it to a thread on another core costs more than the work for the file; on the same core it is
nearly free.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cachd.kernel.calls import running_on

_CHOOSE_SECONDS = 1.0


class _Place(threading.local):
    core: int | None = None  # the only core that the thread may run on; None: any
    leads = False  # it may run on any core, and the others follow it to the core where it runs


class OneCore:
    """A thread that calls `gather` shares one core with the others until it calls `scatter`.

    Safe from any thread; each call affects only the calling thread.

    The scheduler chooses the core, anew every second: one thread may run anywhere while it fetches a file,
    and then the others follow it to its core. Where the affinity may not be set, nothing happens.
    """

    def __init__(self) -> None:
        self._core: int | None = None
        self._choose_at = 0.0
        self._mine = _Place()

    def gather(self) -> None:
        """Run on the common core, for work that is short or mostly waits."""
        mine, now = self._mine, time.monotonic()
        if now >= self._choose_at:
            self._choose_at, mine.leads = now + _CHOOSE_SECONDS, True
            if mine.core is not None:
                self.scatter()  # until its next `gather`: by then the scheduler has moved it to a free core
                return
        if mine.leads:
            mine.leads, self._core = False, running_on()
        if self._core not in (None, mine.core) and _run_on({self._core}):
            mine.core = self._core

    def scatter(self) -> None:
        """Run on any core that this process may use."""
        if self._mine.core is not None and _run_on(os.sched_getaffinity(os.getpid())):
            self._mine.core = None

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Gather while inside. Threads started inside inherit the core."""
        self.gather()
        try:
            yield
        finally:
            self.scatter()


together = OneCore()


def _run_on(cores: set[int]) -> bool:
    """Restrict the calling thread to these cores. Returns whether the kernel allowed it."""
    try:
        os.sched_setaffinity(0, cores)
    except OSError:  # the cores were taken from this process (cpuset), or the call is forbidden (seccomp)
        return False
    return True
