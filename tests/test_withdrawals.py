"""What a withdrawal and a sweep remove, and what they never do."""

from __future__ import annotations

import errno
import fcntl
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cachd.errors import (
    InUse,
    NotFound,
)
from cachd.kernel import durable
from cachd.kernel.leases import is_open
from cachd.model import ModelSpec, Ref, Snapshot
from cachd.store.disk_store import DiskStore
from cachd.store.protection import UseRules
from cachd.store.withdrawals import Withdrawals
from tests.ground.kill import base_as_another_user, killed_at_every_step
from tests.ground.models import digests, noise
from tests.ground.pause import paused_before
from tests.ground.site import mapped, until
from tests.ground.stored import (
    CONTENT,
    FILE,
    KIB,
    ONE,
    PARTS,
    SMALL,
    TWO,
    A,
    B,
    assert_nothing_left,
    assert_only,
    assert_whole,
    blobs_of,
    hexes,
    hub,
    keep,
    left_by_an_earlier_life,
    manifest_of,
    names_below,
    publish,
    sha256,
    shown,
    swept_bytes,
)
from tests.ground.synced import synced

# --- other users, small disks, other processes ---


def leases_work() -> bool:
    """Whether the kernel lends files of the directory for temporary files (man 2 fcntl, "Leases")."""
    with tempfile.NamedTemporaryFile() as opened, open(opened.name, "rb") as again:
        try:
            fcntl.fcntl(again, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            return error.errno == errno.EAGAIN
    return True


needs_leases = pytest.mark.skipif(not leases_work(), reason="this file system has no leases (F_SETLEASE)")


# --- withdraw ---


def test_a_withdrawn_model_leaves_nothing(store: DiskStore, root: Path) -> None:
    snapshot = publish(store, ONE)
    on_disk = store.space.capacity().usage.blobs
    assert snapshot.size < on_disk
    assert store.withdraw("org--model") == on_disk
    assert store.names.get("org--model") is None
    assert_nothing_left(root)
    with pytest.raises(NotFound):
        store.manifests.of(snapshot)


def test_a_name_nobody_has_is_not_found(store: DiskStore) -> None:
    with pytest.raises(NotFound) as refusal:
        store.withdraw("nobody")
    assert refusal.value.code == "no_such_model"


def test_a_pinned_model_is_not_withdrawn_until_unpinned_or_forced(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, SMALL)
    store.pins.add("org--model")
    store = next_life()
    with pytest.raises(InUse) as refusal:
        store.withdraw("org--model")
    assert refusal.value.code == "pinned"
    assert_whole(root, "org--model", SMALL, commit=A)
    store.pins.remove("org--model")
    store.pins.remove("org--model")
    store.withdraw("org--model")
    publish(store, SMALL)
    store.pins.add("org--model")
    store.withdraw("org--model", force=True)
    assert_nothing_left(root)


@needs_leases
def test_an_open_file_is_in_use_under_every_name_and_an_unopened_one_is_not(
    store: DiskStore, root: Path
) -> None:
    snapshot = publish(store, ONE)
    blob = store.content.path(sha256(ONE["model.safetensors"]))
    for view in (root / "models/org--model", hub(root) / "snapshots" / A):
        with (view / "model.safetensors").open("rb"):
            assert is_open([blob])
            assert store.protection.is_in_use(store.manifests.of(snapshot))
        assert not store.protection.is_in_use(store.manifests.of(snapshot))
    assert not is_open([blob.with_name("absent")])


@needs_leases
def test_a_model_that_another_process_has_mapped_is_withdrawn_by_force_alone(
    store: DiskStore, root: Path
) -> None:
    publish(store, ONE)
    with mapped(root / "models/org--model/model.safetensors") as reader:
        with pytest.raises(InUse) as refusal:
            store.withdraw("org--model")
        assert refusal.value.code == "in_use"
        assert_whole(root, "org--model", ONE, commit=A)
        assert store.withdraw("org--model", force=True) < len(ONE["model.safetensors"])
        assert store.space.capacity().usage.held == len(ONE["model.safetensors"]), "still taken"
        assert blobs_of(root) == set()
        seen, _ = reader.communicate(timeout=30)
        assert seen.strip() == sha256(ONE["model.safetensors"]).hex
    until(lambda: is_emptied(store))  # a child of another test may have been forked with the file open
    assert_nothing_left(root)


def is_emptied(store: DiskStore) -> bool:
    store.content.trash.empty_all()
    return store.space.capacity().usage.total == 0


@needs_leases
def test_one_of_two_names_may_go_while_the_model_is_read(store: DiskStore, root: Path) -> None:
    publish(store, ONE, name="one")
    publish(store, ONE, name="other")
    with (root / "models/one/model.safetensors").open("rb"):
        store.withdraw("one")
        with pytest.raises(InUse):
            store.withdraw("other")
    assert_whole(root, "other", ONE, commit=A)


@needs_leases
def test_a_replaced_snapshot_that_is_read_is_swept_when_its_reader_is_gone(
    store: DiskStore, root: Path
) -> None:
    publish(store, ONE, revision=A)
    with mapped(root / "models/org--model/model.safetensors") as reader:
        publish(store, TWO, revision=B)
        assert store.sweep_snapshots() == 0
        assert digests(hub(root) / "snapshots" / A) == shown(ONE)
        reader.communicate(timeout=30)
    assert store.sweep_snapshots() == swept_bytes(ONE, TWO)
    assert names_below(hub(root) / "snapshots") == {B}


@needs_leases
def test_refused_snapshots_lose_their_names_at_once_and_their_files_when_nobody_reads_them(
    root: Path,
) -> None:
    with DiskStore(root, keep_previous=1) as store:
        old = publish(store, ONE, revision=A)
        new = publish(store, TWO, revision=B)
        same = publish(store, TWO, name="same", revision=B)
        other = publish(store, SMALL, "hf://org/other")
        store.pins.add("org--model")
        refused = {old.manifest, new.manifest}

        def withdrawn(among: set[str] | None = None) -> tuple[list[str], set[str]]:
            found, held = store.withdraw_refused(lambda m: m.id in refused, among=among)
            assert all(manifest.id == snapshot.manifest for snapshot, manifest in found)
            return [snapshot.name for snapshot, _ in found], held

        assert withdrawn({other.manifest}) == ([], set())
        with store.layout.hold(new.manifest).open("rb"):
            names, held = withdrawn()
            assert (sorted(names), held) == (["org--model", "same"], {new.manifest})
            assert (store.history.of("org--model"), store.pins.has("org--model")) == ([], False)
            assert not store.layout.address(same.address).is_symlink()
            assert digests(store.layout.tree(new.manifest)) == shown(TWO)
            assert not store.layout.tree(old.manifest).exists()
            assert withdrawn(held) == ([], {new.manifest})
        assert withdrawn(held) == ([], set())
        assert blobs_of(root) == hexes(SMALL)
        assert names_below(root / ".cachd/trash") == set()
        assert [each.name for each in store.names.all()] == [other.name]


@needs_leases
def test_a_withdrawal_that_is_refused_puts_the_ready_files_back_durably(store: DiskStore, root: Path) -> None:
    snapshot = publish(store, SMALL)
    ready = store.layout.ready_file(snapshot.name)
    before = ready.read_bytes()
    ways: list[Callable[[], int]] = [
        lambda: store.withdraw(snapshot.name),
        lambda: store.evict(snapshot.manifest),
    ]
    store.protection.rules = UseRules(keep_opened_seconds=0.0)
    for way in ways:
        with synced() as paths:
            with paused_before(durable.sync_directory, way, within=Withdrawals._remove_names) as going:
                held = store.layout.hold(snapshot.manifest).open("rb")
            with held, pytest.raises(InUse):
                going.result(60)
        assert paths.count(str(store.layout.ready)) == 2, "once it was hidden, and once it was put back"
        assert (ready.read_bytes(), names_below(root / ".cachd/staging")) == (before, set())
        assert_whole(root, snapshot.name, SMALL, commit=A)


def test_a_model_that_is_gone_is_watched_no_more_and_one_that_was_evicted_is_known_as_such(
    store: DiskStore,
) -> None:
    store.watch_all()
    empty = store.watch.watched().directories
    ways: list[Callable[[Snapshot], int]] = [
        lambda snapshot: store.withdraw(snapshot.name),
        lambda snapshot: store.evict(snapshot.manifest),
    ]
    for go in ways:
        snapshot = publish(store, SMALL)
        assert store.watch.watched().directories > empty
        assert go(snapshot) > 0
        assert store.watch.watched().directories <= empty + 1, "the directory of blobs stays"
    assert store.names.was_evicted(snapshot.name)
    with pytest.raises(NotFound) as refused:
        store.evict(snapshot.manifest)
    assert refused.value.code == "no_such_snapshot"


def test_what_a_pull_is_about_to_publish_is_not_swept(store: DiskStore, root: Path) -> None:
    publish(store, ONE, revision=A)
    publish(store, TWO, revision=B)
    assert store.sweep_snapshots(keep={"hf://org/model"}) == 0
    assert names_below(hub(root) / "snapshots") == {A, B}
    assert store.sweep_snapshots(keep={"hf://org/other"}) > 0


def test_a_blob_that_a_running_pull_needs_is_not_freed(store: DiskStore) -> None:
    publish(store, ONE, "hf://org/one")
    with store.content.claim(manifest_of(TWO)):
        store.withdraw("org--one")
        assert blobs_of(store.layout.root) == hexes(ONE) & hexes(TWO)
    store.content.removal.free(manifest_of(TWO))
    assert blobs_of(store.layout.root) == set()


def test_what_an_interrupted_pull_left_is_freed_with_its_manifest(store: DiskStore, root: Path) -> None:
    left_by_an_earlier_life(store, PARTS[0])
    assert store.content.removal.free(manifest_of({"model.bin": CONTENT})) >= PARTS[0].size
    assert_nothing_left(root)


def test_what_a_remembered_pull_may_need_is_not_swept(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    store.pending.remember(ModelSpec(Ref.parse("hf://org/model"), "mine"))
    left_by_an_earlier_life(store, PARTS[0])
    keep(store, {"committed.bin": b"by a pull that goes on"})
    store = next_life()
    store.sweep_snapshots(keep={"hf://org/model"})
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.resumed == PARTS[0].size
    assert blobs_of(root) == hexes({"committed.bin": b"by a pull that goes on"})


def test_a_process_killed_at_any_step_of_a_withdrawal_leaves_what_a_sweep_ends() -> None:
    gone = {"config.json": b"{}", "dir/model.bin": noise(KIB, 1)}
    left = {"config.json": b"{}", "dir/model.bin": noise(KIB, 2)}
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, gone, "hf://org/model", "gone", revision=A)
            kept = publish(store, left, "hf://org/model@v1", "left", revision=B)

        def withdrawn(root: Path) -> None:
            with DiskStore(root) as store:
                store.withdraw("gone")

        for root in killed_at_every_step(base, withdrawn):
            assert_whole(root, "left", left, commit=B)
            if (root / "ready/gone.json").exists():
                assert_whole(root, "gone", gone, commit=A)
            with DiskStore(root) as store:
                if store.names.get("gone"):
                    store.withdraw("gone")
                store.sweep_snapshots()
                assert_only(root, {"left": kept}, left)
                assert_whole(root, "left", left, commit=B)


def test_a_process_killed_at_any_step_of_a_recovery_leaves_what_the_next_recovers() -> None:
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, SMALL, name="cut-off")
            kept = publish(store, {"model.bin": b"kept"}, "hf://org/model@v1", "kept", revision=B)
        (base / "ready/cut-off.json").unlink()
        for left in (base / ".cachd/staging/tree/sub", base / ".cachd/trash/tree/sub"):
            left.mkdir(parents=True)
            (left / "file").write_bytes(b"x")

        def recovered(root: Path) -> None:
            with DiskStore(root) as store:
                store.sweep_snapshots()

        for root in killed_at_every_step(base, recovered):
            recovered(root)
            assert_whole(root, "kept", {"model.bin": b"kept"}, commit=B)
            assert_only(root, {"kept": kept}, {"model.bin": b"kept"})
