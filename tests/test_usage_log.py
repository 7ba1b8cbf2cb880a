"""How it is known which models were used."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.policy.eviction import Use
from cachd.store.layout import Layout
from cachd.store.root import make_directories
from cachd.store.usage_log import GATED, GONE, UsageLog
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


# --- the log by itself ---

MOST = 10_000  # entries of each kind
MEASURED = 4 * MIB  # the fewest bytes from which a rate is measured
DAY = 86400.0


@pytest.fixture
def layout(root: Path) -> Layout:
    make_directories(root)
    return Layout(root)


def test_all_that_is_known_survives_a_restart(layout: Layout) -> None:
    log = UsageLog(layout, now=lambda: 5000.0)
    log.save()
    assert not layout.usage_log.exists(), "nothing is known yet"
    log.used("a", 1000.0)
    log.seen("b", 2000.0)
    log.opened("1" * 32, 4000.0)
    log.opened("2" * 32, 5000.0 - 3600.0)  # an hour ago
    log.set_priority("a", 7)
    log.brought("hf", MEASURED, 2.0)
    log.lost("hf://org/gated", GATED)
    log.lost("hf://org/gone", GONE)
    log.save()
    assert layout.usage_log.stat().st_mode & 0o777 == 0o600
    for each in (log, UsageLog(layout)):
        assert (each.of("a"), each.of("b"), each.of("absent")) == (Use(1000.0), Use(2000.0), None)
        assert (each.opened_at("1" * 32), each.opened_at("2" * 32)) == (4000.0, None)
        assert (each.priority("a"), each.priority("b")) == (7, 0)
        assert (each.rate("hf"), each.rate("s3")) == (MEASURED / 2, None)
        assert each.why_lost("hf://org/gated") == GATED
        assert each.why_lost("hf://org/gone") == GONE
        assert each.why_lost("hf://org/model") is None


@pytest.mark.parametrize(
    "change",
    [
        lambda log: log.used("a", 1.0),
        lambda log: log.opened("1" * 32, 1.0),
        lambda log: log.set_priority("a", 1),
        lambda log: log.brought("hf", MEASURED, 1.0),
        lambda log: log.lost("hf://org/m", GONE),
    ],
    ids=["used", "opened", "priority", "brought", "lost"],
)
def test_each_change_is_written_once(layout: Layout, change: Callable[[UsageLog], None]) -> None:
    log = UsageLog(layout, now=lambda: 1.0)
    change(log)
    log.save()
    written = layout.usage_log.stat().st_ino
    log.save()
    assert layout.usage_log.stat().st_ino == written


def test_what_changes_nothing_is_not_written(layout: Layout) -> None:
    log = UsageLog(layout)
    log.set_priority("a", 3)
    log.lost("hf://org/m", GONE)
    log.save()
    written = layout.usage_log.stat().st_ino
    log.set_priority("a", 3)
    log.set_priority("b", 0)
    log.lost("hf://org/m", GONE)
    log.lost("hf://org/other", None)
    log.lost("hf://" + "x" * 996, GONE)
    log.brought("hf", MEASURED - 1, 1.0)
    log.brought("hf", MEASURED, 0.0)
    log.save()
    assert layout.usage_log.stat().st_ino == written
    assert (log.rate("hf"), log.why_lost("hf://" + "x" * 996)) == (None, None)
    log.lost("hf://" + "x" * 995, GONE)
    assert log.why_lost("hf://" + "x" * 995) == GONE
    log.set_priority("a", 0)
    log.lost("hf://org/m", None)
    log.save()
    saved = json.loads(layout.usage_log.read_text())
    assert (saved["priorities"], list(saved["lost"])) == ({}, ["hf://" + "x" * 995])


def test_only_a_request_counts_as_asked_for(layout: Layout) -> None:
    log = UsageLog(layout)
    assert log.asked_at == 0.0
    log.seen("a", 9.0)
    assert log.asked_at == 0.0
    log.used("a", 8.0)
    log.used("b", 7.0)
    assert log.asked_at == 8.0


def test_uses_add_up_and_fade(layout: Layout) -> None:
    log = UsageLog(layout)
    for now in (0.0, 10.0, 3 * DAY + 10.0):
        log.used("a", now)
    assert log.of("a") == Use(3 * DAY + 10.0, 1.5)


def test_new_opens_are_reported_once(layout: Layout) -> None:
    log = UsageLog(layout)
    assert log.newly_opened() == {}
    log.opened("1" * 32, 1.0)
    log.opened("1" * 32, 2.0)
    assert log.newly_opened() == {"1" * 32: 2.0}
    assert log.newly_opened() == {}
    assert log.opened_at("1" * 32) == 2.0


def test_the_rate_of_a_source_follows_what_it_sends(layout: Layout) -> None:
    log = UsageLog(layout)
    for seconds, rate in ((1.0, MEASURED), (0.5, 1.5 * MEASURED), (1.0, 1.25 * MEASURED)):
        log.brought("hf", MEASURED, seconds)
        assert log.rate("hf") == rate


def test_so_many_entries_are_kept_and_the_oldest_go_first(layout: Layout) -> None:
    log = UsageLog(layout, now=lambda: 0.0)
    log.set_priority("0", 5)
    for number in range(MOST):
        log.seen(str(number), 0.0)
        log.opened(str(number), 0.0)
        log.lost(str(number), GONE)
    log.seen("0", 0.0)  # and so is not the oldest
    log.opened("0", 0.0)
    log.lost("0", GATED)
    assert log.of("1")
    assert (log.opened_at("1"), log.why_lost("1")) == (0.0, GONE)
    log.seen("more", 0.0)
    log.opened("more", 0.0)
    log.lost("more", GONE)
    assert (log.of("1"), log.opened_at("1"), log.why_lost("1")) == (None, None, None)
    assert all(log.of(name) for name in ("0", "2", "more"))
    assert log.priority("0") == 5
    for number in range(2, MOST):
        log.seen(str(number), 0.0)
    log.seen("one more", 0.0)
    assert (log.of("0"), log.priority("0")) == (None, 0), "a priority goes with its name"


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"names": {"a": [1]}, "priorities": {}, "rates": {}, "lost": {}}', "[" * 100_000],
)
def test_a_log_that_cannot_be_read_is_replaced_by_the_next(layout: Layout, content: str) -> None:
    layout.usage_log.write_text(content)
    log = UsageLog(layout)
    assert log.of("a") is None
    log.used("a", 1.0)
    log.save()
    assert UsageLog(layout).of("a") == Use(1.0)


def test_a_log_of_an_older_version_has_no_opens_and_no_rate_of_zero_is_believed(layout: Layout) -> None:
    saved = {"names": {"a": [1, 2]}, "priorities": {}, "rates": {"hf": 0, "s3": 1}, "lost": {}}
    layout.usage_log.write_text(json.dumps(saved))
    log = UsageLog(layout)
    assert (log.of("a"), log.rate("hf"), log.rate("s3")) == (Use(1.0, 2.0), None, 1.0)


def test_a_log_that_could_not_be_written_is_written_later(layout: Layout) -> None:
    log = UsageLog(layout)
    log.used("a", 1.0)
    layout.usage_log.mkdir()  # nothing can be renamed over it
    log.save()
    layout.usage_log.rmdir()
    log.save()
    assert UsageLog(layout).of("a") == Use(1.0)
