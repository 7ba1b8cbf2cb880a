"""The models that the configuration lists: pulled, pinned, warmed and tried again, tick by tick."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from cachd.policy.backoff import delay
from cachd.store.pins import PinnedBy
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.upkeep.prewarm import Desired, Prewarm
from cachd.upkeep.warms import Warms
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin, Status

NOW = 1000.0


class Listed:
    """The list of a configuration that a test changes, and what keeps its models ready."""

    def __init__(self, on: Engine, warms: Warms) -> None:
        self.on, self.warms, self.now = on, warms, NOW
        self._unread: list[Desired] | None = None
        self.prewarm = Prewarm(
            on.pulls, on.store, warms, self._read, chance=lambda: 1.0, now=lambda: self.now
        )

    def _read(self) -> list[Desired] | None:
        unread, self._unread = self._unread, None
        return unread

    def tick(self, *desired: Desired, changed: bool = True) -> None:
        """One tick. `changed`: the list has changed to `desired`."""
        if changed:
            self._unread = list(desired)
        assert self.prewarm._tick() == 1.0

    def pull(self, name: str = "m") -> Pull:
        found = self.on.pulls.get(name)
        assert found is not None
        return found

    def ended(self, name: str = "m") -> Pull:
        """The last pull of a model, when it has ended."""
        pull = self.pull(name)
        pull.done.exception(PATIENCE_SECONDS)
        return pull


@pytest.fixture
def listed(engine: Callable[..., Engine]) -> Iterator[Listed]:
    on = engine(retries=0)
    with closing(Warms(on.store, on.metrics)) as warms:
        yield Listed(on, warms)


def desired(origin: Origin, name: str = "m", size: int = 64, **how: Any) -> Desired:
    return Desired(spec_of(origin.add(f"/{name}-{size}", noise(size)), name=name), **how)


def test_what_is_listed_is_pulled_once_with_its_priority(listed: Listed, origin: Origin) -> None:
    listed.tick(desired(origin, priority=7))
    assert listed.ended().priority == 7
    first = listed.pull()
    for _ in range(3):
        listed.tick(changed=False)
    assert listed.pull() is first
    assert listed.on.store.names.get("m")


def test_the_names_that_are_required_are_those_of_the_list(listed: Listed, origin: Origin) -> None:
    listed.tick(desired(origin, "a", required=True), desired(origin, "b"))
    assert listed.prewarm.required() == ["a"]
    listed.tick(changed=False)
    assert listed.prewarm.required() == ["a"]
    listed.tick(desired(origin, "b", required=True))
    assert listed.prewarm.required() == ["b"]
    for name in ("a", "b"):
        listed.ended(name)


def test_a_model_is_pinned_while_the_list_says_so(listed: Listed, origin: Origin) -> None:
    pins, model = listed.on.store.pins, desired(origin, pin=True)
    listed.tick(model, desired(origin, "plain"))
    assert PinnedBy.configuration in pins.by("m")
    assert not pins.by("plain")
    listed.ended()
    listed.tick(changed=False)
    pins.add("m")
    listed.tick(Desired(model.spec))
    assert set(pins.by("m")) == set(pins.by("m")) - {PinnedBy.configuration}
    assert pins.by("m"), "a pin of somebody else stays"
    listed.tick(model)
    assert PinnedBy.configuration in pins.by("m"), "a model that is ready is pinned, too"
    listed.ended("plain")


def test_a_model_is_warmed_once_for_each_of_its_snapshots(listed: Listed, origin: Origin) -> None:
    listed.tick(desired(origin, warm=True), desired(origin, "plain"))
    for name in ("m", "plain"):
        listed.ended(name)
    assert listed.warms.warming("m") is None
    listed.tick(changed=False)
    first = listed.warms.warming("m")
    assert first is not None
    assert first.ended.wait(PATIENCE_SECONDS)
    listed.tick(changed=False)
    assert listed.warms.warming("m") is first
    listed.tick(desired(origin, size=65, warm=True))
    listed.ended()
    listed.tick(changed=False)
    second = listed.warms.warming("m")
    assert second is not None
    assert (second is first, second.total) == (False, 65)
    assert second.ended.wait(PATIENCE_SECONDS)
    assert listed.warms.warming("plain") is None


def test_a_pull_that_failed_is_tried_again_after_a_wait_that_grows(listed: Listed, origin: Origin) -> None:
    origin.fault("*", Status(404), methods=("GET", "HEAD"))
    listed.tick(desired(origin))
    for failures in (1, 2, 3):
        failed = listed.ended()
        ticks = 1 + round(delay(failures, requested=None, chance=1.0))
        listed.tick(changed=False)  # it notices the end, and counts
        assert failed.retry_at == NOW + ticks
        for _ in range(ticks - 2):
            listed.tick(changed=False)
            assert listed.pull() is failed
        if failures == 3:
            origin.clear()
        listed.tick(changed=False)
        assert listed.pull() is not failed
    assert listed.ended().progress.state is State.ready
    listed.tick(changed=False)


def test_a_pull_of_somebody_else_that_failed_is_asked_again_and_a_listed_one_not_twice(
    listed: Listed, origin: Origin
) -> None:
    model, other = desired(origin), spec_of(origin.add("/other", noise(9)), name="other")
    origin.fault("*", Status(503), methods=("GET",))
    listed.tick(model)
    listed.on.pulls.start(other)
    listed.ended()
    listed.tick(changed=False)
    of_the_list, of_another = listed.ended(), listed.ended("other")
    listed.tick(changed=False)
    assert of_the_list.retry_at == NOW + 2
    assert of_another.retry_at is not None
    listed.now += 10_000.0
    listed.prewarm._retries.tick()
    assert listed.pull() is of_the_list, "the list alone has it pulled again"
    assert listed.pull("other") is not of_another
    origin.clear()
    listed.ended("other")


def test_a_list_that_is_read_anew_goes_on_to_take_the_name_of_a_model(listed: Listed, origin: Origin) -> None:
    listed.on.pull(origin.add("/other", noise(9)), name="m")
    model = desired(origin)
    origin.fault("*", Status(404), methods=("GET", "HEAD"))
    listed.tick(model)
    listed.ended()
    origin.clear()
    listed.tick(model)
    listed.ended()
    ready = listed.on.store.names.get("m")
    assert ready is not None
    assert ready.spec == model.spec


def test_a_pull_that_somebody_cancelled_is_not_tried_again_until_the_list_changes(
    listed: Listed, origin: Origin
) -> None:
    model, hold = desired(origin, size=4096), origin.hold("/m-4096", after=9)
    listed.tick(model)
    assert hold.reached.wait(PATIENCE_SECONDS)
    assert listed.on.pulls.stop("m") is not None
    cancelled = listed.ended()
    assert cancelled.progress.state is State.cancelled
    for _ in range(3):
        listed.tick(changed=False)
    assert listed.pull() is cancelled
    assert cancelled.retry_at is None
    hold.release()
    listed.tick(model)
    assert listed.pull() is cancelled or listed.ended().progress.state is State.ready


def test_a_model_that_somebody_removed_comes_back_only_when_it_is_listed_anew(
    listed: Listed, origin: Origin
) -> None:
    model = desired(origin)
    listed.tick(model)
    listed.ended()
    listed.tick(changed=False)
    listed.on.pulls.delete("m", force=True)
    for _ in range(3):
        listed.tick(changed=False)
    assert listed.on.store.names.get("m") is None
    listed.tick()
    listed.tick(model)
    assert listed.ended().progress.state is State.ready


def test_a_listed_model_takes_its_name_even_if_that_is_pinned_and_another_one_s(
    listed: Listed, origin: Origin
) -> None:
    listed.on.pull(origin.add("/other", noise(9)), name="m")
    listed.on.store.pins.add("m")
    model = desired(origin)
    listed.tick(model)
    listed.ended()
    ready = listed.on.store.names.get("m")
    assert ready is not None
    assert ready.spec == model.spec
    listed.tick(changed=False)
    listed.on.pull(origin.add("/third", noise(10)), name="m", replace=True)
    for _ in range(2):
        listed.tick(changed=False)
    ready = listed.on.store.names.get("m")
    assert ready is not None
    assert ready.spec.ref.base.endswith("/third"), "somebody replaced it, and the list did not change"


def test_a_start_begins_all_pulls_before_it_returns(listed: Listed, origin: Origin) -> None:
    listed._unread = [desired(origin)]
    listed.prewarm.start()
    with closing(listed.prewarm):
        assert listed.ended().progress.state is State.ready
