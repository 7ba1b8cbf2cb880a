"""Asks an origin about many things at once, and with fewer threads when it refuses some of the requests."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from cachd.errors import Unavailable
from cachd.sources.cancel import CancelToken

BUSY = (429, 503)
THREADS = 8
_MAX_REFUSALS = 4
_FIRST_PAUSE_SECONDS = 0.1

T = TypeVar("T")
R = TypeVar("R")


def ask_all(ask: Callable[[T], R], things: Sequence[T], cancel_token: CancelToken) -> list[R]:
    """The answer to each question, in order. The first error that is raised ends the others.

    A thread whose request is refused (429, 503) leaves its question to the others, unless it is the last.
    """
    questions = Questions(ask, things, cancel_token)
    with ThreadPoolExecutor(THREADS) as pool:
        for ended in [pool.submit(questions.work) for _ in range(THREADS)]:
            ended.result()
    return questions.answers()


class Questions(Generic[T, R]):
    """What is asked, and the answers so far. THREADS threads call `work`."""

    def __init__(self, ask: Callable[[T], R], things: Sequence[T], cancel_token: CancelToken) -> None:
        self._ask, self._cancel_token = ask, cancel_token
        self._left = deque(enumerate(things))
        self._answers: dict[int, R] = {}
        self._lock = threading.Lock()
        self._threads, self._refusals = THREADS, 0  # refusals of the last thread in a row
        self._has_failed = False

    def answers(self) -> list[R]:
        """The answers, in the order of the questions."""
        return [self._answers[number] for number in sorted(self._answers)]

    def work(self) -> None:
        """Ask until nothing is left, an error was raised, or this thread is one too many."""
        while (taken := self._take()) is not None:
            number, thing = taken
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
                self._pause()
            except BaseException:
                self._has_failed = True
                raise

    def _take(self) -> tuple[int, T] | None:
        """The next question; None when the thread must end."""
        with self._lock:
            if self._has_failed or not self._left:
                self._threads -= 1
                return None
            return self._left.popleft()

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

    def _pause(self) -> None:
        waker = _Waker()
        with self._cancel_token.reaches(waker):
            waker.event.wait(_FIRST_PAUSE_SECONDS * 2**self._refusals)


class _Waker:
    """Ends a pause when the cancel token is cancelled."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def abort(self) -> None:
        self.event.set()
