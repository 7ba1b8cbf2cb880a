"""Threads that are there from the start, and the turns that long work leaves to others."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from cachd.errors import Busy
from cachd.kernel import threads

PATIENCE_SECONDS = 30.0


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    before = threading.enumerate()
    yield
    assert [each for each in threading.enumerate() if each not in before] == []


def named(prefix: str) -> list[str]:
    return sorted(each.name for each in threading.enumerate() if each.name.startswith(prefix))


@pytest.mark.parametrize("count", [1, 3])
def test_all_threads_of_a_pool_are_there_at_once_and_each_was_prepared(count: int) -> None:
    prepared: list[str] = []
    with threads.pool(count, "ours", lambda: prepared.append(threading.current_thread().name)) as pool:
        assert named("ours") == [f"ours_{number}" for number in range(count)] == sorted(prepared)
        assert sorted(pool.map(lambda n: n + 1, range(5))) == [1, 2, 3, 4, 5]
        gate = threading.Barrier(count)
        assert {each.result(PATIENCE_SECONDS) for each in [pool.submit(gate.wait) for _ in range(count)]}
    assert named("ours") == []


class Refusing:
    """Lets `threading` start so many more threads, as a limit of the system does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self._left, self._start = left, threading.Thread.start
        monkeypatch.setattr(threading.Thread, "start", lambda thread: self._started(thread))

    def _started(self, thread: threading.Thread) -> None:
        if not self._left:
            raise RuntimeError("can't start new thread")
        self._left -= 1
        self._start(thread)


@pytest.mark.parametrize("left", [0, 2])
def test_a_pool_that_the_system_refuses_leaves_no_thread(monkeypatch: pytest.MonkeyPatch, left: int) -> None:
    Refusing(monkeypatch, left)
    with pytest.raises(Busy) as refused:
        threads.pool(3, "ours")
    assert (refused.value.code, "ours" in refused.value.detail) == ("no_threads", True)
    assert named("ours") == []


def test_threads_that_were_started_before_one_was_refused_keep_running(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = threading.Event()
    made = [threading.Thread(target=gate.wait, name=f"ours {n}") for n in range(2)]
    Refusing(monkeypatch, 1)
    with pytest.raises(Busy, match="ours 1"):
        threads.start(made)
    assert [each.is_alive() for each in made] == [True, False]
    gate.set()
    made[0].join(PATIENCE_SECONDS)


@pytest.mark.parametrize("error", [RuntimeError("another one"), ValueError("a thread")])
def test_another_error_is_no_missing_thread(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), threads.given("ours"):
        raise error
    with threads.given("ours"):
        pass


def test_turns_are_brief_until_the_last_thread_is_outside() -> None:
    usual = sys.getswitchinterval()
    assert usual == pytest.approx(0.005)
    inside, over = threading.Event(), threading.Event()

    def other() -> None:
        with threads.in_brief_turns():
            inside.set()
            assert over.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(other)
        assert inside.wait(PATIENCE_SECONDS)
        with threads.in_brief_turns():
            assert sys.getswitchinterval() == pytest.approx(0.0005)
        assert sys.getswitchinterval() == pytest.approx(0.0005), "the other is inside"
        over.set()
        running.result(PATIENCE_SECONDS)
    assert sys.getswitchinterval() == pytest.approx(0.005)
    with pytest.raises(ZeroDivisionError), threads.in_brief_turns():
        raise ZeroDivisionError
    assert sys.getswitchinterval() == pytest.approx(0.005)


def test_a_process_that_cannot_end_is_ended_by_the_kernel_in_time() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        threads.end_in_time()
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        left = signal.alarm(0)
        assert threads.STOP_SECONDS - 10 <= left <= threads.STOP_SECONDS
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
