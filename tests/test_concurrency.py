"""The number of streams climbs while throughput grows, and falls while it stays the same."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cachd.policy.concurrency import Concurrency


def test_the_first_number_is_within_the_most() -> None:
    assert (Concurrency(8, 100).count, Concurrency(8, 8).count, Concurrency(8, 5).count) == (8, 8, 5)


def test_steps_up_go_on_while_each_gains_enough() -> None:
    streams = Concurrency(8, 100)
    assert [streams.measured(rate) for rate in (100, 150, 225, 340)] == [12, 18, 27, 40]


@pytest.mark.parametrize(("rate", "count"), [(107.4, 8), (107.6, 18)])
def test_a_step_of_a_half_must_gain_7_percent_and_a_half(rate: float, count: int) -> None:
    streams = Concurrency(8, 100)
    assert (streams.measured(100), streams.measured(rate)) == (12, count)


@pytest.mark.parametrize(("rate", "count"), [(102.9, 40), (103.1, 54)])
def test_the_finest_step_must_gain_more_than_noise(rate: float, count: int) -> None:
    streams = Concurrency(40, 44)
    assert (streams.measured(100), streams.measured(102.9)) == (44, 40)
    streams.most = 100
    for _ in range(4):
        streams.measured(100)
    assert [streams.measured(100), streams.measured(50)] == [36, 40], "down, which does not pay"
    for _ in range(8):
        streams.measured(100)
    assert streams.measured(100) == 45
    assert streams.measured(rate) == (count if count == 40 else 68)


def test_without_any_throughput_steps_pay_nothing_and_cost_nothing() -> None:
    up, down = Concurrency(8, 100), Concurrency(8, 8)
    assert [up.measured(0) for _ in range(2)] == [12, 18]
    assert [down.measured(0) for _ in range(7)] == [8, 8, 8, 8, 8, 7, 6]


def test_a_step_that_does_not_pay_is_undone_and_the_next_is_smaller_and_the_other_way() -> None:
    streams = Concurrency(8, 100)
    assert [streams.measured(100), streams.measured(110), streams.measured(111)] == [12, 18, 12]
    assert [streams.measured(110) for _ in range(5)] == [12, 12, 12, 12, 11]
    assert streams.measured(108.7) == 10, "the step down lost less than its streams"
    assert streams.measured(100) == 11
    assert [streams.measured(109) for _ in range(5)] == [11, 11, 11, 11, 12], "a step of an eighth"
    assert streams.measured(200) == 18, "a step that paid makes the next one a half again"


@pytest.mark.parametrize(("rate", "count"), [(98.0, 8), (98.2, 6)])
def test_a_step_down_is_kept_if_it_loses_less_than_its_streams_would(rate: float, count: int) -> None:
    streams = Concurrency(8, 8)
    assert [streams.measured(100) for _ in range(6)] == [8, 8, 8, 8, 8, 7]
    assert streams.measured(rate) == count


def test_rests_get_longer_while_no_step_pays() -> None:
    """A link that eight streams fill exactly."""
    streams, counts = Concurrency(8, 100), list[int]()
    for _ in range(110):
        counts.append(streams.measured(min(streams.count, 8)))
    steps = [number for number, count in enumerate(counts) if count != 8]
    assert [counts[number] for number in steps] == [12, 7, 9, 7, 9, 7]
    assert [after - before for before, after in pairwise(steps)] == [6, 10, 18, 34, 34]


def test_at_an_end_of_the_range_the_direction_changes() -> None:
    most = Concurrency(8, 8)
    assert [most.measured(100) for _ in range(6)] == [8, 8, 8, 8, 8, 7]
    least = Concurrency(4, 4)
    least.measured(100)
    least.most = 100
    assert [least.measured(100) for _ in range(5)] == [4, 4, 4, 4, 4], "there are never fewer than four"
    assert [least.measured(100) for _ in range(9)] == [4] * 8 + [6]
    alone = Concurrency(1, 1)
    assert [alone.measured(100) for _ in range(9)] == [1] * 9


def test_a_busy_cpu_takes_streams_away_and_makes_the_next_step_wait() -> None:
    streams = Concurrency(20, 100)
    assert streams.measured(100, busy=0.4) == 30
    assert [streams.measured(200, busy=0.41) for _ in range(2)] == [27, 25]
    assert [streams.measured(100) for _ in range(5)] == [25, 25, 25, 25, 38]
    few = Concurrency(5, 100)
    assert [few.measured(100, busy=1.0) for _ in range(3)] == [4, 4, 4]
