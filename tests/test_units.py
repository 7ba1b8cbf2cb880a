"""Sizes, rates, times and percentages in every usual spelling; what may mean two things is refused."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cachd.model import Percentage, bytes_of, percentage_of, rate_of, seconds_of, size_or_percent_of

TB = 10**12
HOUR, DAY = 3600.0, 86400.0
READERS: list[Callable[[object], float | Percentage]] = [
    bytes_of,
    rate_of,
    seconds_of,
    percentage_of,
    size_or_percent_of,
]


def refusal(reads: Callable[[object], object], value: object) -> str:
    with pytest.raises(ValueError, match=r".") as refused:
        reads(value)
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "size"),
    {
        "500gb": TB // 2,
        "500 GB": TB // 2,
        "500G": TB // 2,
        "500g": TB // 2,
        "0.5TB": TB // 2,
        "500 gbytes": TB // 2,
        "500GiB": 500 << 30,
        "500gib": 500 << 30,
        "500Gi": 500 << 30,
        "1_000_000": 10**6,
        "1e9": 10**9,
        "1E9": 10**9,
        "1.5e3 kB": 1_500_000,
        " 7 ": 7,
        "7 bytes": 7,
        "1PB": 10**15,
        "1PiB": 1 << 50,
        "9_223_372_036_854_775_807": (1 << 63) - 1,
    }.items(),
)
def test_a_size_may_be_written_in_any_usual_way(text: str, size: int) -> None:
    assert bytes_of(text) == size == bytes_of(size) == size_or_percent_of(text)


@pytest.mark.parametrize(
    ("text", "rate"),
    {
        "500MB/s": 5 * 10**8,
        "500 MB": 5 * 10**8,
        "500mb": 5 * 10**8,
        "500MBps": 5 * 10**8,
        "500 MB / s": 5 * 10**8,
        "500MB/sec": 5 * 10**8,
        "1GiB/s": 1 << 30,
        "1Gbps": 125 * 10**6,
        "1gbps": 125 * 10**6,
        "100 Mbit/s": 12_500_000,
        "2gbit": 25 * 10**7,
        "8 bits/s": 1,
        "1_000": 1000,
        "0": 0,
    }.items(),
)
def test_a_rate_is_bytes_a_second_unless_it_says_bits(text: str, rate: int) -> None:
    assert rate_of(text) == rate


@pytest.mark.parametrize(
    ("text", "seconds"),
    {
        "90m": 1.5 * HOUR,
        "1h30m": 1.5 * HOUR,
        "1h 30m": 1.5 * HOUR,
        "1 hour 30 minutes": 1.5 * HOUR,
        "1.5h": 1.5 * HOUR,
        "1.5H": 1.5 * HOUR,
        "90 min": 1.5 * HOUR,
        "2 days": 2 * DAY,
        "1w2d3h4m5s": 9 * DAY + 3 * HOUR + 245,
        "1 week": 7 * DAY,
        "30s": 30,
        "30 sec": 30,
        "250ms": 0.25,
        "30": 30,
        "0.5": 0.5,
        "1_000": 1000,
        "1e3": 1000,
    }.items(),
)
def test_a_time_may_be_written_in_any_usual_way(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds == seconds_of(seconds)


@pytest.mark.parametrize("text", ["20%", "20 %", " 20% ", "20.0%"])
def test_a_percentage_may_be_written_in_any_usual_way(text: str) -> None:
    assert percentage_of(text) == size_or_percent_of(text) == Percentage(20)


@pytest.mark.parametrize("text", ["500Mb", "500Gb/s", "1Kib", "500MBPS", "500MbPs"])
def test_a_rate_that_may_mean_bits_or_bytes_is_refused_with_both(text: str) -> None:
    told = refusal(rate_of, text)
    assert "bit/s" in told
    assert "B/s" in told.replace("bit/s", "")


def test_a_time_that_may_mean_minutes_or_months_is_refused_with_both() -> None:
    assert {"minutes", "months:"} <= set(refusal(seconds_of, "1M").split())


NONSENSE: list[object] = [
    *(
        "",
        " ",
        "-1",
        "-1 GB",
        "+1",
        "nan",
        "NaN",
        "inf",
        "Infinity",
        "none",
        "GB",
        "s",
        "%",
        "1,5G",
        "1.500,0",
    ),
    *("٣", "३ GB", "\uff1500MB", "1\u00a0GB", "1GB ²", "1__0", "_1", "1_", "1.", ".5", "1e", "1e999", "0x10"),
    *("5 GB GB", "5GBB", "5i", "5iB", "5XB", "GB5", "1h1h", "1m1h", "1:30", "5 MB/h", "1 fortnight", "5\nGB"),
    *(-1, -0.5, math.nan, math.inf, -math.inf, True, False, None, [], {}, b"5", 1 << 63, 10**400, 1e300),
    *("9" * 20, "9" * 10**6, "1" * 10**6 + "GB", "1e99", "9999999999999PB", "1" + " " * 10**6 + "GB"),
]


@pytest.mark.parametrize("reads", READERS)
@pytest.mark.parametrize(
    "value", NONSENSE, ids=lambda value: ascii(value)[:20] if type(value) is not int else None
)
def test_nonsense_is_refused_at_once_and_told_in_a_few_words(
    reads: Callable[[object], object], value: object
) -> None:
    began = time.thread_time()
    assert len(refusal(reads, value)) < 200
    assert time.thread_time() - began < 0.1


@pytest.mark.parametrize("value", ["1.5", 1.5, "0.1"])
def test_a_part_of_a_byte_is_refused_and_of_a_larger_unit_is_not(value: object) -> None:
    for reads in (bytes_of, rate_of):
        refusal(reads, value)
    assert bytes_of("1.5k") == 1500


def test_a_token_in_place_of_a_number_is_not_repeated() -> None:
    for reads in READERS:
        assert "canary" not in refusal(reads, "hf_canary" + "x" * 28)


def test_a_size_that_says_a_second_is_no_size_and_a_rate_is_no_time() -> None:
    for reads, value in (
        (bytes_of, "5MB/s"),
        (bytes_of, "5Mbit"),
        (seconds_of, "5MB"),
        (percentage_of, "20"),
    ):
        refusal(reads, value)


@given(
    st.integers(0, 10**6),
    st.sampled_from(["", "k", "M", "G", "T"]),
    st.sampled_from(["", "B", "b", "bytes"]),
)
def test_case_and_space_change_no_size(number: int, prefix: str, unit: str) -> None:
    size = number * 1000 ** ("kMGT".index(prefix) + 1 if prefix else 0)
    for text in (f"{number}{prefix}{unit}", f"{number} {prefix}{unit}", f"{number}{prefix}{unit}".lower()):
        assert bytes_of(text) == size


@given(st.integers(0, 9999), st.integers(0, 9999), st.integers(0, 9999))
def test_the_parts_of_a_time_add_up(hours: int, minutes: int, seconds: int) -> None:
    expected = hours * 3600 + minutes * 60 + seconds
    assert seconds_of(f"{hours}h{minutes}m{seconds}s") == expected
    assert seconds_of(f"{hours} hours {minutes} min {seconds} seconds") == expected


@given(st.integers(1, 10**6), st.sampled_from("kMGT"))
def test_eight_bits_are_a_byte(number: int, prefix: str) -> None:
    assert (
        rate_of(f"{8 * number}{prefix}bit/s")
        == rate_of(f"{number}{prefix}B/s")
        == bytes_of(f"{number}{prefix}")
    )


@given(st.integers(1, 10**6), st.sampled_from(["bps", "bit", "B/s", "B"]))
def test_what_is_not_nothing_never_becomes_the_0_that_means_no_limit(number: int, unit: str) -> None:
    assert rate_of(f"{number}{unit}") >= 1


@given(
    st.one_of(
        st.text(max_size=60), st.from_regex(r"[0-9._eE]{1,8} ?[kKMGTPiBbps/hdwm%]{0,6}", fullmatch=True)
    )
)
@example("1e9e9")
@example("%")
def test_any_text_is_read_in_bounds_or_refused(text: str) -> None:
    for reads in READERS:
        try:
            found = reads(text)
        except ValueError as error:
            assert len(str(error)) < 200  # noqa: PT017 either is right
        else:
            number = found.percent if isinstance(found, Percentage) else found
            assert 0 <= number < 1 << 63
