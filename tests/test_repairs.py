"""A repair starts by itself. It never brings back what somebody deletes or rolls back at that moment."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import structlog

from cachd.errors import Changed, InUse
from cachd.metrics import Metrics
from cachd.model import ModelSpec, Snapshot
from cachd.store.rollbacks import Rollbacks
from cachd.store.scrub_log import ScrubLog
from cachd.store.withdrawals import Withdrawals
from cachd.transfer.pulls import Pulls
from cachd.upkeep.repairs import Repairs
from tests.conftest import PATIENCE_SECONDS, Engine, spec_of
from tests.ground.models import noise
from tests.ground.origin import ChangeETag, Origin
from tests.ground.pause import paused_before

CONTENT = noise(3 << 10)


def repairs_of(on: Engine, clock: Callable[[], float] = lambda: 0.0) -> Repairs:
    log = ScrubLog(on.store.layout.scrub_log)
    return Repairs(on.store, on.pulls, log, Metrics(), clock=clock, chance=lambda: 0.5)


def quarantined(on: Engine, ref: str) -> ModelSpec:
    """The spec of a model whose file was found damaged, and whose repair nobody has started yet."""
    snapshot = on.pull(ref, name="m")
    (file,) = on.store.manifests.of(snapshot).files
    blob = on.store.layout.blob(file.blob)
    blob.chmod(0o644)
    blob.write_bytes(bytes(file.size))
    assert on.store.quarantine(file, "it is damaged", on.store.content.inode(file.blob), now=5.0) == ["m"]
    return spec_of(ref, name="m")


def assert_gone(on: Engine) -> None:
    assert on.pulls.running() == []
    assert on.pulls.get("m") is None
    assert not on.store.names.has("m")
    assert list(on.store.layout.pending.iterdir()) == []


def test_a_damaged_blob_no_longer_counts_as_verified(engine: Callable[..., Engine], origin: Origin) -> None:
    on = engine()
    snapshot = on.pull(origin.add("/model.bin", CONTENT), name="m")
    (file,) = on.store.manifests.of(snapshot).files
    log = ScrubLog(on.store.layout.scrub_log)
    log.verified(file.blob)
    repairs = Repairs(on.store, on.pulls, log, Metrics())
    assert repairs.repair_blob(file, "it is damaged", on.store.content.inode(file.blob))
    assert log.times() == []
    repair = on.pulls.get("m")
    assert repair is not None
    repair.done.result(PATIENCE_SECONDS)


def test_a_delete_ends_the_repair_that_began_before_it(engine: Callable[..., Engine], origin: Origin) -> None:
    on = engine()
    ref = origin.add("/model.bin", CONTENT)
    quarantined(on, ref)
    hold = origin.hold("/model.bin", after=0)
    repairs_of(on).retry()
    assert hold.reached.wait(PATIENCE_SECONDS)
    repair = on.pulls.awaited("m")
    assert repair is not None
    on.pulls.delete("m")
    hold.release()
    assert repair.is_cancelled
    assert_gone(on)


def test_a_repair_that_is_due_does_not_begin_while_its_model_is_deleted(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    quarantined(on, origin.add("/model.bin", CONTENT))
    repairs = repairs_of(on)
    with paused_before(Withdrawals.withdraw, lambda: on.pulls.delete("m"), within=Pulls.delete) as deleting:
        repairs.retry()
    deleting.result(PATIENCE_SECONDS)
    assert_gone(on)


def test_a_repair_that_was_about_to_begin_does_not_bring_back_a_deleted_model(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    quarantined(on, origin.add("/model.bin", CONTENT))
    repairs = repairs_of(on)
    with paused_before(Pulls.start_by_itself, repairs.retry) as retrying:
        on.pulls.delete("m")
    retrying.result(PATIENCE_SECONDS)
    assert_gone(on)


def test_a_delete_that_is_refused_leaves_the_repair_due(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    quarantined(on, origin.add("/model.bin", CONTENT))
    on.store.pins.add("m")
    with pytest.raises(InUse, match="pinned"):
        on.pulls.delete("m")
    repairs_of(on).retry()
    repair = on.pulls.get("m")
    assert repair is not None
    repair.done.result(PATIENCE_SECONDS)
    assert on.store.names.get("m") is not None


def rolled(on: Engine, origin: Origin) -> Snapshot:
    """A quarantined model with a good snapshot to go back to, which is returned."""
    before = on.pull(origin.add("/model.bin", noise(2 << 10, 7)), name="m")
    spec = spec_of(origin.add("/model.bin", CONTENT), name="m")
    on.begin(spec, refresh=True).done.result(PATIENCE_SECONDS)
    quarantined(on, str(spec.ref))
    return before


def test_a_repair_that_is_due_does_not_undo_a_rollback(engine: Callable[..., Engine], origin: Origin) -> None:
    on = engine(keep_previous=1)
    before = rolled(on, origin)
    repairs = repairs_of(on)
    with paused_before(Rollbacks.rollback, lambda: on.pulls.rollback("m"), within=Pulls.rollback) as rolling:
        repairs.retry()
    rolling.result(PATIENCE_SECONDS)
    assert on.pulls.running() == []
    ready = on.store.names.get("m")
    assert ready is not None
    assert ready.manifest == before.manifest


# --- what a repair brings back ---


def directory(on: Engine, origin: Origin, files: dict[str, bytes]) -> Snapshot:
    """A model `m` of a directory with checksums."""
    return on.pull(origin.add_model("shelf", files), name="m")


def damage(on: Engine, path: str) -> None:
    snapshot = on.store.names.ready("m")
    file = next(f for f in on.store.manifests.of(snapshot).files if f.path == path)
    blob = on.store.layout.blob(file.blob)
    blob.chmod(0o644)
    blob.write_bytes(bytes(file.size))
    on.store.quarantine(file, "it is damaged", on.store.content.inode(file.blob), now=5.0)


def repaired(on: Engine) -> Snapshot:
    repairs_of(on).retry()
    repair = on.pulls.get("m")
    assert repair is not None
    return repair.done.result(PATIENCE_SECONDS)


def test_a_repair_puts_back_the_same_revision_while_the_source_has_its_bytes(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    """The source has a newer revision of another file, and serves the damaged one from another machine."""
    on = engine()
    before = directory(on, origin, {"a.bin": CONTENT, "b.bin": noise(2 << 10, 1)})
    directory_now = {"a.bin": CONTENT, "b.bin": noise(2 << 10, 2)}
    origin.add_model("shelf", directory_now)
    origin.fault("/shelf/a.bin", ChangeETag("another-machine"), methods=("GET", "HEAD"), times=None)
    damage(on, "a.bin")
    after = repaired(on)
    assert (after.revision, after.manifest) == (before.revision, before.manifest)
    assert (on.store.layout.model("m") / "a.bin").read_bytes() == CONTENT


def test_a_repair_follows_a_file_that_only_has_another_etag(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    ref = f"{origin.add('/model.bin', CONTENT)}#sha256={hashlib.sha256(CONTENT).hexdigest()}"
    before = on.pull(ref, name="m")
    on.store.pins.add("m")
    origin.fault("/model.bin", ChangeETag("another-machine"), methods=("GET", "HEAD"), times=None)
    damage(on, "model.bin")
    after = repaired(on)
    assert (after.revision, after.manifest) == (before.revision, before.manifest)


def test_a_repair_that_must_take_a_new_revision_says_both(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    before = directory(on, origin, {"a.bin": CONTENT})
    origin.add_model("shelf", {"a.bin": noise(3 << 10, 9)})
    damage(on, "a.bin")
    with structlog.testing.capture_logs() as logs:
        after = repaired(on)
    (said,) = (each for each in logs if each["event"] == "repaired")
    assert before.revision != after.revision
    assert (said["before"], said["revision"]) == (before.revision, after.revision)


def test_a_repair_moves_no_pinned_model_to_a_new_revision(
    engine: Callable[..., Engine], origin: Origin
) -> None:
    on = engine()
    before = directory(on, origin, {"a.bin": CONTENT})
    on.store.pins.add("m")
    origin.add_model("shelf", {"a.bin": noise(3 << 10, 9)})
    damage(on, "a.bin")
    with pytest.raises(Changed, match=f"pinned at revision {before.revision}"):
        repaired(on)
    listed = on.pulls.start_by_itself(before.spec, replace=True)  # as the configuration does at a start
    assert listed is not None
    with pytest.raises(Changed):
        listed.done.result(PATIENCE_SECONDS)
    on.store.pins.remove("m")
    assert repaired(on).revision != before.revision


def test_a_repair_from_a_share_takes_files_that_were_copied_anew(
    engine: Callable[..., Engine], tmp_path: Path
) -> None:
    place = tmp_path / "share"
    place.mkdir()
    (place / "a.bin").write_bytes(CONTENT)
    (place / "SHA256SUMS").write_text(f"{hashlib.sha256(CONTENT).hexdigest()}  a.bin\n")
    on = engine(allow=[f"file://{place}/"])
    before = on.pull(f"file://{place}/", name="m")
    on.store.pins.add("m")
    os.utime(place / "a.bin", (1e9, 1e9))
    damage(on, "a.bin")
    after = repaired(on)
    assert (after.revision, after.manifest) == (before.revision, before.manifest)
