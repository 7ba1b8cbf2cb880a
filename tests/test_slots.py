"""Which pull gets the next slot, and what a pull may do with its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from cachd.errors import Cancelled
from cachd.sources.cancel import CancelToken
from cachd.transfer.slots import Slot, SlotQueue
from tests.ground.counted import counted
from tests.ground.site import until

PATIENCE_SECONDS = 120.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True, eq=False)
class Asked:
    name: str
    host: str = "host"
    scheme: str = "https"
    priority: int = 0


class Queue(SlotQueue[Asked]):
    """A queue whose reports and time a test sees."""

    def __init__(self, at_once: int) -> None:
        self.lengths: list[int] = []
        self.clock = Clock()
        super().__init__(at_once, self.lengths.append, self.clock)

    @property
    def is_full(self) -> bool:
        """Whether nobody who waits may have a slot now."""
        with self._changed:
            return self._chosen() is None

    def names(self, count: int) -> list[str]:
        """The next so many pulls. Each has a slot then."""
        found = [self.next() for _ in range(count)]
        return [each.name for each in found if each]


def queue(at_once: int, *pulls: Asked) -> Queue:
    made = Queue(at_once)
    for pull in pulls:
        made.add(pull)
    return made


@pytest.mark.parametrize(
    ("pulls", "order"),
    [
        ([Asked("a"), Asked("b"), Asked("c")], "abc"),
        ([Asked("a"), Asked("b", priority=1), Asked("c", priority=-1)], "bac"),
        ([Asked("a"), Asked("b"), Asked("c", "other")], "acb"),
        ([Asked("a"), Asked("b", "two"), Asked("c", "three", "s3")], "acb"),
        ([Asked("a"), Asked("b", priority=1), Asked("c", "other", priority=2)], "cba"),
        ([Asked("a"), Asked("b", "two"), Asked("c")], "abc"),
    ],
    ids=["first", "priority", "host", "scheme", "priority before host", "scheme, host, first"],
)
def test_the_next_pull_is_of_highest_priority_then_of_the_scheme_and_host_with_fewest_slots(
    pulls: list[Asked], order: str
) -> None:
    assert "".join(queue(9, *pulls).names(3)) == order


def test_while_pulls_of_several_hosts_wait_no_host_gets_all_slots() -> None:
    pulls = [Asked(name, priority=1) for name in "abc"] + [Asked("d", "other")]
    waiting = queue(3, *pulls)
    assert waiting.names(3) == ["a", "b", "d"]
    assert queue(3, *pulls[:3]).names(3) == ["a", "b", "c"]
    assert queue(1, *pulls).names(1) == ["a"]


def test_no_more_pulls_have_slots_than_there_are() -> None:
    pulls = [Asked(name) for name in "abc"]
    waiting = queue(2, *pulls)
    assert (len(waiting), waiting.threads) == (3, 6)
    assert waiting.names(2) == ["a", "b"]
    assert waiting.is_full
    assert (len(waiting), waiting.at_work()) in [(1, pulls[:2]), (1, [pulls[1], pulls[0]])]
    waiting.end(pulls[0])
    assert waiting.names(1) == ["c"]
    assert waiting.lengths == [1, 2, 3, 2, 1, 1, 0]
    assert SlotQueue[Asked](40, lambda _: None).threads == 104


def test_a_slot_that_is_lent_serves_another_host_and_is_taken_back_at_once() -> None:
    a, b, c = Asked("a"), Asked("b"), Asked("c", "other")
    waiting = queue(1, a, b)
    slot = Slot(waiting, a, CancelToken())
    slot.lend()
    assert waiting.names(1) == ["a"], "who waits lends nothing"
    assert waiting.is_full
    slot.lend()
    assert waiting.is_full, "its host has as many threads as there are slots"
    assert waiting.at_work() == [a]
    waiting.add(c)
    assert waiting.names(1) == ["c"]
    assert waiting.at_work() == [c, a]
    slot.take()
    assert set(waiting.at_work()) == {a, c}
    waiting.end(c)
    assert waiting.is_full, "it has its slot again"
    slot.take()
    waiting.end(a)
    assert waiting.at_work() == []
    slot.take()
    assert waiting.at_work() == [], "a slot that was not lent is not taken"
    assert waiting.names(1) == ["b"]


def test_a_pull_waits_for_a_free_slot_ahead_of_the_queue() -> None:
    a, b = Asked("a"), Asked("b", "other")
    waiting, token = queue(1, a, b), CancelToken()
    slot = Slot(waiting, a, token)
    assert waiting.names(1) == ["a"]
    slot.take_when_free()
    slot.lend()
    slot.take_when_free()
    assert waiting.is_full
    slot.lend()
    assert waiting.names(1) == ["b"]
    with ThreadPoolExecutor(1) as pool:
        returned = pool.submit(slot.take_when_free)
        waiting.end(b)
        returned.result(PATIENCE_SECONDS)
    assert (waiting.at_work(), waiting.returning) == ([a], 0)
    token.cancel()
    with pytest.raises(Cancelled):
        slot.take_when_free()


def test_a_pull_that_returns_keeps_a_queued_one_waiting() -> None:
    a, b = Asked("a"), Asked("b", "other")
    waiting = queue(1, a)
    assert waiting.names(1) == ["a"]
    waiting.lend(a)
    waiting.add(b)
    waiting.returning = 1
    assert waiting.is_full


def test_a_pull_leaves_the_queue_once() -> None:
    a, b, later = Asked("a"), Asked("b"), Asked("later")
    waiting = queue(1, a, b)
    waiting.add_later(later, 60)
    assert len(waiting) == 3
    assert [waiting.leave(a), waiting.leave(a), waiting.leave(later), waiting.leave(Asked("b"))] == [
        True,
        False,
        True,
        False,
    ]
    assert (len(waiting), waiting.lengths) == (1, [1, 2, 3, 2, 2, 1, 1])
    assert waiting.names(1) == ["b"]
    assert waiting.leave(b) is False


def test_those_behind_a_pull_that_leaves_keep_their_order() -> None:
    first = Asked("first", priority=3)
    waiting = queue(9, first, Asked("third", priority=1), Asked("second", priority=2))
    waiting.leave(first)
    assert waiting.names(2) == ["second", "third"]
    now, late, soon = Asked("now"), Asked("late"), Asked("soon")
    for pull, seconds in ((now, 10), (late, 30), (soon, 20)):
        waiting.add_later(pull, seconds)
    waiting.leave(now)
    waiting.clock.now += 20
    assert waiting.names(1) == ["soon"]
    assert len(waiting) == 1


def test_a_thread_that_waits_for_a_pull_gets_the_one_that_is_added_then() -> None:
    adds: list[Callable[[Queue, Asked], None]] = [Queue.add, lambda on, pull: on.add_later(pull, 0)]
    for add in adds:
        waiting, pull = queue(1), Asked("a")
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(waiting.next)
            until(lambda: waiting._changed._waiters)  # type: ignore[attr-defined]  # noqa: B023
            add(waiting, pull)
            assert found.result(PATIENCE_SECONDS) is pull


def test_a_pull_that_waits_for_its_slot_is_woken_when_it_is_cancelled() -> None:
    a, b = Asked("a"), Asked("b", "other")
    waiting, token = queue(1, a, b), CancelToken()
    assert waiting.names(1) == ["a"]
    waiting.lend(a)
    assert waiting.names(1) == ["b"]
    with ThreadPoolExecutor(1) as pool:
        returned = pool.submit(Slot(waiting, a, token).take_when_free)
        until(lambda: waiting.returning)
        token.cancel()
        with pytest.raises(Cancelled):
            returned.result(PATIENCE_SECONDS)
    assert waiting.returning == 0


def test_a_slot_that_is_taken_back_is_in_use() -> None:
    a, b, c = Asked("a"), Asked("b", "two"), Asked("c", "three")
    waiting = queue(1, a, b, c)
    assert waiting.names(1) == ["a"]
    slot = Slot(waiting, a, CancelToken())
    slot.lend()
    assert waiting.names(1) == ["b"]
    slot.take()
    waiting.end(b)
    assert waiting.is_full
    waiting.end(a)
    assert waiting.names(1) == ["c"]


def test_a_pull_is_queued_when_its_time_has_come() -> None:
    waiting = queue(2)
    waiting.add_later(Asked("late"), 60)
    waiting.add_later(Asked("soon"), 30)
    waiting.clock.now += 30
    assert waiting.names(1) == ["soon"]
    waiting.add(Asked("now"))
    assert waiting.names(1) == ["now"]
    assert len(waiting) == 1
    waiting.clock.now += 30
    assert waiting.is_full
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(waiting.names, 1)
        waiting.close()
        assert found.result(PATIENCE_SECONDS) == ["late"]


def test_a_closed_queue_gives_out_whoever_waits_and_then_nobody() -> None:
    waiting = queue(1, Asked("a"), Asked("b"), Asked("c"))
    waiting.add_later(Asked("late"), 600)
    assert waiting.names(1) == ["a"]
    waiting.close()
    assert sorted(waiting.names(3)) == ["b", "c", "late"]
    assert waiting.next() is None
    assert (len(waiting), waiting.lengths[-1]) == (0, 0)


def test_those_at_work_are_listed_and_change_with_the_lock() -> None:
    pull = Asked("a")
    waiting = queue(1, pull)
    slot = Slot(waiting, pull, CancelToken())
    assert waiting.names(1) == ["a"]
    steps: list[Callable[[], object]] = [slot.lend, slot.take, waiting.at_work]
    with counted(waiting, "_changed") as lock:
        for number, step in enumerate(steps, 1):
            step()
            assert lock.here == number


def test_a_pull_that_ends_while_its_slot_is_lent_has_no_thread() -> None:
    pull = Asked("a")
    waiting = queue(1, pull)
    assert waiting.names(1) == ["a"]
    waiting.lend(pull)
    waiting.end(pull)
    assert waiting.at_work() == []


def test_a_thread_that_waits_for_a_pull_is_woken_when_a_slot_is_lent() -> None:
    first, second = Asked("a"), Asked("b", "other")
    waiting = queue(1, first, second)
    assert waiting.names(1) == ["a"]
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(waiting.next)
        until(lambda: waiting._changed._waiters)  # type: ignore[attr-defined]
        waiting.lend(first)
        assert found.result(PATIENCE_SECONDS) is second
