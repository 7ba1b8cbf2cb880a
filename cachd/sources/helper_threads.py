"""A thread that can be left behind: for calls into a file system that may never answer.

A share whose server is gone holds a thread in the kernel for as long as it likes, and no signal helps. So
the calls are made aside, and who waits for them gives up in time. A thread that was left behind touches
nothing of its owner's: it has its own descriptors, closes them when its call returns at last, and ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from queue import Empty, SimpleQueue
from typing import Any, Self, TypeVar

T = TypeVar("T")


class HelperThread:
    """One such thread. `call` from one thread; `abort` may come from any other."""

    def __init__(self, seconds: float) -> None:
        self.held = ExitStack()  # what its calls opened: entered and closed in the thread
        self._seconds = seconds
        self._asked: SimpleQueue[Callable[[], object] | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[object, BaseException | None]] = SimpleQueue()
        self._is_waited_for = True
        self._thread = threading.Thread(target=self._run, name="aside", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, what: Callable[..., T], *arguments: Any) -> T:
        """What `what` returns or raises. Raises TimeoutError when it does neither in time, or was aborted."""
        self._asked.put(lambda: what(*arguments))
        try:
            answer, error = self._answers.get(timeout=self._seconds)
        except Empty:
            answer, error = None, TimeoutError(f"no answer within {self._seconds:g} s")
        if isinstance(error, TimeoutError):
            self._is_waited_for = False
        if error is not None:
            raise error
        return answer  # type: ignore[return-value] # as `what` gave it

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
                except Exception as error:  # noqa: BLE001 it is raised where `call` waits
                    self._answers.put((None, error))
                del what


class HelperThreads:
    """Makes such threads, and none while `most` that were left behind still wait. Safe from any thread."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._left: list[HelperThread] = []

    @contextmanager
    def aside(self, seconds: float) -> Iterator[HelperThread]:
        """A thread for the calls inside. Raises TimeoutError when too many still wait."""
        with self._lock:
            self._left = [aside for aside in self._left if aside.is_alive]
            if len(self._left) >= self._most:
                raise TimeoutError(f"{len(self._left)} earlier calls still wait")
        aside = HelperThread(seconds)
        try:
            with aside:
                yield aside
        finally:
            if aside.is_alive:
                with self._lock:
                    self._left.append(aside)
