"""When a source or a request is too slow, and how many requests an origin gets: decisions at their bounds."""

from __future__ import annotations

from itertools import pairwise

import pytest

from cachd.policy.backoff import FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS, before_retry, delay
from cachd.policy.origin_limit import FIRST_HOLD_SECONDS, LONGEST_HOLD_SECONDS, OriginLimit
from cachd.policy.outrun import (
    SLOW_BYTES_PER_SECOND,
    answers_late,
    is_far_behind,
    is_outrun,
    is_slow,
    takes_long,
)
from cachd.policy.patience import Patience
from cachd.policy.rate_limiter import RateLimiter

SLOW = SLOW_BYTES_PER_SECOND

# --- one source beside others ---


@pytest.mark.parametrize(
    ("pace", "best", "another_is_new", "expected"),
    [
        (100, 400, False, False),
        (100, 401, False, True),
        (100, None, False, False),
        (100, 400, True, True),
        (SLOW, None, True, False),
        (SLOW - 1, None, True, True),
        (SLOW - 1, None, False, False),
        (SLOW, 4 * SLOW + 1, False, True),
        (SLOW, 4 * SLOW, True, False),
    ],
)
def test_a_source_is_outrun_by_one_four_times_as_fast_or_by_an_unknown_one_when_it_crawls(
    pace: float, best: float | None, expected: bool, *, another_is_new: bool
) -> None:
    assert is_outrun(pace, best, another_is_new=another_is_new) is expected


def test_a_crawl_is_below_64_kib_a_second_and_a_long_time_above_five_seconds() -> None:
    assert (is_slow(SLOW - 1), is_slow(SLOW)) == (True, False)
    assert (takes_long(500, 100.0), takes_long(501, 100.0)) == (False, True)


@pytest.mark.parametrize(
    ("rest", "pace", "usual", "taken", "expected"),
    [
        (500, 100.0, 100.0, 0, False),
        (500, 10.0, 100.0, 0, True),  # 50 s here; 1 s and four times 5 s there
        (210, 10.0, 40.0, 0, False),
        (210, 10.0, 50.0, 0, True),
        (500, 10.0, 100.0, 1, True),
        (500, 10.0, 100.0, 2, False),
        (500, 0.0, 100.0, 0, True),
        (500, 0.0, 0.0, 0, False),
    ],
)
def test_a_request_is_far_behind_when_another_would_need_a_fourth_of_its_time(
    rest: int, pace: float, usual: float, taken: int, expected: bool
) -> None:
    assert is_far_behind(rest, pace, usual, taken=taken) is expected


@pytest.mark.parametrize(
    ("rest", "waited", "usual", "taken", "expected"),
    [
        (1, 3.0, 100.0, 0, False),
        (1, 3.1, 100.0, 0, True),
        (1, 6.0, 100.0, 1, False),
        (1, 6.1, 100.0, 1, True),
        (100, 4.0, 100.0, 0, False),
        (100, 4.1, 100.0, 0, True),
        (1, 99.0, 0.0, 0, False),
        (1, 99.0, 0.5, 0, True),
    ],
)
def test_the_first_byte_is_late_after_three_seconds_or_four_times_the_usual_time(
    rest: int, waited: float, usual: float, taken: int, expected: bool
) -> None:
    assert answers_late(rest, waited, usual, taken=taken) is expected


# --- an origin that refuses ---


def serving(count: int) -> OriginLimit:
    origin = OriginLimit()
    for _ in range(count):
        origin.answered()
    origin.running = count
    return origin


def limit(origin: OriginLimit) -> int | None:
    return origin.most


def test_an_origin_has_no_limit_until_it_refuses_while_it_serves() -> None:
    origin = OriginLimit()
    assert origin.allows(0.0)
    assert not origin.refused(0.0), "it serves nobody: this one need not wait for others"
    assert limit(origin) is None
    origin = serving(3)
    assert origin.refused(5.0)
    assert limit(origin) is None, "one refusal is no limit"
    assert origin.refused(5.0)
    assert (limit(origin), origin.raised_at) == (3, 5.0 + FIRST_HOLD_SECONDS)


