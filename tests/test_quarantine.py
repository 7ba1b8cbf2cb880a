"""A process is killed after any step on disk of a quarantine, a repair, a rollback or an eviction."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import NoSpace, NotFound
from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.store.history import Rollback
from cachd.store.views import HubView
from tests.ground.disks import fill, take_inodes
from tests.ground.kill import base_as_another_user, killed_at_every_step
from tests.ground.models import noise
from tests.ground.stored import (
    A,
    B,
    assert_only,
    assert_whole,
    blobs_of,
    file_of,
    give_back,
    hexes,
    keep,
    manifest_of,
    publish,
    refs_of,
)

KIB, MIB = 1 << 10, 1 << 20
FILES = {"config.json": b"{}", "dir/model.bin": noise(3 * KIB)}
WRONG = file_of(FILES["dir/model.bin"], "dir/model.bin")
SPEC = ModelSpec(Ref.parse("hf://org/model"), "m")


def spoil(root: Path) -> None:
    """Flip one bit of a published file, as a failing disk does."""
    blob = next((root / ".cachd/blobs").glob(f"*/{WRONG.blob.hex}"))
    blob.chmod(0o644)
    content = FILES["dir/model.bin"]
    with blob.open("r+b") as opened:
        opened.write(bytes([content[0] ^ 4]) + content[1:])
    blob.chmod(0o444)


def find(store: DiskStore) -> list[str]:
    """Report the damage as a scrub does. Returns the names that are quarantined."""
    inode = store.content.inode(WRONG.blob)
    return store.quarantine(WRONG, "it hashes to another", inode, now=5.0)


def repair(store: DiskStore, *, now: float = 9.0) -> None:
    """Publish the model as the pull of a repair does, once the bytes are here."""
    manifest = store.to_repair(SPEC)
    assert manifest is not None
    keep(store, FILES)
    store.publish(SPEC, manifest, now=now)


def quarantine_file(root: Path) -> Path:
    return root / ".cachd/quarantined/m.json"


def good_blob(root: Path) -> int:
    """The inode of the file's blob when that has the right bytes; else 0."""
    found = list((root / ".cachd/blobs").glob(f"*/{WRONG.blob.hex}"))
    is_good = found and hashlib.sha256(found[0].read_bytes()).hexdigest() == WRONG.blob.hex
    return found[0].stat().st_ino if is_good else 0


def assert_repaired(root: Path) -> None:
    assert_whole(root, "m", FILES, commit=A)
    assert not quarantine_file(root).exists()
    assert list((root / ".cachd/quarantined").iterdir()) == []


def test_a_process_killed_at_any_step_of_a_quarantine_leaves_a_model_that_the_next_life_repairs() -> None:
    """The quarantine is on disk before the ready file goes, so no restart forgets the repair. A quarantine on
    disk counts even while the ready file is still there."""
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, FILES, name="m")
        spoil(base)

        def found(root: Path) -> None:
            with DiskStore(root) as store:
                assert find(store) == ["m"]

        for root in killed_at_every_step(base, found):
            is_recorded, is_ready = quarantine_file(root).exists(), (root / "ready/m.json").exists()
            assert is_recorded or is_ready, (
                "the ready file is gone, and no quarantine says that a repair is due"
            )
            with DiskStore(root) as store:
                if not is_recorded:
                    assert store.names.get("m") is not None
                    assert find(store) == ["m"]
                assert store.names.get("m") is None
                assert not (root / "ready/m.json").exists()
                assert not (root / "models/m").is_symlink()
                assert refs_of(root) == {}, "no branch leads to a quarantined snapshot"
                found_now = store.names.quarantine_of("m")
                assert found_now is not None
                assert found_now.since == 5.0
                missing = store.content.missing(manifest_of(FILES))
                assert [f.path for f in missing] == ["dir/model.bin"], "the bad blob counts as good"
                repair(store)
                assert_repaired(root)


def test_a_process_killed_at_any_step_of_a_repair_leaves_it_due_or_done_and_no_good_blob_is_lost() -> None:
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, FILES, name="m")
        spoil(base)
        with DiskStore(base) as store:
            find(store)

        def repaired(root: Path) -> None:
            with DiskStore(root) as store:
                repair(store)

        ends = set()
        for root in killed_at_every_step(base, repaired):
            good, is_ready = good_blob(root), (root / "ready/m.json").exists()
            with DiskStore(root) as store:
                assert good_blob(root) == good, "the repaired blob was taken for the damaged one"
                ends.add((bool(good), is_ready))
                assert bool(store.names.get("m")) == is_ready
                if not is_ready:
                    assert store.names.quarantine_of("m") is not None
                    repair(store)
                assert_repaired(root)
        assert ends == {(False, False), (True, False), (True, True)}, "every state was seen"


