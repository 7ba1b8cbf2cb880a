"""How a pull makes space: its victims are chosen at the start, and go one by one as its bytes arrive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from cachd.errors import NoSpace, TooBig
from cachd.metrics import Metrics
from cachd.model import Digest, Extent, File, Manifest, Snapshot
from cachd.store.disk_store import DiskStore
from cachd.store.space import Reservation
from cachd.transfer.evictor import Evictor
from cachd.transfer.plans import Planner, Victims
from cachd.transfer.pull_space import PullSpace
from tests.ground.models import noise
from tests.ground.stored import MIB, file_of, publish, write

NOW = 1_000_000.0
DAY = 86400.0


class Ground:
    """A store whose models may take so many bytes, and pulls that want some of them."""

    def __init__(self, store: DiskStore, stack: ExitStack) -> None:
        self.store, self.stack, self.metrics = store, stack, Metrics()
        self.planner = Planner(store, lambda: NOW)
        self.evictor = Evictor(store, self.metrics, lambda: NOW)

    def have(self, name: str, *, age: float) -> Snapshot:
        """A model of 1 MiB that was last used so long ago."""
        content = {"x": noise(MIB, seed=ord(name))}
        return publish(self.store, content, f"hf://org/{name}", name, now=NOW - age)

    def leave(self, free: int) -> None:
        """Let models take so many bytes more than they do."""
        limit = self.store.space.capacity().usage.total + free
        self.store.space.change(reserve_free=0, limit=limit, reserve_inodes=0)

    def pull(self, size: int, *, automatic: bool = True) -> tuple[PullSpace, Reservation]:
        space = PullSpace("pull", self.store, self.planner, self.evictor, automatic=automatic)
        file = File("y", size, "hf://org/new/y", Digest("sha256", f"{size:064x}"))
        return space, space.reserve(Manifest("hf://org/new", "b" * 40, (file,)), self.stack)

    def granted(self, reservation: Reservation, size: int) -> int:
        """Let so many bytes arrive, which take their blocks until the end of the test."""
        return self.stack.enter_context(reservation.grant(size, size))

    @property
    def names(self) -> list[str]:
        return [snapshot.name for snapshot in self.store.names.all()]


@pytest.fixture
def ground(store: DiskStore) -> Iterator[Ground]:
    with ExitStack() as stack:
        yield Ground(store, stack)


def test_a_partial_download_of_an_ended_pull_goes_before_any_model(ground: Ground) -> None:
    ground.have("a", age=3 * DAY)
    content = noise(MIB, seed=7)
    with closing(ground.store.content.begin(file_of(content))) as ingest:
        ingest.allocate(Extent(0, MIB))
        write(ingest, content, Extent(0, MIB // 2))
    ground.leave(MIB // 4)
    space, reservation = ground.pull(MIB)
    (victims,) = ground.planner.victims
    assert (len(victims.plan.partials), len(victims.plan.choices)) == (1, 0)
    assert reservation.owed > 0
    assert space.make_space(reservation, MIB)
    assert (ground.store.sweep.partial_downloads(), ground.names) == ([], ["a"])
    assert reservation.owed == 0
    assert ground.metrics.swept_bytes.labels("ingest")._value.get() >= MIB // 2


def test_a_pull_that_fits_chooses_nobody(ground: Ground) -> None:
    ground.have("a", age=DAY)
    ground.leave(4 * MIB)
    space, reservation = ground.pull(2 * MIB)
    assert (ground.planner.victims, reservation.owed) == ([], 0)
    assert space.make_space(reservation, 1), "its bytes are free"
    space.close()
    assert ground.names == ["a"]


def test_a_victim_goes_when_the_bytes_need_its_space_and_no_earlier(ground: Ground) -> None:
    ground.have("a", age=3 * DAY)
    ground.have("b", age=2 * DAY)
    ground.have("c", age=1 * DAY)
    ground.leave(MIB // 2)
    _, reservation = ground.pull(2 * MIB)
    (victims,) = ground.planner.victims
    assert (ground.names, len(victims.plan.choices)) == (["a", "b", "c"], 2)
    owed = reservation.owed
    assert MIB < owed < 2 * MIB
    assert ground.granted(reservation, MIB // 4) == MIB // 4
    assert ground.names == ["a", "b", "c"]
    assert ground.granted(reservation, MIB // 2) == MIB // 2
    assert ground.names == ["b", "c"]
    assert 0 < reservation.owed < owed - MIB // 2
    assert ground.granted(reservation, MIB) == MIB
    assert ground.names == ["c"]
    assert [(done.names, done.reason) for done in ground.evictor.evicted()] == [
        (("b",), "pull"),
        (("a",), "pull"),
    ]
    assert reservation.owed == 0


def test_after_the_end_of_a_pull_its_victims_stay(ground: Ground) -> None:
    ground.have("a", age=DAY)
    ground.leave(0)
    space, reservation = ground.pull(MIB // 2)
    assert len(ground.planner.victims) == 1
    reservation.end()
    assert not space.make_space(reservation, 1)
    assert not reservation.make_space(1)
    ground.stack.close()
    assert (ground.names, ground.planner.victims) == (["a"], [])
    space.close()


@pytest.mark.parametrize("automatic", [True, False])
def test_a_pull_evicts_only_if_it_may(ground: Ground, automatic: bool) -> None:
    ground.have("a", age=DAY)
    ground.leave(0)
    if automatic:
        ground.pull(MIB // 2, automatic=True)
    else:
        with pytest.raises(NoSpace) as refusal:
            ground.pull(MIB // 2, automatic=False)
        assert "held by a (" in refusal.value.detail
        assert refusal.value.short >= MIB // 2
    assert len(ground.planner.victims) == automatic


def test_a_pull_that_would_not_fit_all_the_same_is_refused_and_chooses_nobody(ground: Ground) -> None:
    ground.have("a", age=DAY)
    ground.have("b", age=DAY)
    ground.store.pins.add("b")
    ground.leave(0)
    with pytest.raises(NoSpace, match="pinned as b"):
        ground.pull(MIB + MIB // 2)
    with pytest.raises(TooBig):
        ground.pull(9 * MIB)
    assert (ground.planner.victims, ground.names) == ([], ["a", "b"])
    assert ground.store.space.capacity().reserved == 0


def test_a_victim_that_was_used_meanwhile_is_replaced(ground: Ground) -> None:
    ground.have("a", age=2 * DAY)
    ground.have("b", age=1 * DAY)
    ground.leave(0)
    _, reservation = ground.pull(MIB // 2)
    ground.store.usage_log.used("a", NOW)
    with reservation.grant(MIB // 4, MIB // 4) as granted:
        assert granted == MIB // 4
    assert ground.names == ["a"]


def test_a_victim_that_cannot_be_replaced_fails_the_pull(ground: Ground) -> None:
    ground.have("a", age=DAY)
    ground.leave(0)
    space, reservation = ground.pull(MIB // 2)
    ground.store.pins.add("a")
    owed = reservation.owed
    with pytest.raises(NoSpace) as refusal:
        space.make_space(reservation, 1)
    assert refusal.value.short == owed
    assert f"pull still needs {owed} bytes to be freed, and only 0 can be" in refusal.value.detail
    assert "pinned as a" in refusal.value.detail
    assert (ground.names, reservation.owed) == (["a"], owed)


def test_space_that_another_process_took_is_not_made_by_evictions(ground: Ground) -> None:
    ground.have("a", age=DAY)
    ground.leave(2 * MIB)
    space, reservation = ground.pull(MIB)
    ground.leave(0)
    assert not space.make_space(reservation, MIB)
    with reservation.grant(MIB, MIB) as granted:
        assert granted == 0
    assert (reservation.waits_for, ground.names) == (MIB, ["a"])
    ground.leave(2 * MIB)
    assert space.make_space(reservation, MIB)


def test_two_pulls_choose_different_victims(ground: Ground) -> None:
    ground.have("a", age=2 * DAY)
    ground.have("b", age=1 * DAY)
    ground.leave(0)
    ground.pull(MIB // 2)
    ground.pull(MIB // 2 + 1)
    chosen = [victims.manifests for victims in ground.planner.victims]
    assert len(chosen) == 2
    assert not chosen[0] & chosen[1]
    with pytest.raises(NoSpace, match="will be evicted for the pull of pull as its bytes arrive"):
        ground.pull(MIB // 2 + 2)


def test_victims_for_inodes_go_while_inodes_lack(ground: Ground) -> None:
    ground.have("a", age=2 * DAY)
    ground.have("b", age=1 * DAY)
    ground.leave(9 * MIB)
    space, reservation = ground.pull(MIB)
    reservation.owed_inodes = 2
    assert space.make_space(reservation, 1)
    assert (ground.names, reservation.owed_inodes) == (["a", "b"], 2), "no inodes lack"
    free = ground.store.space.capacity().free_inodes
    more = free + 1_000_000  # however many files other processes remove meanwhile
    ground.store.space.change(reserve_free=0, limit=None, reserve_inodes=more)
    space._victims.for_inodes = ground.planner.plan_inodes(2, for_pull=Victims("pull")).choices
    left = []
    for _ in range(3):
        assert space.make_space(reservation, 1)
        left.append((len(ground.names), reservation.owed_inodes))
        reservation.owed_inodes = max(reservation.owed_inodes, 1) if len(left) < 3 else 0
    assert [count for count, _ in left] == [1, 0, 0]
    assert left[0][1] == 1
    assert left[2][1] == 0, "no victim is left: from here on, the file system decides"
