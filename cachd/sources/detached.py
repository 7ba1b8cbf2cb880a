"""Runs calls that may never return in detached threads, so that their callers can stop waiting.

A call to a shared volume whose server is gone blocks in the kernel without end, and no signal interrupts it.
So a detached thread makes the call, and the caller abandons that thread after a time. An abandoned thread
uses nothing of its caller's: it has its own descriptors, closes them when its call returns, and ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeVar

T = TypeVar("T")


class DetachedThread:
    """A detached thread for one caller. Any other thread may use `abort`."""

    def __init__(self, seconds: float) -> None:
        self.held = ExitStack()  # what the calls opened; only the detached thread uses it
        self._seconds = seconds
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        self._is_waited_for = True
        self._thread = threading.Thread(target=self._run, name="detached", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether a call is still running, or may yet be made."""
        return self._thread.is_alive()

    def call(self, what: Callable[..., T], *arguments: Any) -> T:
        """Call `what` in the thread, and return or raise what it does. Raises TimeoutError after `seconds`.

        `abort` makes it raise TimeoutError, too. After a TimeoutError the thread is abandoned.
        """
        self._asked.put(lambda: what(*arguments))
        try:
            answer, error = self._answers.get(timeout=self._seconds)
        except Empty:
            answer, error = None, TimeoutError(f"no answer within {self._seconds:g} s")
        if isinstance(error, TimeoutError):
            self._is_waited_for = False
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]  # the queue holds what `what` returned

    def abort(self) -> None:
        """Make a `call` that waits in another thread raise TimeoutError at once."""
        self._answers.put((None, TimeoutError("aborted")))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._asked.put(None)
        if self._is_waited_for:
            self._thread.join()

    def _run(self) -> None:
        with self.held:
            while (what := self._asked.get()) is not None:
                try:
                    self._answers.put((what(), None))
                except Exception as error:  # noqa: BLE001 `call` raises it
                    self._answers.put((None, error))
                del what


class DetachedThreads:
    """Makes detached threads, but none while `most` abandoned ones are blocked. Safe from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._abandoned: list[DetachedThread] = []

    @contextmanager
    def one(self, seconds: float) -> Iterator[DetachedThread]:
        """A detached thread for the calls of this context. Raises TimeoutError when too many are blocked."""
        with self._lock:
            self._abandoned = [each for each in self._abandoned if each.is_alive]
            if len(self._abandoned) >= self._most:
                raise TimeoutError(f"{len(self._abandoned)} earlier calls still wait")
        thread = DetachedThread(seconds)
        try:
            with thread:
                yield thread
        finally:
            if thread.is_alive:
                with self._lock:
                    self._abandoned.append(thread)
