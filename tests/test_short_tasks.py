"""How many short tasks run at once: as many as wait for something else than the interpreter."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from cachd.policy.short_tasks import SHORT_CPU_SECONDS, ShortTasks
from cachd.sources.at_once import ask_all
from cachd.sources.cancel import CancelToken
from cachd.transfer.streams import StreamQuota, Streams

PATIENCE_SECONDS = 120
MANY = 64


class Clock:
    """A clock that stands still until it is moved: no task ever waits by it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Hall:
    """Counts who is inside at once. Whoever enters waits for `open`; `reached` counts the entries."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Semaphore(0)
        self.most = self._inside = 0
        self._lock = threading.Lock()

    def __call__(self, _: object = None) -> None:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
        self.reached.release()
        assert self.open.wait(PATIENCE_SECONDS)
        with self._lock:
            self._inside -= 1

    def entered(self) -> bool:
        return self.reached.acquire(timeout=PATIENCE_SECONDS)


def after(count: int, seconds: float, cpu_seconds: float) -> ShortTasks:
    tasks = ShortTasks()
    for _ in range(count):
        tasks.ended(seconds, cpu_seconds, 0.0)
    return tasks


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds", "enough"),
    [
        (0.0003, 0.0003, 1),
        (0.00035, 0.0003, 1),
        (0.0006, 0.0003, 2),
        (0.003, 0.0003, 10),
        (0.03, 0.0003, 100),
    ],
)
def test_enough_tasks_run_to_use_the_cpu_while_others_wait(
    seconds: float, cpu_seconds: float, enough: int
) -> None:
    tasks = after(16, seconds, cpu_seconds)
    assert tasks.are_enough(enough, 0.0)
    assert not tasks.are_enough(enough - 1, 0.0)


def test_the_task_that_waited_least_for_the_interpreter_decides() -> None:
    tasks = after(15, 0.003, 0.0003)
    tasks.ended(0.0003, 0.0003, 0.0)
    assert tasks.are_enough(1, 0.0)


def test_a_few_tasks_do_not_limit_the_threads() -> None:
    assert not after(15, 0.0003, 0.0003).are_enough(MANY, 0.0)


def test_tasks_that_use_the_cpu_for_long_are_not_limited() -> None:
    tasks = after(16, 0.0003, 0.0003)
    tasks.ended(2 * SHORT_CPU_SECONDS, 2 * SHORT_CPU_SECONDS, 0.0)
    assert not tasks.are_enough(MANY, 0.0)


def test_more_may_run_while_no_task_ends() -> None:
    tasks = after(16, 0.0003, 0.0003)
    assert tasks.are_enough(1, tasks.seconds_left(0.0) / 2)
    assert not tasks.are_enough(MANY, tasks.seconds_left(0.0))


@contextmanager
def of_short_tasks(clock: Clock, quota: StreamQuota, hall: Hall) -> Iterator[Streams]:
    """Four streams on which many short tasks of a pull ended; who is in the hall leaves it at the end."""
    streams, ended = Streams(4, first=4, clock=clock), threading.Semaphore(0)
    try:
        streams.append(quota, *[lambda _: ended.release()] * MANY)
        for _ in range(MANY):
            assert ended.acquire(timeout=PATIENCE_SECONDS)
        yield streams
    finally:
        hall.open.set()
        streams.close()


def test_short_tasks_of_a_pull_run_one_after_the_other_and_one_that_waits_holds_up_no_other() -> None:
    clock, quota, hall = Clock(), StreamQuota(), Hall()
    with of_short_tasks(clock, quota, hall) as streams:
        streams.append(quota, hall, hall, hall)
        assert hall.entered()
        assert not hall.reached.acquire(timeout=0.2), "one is enough"
        clock.now += 1.0  # the first one waits
        assert hall.entered()
        assert hall.entered()


def test_another_pull_runs_beside_the_short_tasks_of_one() -> None:
    quota, hall = StreamQuota(), Hall()
    with of_short_tasks(Clock(), quota, hall) as streams:
        streams.append(quota, hall)
        assert hall.entered()
        streams.append(StreamQuota(), hall)
        assert hall.entered()


def test_a_near_origin_is_asked_by_one_thread_and_one_that_makes_it_wait_by_more() -> None:
    clock, hall = Clock(), Hall()
    answers: list[list[int]] = []

    def ask(number: int) -> int:
        if number >= MANY:
            hall()
        return number

    asking = threading.Thread(
        target=lambda: answers.append(ask_all(ask, range(MANY + 3), CancelToken(), clock=clock))
    )
    asking.start()
    assert hall.entered()
    assert not hall.reached.acquire(timeout=0.2), "one is enough"
    clock.now += 1.0
    assert hall.entered()
    assert hall.entered()
    hall.open.set()
    asking.join(PATIENCE_SECONDS)
    assert answers == [list(range(MANY + 3))]


def test_threads_that_are_too_many_end_with_the_last_answer_or_the_first_error() -> None:
    def fails(number: int) -> int:
        if number == MANY:
            raise ValueError("the first error")
        return number

    def asked(ask: Callable[[int], int]) -> list[int]:
        return ask_all(ask, range(2 * MANY), CancelToken(), clock=Clock())

    assert asked(lambda number: number) == list(range(2 * MANY))
    with pytest.raises(ValueError, match="the first error"):
        asked(fails)
