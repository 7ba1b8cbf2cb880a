"""What bandwidth limits let through, and who waits for whom."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import Cancelled, Invalid
from cachd.metrics import Metrics
from cachd.model import Limits
from cachd.policy.rate_limiter import BURST_SECONDS, SLOT_SECONDS, RateLimiter
from cachd.sources.cancel import Abortable, CancelToken
from cachd.transfer.bandwidth import ALL, Bandwidth

MIB = 1 << 20
PATIENCE_SECONDS = 120


# --- the decision ---

RATE = 1000
SLOT_BYTES = 20
# What happens at one moment: bytes that are asked for, or (0) everybody who waits standing in line anew.
moments = st.lists(
    st.tuples(
        st.one_of(st.just(0), st.integers(1, SLOT_BYTES)),
        st.sampled_from([0.0, 0.001, 0.01, 0.03, 0.06, 0.1, 0.5, 3.0]),
    ),
    max_size=60,
)


def gone(told: list[tuple[int, float]]) -> list[tuple[float, int]]:
    """When which bytes went, by a pace that was asked so."""
    pace, now = RateLimiter(RATE, 0.0), 0.0
    line: list[tuple[float, int]] = []
    for count, later in told:
        now += later
        if count:
            line.append((now + pace.reserve(count, now), count))
            continue
        pace.restart(RATE, now)
        waiting = [waits for at, waits in line if at > now]
        line = [(at, count) for at, count in line if at <= now]
        line += [(now + pace.reserve(count, now), count) for count in waiting]
    return line


@given(moments)
def test_over_no_time_do_more_bytes_go_than_the_rate_a_burst_and_one_turn(
    told: list[tuple[int, float]],
) -> None:
    went = gone(told)
    for first in range(len(went)):
        total = 0
        for last in range(first, len(went)):
            total += went[last][1]
            seconds = went[last][0] - went[first][0]
            assert total <= RATE * (seconds + BURST_SECONDS) + SLOT_BYTES + 1e-6


@given(moments)
def test_the_line_is_served_in_its_order(told: list[tuple[int, float]]) -> None:
    assert all(one[0] <= other[0] for one, other in pairwise(gone(told)))


@given(st.lists(st.integers(1, SLOT_BYTES), max_size=20), st.floats(0, BURST_SECONDS * 0.99))
def test_who_comes_late_by_less_than_a_burst_catches_up(counts: list[int], late: float) -> None:
    pace, now = RateLimiter(RATE, 0.0), 0.0
    for count in counts:
        now += pace.reserve(count, now)
    now += pace.reserve(SLOT_BYTES, now) + SLOT_SECONDS + late
    for _ in range(3):  # more than a burst
        now += pace.reserve(SLOT_BYTES, now)
    now += pace.reserve(1, now)
    assert now == pytest.approx((sum(counts) + 4 * SLOT_BYTES) / RATE)


@given(st.integers(1, 10**12), st.integers(1, 64))
def test_nobody_waits_longer_than_the_turns_before_it(rate: int, ahead: int) -> None:
    pace = RateLimiter(rate, 0.0)
    assert 1 <= pace.slot_bytes <= max(1, rate * SLOT_SECONDS)
    turn = pace.slot_bytes / rate
    for before in range(ahead):
        assert pace.reserve(pace.slot_bytes, 0.0) <= before * turn * (1 + 1e-9)
    pace.restart(rate, 0.0)
    assert pace.reserve(1, 0.0) <= turn * (1 + 1e-9), "who left the line keeps nobody waiting"


def test_a_new_rate_holds_for_the_next_in_line() -> None:
    pace = RateLimiter(RATE, 0.0)
    for _ in range(5):
        pace.reserve(SLOT_BYTES, 0.0)
    pace.restart(10 * RATE, 0.0)
    assert pace.reserve(10 * SLOT_BYTES, 0.0) <= SLOT_SECONDS
    assert pace.reserve(10 * SLOT_BYTES, 0.0) == pytest.approx(2 * SLOT_SECONDS)


@pytest.mark.parametrize(
    ("every", "sources"), [(0, {}), (-1, {}), (None, {"hf": 0}), (None, {"hf": -5}), (5, {"gopher": 5})]
)
def test_limits_without_sense_are_refused(every: int | None, sources: dict[str, int]) -> None:
    with pytest.raises(Invalid) as refusal:
        Limits(every, sources)
    assert refusal.value.code == "bad_limit"


# --- where streams wait ---


class SeenCancelToken(CancelToken):
    """Tells when somebody waits that it can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.is_waited_for = threading.Event()

    @contextmanager
    def reaches(self, waited_for: Abortable) -> Iterator[None]:
        with super().reaches(waited_for):
            self.is_waited_for.set()
            yield


def bandwidth(every: int | None = None, **sources: int) -> Bandwidth:
    return Bandwidth(Limits(every, sources), Metrics())


