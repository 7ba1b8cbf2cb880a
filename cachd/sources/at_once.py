"""Asks an origin about many things at once.

Fewer threads ask when it refuses some of the requests, or when it is so near that one thread is as fast.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from cachd.errors import Unavailable
from cachd.policy.short_tasks import ShortTasks
from cachd.sources.cancel import CancelToken
from cachd.sources.failures import BUSY

THREADS = 8
_MAX_REFUSALS = 4
_FIRST_PAUSE_SECONDS = 0.1

T = TypeVar("T")
R = TypeVar("R")


def ask_all(
    ask: Callable[[T], R],
    things: Sequence[T],
    cancel_token: CancelToken,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> list[R]:
    """The answer to each question, in order. The first error that is raised ends the others.

    A thread whose request is refused (429, 503) leaves its question to the others, unless it is the last.
    """
    questions = Questions(ask, things, cancel_token, clock)
    with ThreadPoolExecutor(THREADS) as pool:
        for ended in [pool.submit(questions.work) for _ in range(THREADS)]:
            ended.result()
    return questions.answers()


class Questions(Generic[T, R]):
    """What is asked, and the answers so far. THREADS threads call `work`."""

    def __init__(
        self,
        ask: Callable[[T], R],
        things: Sequence[T],
        cancel_token: CancelToken,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._cancel_token, self._clock = ask, cancel_token, clock
        self._left = deque(enumerate(things))
        self._answers: dict[int, R] = {}
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._short, self._running = ShortTasks(), 0
        self._threads, self._refusals = THREADS, 0  # how often in a row the last thread was refused
        self._has_failed = False

    def answers(self) -> list[R]:
        """The answers, in the order of the questions."""
        return [self._answers[number] for number in sorted(self._answers)]

    def work(self) -> None:
        """Ask until nothing is left, an error was raised, or this thread is one too many."""
        while (taken := self._take()) is not None:
            number, thing = taken
            began, used = self._clock(), time.thread_time()
            try:
                self._answers[number] = self._ask(thing)
                self._refusals = 0
            except Unavailable as error:
                if error.origin_status not in BUSY or error.retry_after:
                    self._has_failed = True
                    raise
                if self._leaves(number, thing):
                    return
                if self._refusals > _MAX_REFUSALS:
                    self._has_failed = True
                    raise
                self._cancel_token.wait(_FIRST_PAUSE_SECONDS * 2**self._refusals)
            except BaseException:
                self._has_failed = True
                raise
            finally:
                self._end(began, used)

    def _take(self) -> tuple[int, T] | None:
        """The next question; None when the thread must end."""
        with self._lock:
            while not self._has_failed and self._left:
                now = self._clock()
                if not self._short.are_enough(self._running, now):
                    self._running += 1
                    return self._left.popleft()
                self._changed.wait(self._short.seconds_left(now))
            self._threads -= 1
            self._changed.notify_all()
            return None

    def _end(self, began: float, used: float) -> None:
        with self._lock:
            now = self._clock()
            self._short.ended(now - began, time.thread_time() - used, now)
            self._running -= 1
            if self._has_failed or not self._left:
                self._changed.notify_all()

    def _leaves(self, number: int, thing: T) -> bool:
        """Put back a question that was refused. Returns whether the thread must end: others still work."""
        with self._lock:
            self._left.appendleft((number, thing))
            is_last = self._threads == 1
            if is_last:
                self._refusals += 1
            else:
                self._threads -= 1
            return not is_last
