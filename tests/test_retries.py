"""A pull that failed for a reason that may pass is asked again by itself, and is known after a restart."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachd.errors import NotFound, Unavailable
from cachd.policy import backoff
from cachd.transfer.newest import MAX_REMEMBERED
from cachd.transfer.progress import State
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull
from cachd.upkeep.retries import Retries
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin, Short, Status
from tests.ground.pause import paused_before
from tests.ground.site import MIB, Ground, until

CONTENT = noise(3 << 10)
Engines = Callable[..., Engine]


class Later:
    """Retries of an engine whose clock the test moves."""

    def __init__(self, on: Engine, tried: tuple[str, ...] = ()) -> None:
        self.now = 0.0
        self.retries = Retries(
            on.store, on.pulls, lambda name: name in tried, chance=lambda: 1.0, now=lambda: self.now
        )

    def tick(self, seconds: float = 0.0) -> None:
        self.now += seconds
        self.retries.tick()


def failed(on: Engine, ref: str) -> Pull:
    """A pull of `m` that has failed."""
    pull = on.begin(spec_of(ref, name="m"))
    with pytest.raises((Unavailable, NotFound)):
        pull.done.result(PATIENCE_SECONDS)
    pull.ended_at = 0.0  # by the clock of `Later`
    return pull


def newest(on: Engine) -> Pull:
    found = on.pulls.get("m")
    assert found is not None
    return found


def test_a_pull_that_an_outage_ended_is_asked_again_after_growing_pauses_until_it_is_ready(
    engine: Engines, origin: Origin
) -> None:
    on, ref = engine(retries=0), origin.add("/model.bin", CONTENT)
    origin.fault("/model.bin", Status(503), methods=("GET",), times=None)
    pull, later = failed(on, ref), Later(on)
    for pause in (30.0, 60.0, 120.0, 240.0, 480.0, 600.0, 600.0):
        later.tick()
        assert pull.retry_at == later.now + pause
        later.tick(pause - 0.5)
        assert newest(on) is pull, "it is not due yet"
        later.tick(0.5)
        assert newest(on) is not pull
        pull = newest(on)
        with pytest.raises(Unavailable):
            pull.done.result(PATIENCE_SECONDS)
        pull.ended_at = later.now
    origin.clear()
    later.tick()
    later.tick(600.0)
    newest(on).done.result(PATIENCE_SECONDS)
    assert newest(on).progress.state is State.ready


def test_what_would_fail_again_is_tried_elsewhere_or_was_cancelled_is_not_asked_again(
    engine: Engines, origin: Origin
) -> None:
    on = engine(retries=0)
    lost = failed(on, f"{origin.url}/nothing.bin")
    later = Later(on)
    later.tick()
    later.tick(10_000.0)
    assert (newest(on), lost.retry_at) == (lost, None)
    ref = origin.add("/model.bin", CONTENT)
    origin.fault("/model.bin", Status(503), methods=("GET",), times=None)
    listed, elsewhere = failed(on, ref), Later(on, tried=("m",))
    elsewhere.tick()
    elsewhere.tick(10_000.0)
    assert (newest(on), listed.retry_at) == (listed, None)


def test_a_retry_that_is_due_brings_back_no_model_that_is_deleted_at_that_moment(
    engine: Engines, origin: Origin
) -> None:
    on, ref = engine(retries=0), origin.add("/model.bin", CONTENT)
    origin.fault("/model.bin", Status(503), methods=("GET",), times=None)
    failed(on, ref)
    later = Later(on)
    later.tick()
    with paused_before(Pulls.start, lambda: later.tick(30.0)) as retrying:
        on.pulls.delete("m")
    retrying.result(PATIENCE_SECONDS)
    assert on.pulls.get("m") is None
    assert list(on.store.layout.pending.iterdir()) == []


def test_a_failed_pull_is_shown_as_it_was_after_a_restart_until_somebody_removes_it(
    alone: Callable[..., Ground],
) -> None:
    ground = alone()
    ref = ground.add("big.bin")
    ground.origin.fault("/big.bin", Short(at=2 * MIB), methods=("GET",), times=None)
    ground.node.pull(ref)
    ground.node.pull(f"{ground.origin.url}/nothing.bin")
    ground.node.wait_for("pull ended", name="big.bin", state="failed")
    ground.node.wait_for("pull ended", name="nothing.bin", state="failed")

    def shown(name: str) -> tuple[object, ...]:
        model = ground.show(name)
        pull = model["pull"]
        return model["state"], model["final"], pull["error"], pull["bytes"]["done"], pull["bytes"]["total"]

    before = {name: shown(name) for name in ("big.bin", "nothing.bin")}
    ground.node.kill()
    ground.node.start()
    assert {name: shown(name) for name in before} == before
    assert (ground.node.root / "status/big.bin.json").exists()
    assert until(lambda: ground.show("big.bin")["pull"]["retry_at"])
    listed = ground.node.cli("ls").stdout
    assert "asked again in" in listed
    assert ground.show("nothing.bin")["pull"]["retry_at"] is None
    ground.node.ask("DELETE", "/v1/models/nothing.bin")
    ground.node.stop()
    ground.node.start()
    assert ground.node.ask("GET", "/v1/models/nothing.bin").status == 404
    assert ground.node.ask("GET", "/v1/models/big.bin").status == 200


def test_only_a_bounded_number_of_failed_pulls_is_kept(engine: Engines) -> None:
    on, names = engine(allow=()), [f"m{number:04}" for number in range(MAX_REMEMBERED + 2)]
    for name in names:
        with pytest.raises(Exception, match="http"):
            on.pull(f"http://127.0.0.1:1/{name}.bin", name=name)
    kept = sorted(path.name for path in on.store.layout.pending.iterdir())
    assert kept == [f"{name}.failed" for name in names[2:]]


def test_the_pause_before_a_retry_grows_to_ten_minutes() -> None:
    assert [backoff.before_retry(n, chance=1.0) for n in (1, 2, 5, 6, 50)] == [30, 60, 480, 600, 600]
    assert backoff.before_retry(1, chance=0.0) == 15
