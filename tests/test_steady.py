"""A run during which the machine was not itself is made again; what a run measured has no say in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import pytest

from bench.steady import (
    LOST_SECONDS,
    SLOWER,
    STOLEN,
    TRIES,
    WAIT_SECONDS,
    WAITS,
    Count,
    Machine,
    Yardstick,
    cpu_times,
    told,
    undisturbed,
)


class Watched(Machine):
    """One whose yardstick takes these seconds and then 1; each run has such a share stolen, and then none."""

    def __init__(self, yardstick: Iterable[float] = (), stolen: Iterable[float] = ()) -> None:
        measures, shares = iter(yardstick), iter(stolen)
        looks = count()
        total = [0.0, 0.0]
        self.rests = 0

        def times() -> tuple[float, float]:
            if next(looks) % 2:
                total[0] += 100.0
                total[1] += 100.0 * next(shares, 0.0)
            return total[0], total[1]

        super().__init__(lambda: next(measures, 1.0), times, self._rested)

    def _rested(self, seconds: float) -> None:
        self.rests += 1


def numbered() -> Callable[[], int]:
    runs = iter(range(1, 1000))
    return lambda: next(runs)


SLOW = SLOWER + 0.01


def test_a_run_of_a_calm_machine_is_taken() -> None:
    calm = Watched([1.0, SLOWER], [STOLEN])
    assert calm.undisturbed(numbered()) == 1
    assert calm.counted() == Count(kept=1)
    assert calm.counted() == Count()


@pytest.mark.parametrize(
    ("yardstick", "stolen"), [([1.0, SLOW], []), ([], [STOLEN + 0.01])], ids=["slower", "stolen"]
)
def test_a_disturbed_run_is_made_again(yardstick: list[float], stolen: list[float]) -> None:
    disturbed = Watched(yardstick, stolen)
    assert disturbed.undisturbed(numbered()) == 2
    assert disturbed.counted() == Count(kept=1, again=1)


def test_a_machine_that_does_not_get_better_is_told_and_ends() -> None:
    worse = Watched([1.0], [0.5] * 100)
    assert worse.undisturbed(numbered()) == TRIES
    assert worse.counted() == Count(kept=1, again=TRIES - 1, disturbed=1)


def test_a_run_begins_when_the_machine_is_itself_again() -> None:
    slow = Watched([1.0, 1.0, SLOW, SLOW, 1.0])
    slow.undisturbed(numbered())
    assert slow.rests == 0
    slow.undisturbed(numbered())
    assert slow.rests == 2


def test_waiting_for_the_machine_ends() -> None:
    slow = Watched([1.0, 1.0] + [SLOW] * 1000)
    slow.undisturbed(numbered())
    assert slow.undisturbed(numbered()) == TRIES
    assert slow.rests == TRIES * WAITS


def test_all_waiting_together_ends() -> None:
    slow = Watched([1.0, 1.0] + [SLOW] * 100_000)
    for _ in range(100):
        slow.undisturbed(numbered())
    assert LOST_SECONDS - 1 < slow.rests * WAIT_SECONDS <= LOST_SECONDS
    assert slow.counted().kept == 100
    slow.undisturbed(numbered())
    assert slow.rests * WAIT_SECONDS > LOST_SECONDS, "each question may lose as much"


def test_long_runs_are_not_made_again_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1_000_000, int(LOST_SECONDS) + 1))
    monkeypatch.setattr("bench.steady.time.perf_counter", lambda: float(next(now)))
    long = Watched(stolen=[0.5] * 100)
    assert long.undisturbed(numbered()) == 1
    assert long.counted() == Count(kept=1, disturbed=1)


def test_the_only_run_is_taken_as_it_comes() -> None:
    assert undisturbed(numbered(), runs=1) == 1


def test_this_machine_can_be_measured() -> None:
    wanted, stolen = cpu_times()
    yardstick = Yardstick()
    assert 0 < yardstick.cpu_seconds() < 10
    later, stolen_later = cpu_times()
    assert later > wanted
    assert stolen_later >= stolen >= 0


def test_what_was_watched_is_told() -> None:
    assert told({"kept": 0, "again": 0, "disturbed": 0}) == ""
    assert "Of 42 runs, 2 " in told({"kept": 40, "again": 2, "disturbed": 1})
