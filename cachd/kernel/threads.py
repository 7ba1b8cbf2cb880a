"""Starts threads, so that a missing thread fails the daemon's start and not a pull.

All threads start with the daemon, except those that a source starts for its own requests. If the system
refuses one of these, `given` raises Busy.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cachd.errors import Busy

CORES = len(os.sched_getaffinity(0))  # cores that this process may use
STOP_SECONDS = 20  # less than a pod's default terminationGracePeriodSeconds, which is 30
_USUAL_SECONDS, _BRIEF_SECONDS = 0.005, 0.0005  # switch intervals; the first is Python's default

_inside = 0  # threads in `in_brief_turns`: the interval is one for the process
_counting = threading.Lock()


def start(threads: Iterable[threading.Thread]) -> None:
    """Start threads. Raises Busy when the system refuses one; those started before keep running."""
    for thread in threads:
        with given(thread.name):
            thread.start()


def pool(count: int, name: str, initializer: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    """A pool whose `count` threads have all started. Raises Busy when the system refuses one."""
    made = ThreadPoolExecutor(count, name, initializer)
    # An executor starts a thread only if none is idle. So each first task blocks until all threads have
    # started. This thread waits, too: a shutdown that cancels queued tasks would leave the others blocked.
    all_here = threading.Barrier(count + 1)
    try:
        with given(name):
            for _ in range(count):
                made.submit(all_here.wait)
        all_here.wait()
    except Busy:
        all_here.abort()
        made.shutdown()
        raise
    return made


class given:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Raises Busy when code inside `with given(name)` starts a thread and the system refuses it.

    A class and no generator, because each request to a source passes it.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, RuntimeError) and "thread" in str(error):
            raise Busy(
                f"the system refused a thread for {self._name}: {error}",
                code="no_threads",
                hint="raise the limit on processes (ulimit -u, pids.max), or lower streams and pulls",
            ) from error


@contextmanager
def in_brief_turns() -> Iterator[None]:
    """Lower the interpreter's switch interval from 5 ms to 0.5 ms while any thread is inside.

    Use it around long work in pure Python. While such work runs, the event loop waits one interval each time
    it needs the interpreter, and a probe needs it several times. The short interval is not permanent, because
    each switch costs time: it would make a pull of many small files 10 % slower.
    """
    global _inside
    with _counting:
        _inside += 1
        sys.setswitchinterval(_BRIEF_SECONDS)
    try:
        yield
    finally:
        with _counting:
            _inside -= 1
            if not _inside:
                sys.setswitchinterval(_USUAL_SECONDS)


def end_in_time() -> None:
    """Have the kernel end this process after `STOP_SECONDS`, because a thread that waits for a hanging disk
    cannot be joined. Call it from the main thread.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(STOP_SECONDS)
