"""The limit of an origin follows what it refuses while it serves others, and is raised with time."""

from __future__ import annotations

import pytest

from cachd.policy.origin_limit import FIRST_HOLD_SECONDS, LONGEST_HOLD_SECONDS, OriginLimit


def serving(count: int, *, answered: int = 0) -> OriginLimit:
    """An origin that answers so many requests now, and has answered others before."""
    limit = OriginLimit()
    for _ in range(answered):
        limit.answered()
        limit.ended()
    for _ in range(count):
        limit.answered()
    limit.running = count
    return limit


def test_a_refusal_of_an_origin_that_serves_nothing_is_no_sign_of_a_limit() -> None:
    limit = serving(0)
    assert [limit.refused(0.0) for _ in range(5)] == [False] * 5
    assert (limit.most, limit.raised_at) == (None, 0.0)
    assert limit.allows(0.0)


def test_one_refusal_limits_nothing_and_a_second_one_does() -> None:
    limit = serving(3)
    assert limit.refused(5.0)
    assert (limit.most, limit.raised_at) == (None, 5.0 + FIRST_HOLD_SECONDS)
    assert limit.refused(6.0)
    assert (limit.most, limit.raised_at) == (3, 6.0 + FIRST_HOLD_SECONDS)


@pytest.mark.parametrize(("answered", "most"), [(5, 1), (6, None)])
def test_an_origin_that_refuses_less_than_a_quarter_has_no_limit(answered: int, most: int | None) -> None:
    limit = serving(1, answered=answered)
    assert [limit.refused(0.0) for _ in range(2)] == [True, True]
    assert limit.most == most


def test_a_limit_is_never_raised_by_a_refusal_and_never_below_one() -> None:
    limit = serving(2)
    for _ in range(2):
        limit.refused(0.0)
    limit.answered()
    limit.answered()
    for _ in range(2):
        limit.refused(0.0)
    assert limit.most == 2
    for _ in range(3):
        limit.ended()
    for _ in range(2):
        limit.refused(0.0)
    assert (limit.serving, limit.most) == (1, 1)


def test_no_more_run_than_the_limit_allows_until_it_is_raised_by_a_half() -> None:
    limit = serving(4)
    for _ in range(2):
        limit.refused(0.0)
    allowed = []
    for running in (3, 4):
        limit.running = running
        allowed.append(limit.allows(FIRST_HOLD_SECONDS - 1))
    assert (allowed, limit.most) == ([True, False], 4)
    assert limit.allows(FIRST_HOLD_SECONDS)
    assert (limit.most, limit.raised_at) == (6, 2 * FIRST_HOLD_SECONDS)
    one = serving(1)
    for _ in range(2):
        one.refused(0.0)
    assert one.allows(FIRST_HOLD_SECONDS)
    assert one.most == 2


def test_a_raise_that_was_too_much_makes_the_next_one_wait_twice_as_long() -> None:
    limit, now, holds = serving(2), 0.0, []
    for _ in range(6):
        for _ in range(2):
            limit.refused(now)
        holds.append(limit.raised_at - now)
        now = limit.raised_at
        limit.allows(now)
    assert holds == [60.0, 120.0, 240.0, 480.0, LONGEST_HOLD_SECONDS, LONGEST_HOLD_SECONDS]


def test_a_limit_that_was_not_raised_in_between_waits_no_longer() -> None:
    limit = serving(2)
    for _ in range(4):
        limit.refused(7.0)
    assert limit.raised_at == 7.0 + FIRST_HOLD_SECONDS


def test_what_was_answered_before_a_change_of_the_limit_counts_no_more() -> None:
    limit = serving(2)
    for _ in range(2):
        limit.refused(0.0)
    assert limit.allows(FIRST_HOLD_SECONDS)
    assert limit.most == 3
    limit.refused(FIRST_HOLD_SECONDS)
    assert limit.most == 3, "one refusal is not enough"
    limit.refused(FIRST_HOLD_SECONDS)
    assert limit.most == 2
