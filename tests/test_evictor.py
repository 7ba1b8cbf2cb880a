"""What goes when a pull needs space, and that nothing else does."""

from __future__ import annotations

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest

from cachd.errors import InUse, NoSpace, NotFound
from cachd.transfer.evictor import Evictor
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.small import MIB, PATIENCE_SECONDS, Disks, Engines, Small, on_disk


def test_a_pull_that_needs_room_evicts_what_is_worth_least_and_nothing_else(small: Small) -> None:
    for name, age in (("a", 3000), ("b", 4000), ("c", 2000), ("d", 5000)):
        small.pull(name)
        small.age(name, age)
    free = small.engine.store.space.capacity().free
    small.pull("e")
    assert small.names == ["a", "b", "c", "e"]
    assert abs(small.engine.store.space.capacity().free - free) < MIB, "as much came free as went"
    (eviction,) = small.engine.reclaim.evicted()
    assert (eviction.names, eviction.reason) == (("d",), "pull")
    assert 8 * MIB <= eviction.freed < 9 * MIB
    assert eviction.why.startswith("last used 83 min ago")
    told = small.engine.metrics.text().decode()
    assert 'cachd_evictions_total{reason="pull"} 1.0' in told
    (told_bytes,) = re.findall(r"^cachd_evicted_bytes_total (.*)$", told, flags=re.MULTILINE)
    assert float(told_bytes) == eviction.freed
    assert small.engine.pulls.get("d") is None, "an evicted model is not told as ready"


def test_when_everything_is_protected_nothing_goes_and_the_refusal_says_what_holds_the_space(
    small: Small,
) -> None:
    for name in "abcd":
        small.pull(name)
        small.engine.store.pins.add(name)
    with pytest.raises(NoSpace) as refusal:
        small.pull("e")
    for name in "abcd":
        assert re.search(rf"\b{name} \(\d+ bytes, pinned as {name}\)", refusal.value.detail)
    assert small.names == list("abcd")
    assert small.engine.reclaim.evicted() == []
    assert small.engine.store.space.capacity().reserved == 0
    small.engine.store.pins.remove("c")
    small.pull("e")
    assert small.names == ["a", "b", "d", "e"]


def test_nothing_goes_for_a_pull_that_would_not_fit_all_the_same(small: Small) -> None:
    for name in "abcd":
        small.pull(name)
    for name in "abc":
        small.engine.store.pins.add(name)
    with pytest.raises(NoSpace):
        small.pull("e", 13 * MIB)
    assert small.names == list("abcd")


def test_pulls_at_once_make_room_for_each_other_and_the_reserve_is_never_crossed(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    store = Small(engine(root=disk(64 * MIB, kind="ext4"), reserve_free="8MiB", pulls=4, streams=8), origin)
    refs = [store.add(f"m{n}", 5 * MIB + n * 7919) for n in range(16)]
    space, least, stop = store.engine.store.space, [1 << 60], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            now = space.capacity()
            least[0] = min(least[0], now.free - now.reserve_free)

    store.engine.reclaim.start()  # ext4 takes blocks of its own beside those that were reserved
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(4) as crowd:
            ended = [crowd.submit(store.engine.pull, ref) for ref in refs]
            pulled = [future.result(PATIENCE_SECONDS) for future in ended]
    finally:
        stop.set()
        watching.join()
    assert len(pulled) == 16
    assert least[0] >= 0, "it filled the disk to the reserve, and no further"
    assert len(store.engine.store.names.all()) < 16, "some went for others"
    assert space.capacity().reserved == 0
    root = store.engine.store.layout.root
    assert space.capacity().usage.total == on_disk(root / ".cachd/blobs")


def test_evictions_while_the_same_blobs_are_published_leave_every_ready_model_whole(
    small: Small,
) -> None:
    """One takes a snapshot away while another links its blobs anew: they go one after the other."""
    files = {f"f{n}": noise(8192, n + 1) for n in range(60)}
    ref = small.origin.add_model("shared", files)
    store = small.engine.store
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            for manifest, _ in list(store.manifests.with_names()):
                with suppress(NotFound, InUse):
                    store.evict(manifest.id)

    evicting = threading.Thread(target=evict)
    evicting.start()
    try:
        for turn in range(20):
            small.engine.pull(ref, name=f"shared-{turn % 3}")
    finally:
        stop.set()
        evicting.join()
    small.engine.pull(ref, name="last")
    for snapshot in store.names.all():
        tree = small.engine.store.layout.model(snapshot.name)
        assert {path.name: path.read_bytes() for path in tree.iterdir()} == files


def test_what_is_gone_or_in_use_by_now_is_skipped_and_counts_as_no_eviction(small: Small) -> None:
    for name, age in (("a", 5000), ("b", 4000), ("c", 3000)):
        small.pull(name)
        small.age(name, age)
    store = small.engine.store
    plan = small.engine.reclaim.plan(40 * MIB)
    assert [choice.candidate.names for choice in plan.choices] == [("a",), ("b",), ("c",)]
    small.engine.pulls.delete("a")
    store.pins.add("b")
    store.leases.take("c", "a pod", until=time.time() + 3600)
    assert Evictor(store, small.engine.metrics).evict(plan.choices, "pull") == []
    assert small.names == ["b", "c"]
