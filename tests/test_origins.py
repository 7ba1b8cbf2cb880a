"""What this node remembers of each origin, and how many requests the origin gets."""

from __future__ import annotations

import pytest

from cachd.errors import Unavailable
from cachd.policy.origin_limit import FIRST_HOLD_SECONDS
from cachd.transfer.origins import Origin, Origins, origin_name


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def busy(status: int | None = 503) -> Unavailable:
    return Unavailable("busy", code="origin_failed", origin_status=status)


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("https://host:8443/a/b", "https://host:8443"),
        ("https://host", "https://host"),
        ("https://host?x=/y", "https://host"),
        ("s3://bucket/a", "s3://bucket"),
        ("hf://org/model@0/file", "hf://org"),
        ("no url", "no url"),
        ("a/b://c", "a/b://c"),
    ],
)
def test_the_origin_of_a_location_is_its_scheme_and_its_first_name(location: str, name: str) -> None:
    assert origin_name(location) == name


def limited(clock: Clock) -> Origin:
    """An origin that refused two requests while it served one."""
    origin = Origin("https://host", clock)
    for _ in range(3):
        origin.begin()
    with origin.serving():
        assert origin.refused(busy())
        assert origin.refused(busy(429))
    return origin


def test_an_origin_without_a_limit_takes_any_number() -> None:
    origin = Origin("https://host", Clock())
    assert (origin.most, origin.is_serving) == (None, False)
    for _ in range(100):
        assert origin.allows()
        origin.begin()
    with origin.serving():
        assert origin.is_serving
    assert not origin.is_serving


def test_an_origin_that_refuses_while_it_serves_gets_as_many_as_it_served() -> None:
    clock = Clock()
    origin = limited(clock)
    assert (origin.most, origin.raised_in) == (1, FIRST_HOLD_SECONDS)
    assert not origin.allows(), "three tasks run"
    origin.end()
    origin.end()
    assert not origin.allows()
    origin.end()
    assert origin.allows()
    clock.now += FIRST_HOLD_SECONDS - 1
    assert (origin.raised_in, origin.most) == (1, 1)
    clock.now += 1
    assert origin.raised_in == 0
    origin.begin()
    assert origin.allows(), "it may get one more now"
    assert origin.most == 2
    clock.now += 10 * FIRST_HOLD_SECONDS
    assert origin.raised_in == 0


@pytest.mark.parametrize("status", [None, 500, 404])
def test_a_failure_is_no_refusal(status: int | None) -> None:
    origin = Origin("https://host", Clock())
    with origin.serving():
        assert [origin.refused(busy(status)) for _ in range(9)] == [False] * 9
    assert origin.most is None
    assert origin.refused(busy()) is False, "it serves nothing"


def test_an_answer_that_fails_is_served_no_longer() -> None:
    origin = Origin("https://host", Clock())
    with pytest.raises(Unavailable), origin.serving():
        raise busy()
    assert not origin.is_serving


def test_files_of_one_origin_share_what_is_known_of_it_and_the_oldest_of_a_thousand_is_forgotten() -> None:
    origins = Origins(Clock())
    first = origins.of("https://host-0/a")
    assert origins.of("https://host-0/b") is first
    for number in range(1, 1000):
        origins.of(f"https://host-{number}/a")
    assert origins.of("https://host-0/b") is first
    second = origins.of("https://host-1/a")
    origins.of("https://host-1000/a")
    assert origins.of("https://host-1/a") is second
    assert origins.of("https://host-0/b") is not first
