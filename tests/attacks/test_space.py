"""An origin that claims what it never sends, and tenants whose pulls would cost others their models."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError, NoSpace, NotFound
from cachd.transfer.evictor import Evictor
from cachd.transfer.request import Pull
from tests.conftest import Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import Hold, Origin
from tests.ground.origin.faults import Status
from tests.ground.site import until

MIB = 1 << 20
PATIENCE_SECONDS = 120
Engines = Callable[..., Engine]


class Full:
    """A cache with room for four models of 8 MiB and something beside, which are there: a, the longest
    unused, b, c and d. `hold` begins a pull that stands still after some bytes."""

    def __init__(self, engine: Engines, origin: Origin, **options: object) -> None:
        self.engine, self.origin = engine(limit_bytes="40MiB", retries=0, **{"streams": 1, **options}), origin
        self.reclaim, self.store = self.engine.reclaim, self.engine.store
        for age, name in enumerate("dcba", 1):
            self.engine.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name))))
            uses = self.engine.store.usage_log
            uses._by_name.pop(name)
            uses.used(name, time.time() - age * 10_000)

    @property
    def names(self) -> str:
        return "".join(sorted(s.name for s in self.store.names.all() if len(s.name) == 1))

    def begin(self, name: str, size: int, *, after: int) -> tuple[Pull, Hold]:
        """Pull a model of `size` bytes, of which `after` come until the hold is released."""
        ref = self.origin.add_model(name, {"f": noise(size, seed=sum(name.encode()))})
        hold = self.origin.hold(f"/{name}/f", after=after)
        pull = self.engine.pulls.start(spec_of(ref))
        assert pull is not None
        assert hold.reached.wait(PATIENCE_SECONDS)
        return pull, hold

    def partial(self, name: str, size: int) -> None:
        """Leave a partial download behind: its pull is cancelled when some of it has come."""
        pull, hold = self.begin(name, size, after=3 * MIB)
        until(lambda: self.engine.store.space.capacity().usage.ingests >= 4 * MIB)
        pull.progress.cancel_token.cancel()
        with pytest.raises(CachdError):
            pull.done.result(PATIENCE_SECONDS)
        hold.release()


@pytest.fixture
def full(engine: Engines, origin: Origin) -> Full:
    return Full(engine, origin)


def ingests(root: Path) -> list[str]:
    return sorted(path.name for path in (root / ".cachd/ingest").iterdir())


# --- what is claimed ---


@pytest.mark.parametrize("directory", [False, True])
def test_a_size_that_is_only_claimed_makes_no_model_go(full: Full, directory: bool) -> None:
    """Promised: A size that a source only claims evicts no model: only bytes that have arrived do."""
    if directory:
        ref = full.origin.add_model("evil", {"f": noise(30 * MIB)})
        full.origin.fault("/evil/f", Status(404))
    else:
        ref = full.origin.add("/evil", noise(30 * MIB))
        full.origin.fault("/evil", Status(404))
    with pytest.raises(NotFound):
        full.engine.pull(ref)
    assert full.names == "abcd"
    assert full.reclaim.evicted() == []
    assert full.engine.store.space.capacity().reserved == 0


def test_a_file_that_is_only_claimed_takes_no_blocks(full: Full) -> None:
    pull, hold = full.begin("slow", 30 * MIB, after=0)
    assert full.engine.store.space.capacity().usage.ingests < MIB
    assert full.names == "abcd"
    hold.release()
    pull.done.result(PATIENCE_SECONDS)


def test_a_claim_that_passes_the_high_watermark_makes_no_model_go(engine: Engines, origin: Origin) -> None:
    full = Full(engine, origin, high_watermark="85%", low_watermark="50%")
    pull, hold = full.begin("slow", 6 * MIB, after=0)
    full.reclaim.watch.relieve()
    assert full.names == "abcd"
    hold.release()
    pull.done.result(PATIENCE_SECONDS)
    full.reclaim.watch.relieve()
    assert full.names != "abcd", "what is really taken does"


def test_no_more_models_go_than_the_bytes_that_have_arrived_need(full: Full) -> None:
    """It needs three of them in the end; in the order in which they were chosen."""
    pull, hold = full.begin("big", 30 * MIB, after=7 * MIB)
    until(lambda: full.engine.store.space.capacity().usage.ingests >= 6 * MIB)
    assert full.names == "abcd", "these had space"
    hold.release()
    pull.done.result(PATIENCE_SECONDS)
    assert [gone.names for gone in full.reclaim.evicted()][::-1] == [("a",), ("b",), ("c",)]
    assert {gone.reason for gone in full.reclaim.evicted()} == {"pull"}


# --- what was chosen ---


def test_what_was_chosen_for_one_pull_is_chosen_for_no_other(engine: Engines, origin: Origin) -> None:
    """The second is refused at once: neither waits for what the other holds."""
    full = Full(engine, origin, streams=8)
    pull, hold = full.begin("first", 24 * MIB, after=0)
    told = {c.names[0]: c.protected for c in full.reclaim.candidates()}
    assert told["a"] == told["b"] == "will be evicted for the pull of first as its bytes arrive"
    with pytest.raises(NoSpace) as refusal:
        full.engine.pull(full.origin.add("/second", noise(24 * MIB, 2)))
    assert "first" in refusal.value.detail
    assert full.names == "abcd"
    hold.release()
    pull.done.result(PATIENCE_SECONDS)
    assert full.names == "d"


def test_a_pull_that_ends_early_leaves_what_was_chosen_to_others(full: Full) -> None:
    pull, hold = full.begin("first", 30 * MIB, after=0)
    full.engine.pulls.delete("first")
    assert pull.done.done()
    hold.release()
    assert full.names == "abcd"
    assert [c.protected for c in full.reclaim.candidates()] == [""] * 4
    full.engine.pull(full.origin.add("/e", noise(30 * MIB, 3)))


@pytest.mark.parametrize("how", ["pinned", "leased", "used", "deleted"])
def test_what_is_needed_by_now_is_replaced_by_what_is_not(full: Full, how: str) -> None:
    pull, hold = full.begin("e", 12 * MIB, after=0)
    if how == "pinned":
        full.store.pins.add("a")
    elif how == "leased":
        full.store.leases.take("a", "pod", until=time.time() + 600)
    elif how == "used":
        full.engine.store.usage_log.used("a", time.time())
    else:
        full.engine.pulls.delete("a")
    hold.release()
    pull.done.result(PATIENCE_SECONDS)
    assert full.names == ("bcde" if how == "deleted" else "acde")


def test_when_nothing_can_go_any_more_the_pull_fails_and_keeps_what_has_come(full: Full, root: Path) -> None:
    pull, hold = full.begin("e", 12 * MIB, after=0)
    for name in "abcd":
        full.store.pins.add(name)
    hold.release()
    with pytest.raises(NoSpace) as refusal:
        pull.done.result(PATIENCE_SECONDS)
    assert "pinned as a" in refusal.value.detail
    assert full.names == "abcd"
    assert len(ingests(root)) == 1
    assert full.engine.store.space.capacity().reserved == 0
    full.store.pins.remove("a")
    full.origin.forget()
    full.engine.pull(f"{full.origin.url}/e/")
    assert full.origin.bytes_sent("/e/f") < 12 * MIB, "it went on with what had come"
    assert full.names == "bcde"


# --- partial downloads ---


def test_partial_downloads_of_ended_pulls_go_before_any_model(full: Full, root: Path) -> None:
    full.partial("left", 7 * MIB)
    assert len(ingests(root)) == 1
    plan = full.reclaim.plan(6 * MIB)
    assert [found.kind for found in plan.partials] == ["ingest"]
    assert plan.choices == []
    full.engine.pull(full.origin.add("/e", noise(7 * MIB, 3)))
    assert full.names == "abcde"
    assert ingests(root) == []


def test_the_bytes_of_partial_downloads_that_go_are_counted_exactly(full: Full, root: Path) -> None:
    full.partial("left", 7 * MIB)
    partials = full.reclaim.plan(6 * MIB).partials
    freed = Evictor(full.store, full.engine.metrics).drop_partials(partials)
    assert freed == sum(found.size for found in partials) >= 3 * MIB
    assert ingests(root) == []


def test_while_a_manifest_cannot_be_read_every_partial_download_stays(full: Full, root: Path) -> None:
    """Any of them may be of a file that this manifest names."""
    full.partial("left", 7 * MIB)
    snapshot = full.store.names.get("d")
    assert snapshot is not None
    manifest = full.store.layout.manifests / f"{snapshot.manifest}.json"
    manifest.chmod(0o600)
    manifest.write_text("{")
    plan = full.reclaim.plan(6 * MIB)
    assert plan.partials == []
    assert plan.choices, "models go instead"
    assert len(ingests(root)) == 1


def test_a_partial_download_that_is_only_threatened_by_a_claim_stays(full: Full, root: Path) -> None:
    full.partial("left", 7 * MIB)
    full.origin.fault("/evil", Status(404))
    with pytest.raises(NotFound):
        full.engine.pull(full.origin.add("/evil", noise(20 * MIB)))
    assert len(ingests(root)) == 1, "and the pull of which no byte came leaves nothing"


@pytest.mark.parametrize("ended", ["lately", "never"])
def test_deleting_one_model_leaves_the_partial_download_of_another(
    engine: Engines, origin: Origin, root: Path, ended: str
) -> None:
    """Both name one file; one began it, and the other deletes its own model."""
    full = Full(engine, origin, streams=8)
    content = {"f": noise(7 * MIB)}
    mine, other = (full.origin.add_model(name, content) for name in ("mine", "other"))
    for name, ref in (("mine", mine), ("other", other)):
        hold = full.origin.hold(f"/{name}/f", after=3 * MIB if name == "mine" else 0)
        pull = full.engine.pulls.start(spec_of(ref))
        assert pull is not None
        if name == "mine":
            assert hold.reached.wait(PATIENCE_SECONDS)
            until(lambda: full.engine.store.space.capacity().usage.ingests >= 4 * MIB)
        else:
            until(lambda pull=pull: pull.progress.state == "downloading")
        if name == "mine" and ended == "lately":
            pull.progress.cancel_token.cancel()
            with pytest.raises(CachdError):
                pull.done.result(PATIENCE_SECONDS)
    full.engine.pulls.delete("other")
    assert len(ingests(root)) == 1
    full.engine.pulls.delete("mine")
    assert ingests(root) == [], "nobody names it any more"
