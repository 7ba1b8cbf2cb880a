"""The score of a snapshot, exactly, and the texts about snapshots at their edges."""

from __future__ import annotations

import pytest

from cachd.model import Digest
from cachd.policy.eviction import (
    FRESH_SECONDS,
    GATED_FACTOR,
    GONE_FACTOR,
    HALF_LIFE_SECONDS,
    SITTING_SECONDS,
    UNKNOWN_RATE,
    UNVERIFIED_FACTOR,
    Candidate,
    Use,
    choose,
    duration_in_words,
    expired,
    largest_first,
    refetch_seconds,
)

NOW = 1e9


def candidate(name: str, *sizes: int, use: Use | None = None, **more: object) -> Candidate:
    """A snapshot of blobs of its own."""
    blobs = {Digest("sha256", f"{abs(hash((name, n))):064x}"): size for n, size in enumerate(sizes)}
    return Candidate(name, (name,), blobs, use, **{"refetch_seconds": 8.0, **more})  # type: ignore[arg-type]


def test_a_score_is_uses_times_cost_and_doubles_with_ten_of_priority() -> None:
    use = Use(NOW - HALF_LIFE_SECONDS, 4.0)
    scores = {p: candidate("a", 1, use=use, priority=p).score(NOW) for p in (-10, 0, 10, 20)}
    assert scores == {-10: 8.0, 0: 16.0, 10: 32.0, 20: 64.0}
    assert candidate("a", 1, use=None, priority=20).score(NOW) == 0


def test_a_snapshot_is_fresh_for_a_minute_after_its_use() -> None:
    scores = [candidate("a", 1, use=Use(NOW - age)).score(NOW) for age in (FRESH_SECONDS - 1, FRESH_SECONDS)]
    assert scores[0] > 7e6
    assert 7 < scores[1] < 8


def test_uses_closer_than_ten_minutes_are_one() -> None:
    use = Use(NOW, 3.0)
    assert use.again(NOW + SITTING_SECONDS - 1) == Use(NOW + SITTING_SECONDS - 1, 3.0)
    assert use.again(NOW - 5) == Use(NOW, 3.0)
    later = use.again(NOW + SITTING_SECONDS)
    assert (later.last, later.weight) == (NOW + SITTING_SECONDS, use.popularity(NOW + SITTING_SECONDS) + 1)


def test_the_cost_of_fetching_again_has_a_factor_for_each_doubt() -> None:
    plain = refetch_seconds(1000, 10.0)
    assert plain == 100
    assert refetch_seconds(1000, None) == refetch_seconds(1000, 0.0) == 1000 / UNKNOWN_RATE
    assert refetch_seconds(1000, 10.0, verified=False) == plain * UNVERIFIED_FACTOR
    assert refetch_seconds(1000, 10.0, gated=True) == plain * GATED_FACTOR
    assert refetch_seconds(1000, 10.0, gone=True) == plain * GONE_FACTOR
    every = UNVERIFIED_FACTOR * GATED_FACTOR * GONE_FACTOR
    assert refetch_seconds(1000, 10.0, verified=False, gated=True, gone=True) == plain * every


@pytest.mark.parametrize(("count", "others"), [(5, []), (6, ["1 more models"]), (0, [])])
def test_five_models_are_named_and_the_others_counted(count: int, others: list[str]) -> None:
    named = largest_first([candidate(f"m{n}", n + 1, protected="pinned" if n else "") for n in range(count)])
    assert named[5:] == others
    assert (
        named[:5]
        == [f"m{n} ({n + 1} bytes, {'pinned' if n else 'evictable'})" for n in reversed(range(count))][:5]
    )


def test_of_two_that_are_equally_large_the_first_by_its_manifest_is_named_first() -> None:
    assert [text[0] for text in largest_first([candidate("b", 3), candidate("a", 3)])] == ["a", "b"]


def test_exactly_what_is_needed_is_evicted() -> None:
    old, new = Use(NOW - 9 * HALF_LIFE_SECONDS), Use(NOW - HALF_LIFE_SECONDS)
    pair = [candidate("a", 10, use=old), candidate("b", 10, use=new)]
    for need, evicted in ((9, ["a"]), (10, ["a"]), (11, ["a", "b"]), (20, ["a", "b"]), (21, ["a", "b"])):
        assert sorted(each.candidate.manifest for each in choose(pair, need=need, now=NOW)) == evicted


@pytest.mark.parametrize("is_spare_shared", [False, True])
def test_what_turns_out_to_be_needless_stays(*, is_spare_shared: bool) -> None:
    """The spare one has the lowest score. What is needed becomes free when the two others go together."""
    both, spare = Digest("sha256", "0" * 64), Digest("sha256", "1" * 64)

    def of(manifest: str, size: int, blob: Digest, uses: float) -> Candidate:
        return Candidate(manifest, (manifest,), {blob: size}, Use(NOW - HALF_LIFE_SECONDS, uses), 8.0)

    everybody = [of("spare", 1, spare, 0.001), of("one", 10, both, 1.0), of("other", 10, both, 1.0)]
    if is_spare_shared:
        everybody.append(of("popular", 1, spare, 10.0))
    chosen = choose(everybody, need=10, now=NOW)
    assert [(each.candidate.manifest, each.frees) for each in chosen] == [("one", 0), ("other", 10)]


def test_a_snapshot_expires_when_it_was_unused_for_so_long_and_not_a_second_before() -> None:
    old = candidate("a", 10, use=Use(NOW - 100))
    assert [each.frees for each in expired([old], unused_seconds=100, now=NOW)] == [10]
    assert expired([old], unused_seconds=101, now=NOW) == []
    assert expired([candidate("a", 10)], unused_seconds=0, now=NOW) == [], "no name leads to it"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (119.4, "119 s"),
        (120, "2 min"),
        (2 * 3600 - 1, "119 min"),
        (2 * 3600, "2 h"),
        (2 * 86400 - 1, "47 h"),
        (2 * 86400, "2 d"),
        (3.9 * 86400, "3 d"),
        (-1, "0 s"),
    ],
)
def test_a_duration_is_in_the_largest_unit_that_fits_twice(seconds: float, text: str) -> None:
    assert duration_in_words(seconds) == text


def test_the_reason_names_three_at_most_of_those_that_share_files() -> None:
    shared = Digest("sha256", "0" * 64)
    own = Digest("sha256", "1" * 64)
    use = Use(NOW - 200)
    others = [
        Candidate(f"m{n}", (f"n{n}",) if n else (), {shared: 9}, Use(NOW), 8.0, protected="pinned")
        for n in range(4)
    ]
    going = Candidate("x", ("x",), {shared: 9, own: 1}, use, 240.0, priority=3)
    (choice,) = choose([going, *others], need=1, now=NOW)
    assert choice.frees == 1
    assert choice.why == (
        "last used 3 min ago, 1.00 recent uses, about 4 min to fetch again, priority 3;"
        " files it shares with m0, n1, n2 stay"
    )
    alone = Candidate("x", ("x",), {own: 1}, None, 240.0)
    (choice,) = choose([alone], need=1, now=NOW)
    assert choice.why == "a newer snapshot replaced it and nobody reads it"