def test_a_repair_that_ends_at_the_very_moment_of_the_publish_before_it_is_made_once_more(root: Path) -> None:
    """The clock stands still, so cachd cannot tell the repaired snapshot from the damaged one."""
    with DiskStore(root) as store:
        snapshot = publish(store, FILES, name="m", now=1.0)
        find(store)
        left = quarantine_file(root).read_bytes()
        repair(store, now=snapshot.published_at)
        assert_repaired(root)
    quarantine_file(root).write_bytes(left)  # as if killed before it was removed
    with DiskStore(root) as store:
        assert store.names.get("m") is None
        assert store.names.quarantine_of("m") is not None
        repair(store)
        assert_repaired(root)


OLD = {"config.json": b"{}", "model.bin": noise(KIB, 1)}
NEW = {"config.json": b"{}", "model.bin": noise(KIB, 2)}
BOTH = {A: OLD, B: NEW}
OTHER = {A: B, B: A}


def two_revisions(root: Path) -> None:
    """Let m lead to B, and to A before."""
    with DiskStore(root, keep_previous=1) as store:
        publish(store, OLD, "hf://org/model@v1", "m", revision=A, now=1.0)
        publish(store, NEW, "hf://org/model@v2", "m", revision=B, now=2.0)


def roll_back(root: Path) -> None:
    with DiskStore(root, keep_previous=1) as store:
        assert store.rollback("m", now=3.0).revision == A


def assert_way_back(root: Path) -> str:
    """Open a root that a killed rollback left: m leads to one revision, and back to the other. Returns it."""
    with DiskStore(root, keep_previous=1) as store:
        shown = store.names.get("m")
        assert shown is not None, "the name is lost"
        store.sweep_snapshots()
        assert blobs_of(root) == hexes(OLD, NEW)
        assert_whole(root, "m", BOTH[shown.revision], commit=shown.revision)
        back = OTHER[shown.revision]
        assert [s.revision for s in store.history.of("m")] == [back], "the way back is lost"
        assert (shown.revision == A) == (store.history.rolled_back_from("m") is not None)
        assert list((root / ".cachd/rollbacks").glob("[!.]*")) == []
        assert store.rollback("m", now=4.0).revision == back
        assert_whole(root, "m", BOTH[back], commit=back)
    return shown.revision


def test_a_process_killed_at_any_step_of_a_rollback_loses_neither_the_name_nor_the_way_back() -> None:
    with base_as_another_user() as base:
        two_revisions(base)
        assert {assert_way_back(root) for root in killed_at_every_step(base, roll_back)} == {A, B}


def test_a_process_killed_while_it_completes_a_rollback_completes_it_in_the_next_life() -> None:
    with base_as_another_user() as base:
        two_revisions(base)
        cut = [r for r in killed_at_every_step(base, roll_back) if not (r / "ready/m.json").exists()]
        assert cut, "it was killed between the old ready file and the new one"
        for root in killed_at_every_step(cut[0], lambda root: DiskStore(root, keep_previous=1).close()):
            assert assert_way_back(root) == A


def test_a_rollback_that_fails_leaves_the_name_and_the_way_back(small_disk: Callable[..., Path]) -> None:
    """Out of inodes at the first step that needs one, the second, the third... until it has enough."""
    disk = small_disk(16 * MIB, inodes=400)
    root = disk / "root"
    root.mkdir()
    two_revisions(root)
    with DiskStore(root, keep_previous=1) as store:
        for leave in itertools.count():
            fillers = take_inodes(disk, leave=leave)
            try:
                store.rollback("m", now=3.0)
            except NoSpace:
                give_back(fillers)
            else:
                give_back(fillers)
                break
            assert [s.revision for s in (store.names.ready("m"), *store.history.of("m"))] == [B, A]
            assert list((root / ".cachd/rollbacks").glob("[!.]*")) == []
    assert leave > 3
    assert assert_way_back(root) == A


@pytest.mark.parametrize("by", ["the next start", "another rollback"])
def test_a_rollback_that_a_full_disk_stops_at_start_is_completed_later(
    small_disk: Callable[..., Path], by: str
) -> None:
    disk = small_disk(16 * MIB, inodes=400)
    root = disk / "root"
    root.mkdir()
    two_revisions(root)
    with DiskStore(root, keep_previous=1) as store, store.names.changing():  # as if killed after the history
        ready, (before,) = store.names.ready("m"), store.history.of("m")
        store.history.begin_rollback(Rollback(before, ready, ready.spec, 3.0))
        store.history.replace(ready, before, rolled_back_from=ready.spec)
    fillers = take_inodes(disk, leave=1)
    with DiskStore(root, keep_previous=1) as store:
        assert store.names.ready("m").revision == B
        store.sweep_snapshots()
        with pytest.raises(NoSpace):
            store.rollback("m", now=4.0)
        give_back(fillers)
        if by == "another rollback":
            assert store.rollback("m", now=4.0).revision == A
    assert assert_way_back(root) == A


