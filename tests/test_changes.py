"""The names whose state has changed, from whoever changes one to the thread that takes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from cachd.store.changes import Changes

PATIENCE_SECONDS = 30.0
LET_IN_SECONDS = 0.2  # given to a thread that should wait


def test_marked_names_are_taken_once() -> None:
    changes = Changes()
    assert changes.take(0.0) == set()
    for name in ("a", "b", "a"):
        changes.mark(name)
    assert changes.take(None) == {"a", "b"}
    assert changes.take(0.0) == set()


@pytest.mark.parametrize(
    ("act", "taken"), [(lambda changes: changes.mark("a"), {"a"}), (lambda changes: changes.wake(), set())]
)
def test_who_waits_for_names_is_woken(act: Callable[[Changes], None], taken: set[str]) -> None:
    changes = Changes()
    with ThreadPoolExecutor(1) as other:
        taking = other.submit(changes.take, None)
        waits(taking)
        act(changes)
        assert taking.result(PATIENCE_SECONDS) == taken


def waits(running: Future[object] | Future[set[str]] | Future[None]) -> None:
    with pytest.raises(TimeoutError):
        running.result(LET_IN_SECONDS)


def test_a_change_is_settled_when_whoever_took_it_comes_back() -> None:
    changes = Changes()
    changes.mark("a")
    changes.settle(PATIENCE_SECONDS)  # nobody takes: nothing is waited for
    assert changes.take(0.0) == {"a"}
    with ThreadPoolExecutor(1) as other:
        settling = other.submit(changes.settle, PATIENCE_SECONDS)
        waits(settling)
        assert changes.take(0.0) == set()
        settling.result(PATIENCE_SECONDS)
        changes.settle(PATIENCE_SECONDS)
        changes.mark("b")
        changes.settle(0.0)  # it waits no longer than it is told to
        settling = other.submit(changes.settle, PATIENCE_SECONDS)
        waits(settling)
        changes.close()
        settling.result(PATIENCE_SECONDS)


def test_every_thread_that_waits_is_woken() -> None:
    changes = Changes()
    changes.take(0.0)
    changes.mark("a")
    settled = threading.Barrier(3)

    def settle() -> None:
        changes.settle(PATIENCE_SECONDS)
        settled.wait(PATIENCE_SECONDS)

    with ThreadPoolExecutor(2) as others:
        waiting = [others.submit(settle) for _ in range(2)]
        changes.take(0.0)
        changes.take(0.0)
        settled.wait(PATIENCE_SECONDS)
        for each in waiting:
            each.result(PATIENCE_SECONDS)
