"""Which requests may start or cancel a pull now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from cachd.errors import Busy, CachdError, InUse, NotFound, Unavailable
from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.transfer.admission import Admission
from cachd.transfer.newest import NewestPulls
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls
from tests.ground.stored import publish


class Ground:
    """The rules of a store whose models may be listed, and the pulls that a test adds."""

    def __init__(self, store: DiskStore) -> None:
        self.store, self.running, self.newest = store, RunningPulls(), NewestPulls(store)
        self.listed: set[str] = set()
        self.rules = Admission(
            store, self.running, self.newest, is_configured=self.listed.__contains__, at_once=2, queued=1
        )

    def run(self, spec: ModelSpec) -> Pull:
        pull = Pull(spec)
        self.running.add(pull)
        self.newest.add(pull)
        return pull

    def fail(self, spec: ModelSpec) -> Pull:
        pull = Pull.failed(spec, Unavailable("away", code="origin_failed"))
        self.newest.add(pull)
        return pull

    def ready(self, spec: ModelSpec) -> None:
        publish(self.store, {"x": b"x"}, str(spec.ref), spec.name)


@pytest.fixture
def ground(store: DiskStore) -> Ground:
    return Ground(store)


SPEC = ModelSpec(Ref.parse("hf://org/m"), "m")
MOVED = ModelSpec(Ref.parse("hf://org/m@v2"), "m")
OTHER = ModelSpec(Ref.parse("hf://org/other"), "m")


def code_of(call: Callable[[], object]) -> str | None:
    try:
        call()
    except CachdError as error:
        return f"{error.code}: {error.detail}"
    return None


Prepare = Callable[[Ground], object]
PINNED_READY: Prepare = lambda ground: (ground.ready(SPEC), ground.store.pins.add("m"))  # noqa: E731
PINNED_FAILED: Prepare = lambda ground: (ground.fail(SPEC), ground.store.pins.add("m"))  # noqa: E731


@pytest.mark.parametrize(
    ("prepare", "asked", "refresh", "code"),
    [
        (lambda _: None, SPEC, False, None),
        (lambda ground: ground.ready(SPEC), SPEC, True, None),
        (lambda ground: ground.ready(SPEC), MOVED, False, None),
        (lambda ground: ground.ready(SPEC), OTHER, False, "name_taken: m is hf://org/m"),
        (lambda ground: ground.run(SPEC), OTHER, False, "name_taken: m is being pulled from hf://org/m"),
        (lambda ground: ground.run(SPEC), MOVED, False, "name_busy: m is being pulled from hf://org/m"),
        (lambda ground: ground.fail(SPEC), OTHER, False, None),
        (PINNED_FAILED, OTHER, False, "name_taken: m is hf://org/m"),
        (PINNED_FAILED, SPEC, True, None),
        (PINNED_READY, SPEC, False, None),
        (PINNED_READY, SPEC, True, "name_taken: m is pinned at revision aaaa"),
        (PINNED_READY, MOVED, False, "name_taken: m is pinned at hf://org/m"),
        (lambda ground: ground.store.pins.add("m"), OTHER, True, None),
    ],
)
def test_a_name_belongs_to_the_model_that_it_was_pulled_for(
    ground: Ground, prepare: Prepare, asked: ModelSpec, refresh: bool, code: str | None
) -> None:
    prepare(ground)
    found = code_of(lambda: ground.rules.check_name(asked, refresh=refresh, replace=False))
    assert found is None if code is None else (found or "").startswith(code), found
    ground.rules.check_name(asked, refresh=refresh, replace=True)


def test_the_hub_folder_of_another_source_is_refused_even_to_replace(ground: Ground) -> None:
    ground.ready(SPEC)
    other = ModelSpec.asked("https://host/x", "n", hub_id="org/m")
    for may_replace in (False, True):
        with pytest.raises(InUse):
            ground.rules.check_name(other, refresh=False, replace=may_replace)


def test_a_spec_is_ready_if_its_name_leads_to_a_snapshot_of_it(ground: Ground) -> None:
    assert ground.rules.is_ready(SPEC) is False
    ground.ready(SPEC)
    assert ground.rules.is_ready(SPEC) is True
    assert ground.rules.is_ready(MOVED) is False


def test_a_repair_is_wanted_while_the_spec_waits_for_it(ground: Ground) -> None:
    def may_begin(spec: ModelSpec) -> bool:
        return ground.rules.may_begin(spec, repairs=True, retried=None)

    assert not may_begin(SPEC)
    ground.ready(SPEC)
    assert not may_begin(SPEC)
    snapshot = ground.store.names.ready("m")
    tree = ground.store.layout.tree(snapshot.manifest)
    tree.chmod(0o755)
    (tree / "x").unlink()
    assert ground.store.check("m", now=2.0)
    assert may_begin(SPEC) is True
    assert not may_begin(MOVED)
    with ground.running.without_repairs("m"):
        assert not may_begin(SPEC)


def test_a_retry_is_wanted_while_the_failed_pull_is_the_newest(ground: Ground) -> None:
    failed = ground.fail(SPEC)
    assert ground.rules.may_begin(SPEC, repairs=False, retried=failed) is True
    with ground.running.without_repairs("m"):
        assert not ground.rules.may_begin(SPEC, repairs=False, retried=failed)
        assert ground.rules.may_begin(SPEC, repairs=False, retried=None) is True
    ground.fail(SPEC)
    assert not ground.rules.may_begin(SPEC, repairs=False, retried=failed)


def test_the_queue_takes_so_many_pulls(ground: Ground) -> None:
    for number in range(3):
        ground.rules.check_queue(0)
        ground.run(replace(SPEC, name=f"m{number}"))
    with pytest.raises(Busy, match="1 pull is waiting, and at most 1 may wait") as refusal:
        ground.rules.check_queue(1)
    assert (refusal.value.code, refusal.value.retry_after) == ("queue_full", 60.0)
    ground.running.close()
    with pytest.raises(Busy) as refusal:
        ground.rules.check_queue(0)
    assert refusal.value.code == "stopping"


def test_only_an_unfinished_pull_can_be_stopped(ground: Ground) -> None:
    with pytest.raises(NotFound):
        ground.rules.running("m")
    ground.fail(SPEC)
    with pytest.raises(NotFound) as refusal:
        ground.rules.running("m")
    assert refusal.value.code == "no_pull"
    pull = ground.run(SPEC)
    assert ground.rules.running("m") is pull
    pull.end(State.failed, Unavailable("away", code="origin_failed"))
    pull.wake(Unavailable("away", code="origin_failed"))
    with pytest.raises(NotFound):
        ground.rules.running("m")


@pytest.mark.parametrize(
    "prepare",
    [
        lambda ground: ground.run(SPEC),
        lambda ground: ground.fail(SPEC),
        lambda ground: ground.ready(SPEC),
        lambda ground: ground.store.names.note_eviction("m"),
    ],
    ids=["pulled", "failed", "ready", "evicted"],
)
def test_a_name_that_is_known_may_be_deleted(ground: Ground, prepare: Prepare) -> None:
    for force in (False, True):
        with pytest.raises(NotFound):
            ground.rules.check_cancel("m", force=force)
    prepare(ground)
    for force in (False, True):
        ground.rules.check_cancel("m", force=force)


@pytest.mark.parametrize("why", ["configured", "pinned"])
def test_a_model_that_is_listed_or_pinned_is_deleted_only_by_force(ground: Ground, why: str) -> None:
    ground.ready(SPEC)
    if why == "pinned":
        ground.store.pins.add("m")
    else:
        ground.listed.add("m")
    with pytest.raises(InUse) as refusal:
        ground.rules.check_cancel("m", force=False)
    assert refusal.value.code == why
    ground.rules.check_cancel("m", force=True)
