"""What a plan removes for space, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path

import pytest

from cachd.errors import NoSpace
from cachd.model import Snapshot
from cachd.policy.eviction import Candidate, Choice
from cachd.store.disk_store import DiskStore
from cachd.store.sweep import Leftover
from cachd.store.usage_log import GATED, GONE
from cachd.transfer.plans import EMPTY_PLAN, Plan, Planner, Victims
from tests.ground.models import noise
from tests.ground.stored import KIB, file_of, publish, write

NOW = 1_000_000.0


def choice(manifest: str, frees: int) -> Choice:
    return Choice(Candidate(manifest, ("m",), {}, None, 1.0), frees, "nobody used it")


def leftover(name: str, size: int) -> Leftover:
    return Leftover("ingest", name, size, 0.0, lambda: size)


@pytest.fixture
def planner(store: DiskStore) -> Planner:
    return Planner(store, lambda: NOW)


def model(store: DiskStore, name: str, *, files: int = 1, now: float = NOW - 86400) -> Snapshot:
    """A model of files of 64 KiB that it shares with no other."""
    content = {f"{number}.bin": noise(64 * KIB, seed=10 * ord(name[0]) + number) for number in range(files)}
    return publish(store, content, f"hf://org/{name}", name, now=now)


def chosen(plan: Plan) -> list[str]:
    return [each.candidate.names[0] for each in plan.choices]


@pytest.mark.parametrize(("short", "is_enough"), [(0, True), (29, True), (30, True), (31, False)])
def test_a_plan_is_enough_if_it_frees_what_is_short(short: int, is_enough: bool) -> None:
    plan = Plan(short, [leftover("p", 10)], [choice("1", 15), choice("2", 5)], ())
    assert plan.frees == 30
    assert plan.is_enough is is_enough
    assert (EMPTY_PLAN.frees, EMPTY_PLAN.short, EMPTY_PLAN.is_enough) == (0, 0, True)


def test_victims_go_in_the_order_of_the_plan_the_partial_downloads_first() -> None:
    victims = Victims("pull")
    assert victims.manifests == set()
    assert victims.next_for_inodes() is None
    partials, choices = [leftover("p", 1), leftover("q", 2)], [choice("1", 3), choice("2", 4)]
    victims.plan = Plan(10, partials, choices, ())
    victims.for_inodes = inodes = [choice("3", 1), choice("2", 1)]
    assert victims.manifests == {"1", "2", "3"}
    assert [victims.next() for _ in range(3)] == [*partials, choices[0]]
    assert victims.plan == Plan(10, [], choices[1:], ())
    assert victims.manifests == {"2", "3"}
    assert [victims.next_for_inodes() for _ in range(3)] == [*inodes, None]
    assert victims.next() is choices[1]


def test_no_more_is_chosen_than_is_short(store: DiskStore, planner: Planner) -> None:
    model(store, "old", now=NOW - 90000)
    model(store, "new", now=NOW - 7000)
    one = planner.plan(1)
    assert (one.short, chosen(one), len(one.candidates)) == (1, ["old"], 2)
    assert 64 * KIB <= one.frees < 128 * KIB
    assert chosen(planner.plan(one.frees)) == ["old"]
    assert chosen(planner.plan(one.frees + 1)) == ["old", "new"]
    for short in (0, -5):
        assert (planner.plan(short).short, planner.plan(short).choices) == (0, [])
    assert not planner.plan(1 << 40).is_enough


def test_inodes_are_counted_instead_of_bytes(store: DiskStore, planner: Planner) -> None:
    model(store, "m", files=3)
    victims = Victims("pull")
    plans = {count: planner.plan_inodes(count, for_pull=victims) for count in (1, 3, 4)}
    assert [plan.frees for plan in plans.values()] == [3, 3, 3]
    assert [plan.is_enough for plan in plans.values()] == [True, True, False]
    assert [plan.short for plan in plans.values()] == [1, 3, 4]


def test_what_nobody_used_for_so_long_is_planned(store: DiskStore, planner: Planner) -> None:
    model(store, "old", now=NOW - 9000)
    model(store, "new", now=NOW - 7000)
    names = {
        age: [each.candidate.names[0] for each in planner.plan_unused(age)] for age in (6000, 8000, 10000)
    }
    assert {age: sorted(found) for age, found in names.items()} == {
        6000: ["new", "old"],
        8000: ["old"],
        10000: [],
    }


def opened(store: DiskStore, snapshot: Snapshot) -> AbstractContextManager[object]:
    (file,) = store.manifests.of(snapshot).files
    return store.content.path(file.blob).open("rb")


PROTECTED: dict[str, Callable[[DiskStore, Planner, Snapshot], AbstractContextManager[object]]] = {
    "pinned as m": lambda store, _, __: nullcontext(store.pins.add("m")),
    "leased by pod for 60 s more": lambda store, _, __: nullcontext(
        store.leases.take("m", "pod", until=NOW + 60)
    ),
    "listed in the configuration as m": lambda _, planner, __: nullcontext(
        setattr(planner, "listed", frozenset({"m", "x"}))
    ),
    "a running pull needs its files": lambda store, _, snapshot: store.content.claim(
        store.manifests.of(snapshot), "pull"
    ),
    "open in a process on this node": lambda store, _, snapshot: opened(store, snapshot),
}


@pytest.mark.parametrize("why", PROTECTED)
def test_a_protected_model_is_not_chosen_and_the_reason_is_given(
    store: DiskStore, planner: Planner, why: str
) -> None:
    snapshot = model(store, "m")
    (before,) = planner.candidates()
    assert before.protected == ""
    assert chosen(planner.plan(1)) == ["m"]
    with PROTECTED[why](store, planner, snapshot):
        (found,) = planner.candidates()
        assert why in found.protected
        assert chosen(planner.plan(1)) == []
        held = planner.with_holders(NoSpace("too little", short=1))
        assert held.detail.startswith("too little; held by m (")
        assert why in held.detail


def test_what_is_chosen_for_one_pull_is_not_chosen_for_another(store: DiskStore, planner: Planner) -> None:
    model(store, "m")
    first, second = Victims("first"), Victims("second")
    first.plan = planner.plan(1, for_pull=first)
    planner.victims += [first, second]
    assert chosen(planner.plan(1, for_pull=second)) == []
    assert chosen(planner.plan(1)) == []
    assert chosen(planner.plan_ignoring_pulls(1)) == ["m"]
    assert chosen(planner.plan(1, for_pull=first)) == ["m"]
    assert planner.plan_inodes(1, for_pull=second).choices == []
    assert len(planner.plan_inodes(1, for_pull=first).choices) == 1
    (found,) = planner.candidates()
    assert found.protected == "will be evicted for the pull of first as its bytes arrive"
    assert planner.are_as_planned(first)
    second.plan = first.plan
    assert not planner.are_as_planned(first), "another pull has chosen it, too"


@pytest.mark.parametrize(
    "change",
    [
        lambda store, _: store.pins.add("m"),
        lambda store, _: store.usage_log.used("m", NOW),
        lambda store, snapshot: store.evict(snapshot.manifest),
    ],
    ids=["protected", "used", "gone"],
)
def test_a_victim_that_is_used_protected_or_gone_is_not_as_planned(
    store: DiskStore, planner: Planner, change: Callable[[DiskStore, Snapshot], object]
) -> None:
    snapshot = model(store, "m")
    victims = Victims("pull")
    assert planner.are_as_planned(victims)
    victims.plan = planner.plan(1)
    assert planner.are_as_planned(victims)
    change(store, snapshot)
    assert not planner.are_as_planned(victims)


def test_a_model_that_its_source_lost_is_worth_more(store: DiskStore, planner: Planner) -> None:
    snapshot = model(store, "m")

    def seconds() -> float:
        (found,) = planner.candidates()
        return found.refetch_seconds

    before = seconds()
    store.usage_log.lost(snapshot.spec.ref.base, GATED)
    gated = seconds()
    store.usage_log.lost(snapshot.spec.ref.base, GONE)
    assert before < gated < seconds()
    store.usage_log.lost(snapshot.spec.ref.base, None)
    assert seconds() == before
    store.usage_log.brought("hf", 1 << 40, 1.0)
    assert seconds() != before, "the measured rate of the source counts"


def partial_download(store: DiskStore, name: str) -> None:
    """What a pull that ended leaves of a file: 64 KiB."""
    content = noise(64 * KIB, seed=ord(name[0]))
    with closing(store.content.begin(file_of(content + b"more", f"{name}.bin"))) as ingest:
        (gap,) = ingest.gaps()
        write(ingest, content + b"more", type(gap)(0, 64 * KIB))


def test_partial_downloads_go_before_models_and_each_for_one_pull(store: DiskStore, planner: Planner) -> None:
    model(store, "m")
    partial_download(store, "a")
    partial_download(store, "b")
    assert planner.plan(0).partials == []
    one = planner.plan(1)
    assert (len(one.partials), one.choices) == (1, [])
    assert len(planner.plan(one.frees).partials) == 1
    two = planner.plan(one.frees + 1)
    assert (len(two.partials), two.choices) == (2, [])
    three = planner.plan(two.frees + 1)
    assert (len(three.partials), chosen(three)) == (2, ["m"])
    victims = Victims("pull")
    victims.plan = one
    planner.victims.append(victims)
    (other,) = planner.plan(1).partials
    assert other.name != one.partials[0].name
    (same,) = planner.plan(1, for_pull=victims).partials
    assert same.name == one.partials[0].name


def test_an_error_names_deleted_models_that_are_still_open(store: DiskStore, planner: Planner) -> None:
    snapshot = model(store, "m")
    error = NoSpace("full")
    with opened(store, snapshot):
        store.withdraw("m", force=True)
        held = store.space.capacity().usage.held
        named = planner.with_holders(error)
    assert held >= 64 * KIB
    assert f"deleted models that are still open ({held} bytes)" in (named.held_by or ())
    assert named.detail.startswith("full; held by ")
    assert error.detail == "full"


def test_a_candidate_has_the_blobs_of_its_files_and_the_highest_priority_of_its_names(
    store: DiskStore, planner: Planner
) -> None:
    snapshot = model(store, "m", files=2)
    (found,) = planner.candidates()
    assert set(found.blobs) == {file.blob for file in store.manifests.of(snapshot).files}
    assert all(64 * KIB <= size < 128 * KIB for size in found.blobs.values())
    assert (found.names, found.priority, found.opened_at) == (("m",), 0, None)
    store.usage_log.set_priority("m", 7)
    assert planner.candidates()[0].priority == 7


def test_a_snapshot_that_has_no_name_any_more_has_no_priority(store: DiskStore, planner: Planner) -> None:
    snapshot = model(store, "m")
    with opened(store, snapshot):
        publish(store, {"x": b"other"}, "hf://org/m", "m", revision="b" * 40, now=NOW)
        unnamed = [each for each in planner.candidates() if not each.names]
        assert [(each.manifest, each.priority) for each in unnamed] == [(snapshot.manifest, 0)]


@pytest.mark.parametrize("is_limited", [True, False])
def test_an_error_names_other_files_of_the_disk_unless_a_limit_is_what_lacks(
    store: DiskStore, planner: Planner, is_limited: bool
) -> None:
    model(store, "m")
    taken = store.space.capacity().usage.total
    store.space.change(reserve_free=0, limit=taken if is_limited else None, reserve_inodes=0)
    named = planner.with_holders(NoSpace("full"))
    assert (
        any(each.startswith("other files of this disk (") for each in named.held_by or ()) is not is_limited
    )


def test_on_a_shared_volume_no_partial_download_is_removed(root: Path) -> None:
    for is_unknown in (False, True):
        with DiskStore(root, use_is_unknown=is_unknown) as store:
            partial_download(store, "a")
            assert len(Planner(store, lambda: NOW).plan(1).partials) == (0 if is_unknown else 1)