def test_the_limit_is_what_is_served_and_allows_no_more() -> None:
    origin = serving(4)
    for _ in range(2):
        assert origin.refused(0.0)
    assert limit(origin) == 4
    assert not origin.allows(1.0)
    origin.running = 3
    assert origin.allows(1.0)
    for _ in range(3):
        origin.ended()
    assert origin.refused(1.0)
    assert limit(origin) == 4
    assert origin.refused(1.0)
    assert limit(origin) == 1
    origin.running = 1
    assert not origin.allows(2.0)


def test_few_refusals_among_many_answers_set_no_limit() -> None:
    origin = serving(7)
    for _ in range(2):
        origin.refused(0.0)
    assert limit(origin) is None, "2 of 9 are less than a quarter"
    origin = serving(6)
    for _ in range(2):
        origin.refused(0.0)
    assert limit(origin) == 6, "2 of 8 are a quarter"


def test_the_limit_is_raised_by_half_after_a_time_without_refusals() -> None:
    origin = serving(4)
    for _ in range(2):
        origin.refused(0.0)
    assert not origin.allows(FIRST_HOLD_SECONDS - 1)
    assert origin.allows(FIRST_HOLD_SECONDS)
    assert limit(origin) == 6
    assert origin.raised_at == 2 * FIRST_HOLD_SECONDS
    origin.refused(FIRST_HOLD_SECONDS)
    assert limit(origin) == 6, "one refusal is too few, as before"
    one = serving(1)
    for _ in range(2):
        one.refused(0.0)
    assert one.allows(FIRST_HOLD_SECONDS)
    assert limit(one) == 2


def test_after_a_raise_that_was_refused_the_next_one_comes_later_each_time() -> None:
    origin, now, holds = serving(4), 0.0, []
    for _ in range(6):
        for _ in range(2):
            assert origin.refused(now)
        holds.append(origin.raised_at - now)
        assert limit(origin) == 4
        now = origin.raised_at
        assert origin.allows(now)
        assert limit(origin) == 6
        for _ in range(2):
            origin.answered()
            origin.ended()
    assert holds[:5] == [60.0, 120.0, 240.0, 480.0, 600.0]
    assert holds[5] == LONGEST_HOLD_SECONDS


def test_without_a_raise_the_next_one_comes_no_later() -> None:
    origin = serving(4)
    for now in (0.0, 1.0):
        for _ in range(2):
            origin.refused(now)
        assert origin.raised_at == now + FIRST_HOLD_SECONDS


# --- a resolve ---


def test_a_resolve_has_a_time_in_all() -> None:
    patience = Patience(600.0, stall_seconds=10.0, now=100.0)
    assert patience.why_not(10_000, 699.0) == ""
    assert patience.why_not(10_000, 700.0) == "not done after 600 s, with 10000 answers"


def test_a_resolve_has_an_answer_every_two_seconds_on_the_average_of_a_minute() -> None:
    patience = Patience(6000.0, stall_seconds=10.0, now=100.0)
    assert patience.why_not(0, 159.0) == ""
    assert patience.why_not(30, 160.0) == "", "half of 60"
    assert patience.why_not(59, 219.0) == "", "the window began anew"
    assert patience.why_not(59, 220.0) == "29 answers in 60 s"


def test_the_window_of_a_resolve_is_twice_the_time_of_one_answer() -> None:
    patience = Patience(6000.0, stall_seconds=45.0, now=0.0)
    assert patience.why_not(0, 89.0) == ""
    assert patience.why_not(0, 90.0) == "0 answers in 90 s"


# --- waits and rates ---


def test_a_wait_doubles_from_half_a_second_and_a_retry_from_half_a_minute() -> None:
    assert [delay(n, requested=None, chance=0.0) for n in (1, 2, 3)] == [0.25, 0.5, 1.0]
    assert [delay(n, requested=None, chance=1.0) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert delay(1, requested=10.0, chance=0.5) == 10.0 + 0.375 * 0.5
    assert [before_retry(n, chance=1.0) for n in (1, 2, 3)] == [30.0, 60.0, 120.0]
    assert before_retry(1, chance=0.0) == FIRST_RETRY_SECONDS / 2
    assert before_retry(99, chance=1.0) == LONGEST_RETRY_SECONDS


def test_a_rate_limiter_lets_bytes_pass_at_its_rate() -> None:
    limiter = RateLimiter(100, 0.0)
    waits = [limiter.reserve(100, 0.0) for _ in range(4)]
    assert [after - before for before, after in pairwise(waits[1:])] == [1.0, 1.0]
    assert limiter.reserve(0, 1000.0) == 0
