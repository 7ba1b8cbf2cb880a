"""Threads that are there from the start: but for a source's own, none is begun when there may be no more."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from cachd.errors import Unavailable

CORES = len(os.sched_getaffinity(0))  # that this process may use
_USUAL_SECONDS = 0.005  # Python's own (sys.setswitchinterval)
STOP_SECONDS = 20  # less than the 30 that a kubelet gives a pod


def start(threads: Iterable[threading.Thread]) -> None:
    """Raises Unavailable when the system gives no more; those that started run on."""
    for thread in threads:
        with given(thread.name):
            thread.start()


def pool(count: int, name: str, initializer: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    """A pool whose `count` threads run already. Raises Unavailable when the system gives fewer."""
    made = ThreadPoolExecutor(count, name, initializer)
    # Each waits for the last, or one would take the others' turns; so do we, or a shutdown that cancels what
    # is queued would leave some of them waiting for the others for ever.
    all_here = threading.Barrier(count + 1)
    try:
        with given(name):
            for _ in range(count):
                made.submit(all_here.wait)
        all_here.wait()
    except Unavailable:
        all_here.abort()
        made.shutdown()
        raise
    return made


@contextmanager
def given(name: str) -> Iterator[None]:
    """Raises Unavailable when a thread is begun inside and the system gives none."""
    try:
        yield
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        raise Unavailable(
            f"the system gives no thread for {name}: {error}",
            code="no_threads",
            hint="raise the limit of processes (ulimit -u, pids.max), or lower streams and pulls",
        ) from error


_BRIEF_SECONDS = 0.0005
_inside = 0
_counting = threading.Lock()


@contextmanager
def in_brief_turns() -> Iterator[None]:
    """While a thread is inside, every thread hands the interpreter over after 0.5 ms, not after 5 ms.

    For long work in pure Python: a probe waits for a turn of it several times. It is not always on, because
    each handover costs, and a pull of many small files, which mostly waits, would be 10 % slower.
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
    """Let the kernel end this process in `STOP_SECONDS` if it has not ended itself: a thread that waits for
    a disk that hangs cannot be joined. To be called from the main thread.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(STOP_SECONDS)
