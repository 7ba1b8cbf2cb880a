"""The newest pull of each name is remembered, also after its end, within bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachd.errors import NotFound
from cachd.model import Digest, File, Manifest, ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.newest import MAX_REMEMBERED, MAX_REMEMBERED_BYTES, NewestPulls
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from tests.ground.counted import counted
from tests.ground.stored import publish

ABSENT = NotFound("absent", code="repo_not_found")
SHA256 = Digest("sha256", "0" * 64)


def pull_of(name: str) -> Pull:
    return Pull(ModelSpec(Ref.parse(f"hf://org/{name}"), name))


def failed(name: str) -> Pull:
    pull = pull_of(name)
    pull.end(State.failed, ABSENT)
    pull.wake(ABSENT)
    return pull


@pytest.fixture
def newest(store: DiskStore) -> NewestPulls:
    return NewestPulls(store)


def test_the_newest_pull_of_a_name_takes_the_place_of_the_one_before(newest: NewestPulls) -> None:
    first, second, other = pull_of("m"), pull_of("m"), pull_of("a")
    assert (newest.of("m"), newest.shown("m"), newest.unfinished("m"), newest.all_shown()) == (None,) * 3 + (
        [],
    )
    for each in (first, second, other):
        newest.add(each)
    assert (newest.of("m"), newest.shown("m"), newest.unfinished("m")) == (second, second, second)
    assert newest.all_shown() == [other, second], "in the order of their names"
    newest.drop_if_newest(first)
    assert newest.of("m") is second
    newest.drop_if_newest(second)
    newest.drop("unknown")
    assert (newest.of("m"), newest.all_shown()) == (None, [other])


def test_that_somebody_waits_for_a_pull_is_noted_once_and_not_after_its_end(newest: NewestPulls) -> None:
    pull = pull_of("m")
    assert newest.awaited("m", 5.0) is None
    newest.add(pull)
    assert [newest.awaited("m", now) for now in (5.0, 6.0)] == [pull, pull]
    assert pull.awaited_since == 5.0
    pull.end(State.failed, ABSENT)
    pull.wake(ABSENT)
    assert (newest.unfinished("m"), newest.awaited("m", 7.0), newest.of("m")) == (None, None, pull)
    never = failed("never")
    newest.add(never)
    assert (newest.awaited("never", 8.0), never.awaited_since) == (None, None)


def test_a_pull_is_shown_as_ready_while_its_snapshot_is(store: DiskStore, newest: NewestPulls) -> None:
    snapshot = publish(store, {"x": b"x"}, "hf://org/m", "m")
    pull = pull_of("m")
    newest.add(pull)
    pull.end(State.ready, snapshot)
    assert (newest.shown("m"), newest.all_shown()) == (pull, [pull])
    store.withdraw("m", force=True)
    assert (newest.shown("m"), newest.all_shown(), newest.of("m")) == (None, [], pull)
    newest.add(failed("m"))
    assert newest.shown("m") is not None, "a failure needs no snapshot"


def test_of_more_than_the_bound_the_oldest_end_is_forgotten(store: DiskStore, newest: NewestPulls) -> None:
    pulls = [failed(f"m{number}") for number in range(MAX_REMEMBERED)]
    for each in pulls:
        newest.add(each)
        assert newest.count_ended(each) == []
    assert newest.count_ended(pulls[0]) == [], "it ended last by now"
    store.changes.take(0)
    running, last = pull_of("running"), failed("last")
    newest.add(running)
    assert len(newest.all_shown()) == MAX_REMEMBERED + 1, "one that runs does not count"
    newest.add(last)
    assert newest.count_ended(last) == ["m1"]
    assert (newest.of("m1"), newest.of("m0"), newest.of("m2")) == (None, pulls[0], pulls[2])
    assert "m1" in store.changes.take(0)


def test_a_pull_that_was_replaced_is_not_counted(newest: NewestPulls) -> None:
    first, second = failed("m"), pull_of("m")
    newest.add(first)
    newest.add(second)
    assert (newest.count_ended(first), newest._ended_bytes) == ([], {})
    newest.add(first)
    newest.count_ended(first)
    newest.add(second)
    assert newest._ended_bytes == {}, "the one that ended is gone"


def large(name: str, files: int) -> Pull:
    """An ended pull of so many files."""
    pull = pull_of(name)
    listed = tuple(File(str(number), 1, f"hf://org/{name}/{number}", SHA256) for number in range(files))
    pull.progress.begin_download(Manifest(f"hf://org/{name}", "a" * 40, listed), 0)
    pull.end(State.failed, ABSENT)
    return pull


def test_pulls_that_take_much_memory_are_forgotten_earlier_but_the_last_one_stays(
    newest: NewestPulls,
) -> None:
    for name, forgotten in (("a", []), ("b", ["a"]), ("c", ["b"])):
        pull = large(name, MAX_REMEMBERED_BYTES // 2000)
        newest.add(pull)
        assert newest.count_ended(pull) == forgotten
    small, huge = failed("small"), large("huge", MAX_REMEMBERED_BYTES // 1000)
    newest.add(small)
    assert newest.count_ended(small) == []
    newest.add(huge)
    assert newest.count_ended(huge) == ["c", "small"]
    assert newest.all_shown() == [huge]


def test_pulls_are_remembered_with_the_lock(newest: NewestPulls) -> None:
    pull = failed("m")
    steps: list[tuple[Callable[[], object], int]] = [
        (lambda: newest.drop("m"), 1),
        (lambda: newest.add(pull), 2),
        (newest.all_shown, 1),
        (lambda: newest.count_ended(pull), 1),
        (lambda: newest.drop_if_newest(pull), 2),
    ]
    with counted(newest) as lock:
        for step, times in steps:
            before = lock.here
            step()
            assert lock.here - before == times
