"""Runs jobs on models (verify, warm) in the background, at most one at a time for each model."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, Generic, TypeVar

import structlog

from cachd.errors import CachdError, Cancelled

log = structlog.get_logger(__name__)


_MAX_REMEMBERED = 1000  # the oldest ended job is forgotten first


class JobState(enum.StrEnum):
    """The states of a job; `Job` draws them."""

    running = "running"
    intact = "intact"
    damaged = "damaged"
    warm = "warm"
    failed = "failed"
    cancelled = "cancelled"


class Job:
    """One job on a model of `total` bytes, of which `done` are processed.

    running ──end──> intact, damaged (a verification), warm (a warming), failed, cancelled

    A job that failed or was cancelled has an `error`.
    """

    unexpected: ClassVar[str] = "a job failed in a way it should not"

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total, self.done = name, total, 0
        self.state = JobState.running
        self.error: CachdError | None = None
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def run(self, work: Callable[[], JobState]) -> None:
        """Run `work`, which returns the final state. Its exceptions end the job and are not raised."""
        try:
            self.end(work())
        except CachdError as error:
            self.end(JobState.cancelled if isinstance(error, Cancelled) else JobState.failed, error)
        except Exception as error:
            log.exception(self.unexpected, name=self.name)
            self.end(
                JobState.failed,
                CachdError(f"{self.name}: {type(error).__name__}", hint="see the daemon's log"),
            )

    def end(self, state: JobState, error: CachdError | None = None) -> None:
        """Set the final state, and set the event `ended`."""
        self.error, self.state = error, state
        self.ended.set()

    def as_document(self) -> dict[str, object]:
        """The job as the API shows it."""
        return {
            "state": self.state,
            "bytes": {"total": self.total, "done": self.done},
            "error": self.error.as_document() if self.error else None,
        }


J = TypeVar("J", bound=Job)


class Jobs(Generic[J]):
    """The last job of each name. At most one job of a name runs at a time, in `pool`."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._last: dict[str, J] = {}

    def start(self, job: J, do: Callable[[J], None]) -> J:
        """Run `do(job)` in the pool, unless a job of its name is running. Returns the one that runs."""
        with self._lock:
            running = self._last.get(job.name)
            if running is not None and running.state is JobState.running:
                return running
            self._last.pop(job.name, None)
            self._last[job.name] = job
            ended = [name for name, last in self._last.items() if last.state is not JobState.running]
            for name in ended[: max(len(self._last) - _MAX_REMEMBERED, 0)]:
                del self._last[name]
        self._pool.submit(do, job)
        return job

    def last(self, name: str) -> J | None:
        """The last job of a name, if it is remembered."""
        return self._last.get(name)

    def close(self) -> None:
        """Drop the queued jobs and wait for the running ones."""
        self._pool.shutdown(cancel_futures=True)
