"""What every store must do, whatever its file system. Each runs this suite: see test_store_contract.py.

A test class for a store inherits from StoreContract. Its fixture `disk` is an empty directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from cachd.errors import Cancelled, InUse, NotFound, TooBig
from cachd.model import File, Manifest, ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.store.permit import Permit
from cachd.store.scrub import Replaced
from cachd.store.store import Store
from tests.ground.models import noise
from tests.ground.stored import A, B, file_of, keep, manifest_of, publish

Files = dict[str, bytes]
Life = Callable[[], Store]

LARGE = "sub/model.safetensors"
ONE: Files = {"config.json": b"{}", LARGE: noise(300_000, 1), "empty": b""}
TWO: Files = {"config.json": b"{}", LARGE: noise(300_000, 2)}
SPEC = ModelSpec(Ref.parse("hf://org/model"), "m")
KEPT = 1  # previous snapshots


def read(store: Store, name: str = "m") -> Files | None:
    """What a pod reads of a model, the same in both views; None if it is not ready."""
    if not store.layout.ready_file(name).exists():
        assert store.names.get(name) is None
        return None
    snapshot = store.names.ready(name)
    commit = store.layout.hub / snapshot.hub_folder / "snapshots" / snapshot.commit
    found, beside = (_below(view) for view in (store.layout.model(name), commit))
    assert found == beside
    assert _below(store.layout.address(snapshot.address)) == found
    return found


def _below(directory: Path) -> Files:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def large(manifest: Manifest) -> File:
    return next(f for f in manifest.files if f.path == LARGE)


class StoreContract:
    @pytest.fixture
    def life(self, disk: Path) -> Iterator[Life]:
        """Opens the store of one root; another call closes it first, as a restart of the daemon does."""
        root = disk / "root"
        root.mkdir(mode=0o755)
        with ExitStack() as opened:

            def next_life() -> Store:
                opened.close()
                return opened.enter_context(DiskStore(root, keep_previous=KEPT))

            yield next_life

    @pytest.fixture
    def store(self, life: Life) -> Store:
        return life()

    # --- publish ---

    def test_a_published_model_is_there_in_both_views_and_after_a_restart(self, life: Life) -> None:
        snapshot = publish(life(), ONE, name="m")
        for store in (life(), life()):
            assert store.names.all() == [store.names.ready("m")] == [snapshot]
            assert store.manifests.of(snapshot).id == manifest_of(ONE).id
            assert read(store) == ONE

    def test_a_name_leads_to_what_was_published_last(self, life: Life, store: Store) -> None:
        for files, revision in ((ONE, A), (TWO, B), (TWO, B)):
            assert publish(store, files, name="m", revision=revision).revision == revision
            assert read(store) == files
        assert read(life()) == TWO

    def test_a_revoked_permit_publishes_nothing(self, store: Store) -> None:
        permit = Permit()
        permit.revoke()
        keep(store, ONE)
        with pytest.raises(Cancelled):
            store.publish(SPEC, manifest_of(ONE), now=1.0, permit=permit)
        assert read(store) is None

    def test_a_name_of_another_model_is_not_taken_unless_the_permit_replaces_it(self, store: Store) -> None:
        publish(store, ONE, "hf://org/other", "m")
        keep(store, TWO)
        with pytest.raises(InUse):
            store.publish(SPEC, manifest_of(TWO), now=2.0, permit=Permit())
        assert read(store) == ONE
        store.publish(SPEC, manifest_of(TWO), now=2.0, permit=Permit(replace=True))
        assert read(store) == TWO

    # --- rollback ---

    def test_a_rollback_leads_back_and_a_second_one_forth(self, life: Life, store: Store) -> None:
        publish(store, ONE, name="m", revision=A)
        publish(store, TWO, name="m", revision=B)
        for files in (ONE, TWO, ONE):
            store.rollback("m", now=3.0)
            assert read(store) == files
            store = life()
            assert read(store) == files

    def test_without_a_previous_snapshot_nothing_is_rolled_back(self, store: Store) -> None:
        with pytest.raises(NotFound):
            store.rollback("m", now=1.0)
        publish(store, ONE, name="m")
        with pytest.raises(NotFound):
            store.rollback("m", now=1.0)
        assert read(store) == ONE

    # --- withdraw, evict, drop, sweep ---

    @pytest.mark.parametrize("verb", ["withdraw", "evict"])
    def test_a_removed_model_is_gone_for_good_and_its_bytes_are_freed(self, life: Life, verb: str) -> None:
        store = life()
        snapshot = publish(store, ONE, name="m")
        freed = store.withdraw("m") if verb == "withdraw" else store.evict(snapshot.manifest)
        assert freed >= len(ONE[LARGE])
        assert store.names.was_evicted("m") == (verb == "evict")
        for opened in (store, life()):
            assert read(opened) is None
            assert opened.manifests.ids() == []
            assert not opened.content.has(file_of(ONE[LARGE], LARGE))
            with pytest.raises(NotFound):
                opened.withdraw("m")
            with pytest.raises(NotFound):
                opened.evict(snapshot.manifest)

    def test_a_snapshot_stays_until_its_last_name_goes(self, store: Store) -> None:
        for name in ("m", "other"):
            snapshot = publish(store, ONE, name=name)
        assert store.withdraw("m") == 0
        assert read(store, "other") == ONE
        publish(store, ONE, name="m")
        assert store.evict(snapshot.manifest) >= len(ONE[LARGE])
        assert store.names.all() == []

    @pytest.mark.parametrize("by", ["pin", "lease"])
    def test_a_pinned_or_leased_name_stays_unless_forced_even_after_a_restart(
        self, life: Life, by: str
    ) -> None:
        store = life()
        snapshot = publish(store, ONE, name="m")
        if by == "pin":
            store.pins.add("m")
        else:
            store.leases.take("m", "pod", until=time.time() + 600)
        for opened in (store, life()):
            with pytest.raises(InUse):
                opened.withdraw("m")
            with pytest.raises(InUse):
                opened.evict(snapshot.manifest)
            assert read(opened) == ONE
            store = opened
        store.withdraw("m", force=True)
        assert not store.pins.has("m")
        assert store.leases.of("m", time.time()) == []

    def test_what_a_pod_holds_stays_unless_forced(self, store: Store) -> None:
        if not store.reports_open_files:
            pytest.skip("this file system does not report open files")
        snapshot = publish(store, ONE, name="m")
        with store.layout.hold(snapshot.manifest).open("rb"):
            # The kernel counts this process's own descriptor, too.
            with pytest.raises(InUse):
                store.withdraw("m")
            with pytest.raises(InUse):
                store.evict(snapshot.manifest)
            assert read(store) == ONE
            store.withdraw("m", force=True)
        assert read(store) is None

    def test_a_sweep_takes_only_what_no_name_and_no_rollback_needs(self, store: Store) -> None:
        first = publish(store, {"config.json": b"1", LARGE: noise(300_000, 3)}, name="m", revision="c" * 40)
        before = publish(store, ONE, name="m", revision=A)
        named = publish(store, TWO, name="m", revision=B)
        assert [store.drop(each.manifest) for each in (named, before)] == [0, 0]
        assert store.sweep_snapshots(keep=["hf://org/model"]) == 0
        assert store.sweep_snapshots() >= 300_000
        assert set(store.manifests.ids()) == {before.manifest, named.manifest}
        assert store.drop(first.manifest) == 0

    def test_a_refused_snapshot_goes_even_if_it_is_pinned(self, life: Life, store: Store) -> None:
        refused = publish(store, ONE, name="m")
        publish(store, TWO, "hf://org/other", "other")
        store.pins.add("m")
        gone, held = store.withdraw_refused(lambda manifest: manifest.id == refused.manifest)
        assert ([snapshot.name for snapshot, _ in gone], held) == (["m"], set())
        for opened in (store, life()):
            assert (read(opened), read(opened, "other")) == (None, TWO)

    # --- check, quarantine, repair ---

    def test_an_intact_model_passes_its_check_and_an_absent_one_too(self, store: Store) -> None:
        publish(store, ONE, name="m")
        assert (store.check("m", now=1.0), store.check("absent", now=1.0)) == (None, None)
        assert read(store) == ONE

    def test_a_model_that_lost_a_file_is_quarantined_until_it_is_published_again(self, life: Life) -> None:
        store = life()
        snapshot = publish(store, ONE, name="m")
        tree = store.layout.tree(snapshot.manifest)
        tree.chmod(0o755)
        (tree / "config.json").unlink()
        assert "config.json" in (store.check("m", now=5.0) or "")
        for opened in (store, life()):
            assert read(opened) is None
            quarantine = opened.names.quarantine_of("m")
            assert quarantine is not None
            assert quarantine.since == 5.0
            store = opened
        manifest = store.to_repair(SPEC)
        assert manifest is not None
        store.publish(SPEC, manifest, now=9.0)
        assert read(store) == ONE
        assert (store.to_repair(SPEC), store.names.quarantined()) == (None, [])

    def test_a_damaged_blob_quarantines_every_name_that_uses_it_and_no_other(self, store: Store) -> None:
        for name in ("m", "too"):
            publish(store, ONE, name=name)
        publish(store, TWO, "hf://org/other", "other")
        file = large(manifest_of(ONE))
        inode = store.content.inode(file.blob)
        assert sorted(store.quarantine(file, "it hashes to another", inode, now=5.0)) == ["m", "too"]
        assert (read(store), read(store, "too"), read(store, "other")) == (None, None, TWO)
        assert [f.path for f in store.content.missing(manifest_of(ONE))] == [LARGE]
        with pytest.raises(Replaced):
            store.quarantine(file, "it hashes to another", inode, now=6.0)
        keep(store, ONE)
        for name in ("m", "too"):
            store.publish(ModelSpec(SPEC.ref, name), manifest_of(ONE), now=9.0)
            assert read(store, name) == ONE

    def test_a_quarantined_name_can_be_withdrawn(self, life: Life, store: Store) -> None:
        publish(store, ONE, name="m")
        file = large(manifest_of(ONE))
        store.quarantine(file, "wrong", store.content.inode(file.blob), now=5.0)
        store.withdraw("m")
        for opened in (store, life()):
            assert not opened.names.has("m")
            assert opened.to_repair(SPEC) is None

    # --- space, and what is remembered ---

    def test_a_reservation_keeps_the_blobs_that_are_here(self, store: Store) -> None:
        keep(store, {LARGE: ONE[LARGE]})
        blob = file_of(ONE[LARGE], LARGE).blob
        with store.reserve(manifest_of(ONE)):
            assert store.content.removal.drop(blob) == 0
        assert store.content.removal.drop(blob) >= len(ONE[LARGE])

    def test_a_model_larger_than_the_disk_gets_no_reservation(self, store: Store) -> None:
        size = 2 * store.space.capacity().total
        too_big = Manifest("hf://org/model", A, (replace(file_of(b"", "model.bin"), size=size),))
        assert store.need(too_big) > size
        with pytest.raises(TooBig), store.reserve(too_big):
            pass

    def test_only_missing_blobs_need_space(self, store: Store) -> None:
        assert store.need(manifest_of(ONE)) >= len(ONE[LARGE])
        keep(store, ONE)
        assert store.need(manifest_of(ONE)) < len(ONE[LARGE])

    def test_pulls_are_remembered_until_they_are_forgotten(self, life: Life) -> None:
        life().pending.remember(SPEC, pins=True)
        (found,) = life().pending.all()
        assert (found.spec, found.pins, found.began) == (SPEC, True, 0)
        life().pending.forget("m")
        assert life().pending.all() == []

    def test_every_recorded_blob_is_watched(self, store: Store) -> None:
        publish(store, ONE, name="m")
        assert set(store.watch_all()) == {f.blob for f in manifest_of(ONE).files}

    def test_nobody_else_opens_the_root(self, store: Store) -> None:
        with pytest.raises(InUse):
            DiskStore(store.layout.root)
