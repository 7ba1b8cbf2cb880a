"""How it is known which models were used."""

from __future__ import annotations

import os
import time

from tests.conftest import Engine
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.small import MIB, Disks, Engines, Small


def test_a_model_asked_for_stays_and_one_that_is_only_read_by_the_clock_of_its_file_goes(
    small: Small,
) -> None:
    """Access times are no use: read-only mounts keep none. What was asked for counts, not what came last."""
    for name in "bcda":
        small.pull(name)
        small.age(name, 10_000)
    read = (small.engine.store.layout.model("a") / "a").stat()
    os.utime(small.engine.store.layout.model("a") / "a", (time.time(), read.st_mtime))
    for name in "bcd":
        small.engine.pull(small.add(name))
    small.pull("e")
    assert small.names == ["b", "c", "d", "e"]


def test_the_usage_log_survives_a_restart(disk: Disks, engine: Engines, origin: Origin) -> None:
    root = disk(40 * MIB)
    from cachd.config import Config
    from cachd.daemon.parts import assembled

    options = Config(root=root, allow=("127.0.0.0/8", f"{origin.url}/"), reserve_free=4 * MIB)
    with assembled(options) as parts:
        first = Small(Engine(parts), origin)
        for name, age in (("a", 9000), ("b", 400_000), ("c", 9000), ("d", 9000)):
            first.pull(name)
            first.age(name, age)
        parts.store.usage_log.set_priority("b", 5)
    with assembled(options) as parts:
        second = Small(Engine(parts), origin)
        assert parts.store.usage_log.priority("b") == 5
        assert (parts.store.usage_log.rate("http") or 0) > 0
        second.pull("e")
        assert second.names == ["a", "c", "d", "e"]


def test_a_torn_file_of_uses_is_no_hindrance(small: Small) -> None:
    from cachd.store.usage_log import UsageLog

    layout = small.engine.store.layout
    layout.usage_log.write_text('{"names": {"a": [1')
    assert UsageLog(layout).of("a") is None


def test_what_is_open_in_a_process_counts_as_used(small: Small) -> None:
    small.pull("a")
    small.age("a", 10_000)
    before = small.engine.store.usage_log.of("a")
    with (small.engine.store.layout.model("a") / "a").open("rb"):
        small.engine.reclaim.watch.check_usage()
    after = small.engine.store.usage_log.of("a")
    assert before is not None
    assert after is not None
    assert after.last > before.last + 9000
    assert 1.9 < after.weight < 2


def test_what_nobody_used_for_long_goes_by_itself(disk: Disks, engine: Engines, origin: Origin) -> None:
    store = Small(engine(root=disk(40 * MIB), evict_unused_seconds=3600), origin)
    for name, age in (("old", 4000), ("new", 3000), ("kept", 4000)):
        store.pull(name, MIB)
        store.age(name, age)
    store.engine.store.pins.add("kept")
    store.engine.reclaim.watch.check_usage()
    assert store.names == ["kept", "new"]
    (eviction,) = store.engine.reclaim.evicted()
    assert (eviction.names, eviction.reason) == (("old",), "unused")


def test_what_the_configuration_lists_is_not_evicted(disk: Disks, engine: Engines, origin: Origin) -> None:
    ref = origin.add("/listed", noise(8 * MIB))
    store = Small(engine(root=disk(40 * MIB), models=[{"ref": ref, "name": "listed"}]), origin)
    store.engine.pull(ref)
    store.age("listed", 10_000)
    for name in "abc":
        store.pull(name)
    store.pull("d")
    assert "listed" in store.names
