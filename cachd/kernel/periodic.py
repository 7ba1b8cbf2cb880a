"""Runs a job again and again in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import structlog

from cachd.errors import Cancelled
from cachd.kernel import threads

log = structlog.get_logger(__name__)


class Periodic:
    """A thread that calls `job` again and again. Its owner calls `start` once, and `close` at the end.

    new ──start──> waiting <──(the job returns)── running ──stop──> ended
                      └────(time is up, wake)────────^

    `job` returns the seconds until its next call, or None to wait for `wake`. If it raises Cancelled, the
    thread ends. Any other exception is logged, and the job is called again after `retry_seconds`.
    `prepare` is called first, in the thread.
    """

    def __init__(
        self,
        name: str,
        job: Callable[[], float | None],
        *,
        retry_seconds: float = 1.0,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        self._name, self._job, self._retry_seconds, self._prepare = name, job, retry_seconds, prepare
        self._stop, self._wake = threading.Event(), threading.Event()
        self._first: float | None = None
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self, *, after: float | None = 0.0) -> None:
        """Start the thread, which calls the job first in `after` seconds. Raises Unavailable."""
        self._first = after
        threads.start([self._thread])

    def wake(self) -> None:
        """Have the job called now, or again if it is running."""
        self._wake.set()

    @property
    def is_stopping(self) -> bool:
        """Whether `stop` has been called: a long job should end."""
        return self._stop.is_set()

    def rest(self, seconds: float = 0.0) -> None:
        """Wait inside of a job, in any thread. Raises Cancelled as soon as `stop` is called."""
        if self._stop.wait(seconds):
            raise Cancelled("the daemon stops")

    def stop(self) -> None:
        """Have the thread end, without waiting for it."""
        self._stop.set()
        self._wake.set()

    def close(self) -> None:
        """Stop the thread and wait for its end. Does nothing else if it was never started."""
        self.stop()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        self._prepare()
        seconds = self._first
        while True:
            self._wake.wait(seconds)
            if self.is_stopping:
                return
            self._wake.clear()
            try:
                seconds = self._job()
            except Cancelled:
                return
            except Exception:
                log.exception("a job failed in a way it should not", job=self._name)
                seconds = self._retry_seconds