@contextmanager
def waiting(limited: Bandwidth, count: int) -> Iterator[list[tuple[SeenCancelToken, Future[int]]]]:
    """Threads that wait for their turns in this order, as those behind the last byte of a full line do."""
    assert limited.allow("hf", MIB, CancelToken()) == 1, "one byte a second, and the first is free"
    with ThreadPoolExecutor(count) as pool:
        line = []
        for _ in range(count):
            token = SeenCancelToken()
            line.append((token, pool.submit(limited.allow, "hf", MIB, token)))
            assert token.is_waited_for.wait(PATIENCE_SECONDS)
        try:
            yield line
        finally:
            limited.change(Limits())


def test_without_a_limit_everything_is_allowed() -> None:
    assert bandwidth().allow("hf", MIB, CancelToken()) == MIB
    assert bandwidth(hf=1).allow("s3", MIB, CancelToken()) == MIB, "another source's limit"


def test_a_turn_is_a_moment_of_the_narrower_limit() -> None:
    both = bandwidth(10**6, hf=10**5, s3=10**7)
    assert both.allow("hf", MIB, CancelToken()) == SLOT_SECONDS * 10**5
    assert both.allow("s3", MIB, CancelToken()) == SLOT_SECONDS * 10**6
    assert both.allow("file", MIB, CancelToken()) == SLOT_SECONDS * 10**6
    assert both.allow("file", 1000, CancelToken()) == 1000


def test_all_sources_stand_in_the_line_of_the_common_limit() -> None:
    limited = bandwidth(10**5, hf=10**9)
    began = time.monotonic()
    took = sum(limited.allow(source, MIB, CancelToken()) for source in ("hf", "s3", "file") * 10)
    assert took == pytest.approx(30 * SLOT_SECONDS * 10**5)
    assert time.monotonic() - began >= 29 * SLOT_SECONDS - BURST_SECONDS


def test_a_limit_that_is_lifted_lets_go_whoever_waits() -> None:
    limited = bandwidth(hf=1)
    with waiting(limited, 5) as line:
        limited.change(Limits())
        assert [turn.result(PATIENCE_SECONDS) for _, turn in line].count(MIB) >= 4, (
            "one may have had its turn"
        )


def test_a_higher_limit_holds_at_once_for_those_who_wait() -> None:
    limited = bandwidth(1)
    with waiting(limited, 5) as line:
        limited.change(Limits(10**6))
        assert [turn.result(PATIENCE_SECONDS) for _, turn in line].count(round(SLOT_SECONDS * 10**6)) >= 4


def test_a_cut_ends_the_wait_before_its_turn_and_the_line_moves_up() -> None:
    limited = bandwidth(1)
    with waiting(limited, 12) as line:
        token, last = line.pop()
        token.cancel()
        with pytest.raises(Cancelled):
            last.result(PATIENCE_SECONDS)
        assert not all(turn.done() for _, turn in line), "those before it still wait"
        with pytest.raises(Cancelled):
            limited.allow("hf", MIB, token)


def test_the_seconds_that_streams_wait_are_counted_by_source() -> None:
    metrics = Metrics()
    limited = Bandwidth(Limits(10**5), metrics)
    for _ in range(10):
        limited.allow("hf", MIB, CancelToken())
    waited = metrics.registry.get_sample_value("cachd_limited_seconds_total", {"source": "hf"})
    assert waited is not None
    assert waited >= 9 * SLOT_SECONDS - BURST_SECONDS


def test_the_limits_in_force_are_those_of_all_sources_of_schemes_and_of_prefixes() -> None:
    assert bandwidth().rates() == {}
    limited = Bandwidth(Limits(7, {"hf": 5}), Metrics(), {"https://host/": 3})
    assert limited.rates() == {ALL: 7, "hf": 5, "https://host/": 3}
    limited.change(Limits())
    assert limited.rates() == {"https://host/": 3}, "those of `sources` stay"
    limited.change(Limits(None, {"hf": 4}), {})
    assert limited.rates() == {"hf": 4}
    assert Bandwidth(Limits(), Metrics(), {"https://host/": 3}).rates() == {"https://host/": 3}


def test_the_limit_of_a_prefix_holds_for_its_files_alone() -> None:
    limited = Bandwidth(Limits(), Metrics(), {"https://host/": 10**5})
    assert limited.allow("https", MIB, CancelToken()) == MIB
    assert limited.allow("https", MIB, CancelToken(), prefix="https://other/") == MIB
    assert limited.allow("https", MIB, CancelToken(), prefix="https://host/") == SLOT_SECONDS * 10**5


def test_a_limit_that_is_changed_keeps_the_line_of_who_received_before() -> None:
    limited = Bandwidth(Limits(None, {"hf": 1}), Metrics(), clock=lambda: 100.0)
    assert limited.allow("hf", MIB, CancelToken()) == 1
    limited.change(Limits(None, {"hf": 2}))
    assert limited._limiters["hf"].reserve(1, 100.0) == 1.0, "its byte at the earlier rate takes a second"
