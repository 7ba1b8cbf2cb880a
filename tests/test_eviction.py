"""Which snapshots are lost for space: the policy alone, by properties and on traces."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.model import Digest, Percentage
from cachd.policy.eviction import (
    FRESH_SECONDS,
    HALF_LIFE_SECONDS,
    SITTING_SECONDS,
    Candidate,
    Choice,
    Use,
    bytes_over,
    choose,
    duration_in_words,
    expired,
    largest_first,
    opened_lately,
    refetch_seconds,
)
from tests.ground.chance import examples
from tests.ground.trace import policies, refetched, trace

NOW = 1e9
DAY = 86400.0
GB = 10**9


def blob(number: int) -> Digest:
    return Digest("sha256", f"{number:064x}")


def snapshot(name: str, size: int = 10 * GB, *, age: float = DAY, uses: float = 1, **more: Any) -> Candidate:
    """A snapshot of one file, which nobody else has."""
    given: dict[str, Any] = {
        "blobs": {blob(zlib.crc32(name.encode())): size},
        "use": Use(NOW - age, uses),
        "refetch_seconds": refetch_seconds(size, 1e9),
        **more,
    }
    return Candidate(name, (name,), **given)


def names(choices: Iterable[Choice]) -> list[str]:
    return [choice.candidate.manifest for choice in choices]


def freed(everybody: Sequence[Candidate], gone: Iterable[Candidate], claimed: set[Digest]) -> int:
    """What is free when exactly these are gone, counted blob by blob."""
    gone = set(gone)
    left = claimed | {b for c in everybody if c not in gone for b in c.blobs}
    return sum({b: s for c in gone for b, s in c.blobs.items() if b not in left}.values())


@st.composite
def nodes(draw: st.DrawFn) -> list[Candidate]:
    """Snapshots of up to four of eight blobs each, some of them protected, some without a name."""
    sizes = draw(st.lists(st.integers(1, 100), min_size=8, max_size=8))
    return [
        Candidate(
            manifest=f"{number:02d}",
            names=(f"model-{number}",),
            blobs={blob(b): sizes[b] for b in draw(st.sets(st.integers(0, 7), min_size=1, max_size=4))},
            use=draw(st.none() | st.builds(Use, st.floats(NOW - 30 * DAY, NOW), st.floats(0.1, 50))),
            refetch_seconds=draw(st.floats(0.1, 1000)),
            priority=draw(st.integers(-100, 100)),
            protected=draw(st.sampled_from(["", "", "", "pinned"])),
        )
        for number in range(draw(st.integers(0, 7)))
    ]


needs = st.integers(1, 400)
claims = st.sets(st.integers(0, 7).map(blob), max_size=2)


@examples(50)
@given(nodes(), needs, claims)
def test_never_more_goes_than_is_needed_and_all_that_may_when_that_is_too_little(
    node: list[Candidate], need: int, claimed: set[Digest]
) -> None:
    chosen = [c.candidate for c in choose(node, need=need, now=NOW, claimed=claimed)]
    if freed(node, chosen, claimed) >= need:
        for candidate in chosen:
            others = [c for c in chosen if c is not candidate]
            assert freed(node, others, claimed) < need, f"{candidate.manifest} could stay"
    else:
        losable = [c for c in node if not c.protected]
        assert freed(node, chosen, claimed) == freed(node, losable, claimed)


@examples(20)
@given(nodes(), needs, claims)
def test_a_protected_snapshot_is_never_evicted(
    node: list[Candidate], need: int, claimed: set[Digest]
) -> None:
    assert not [c for c in choose(node, need=need, now=NOW, claimed=claimed) if c.candidate.protected]
    assert not [c for c in expired(node, unused_seconds=0, now=NOW) if c.candidate.protected]


@examples(20)
@given(nodes(), needs, claims, st.randoms(use_true_random=False))
def test_the_order_in_which_snapshots_are_told_changes_nothing(
    node: list[Candidate], need: int, claimed: set[Digest], chance: random.Random
) -> None:
    before = names(choose(node, need=need, now=NOW, claimed=claimed))
    chance.shuffle(node)
    assert names(choose(node, need=need, now=NOW, claimed=claimed)) == before


@examples(20)
@given(nodes(), needs, claims)
def test_each_choice_says_why_and_what_it_really_frees(
    node: list[Candidate], need: int, claimed: set[Digest]
) -> None:
    choices = choose(node, need=need, now=NOW, claimed=claimed)
    gone: list[Candidate] = []
    for choice in choices:
        before = freed(node, gone, claimed)
        gone.append(choice.candidate)
        assert choice.frees == freed(node, gone, claimed) - before
        assert ("replaced" in choice.why) == (choice.candidate.use is None)
        assert choice.candidate.use is None or " ago" in choice.why
        has_priority = bool(choice.candidate.use and choice.candidate.priority)
        assert (f", priority {choice.candidate.priority}" in choice.why) == has_priority


@examples(12)
@given(nodes(), needs)
def test_a_snapshot_whose_eviction_frees_nothing_stays(node: list[Candidate], need: int) -> None:
    """However little it is worth: a snapshot all of whose blobs a protected one holds."""
    everything = {b: s for c in node for b, s in c.blobs.items()}
    keeper = Candidate("keeper", ("keeper",), everything, Use(NOW), 1.0, protected="pinned")
    assert choose([*node, keeper], need=need, now=NOW) == []


@pytest.mark.parametrize(
    ("goes", "stays"),
    [
        ({"age": 3 * DAY}, {"age": 2 * DAY}),
        ({"uses": 2}, {"uses": 3}),
        ({"refetch_seconds": 10.0}, {"refetch_seconds": 11.0}),
        ({"priority": -1}, {"priority": 0}),
        ({"use": None}, {"age": 300 * DAY}),
        ({"age": 2 * FRESH_SECONDS, "uses": 99}, {"age": FRESH_SECONDS / 2}),
        ({"uses": 1}, {"uses": 9, "priority": -20}),
    ],
    ids=["last use", "uses", "cost", "priority", "replaced", "fresh", "uses outweigh a low priority"],
)
def test_of_two_equal_ones_goes_the_one_with(goes: dict[str, Any], stays: dict[str, Any]) -> None:
    node = [snapshot("b", **goes), snapshot("a", **stays)]
    assert names(choose(node, need=1, now=NOW)) == ["b"]


def test_a_source_that_may_not_give_it_again_makes_a_snapshot_dearer() -> None:
    plain = refetch_seconds(10 * GB, 1e9)
    assert plain == 10
    harder = [
        refetch_seconds(10 * GB, 1e9, verified=False),
        refetch_seconds(10 * GB, 1e9, gated=True),
        refetch_seconds(10 * GB, 1e9, gone=True),
    ]
    assert plain < harder[0] < harder[1] < harder[2]
    assert refetch_seconds(10 * GB, None) > plain, "a source never measured is taken for a slow one"


def test_one_of_two_revisions_frees_only_what_the_other_has_not() -> None:
    common = {blob(1): 9 * GB}
    old = snapshot("old", blobs={**common, blob(2): GB}, age=9 * DAY)
    new = snapshot("new", blobs={**common, blob(3): GB})
    (choice,) = choose([old, new], need=GB, now=NOW)
    assert (choice.candidate, choice.frees) == (old, GB)
    assert "files it shares with new stay" in choice.why
    both = choose([old, new], need=2 * GB, now=NOW)
    assert [(c.candidate, c.frees) for c in both] == [(old, GB), (new, 10 * GB)]


def test_two_snapshots_of_the_same_blobs_go_together_or_not_at_all() -> None:
    same = {blob(1): 9 * GB}
    pair = [snapshot(n, blobs=same, age=9 * DAY) for n in ("one", "two")]
    assert sum(c.frees for c in choose(pair, need=GB, now=NOW)) == 9 * GB
    assert choose([pair[0], replace(pair[1], protected="pinned")], need=GB, now=NOW) == []


def test_a_huge_snapshot_is_not_evicted_for_a_few_bytes() -> None:
    node = [snapshot("giant", 700 * GB, age=2 * DAY), snapshot("small", GB, age=DAY)]
    assert names(choose(node, need=GB, now=NOW)) == ["small"]


def test_a_small_one_is_kept_when_the_large_one_that_must_go_is_enough() -> None:
    node = [snapshot("small", GB, age=9 * DAY), snapshot("large", 10 * GB, age=DAY)]
    assert names(choose(node, need=5 * GB, now=NOW)) == ["large"]


def test_a_claimed_blob_frees_nothing() -> None:
    held = snapshot("held", blobs={blob(1): GB})
    assert choose([held], need=1, now=NOW, claimed={blob(1)}) == []


def test_nothing_goes_when_nothing_is_needed() -> None:
    assert choose([snapshot("a"), snapshot("b", use=None)], need=0, now=NOW) == []


def test_what_is_unused_for_long_expires_the_longest_first() -> None:
    node = [snapshot("a", age=2 * DAY), snapshot("b", age=3 * DAY), snapshot("c", age=DAY)]
    assert names(expired(node, unused_seconds=2 * DAY, now=NOW)) == ["b", "a"]


def test_a_use_halves_with_time_and_a_probe_every_second_is_one_use() -> None:
    use = Use(NOW)
    assert use.popularity(NOW + HALF_LIFE_SECONDS) == pytest.approx(0.5)
    assert use.popularity(NOW - DAY) == 1, "a clock set back makes nothing popular"
    probed = use
    for second in range(0, int(SITTING_SECONDS) * 3, 10):
        probed = probed.again(NOW + second)
    assert probed.weight == 1
    assert probed.last == NOW + int(SITTING_SECONDS) * 3 - 10
    again = probed.again(probed.last + SITTING_SECONDS)
    assert 1.99 < again.weight < 2


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-5, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "119 min"), (7200, "2 h"), (200_000, "2 d")],
)
def test_a_length_of_time_is_told_in_whole_units(seconds: float, told: str) -> None:
    assert duration_in_words(seconds) == told


@pytest.mark.parametrize("seed", range(1, 6))
def test_on_a_trace_fewer_bytes_are_fetched_again_than_by_lru_and_lfu(seed: int) -> None:
    on = trace(seed)
    again = {name: refetched(on, policy) for name, policy in policies(on).items()}
    assert again["offline"] < again["cachd"] < again["LFU"]
    assert again["cachd"] < 0.9 * again["LRU"], Counter(again)


# --- watermarks, several names, and errors ---


@pytest.mark.parametrize(
    ("taken", "over"), [(0, 0), (90, 0), (91, 11), (100, 20)], ids=["empty", "at high", "above high", "full"]
)
def test_above_the_high_watermark_all_above_the_low_one_is_evicted(taken: int, over: int) -> None:
    assert bytes_over(taken, 100, high=Percentage(90), low=Percentage(80)) == over


def test_the_uses_of_a_snapshot_under_two_names_add_up() -> None:
    assert Use.combined([]) is None
    old, new = Use(1000.0, 2.0), Use(1000.0 + HALF_LIFE_SECONDS, 1.0)
    assert Use.combined([new, old]) == Use(1000.0 + HALF_LIFE_SECONDS, 2.0)


def test_an_error_names_the_largest_models_first_and_counts_the_others() -> None:
    held = [
        Candidate(
            f"m{size}", (f"n{size}",) if size else (), {Digest("sha256", f"{size:064x}"): size}, None, 1.0
        )
        for size in range(7)
    ]
    assert largest_first(held[:2]) == ["n1 (1 bytes, evictable)", "a replaced snapshot (0 bytes, evictable)"]
    assert largest_first(held)[0] == "n6 (6 bytes, evictable)"
    assert largest_first(held)[-1] == "2 more models"


def test_a_file_that_was_opened_lately_is_protected_also_after_the_clock_was_set_back() -> None:
    assert opened_lately(NOW - 40, NOW, within=41) == "opened 40 s ago"
    assert opened_lately(NOW + 40, NOW, within=41) == "opened 0 s ago"
    for opened_at in (None, NOW - 41, NOW + 41):
        assert opened_lately(opened_at, NOW, within=41) == ""
