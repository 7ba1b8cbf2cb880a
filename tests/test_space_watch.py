"""When models are evicted without a pull that needs their space, and when not."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from cachd.metrics import Metrics
from cachd.model import Percentage
from cachd.store.disk_store import DiskStore
from cachd.transfer.evictor import Evictor
from cachd.transfer.plans import Planner
from cachd.transfer.space_watch import EvictionRules, SpaceWatch
from tests.ground.models import noise
from tests.ground.stored import MIB, publish

NOW = 1_000_000.0
RULES = EvictionRules(Percentage(90), Percentage(50), unused_seconds=0.0, automatic=True)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Ground:
    """A store of models of 1 MiB each, `a` unused for the longest time, and what watches its space."""

    def __init__(self, store: DiskStore, rules: EvictionRules, names: str) -> None:
        self.store, self.clock, self.time = store, Clock(), Clock()
        self.time.now = NOW
        self.planner = Planner(store, self.time)
        self.evictor = Evictor(store, Metrics(), self.time)
        self.watch = SpaceWatch(store, self.planner, self.evictor, rules, clock=self.clock, now=self.time)
        for at, name in enumerate(names):
            content = {"x": noise(MIB, seed=ord(name))}
            publish(store, content, f"hf://org/{name}", name, now=NOW - (9 - at) * 86400)

    def limit(self, *, models: float) -> None:
        """Let models take the space of so many of them."""
        of_one = self.store.space.capacity().usage.total / len(self.names)
        self.store.space.change(reserve_free=0, limit=int(of_one * models), reserve_inodes=0)

    @property
    def names(self) -> str:
        return "".join(snapshot.name for snapshot in self.store.names.all())

    @property
    def reasons(self) -> list[str]:
        return [done.reason for done in self.evictor.evicted()]


def test_over_the_high_watermark_models_are_evicted_down_to_the_low_one(store: DiskStore) -> None:
    ground = Ground(store, RULES, "abcde")
    ground.limit(models=5.6)
    ground.watch.relieve()
    assert ground.names == "abcde", "89 % are taken"
    ground.limit(models=5.5)
    ground.watch.relieve()
    assert (ground.names, ground.reasons) == ("de", ["pressure"] * 3)
    ground.watch.relieve()
    assert ground.names == "de"


def test_nothing_is_evicted_by_itself_if_that_is_off(store: DiskStore) -> None:
    ground = Ground(store, replace(RULES, automatic=False, unused_seconds=1.0), "ab")
    ground.limit(models=2.1)
    ground.watch.relieve()
    ground.watch.check_usage()
    assert ground.names == "ab"


def test_what_is_chosen_for_a_pull_may_go_for_pressure(store: DiskStore) -> None:
    ground = Ground(store, RULES, "ab")
    ground.limit(models=2.1)
    victims = ground.planner.plan(1)
    assert len(victims.choices) == 1
    ground.watch.relieve()
    assert ground.names == "b"


def test_models_that_exceed_the_limit_all_the_same_are_not_evicted_in_vain(store: DiskStore) -> None:
    ground = Ground(store, RULES, "abc")
    for name in "bc":
        store.pins.add(name)
    ground.limit(models=1.5)
    ground.watch.relieve()
    assert ground.names == "abc"
    ground.limit(models=2.5)
    ground.watch.relieve()
    assert ground.names == "bc", "the others fit into the limit"


def test_without_a_limit_of_their_own_models_go_when_the_disk_is_full(store: DiskStore) -> None:
    ground = Ground(store, RULES, "ab")
    free = store.space.capacity().free
    store.space.change(reserve_free=free, limit=None, reserve_inodes=0)
    ground.watch.relieve()
    assert ground.names == ""
    assert set(ground.reasons) == {"pressure"}


@pytest.mark.parametrize(("unused_seconds", "left"), [(0.0, "abc"), (8 * 86400.0, "c"), (9 * 86400.0, "bc")])
def test_what_nobody_used_for_so_long_is_evicted(store: DiskStore, unused_seconds: float, left: str) -> None:
    ground = Ground(store, replace(RULES, unused_seconds=unused_seconds), "abc")
    ground.watch.check_usage()
    assert ground.names == left
    assert set(ground.reasons) <= {"unused"}


def test_a_model_that_is_open_counts_as_used_now(store: DiskStore) -> None:
    ground = Ground(store, replace(RULES, unused_seconds=86400.0), "ab")
    with open(store.layout.model("a") / "x"):
        ground.watch.check_usage()
    assert ground.names == "a"
    used = store.usage_log.of("a")
    assert used is not None
    assert used.last == NOW


def test_uses_are_checked_more_often_while_a_process_may_be_starting(store: DiskStore) -> None:
    ground = Ground(store, RULES, "a")
    ground.time.now = store.usage_log.asked_at
    assert ground.watch.seconds_between_checks() == 5, "nothing is watched yet"
    ground.time.now += 599
    assert ground.watch.seconds_between_checks() == 5
    ground.time.now += 1
    assert ground.watch.seconds_between_checks() == 60
    ground.time.now = store.usage_log.asked_at
    store.watch_all()
    if store.watch.sees_all_opens():
        assert ground.watch.seconds_between_checks() == 60


def test_a_tick_checks_uses_when_it_is_time_and_relieves_the_disk_always(store: DiskStore) -> None:
    ground = Ground(store, replace(RULES, unused_seconds=8 * 86400.0), "abcd")
    ground.watch._checked_at = 100.0
    every = ground.watch.seconds_between_checks()
    ground.clock.now += every - 0.1
    assert ground.watch._tick() == 1.0
    assert ground.names == "abcd"
    ground.clock.now += 0.1
    ground.watch._tick()
    assert (ground.names, ground.watch._checked_at) == ("cd", ground.clock.now)
    ground.limit(models=2.1)
    ground.watch._tick()
    assert (ground.names, ground.reasons[0]) == ("d", "pressure")


def test_a_tick_ends_leases_that_have_expired(store: DiskStore) -> None:
    ground = Ground(store, RULES, "a")
    lease = store.leases.take("a", "job", until=NOW + 60.0)
    ground.time.now = NOW + 59.0
    ground.watch._tick()
    assert [each.id for each in store.leases.of("a", NOW)] == [lease.id]
    ground.time.now = NOW + 60.0
    ground.watch._tick()
    assert store.leases.of("a", NOW) == []


def test_that_too_little_can_be_freed_is_logged_once_until_there_is_space_again(store: DiskStore) -> None:
    ground = Ground(store, RULES, "ab")
    for name in "ab":
        store.pins.add(name)
    with capture_logs() as logs:
        for models in (1.5, 1.5, 9.0, 1.5):
            ground.limit(models=models)
            ground.watch.relieve()
    warnings = [each for each in logs if each["event"].startswith("too little space can be freed")]
    assert len(warnings) == 2
    assert warnings[0]["short_bytes"] > 0
    assert len(warnings[0]["held_by"]) == 2
    assert ground.names == "ab"


def test_the_thread_checks_uses_and_ends(store: DiskStore) -> None:
    ground = Ground(store, RULES, "a")
    with closing(ground.watch):
        ground.watch.start()
    assert not ground.watch._thread._thread.is_alive()
