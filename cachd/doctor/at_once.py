"""Runs calls at the same time, each in a thread of its own, and waits for them only until a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from cachd.errors import CachdError, Unavailable
from cachd.kernel import threads

T = TypeVar("T")
NO_ANSWER = "no_answer"
MAX_AT_ONCE = 64


def at_once(
    calls: Sequence[Callable[[], T]], seconds: float, *, clock: Callable[[], float] = time.monotonic
) -> list[T | CachdError]:
    """The result of each call, in order; for a call that failed, its error.

    A call that takes longer than `seconds` gets the error `no_answer`, and its thread is left behind: nothing
    can end a thread that waits for a dead disk. MAX_AT_ONCE calls run at once; the others follow, with a
    deadline of their own. Raises Busy when the system refuses a thread.
    """
    if len(calls) > MAX_AT_ONCE:
        first, rest = calls[:MAX_AT_ONCE], calls[MAX_AT_ONCE:]
        return at_once(first, seconds, clock=clock) + at_once(rest, seconds, clock=clock)
    running = [_Call(call) for call in calls]
    deadline = clock() + seconds
    threads.start(running)
    for each in running:
        each.join(max(0.0, deadline - clock()))
    return [each.result(seconds) for each in running]


class _Call(threading.Thread, Generic[T]):
    def __init__(self, call: Callable[[], T]) -> None:
        super().__init__(name="check", daemon=True)
        self._call = call
        self._found: list[T] = []
        self._error: CachdError | Exception | None = None

    def run(self) -> None:
        try:
            self._found.append(self._call())
        except Exception as error:  # noqa: BLE001 raised again by `result`
            self._error = error

    def result(self, seconds: float) -> T | CachdError:
        if self._found:
            return self._found[0]
        if self._error is None:
            return Unavailable(f"no answer within {seconds:g} s", code=NO_ANSWER)
        if isinstance(self._error, CachdError):
            return self._error
        raise self._error
