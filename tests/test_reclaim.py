"""What an operator may free, and what the configuration keeps."""

from __future__ import annotations

import time
from contextlib import closing

import pytest

from cachd.errors import NoSpace
from cachd.metrics import Metrics
from cachd.model import Extent, Percentage
from cachd.store.disk_store import DiskStore
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.space_watch import EvictionRules
from tests.ground.models import noise
from tests.ground.stored import MIB, file_of, manifest_of, publish, write


def rules(*, automatic: bool) -> EvictionRules:
    return EvictionRules(Percentage(100), Percentage(100), unused_seconds=0.0, automatic=automatic)


@pytest.fixture
def reclaim(store: DiskStore) -> Reclaim:
    """Two models of 1 MiB each, `a` unused for longer, and no space for more."""
    for name, days in (("a", 9), ("b", 1)):
        publish(
            store, {"x": noise(MIB, seed=ord(name))}, f"hf://org/{name}", name, now=time.time() - days * 86400
        )
    store.space.change(reserve_free=0, limit=store.space.capacity().usage.total, reserve_inodes=0)
    return Reclaim(store, Metrics(), rules(automatic=True))


def names(store: DiskStore) -> list[str]:
    return [snapshot.name for snapshot in store.names.all()]


def test_an_operator_frees_what_is_needed_and_no_more(store: DiskStore, reclaim: Reclaim) -> None:
    assert reclaim.make_available(0) == []
    plan = reclaim.plan(MIB // 2)
    assert (plan.short, len(plan.choices), names(store)) == (MIB // 2, 1, ["a", "b"])
    (done,) = reclaim.make_available(MIB // 2)
    assert (done.names, done.reason, names(store)) == (("a",), "asked", ["b"])
    assert done.freed >= MIB
    assert reclaim.evicted() == [done]
    assert reclaim.make_available(MIB) == [], "so much is free now"
    assert [each.names for each in reclaim.candidates()] == [("b",)]


def test_if_too_little_can_be_freed_nothing_is(store: DiskStore, reclaim: Reclaim) -> None:
    store.pins.add("b")
    with pytest.raises(NoSpace) as refusal:
        reclaim.make_available(MIB + MIB // 2)
    assert (refusal.value.short, refusal.value.need) == (MIB + MIB // 2, MIB + MIB // 2)
    assert "pinned as b" in refusal.value.detail
    assert (names(store), reclaim.evicted()) == (["a", "b"], [])


def test_partial_downloads_are_freed_first(store: DiskStore, reclaim: Reclaim) -> None:
    content = noise(MIB, seed=9)
    with closing(store.content.begin(file_of(content + b"more"))) as ingest:
        write(ingest, content + b"more", Extent(0, MIB))
    store.space.change(reserve_free=0, limit=store.space.capacity().usage.total, reserve_inodes=0)
    assert reclaim.make_available(MIB // 2) == []
    assert names(store) == ["a", "b"]
    assert store.sweep.partial_downloads() == []


def test_what_the_configuration_lists_is_kept(store: DiskStore, reclaim: Reclaim) -> None:
    reclaim.keep(["a"])
    assert (reclaim.keeps("a"), reclaim.keeps("b")) == (True, False)
    (done,) = reclaim.make_available(1)
    assert done.names == ("b",)
    reclaim.keep([])
    assert not reclaim.keeps("a")


@pytest.mark.parametrize("automatic", [True, False])
def test_a_pull_evicts_for_its_space_if_it_may(store: DiskStore, reclaim: Reclaim, automatic: bool) -> None:
    again = Reclaim(store, Metrics(), rules(automatic=automatic))
    assert again.is_automatic is automatic
    manifest = manifest_of({"y": noise(MIB // 2, seed=9)}, base="hf://org/new")
    if not automatic:
        with pytest.raises(NoSpace), again.reserve(manifest, "new"):
            pass
        return
    with again.reserve(manifest, "new") as reservation:
        assert reservation.owed > 0
        assert store.content.claims.is_claimed(manifest.files[0].blob)
        again.settle(reservation)
        assert reservation.left < MIB // 2, "only what comes beside the files"
    assert not store.content.claims.is_claimed(manifest.files[0].blob)
    assert store.space.capacity().reserved == 0
