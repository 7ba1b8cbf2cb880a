"""A job that runs again and again in its own thread: woken, retried, stopped and joined."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from cachd.errors import Cancelled
from cachd.kernel.periodic import Periodic

PATIENCE_SECONDS = 30.0
NEVER = 3600.0


class Counted:
    """A job that reports each call. `answers`: what its next calls return or raise; then None."""

    def __init__(self, *answers: float | BaseException | None) -> None:
        self.calls: queue.Queue[int] = queue.Queue()
        self._answers = list(answers)
        self._count = 0

    def __call__(self) -> float | None:
        self._count += 1
        self.calls.put(self._count)
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def wait(self) -> int:
        return self.calls.get(timeout=PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "counted"]


def test_a_job_runs_again_after_the_seconds_that_it_returns_and_when_it_is_woken() -> None:
    job = Counted(0.0, 0.0, None)
    thread = Periodic("counted", job)
    thread.start()
    assert [job.wait() for _ in range(3)] == [1, 2, 3]
    thread.wake()
    assert job.wait() == 4
    thread.close()
    assert job.calls.empty()


def test_a_job_is_first_called_after_the_seconds_of_the_start_or_when_it_is_woken() -> None:
    job = Counted()
    thread = Periodic("counted", job)
    thread.start(after=NEVER)
    thread.wake()
    assert job.wait() == 1
    thread.close()


def test_a_job_that_failed_is_called_again() -> None:
    job = Counted(RuntimeError("once"), None)
    thread = Periodic("counted", job, retry_seconds=0.0)
    thread.start()
    assert [job.wait(), job.wait()] == [1, 2]
    thread.close()


def test_a_job_that_is_cancelled_ends_its_thread() -> None:
    job = Counted(Cancelled("it stops"))
    thread = Periodic("counted", job)
    thread.start()
    assert job.wait() == 1
    thread._thread.join(PATIENCE_SECONDS)
    assert not thread._thread.is_alive()
    thread.close()


def test_a_stop_ends_the_rest_inside_of_a_job_and_the_wait_for_the_next_call() -> None:
    rests = threading.Event()

    def job() -> None:
        rests.set()
        thread.rest(NEVER)

    thread = Periodic("counted", job)
    thread.start()
    assert rests.wait(PATIENCE_SECONDS)
    assert not thread.is_stopping
    thread.close()
    assert thread.is_stopping
    with pytest.raises(Cancelled):
        thread.rest()


def test_a_thread_that_was_never_started_can_be_closed() -> None:
    Periodic("counted", Counted()).close()


def test_the_preparation_runs_first_and_in_the_thread() -> None:
    prepared: list[str] = []
    job = Counted()
    thread = Periodic("counted", job, prepare=lambda: prepared.append(threading.current_thread().name))
    thread.start()
    job.wait()
    thread.close()
    assert prepared == ["counted"]