def test_whatever_is_published_or_removed_after_a_rollback_that_was_cut_off_is_not_undone(root: Path) -> None:
    two_revisions(root)
    record = root / ".cachd/rollbacks/m.json"
    for after in (lambda store: publish(store, NEW, "hf://org/model@v2", "m", revision=B), withdrawn):
        with DiskStore(root, keep_previous=1) as store:
            left = Rollback(store.history.of("m")[0], None, store.names.ready("m").spec, 3.0)
            with store.names.changing():
                store.history.begin_rollback(left)
            after(store)
            assert not record.exists()


def withdrawn(store: DiskStore) -> None:
    store.withdraw("m")


def test_a_publish_after_a_rollback_that_failed_half_way_is_undone_by_no_start() -> None:
    newest, commit = {"config.json": b"{}", "model.bin": noise(KIB, 3)}, "c" * 40
    with base_as_another_user() as base:
        two_revisions(base)
        with DiskStore(base, keep_previous=1) as store:
            keep(store, newest)

        def published(root: Path) -> None:
            with DiskStore(root, keep_previous=1) as store:
                ready, (before,) = store.names.ready("m"), store.history.of("m")
                with store.names.changing():
                    store.history.begin_rollback(Rollback(before, ready, ready.spec, 3.0))
                publish(store, newest, "hf://org/model@v3", "m", revision=commit, now=4.0)

        seen = 0
        for root in killed_at_every_step(base, published):
            ready = root / "ready/m.json"
            if ready.exists() and json.loads(ready.read_bytes())["revision"] == commit:
                with DiskStore(root, keep_previous=1):
                    assert_whole(root, "m", newest, commit=commit)
                seen += 1
        assert seen > 1, "it was killed after the ready file"


def test_a_process_killed_at_any_step_of_an_eviction_leaves_a_model_whole_or_gone() -> None:
    gone = {"config.json": b"{}", "dir/model.bin": noise(KIB, 1)}
    left = {"config.json": b"{}", "dir/model.bin": noise(KIB, 2)}
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            manifest = publish(store, gone, "hf://org/model", "gone", revision=A).manifest
            kept = publish(store, left, "hf://org/model@v1", "left", revision=B)

        def evicted(root: Path) -> None:
            with DiskStore(root) as store:
                assert store.evict(manifest) > 0

        for root in killed_at_every_step(base, evicted):
            assert_whole(root, "left", left, commit=B)
            is_ready = (root / "ready/gone.json").exists()
            if is_ready:
                assert_whole(root, "gone", gone, commit=A)
            with DiskStore(root) as store:
                assert bool(store.names.get("gone")) == is_ready
                if is_ready:
                    store.evict(manifest)
                store.sweep_snapshots()
                assert_only(root, {"left": kept}, left)
                assert_whole(root, "left", left, commit=B)
                with pytest.raises(NotFound):
                    store.evict(manifest)


# --- a full disk ---


def test_a_branch_that_cannot_be_moved_is_taken_away_rather_than_left_at_what_goes(
    small_disk: Callable[..., Path],
) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        older = publish(store, {"config.json": b"older"}, name="older", revision=A, now=1.0)
        publish(store, {"config.json": b"newer"}, name="newer", revision=B, now=2.0)
        assert refs_of(root) == {"main": B}
        filler = fill(root)
        with pytest.raises(OSError, match="No space left"):
            HubView(store.layout, store.content, store.copies).point(older.hub_folder, {"main": A})
        assert refs_of(root) == {}, "no branch is better than one that names a commit that may go"
        filler.unlink()
        store.withdraw("newer")
    with DiskStore(root):
        assert refs_of(root) == {"main": A}


def test_a_quarantine_that_finds_no_room_takes_readiness_all_the_same(
    small_disk: Callable[..., Path],
) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, FILES, name="m")
        spoil(root)
        filler = fill(root)
        assert find(store) == ["m"]
        assert not (root / "ready/m.json").exists()
        assert store.names.get("m") is None
        filler.unlink()
        repair(store)
        assert_repaired(root)
        assert json.loads((root / "ready/m.json").read_bytes())["name"] == "m"
