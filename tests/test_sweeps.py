"""Sweeps without a daemon: what is kept, what is removed, and what each counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachd.model import Digest, File
from cachd.store.sweep import KINDS
from cachd.upkeep.sweeps import Sweeps
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import until
from tests.ground.stored import FILE, PARTS, left_by_an_earlier_life

SIZE = 1000


@pytest.fixture
def on(engine: Callable[..., Engine]) -> Engine:
    return engine(scrub_bytes_per_second=0, retries=0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Swept:
    """Sweeps of an engine with clocks of their own."""

    def __init__(self, on: Engine, *, keep: float = 60.0) -> None:
        self.clock, self.now = Clock(), Clock()
        self.sweeps = Sweeps(
            on.store,
            on.pulls,
            on.metrics,
            interval_seconds=0,
            keep_seconds=keep,
            clock=self.clock,
            now=self.now,
        )


def test_what_changed_lately_is_kept_and_so_is_everything_after_a_start(on: Engine) -> None:
    left_by_an_earlier_life(on.store, PARTS[0])  # type: ignore[arg-type]
    swept = Swept(on)
    (found,) = swept.sweeps.leftovers(everything=True)
    swept.clock.now, swept.now.now = 1059.0, found.changed_at + 1e6
    assert swept.sweeps.leftovers() == [], "the daemon has just begun"
    swept.clock.now = 1060.0
    assert [each.name for each in swept.sweeps.leftovers()] == [str(FILE.blob)]
    swept.now.now = found.changed_at + 60.0
    assert swept.sweeps.leftovers() == [], "it changed lately"
    swept.now.now += 0.001
    before = on.metrics.registry.get_sample_value("cachd_swept_bytes_total", {"kind": "ingest"}) or 0.0
    ((gone, freed),) = swept.sweeps.sweep()
    assert (gone.name, freed) == (str(FILE.blob), found.size)
    after = on.metrics.registry.get_sample_value("cachd_swept_bytes_total", {"kind": "ingest"}) or 0.0
    assert after - before == freed
    assert swept.sweeps.sweep(everything=True) == []


def test_each_kind_of_leftover_has_its_metric_from_the_start(on: Engine) -> None:
    Swept(on)
    for kind in KINDS:
        assert on.metrics.registry.get_sample_value("cachd_swept_bytes_total", {"kind": kind}) == 0.0


def test_a_sweep_ends_when_the_daemon_stops_and_drops_proofs_that_nobody_needs(on: Engine) -> None:
    left_by_an_earlier_life(on.store, PARTS[0])  # type: ignore[arg-type]
    gone = File("a", 1, "https://host/a", Digest("sha256", "3" * 64), base="https://host/")
    on.store.content.proven.add(gone)
    swept = Swept(on)
    swept.sweeps.close()
    assert swept.sweeps.sweep(everything=True) == []
    assert len(swept.sweeps.leftovers(everything=True)) == 1
    assert not on.store.content.proven.has(gone)


def test_what_a_running_pull_may_need_is_no_leftover(on: Engine, origin: Origin) -> None:
    """Until its manifest is known, nobody knows which blobs it needs."""
    left_by_an_earlier_life(on.store, PARTS[0])  # type: ignore[arg-type]
    ref = origin.add("/m", noise(SIZE))
    hold = origin.hold("/m", after=0)
    running = on.begin(spec_of(ref, name="m"))
    assert hold.reached.wait(PATIENCE_SECONDS)
    swept = Swept(on)
    until(lambda: running.progress.manifest is not None)
    assert [each.name for each in swept.sweeps.leftovers(everything=True)] == [str(FILE.blob)]
    hold.release()
    running.done.result(PATIENCE_SECONDS)
