"""Rollbacks on a real store, without a daemon: done, refused, and interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed, NotFound
from cachd.store.disk_store import DiskStore
from cachd.store.history import Rollback
from cachd.store.rollbacks import Rollbacks
from tests.ground.stored import SMALL, A, B, assert_whole, names_below, publish, sha256

OLD = {"config.json": b"{}", "model.bin": b"old"}
NEW = {"config.json": b"{}", "model.bin": b"new"}


@pytest.fixture
def keeping(root: Path) -> Iterator[DiskStore]:
    """A store that keeps two previous snapshots, with one: `OLD` was replaced by `NEW`."""
    with DiskStore(root, keep_previous=2) as store:
        publish(store, OLD, "hf://org/model@v1", "m", revision=A, now=1.0)
        publish(store, NEW, "hf://org/model@v2", "m", revision=B, now=2.0)
        yield store


def rollbacks_of(store: DiskStore) -> Rollbacks:
    found: Rollbacks = store.rollback.__self__  # type: ignore[attr-defined]
    return found


def test_a_rollback_moves_the_name_back_and_forth_and_says_from_where(keeping: DiskStore, root: Path) -> None:
    for at, (revision, files, left) in enumerate(((A, OLD, "v2"), (B, NEW, "v1"), (A, OLD, "v2"))):
        with capture_logs() as logs:
            published = keeping.rollback("m", now=3.0 + at)
        assert (published.revision, published.published_at) == (revision, 3.0 + at)
        assert keeping.names.get("m") == published
        assert_whole(root, "m", files, commit=revision)
        (said,) = [each for each in logs if each["event"] == "rolled back"]
        assert (said["revision"], said["rolled_back_from"]) == (revision, f"hf://org/model@{left}")
        assert keeping.history.begun_rollbacks() == []
        assert [each.revision for each in keeping.history.of("m")] == [B if revision == A else A]
    assert keeping.sweep_snapshots() == 0


def test_a_name_without_a_previous_snapshot_is_not_rolled_back(keeping: DiskStore) -> None:
    publish(keeping, SMALL, "hf://org/other", "o")
    for name in ("o", "absent"):
        with pytest.raises(NotFound) as refused:
            keeping.rollback(name, now=3.0)
        assert refused.value.code == "no_previous"
        assert repr(name) in refused.value.detail


@pytest.mark.parametrize("lost", [["config.json"], ["config.json", "model.bin"]])
def test_a_rollback_to_a_snapshot_that_lacks_files_changes_nothing(
    keeping: DiskStore, root: Path, lost: list[str]
) -> None:
    for path in lost:
        keeping.content.path(sha256(OLD[path])).unlink()
    before = keeping.names.get("m"), keeping.history.of("m")
    with pytest.raises(DiskFailed) as refused:
        keeping.rollback("m", now=3.0)
    assert refused.value.code == "previous_incomplete"
    assert f"{len(lost)} file" in refused.value.detail
    assert (keeping.names.get("m"), keeping.history.of("m")) == before
    assert keeping.history.begun_rollbacks() == []


def begun(store: DiskStore) -> Rollback:
    """A rollback as a kill right after its record leaves it."""
    (before,), ready = store.history.of("m"), store.names.ready("m")
    rollback = Rollback(before, ready, ready.spec, 3.0)
    store.history.begin_rollback(rollback)
    return rollback


def test_a_rollback_that_was_interrupted_is_completed_at_the_start(keeping: DiskStore, root: Path) -> None:
    begun(keeping)
    with capture_logs() as logs:
        rollbacks_of(keeping).resume()
    assert_whole(root, "m", OLD, commit=A)
    assert keeping.history.begun_rollbacks() == []
    assert "interrupted rollback ended" in [each["event"] for each in logs]


def test_a_rollback_that_is_done_or_has_lost_its_snapshot_is_only_ended(
    keeping: DiskStore, root: Path
) -> None:
    begun(keeping)
    publish(keeping, OLD, "hf://org/model@v1", "m", revision=A, now=4.0)
    ready = keeping.names.ready("m")
    keeping.history.begin_rollback(Rollback(ready, None, ready.spec, 3.0))
    rollbacks_of(keeping).resume()
    assert keeping.names.ready("m") == ready, "it was not published again"
    keeping.history.begin_rollback(Rollback(keeping.history.of("m")[0], ready, ready.spec, 3.0))
    keeping.layout.manifest(keeping.history.of("m")[0].manifest).unlink()
    rollbacks_of(keeping).resume()
    assert (keeping.names.ready("m"), keeping.history.begun_rollbacks()) == (ready, [])


def test_a_rollback_that_cannot_be_completed_stays_for_a_later_start(keeping: DiskStore) -> None:
    rollback = begun(keeping)
    keeping.content.path(sha256(OLD["model.bin"])).unlink()
    with capture_logs() as logs:
        rollbacks_of(keeping).resume()
    assert [each["event"] for each in logs] == ["rollback not completed"]
    assert keeping.history.begun_rollbacks() == [rollback]
    assert keeping.names.ready("m").revision == B


def test_another_request_completes_the_rollback_that_had_begun(keeping: DiskStore, root: Path) -> None:
    begun(keeping)
    assert keeping.rollback("m", now=9.0).published_at == 3.0
    assert_whole(root, "m", OLD, commit=A)


def test_a_rollback_that_fails_before_the_name_changes_is_undone(keeping: DiskStore, root: Path) -> None:
    before = keeping.names.get("m"), keeping.history.of("m"), keeping.history.rolled_back_from("m")
    (root / ".cachd/staging/m.link").mkdir()
    with pytest.raises(DiskFailed):
        keeping.rollback("m", now=3.0)
    assert (keeping.names.get("m"), keeping.history.of("m"), keeping.history.rolled_back_from("m")) == before
    assert keeping.history.begun_rollbacks() == []
    assert names_below(root / ".cachd/rollbacks") == set()


def test_a_rollback_that_fails_after_the_ready_file_is_gone_is_completed_by_the_next_request(
    keeping: DiskStore, root: Path
) -> None:
    link = root / "models/m"
    link.unlink()
    link.mkdir()
    with pytest.raises(DiskFailed):
        keeping.rollback("m", now=3.0)
    assert keeping.names.get("m") is None
    assert [each.at for each in keeping.history.begun_rollbacks()] == [3.0]
    link.rmdir()
    assert keeping.rollback("m", now=9.0).published_at == 3.0
    assert_whole(root, "m", OLD, commit=A)
    assert keeping.history.begun_rollbacks() == []


def test_a_quarantined_name_is_rolled_back_and_its_damage_is_forgotten(
    keeping: DiskStore, root: Path
) -> None:
    file = next(f for f in keeping.manifests.of(keeping.names.ready("m")).files if f.path == "model.bin")
    assert keeping.quarantine(file, "wrong", keeping.content.inode(file.blob), now=2.5) == ["m"]
    assert keeping.rollback("m", now=3.0).revision == A
    assert_whole(root, "m", OLD, commit=A)
    assert (keeping.names.quarantined(), keeping.history.of("m")) == ([], [])
