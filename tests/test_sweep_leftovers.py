"""Which leftovers a root has, how many bytes each would free, and what its removal frees."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import NotFound
from cachd.model import ModelSpec
from cachd.store.disk_store import DiskStore
from cachd.store.sweep import KINDS, Leftover, remove
from tests.ground.models import noise
from tests.ground.stored import (
    CONTENT,
    FILE,
    KIB,
    ONE,
    PARTS,
    TWO,
    A,
    B,
    commit,
    keep,
    left_by_an_earlier_life,
    manifest_of,
    publish,
    swept_bytes,
)

EXTRA = {"x": noise(8 * KIB, 7)}


def found(store: DiskStore, **how: object) -> dict[str, Leftover]:
    leftovers = store.sweep.leftovers(before=math.inf, **how)  # type: ignore[arg-type]
    return {each.kind: each for each in leftovers}


@pytest.fixture
def full(root: Path, next_life: Callable[[], DiskStore]) -> DiskStore:
    """A store with one leftover of each kind, beside a model that is ready."""
    store = next_life()
    publish(store, ONE, revision=A)
    publish(store, TWO, revision=B)
    keep(store, EXTRA)
    left_by_an_earlier_life(store, PARTS[0])
    damaged = manifest_of({"y": b"damaged"}).files[0]
    commit(store, damaged, b"damaged")
    store.content.damaged.keep(damaged.blob, store.content.inode(damaged.blob))
    return store


def test_each_kind_of_leftover_is_found_and_frees_what_it_says(full: DiskStore) -> None:
    leftovers = found(full)
    assert set(leftovers) == set(KINDS)
    assert leftovers["snapshot"].size == swept_bytes(ONE, TWO)
    assert leftovers["blob"].size == 8 * KIB
    assert leftovers["ingest"].name == str(FILE.blob)
    assert leftovers["ingest"].size >= PARTS[0].size
    assert leftovers["damaged"].size > 0
    for each in leftovers.values():
        assert each.changed_at > 0
        assert each.as_document()["kind"] == each.kind
        assert remove(each) > 0
        assert remove(each) == 0
    assert found(full) == {}
    assert full.check("org--model", now=1.0) is None


def test_what_changed_lately_or_belongs_to_a_running_pull_is_left_out(full: DiskStore) -> None:
    assert {each.kind for each in full.sweep.leftovers(before=0.0)} == {"snapshot"}
    assert set(found(full, pulls_known=False)) == {"snapshot"}
    assert set(found(full, keep=["hf://org/model"])) == {"blob", "ingest", "damaged"}
    with full.content.claim(manifest_of({**EXTRA, "y": b"damaged"})):
        assert set(found(full)) == {"snapshot", "ingest"}
    with full.content.claim(manifest_of({"model.bin": CONTENT}), "m"):
        assert "ingest" not in found(full)
    full.content.owners.expect("m")
    assert "ingest" not in found(full), "a pull of the name that owns it may resume it"
    full.content.owners.expect_no_more("m")
    assert "ingest" in found(full)


def test_an_unreadable_manifest_keeps_every_blob(full: DiskStore) -> None:
    (full.layout.manifests / f"{'0' * 32}.json").write_text("{")
    assert set(found(full)) == {"snapshot"}
    assert full.sweep.partial_downloads() == []


def test_names_that_cachd_never_gives_are_no_leftovers(full: DiskStore) -> None:
    for each in found(full).values():
        remove(each)
    for top in (full.layout.blobs / "sha256", full.layout.ingests, full.layout.damaged_blobs):
        for name in ("foreign", "sha256-zz-1", f"sha256-{'0' * 64}-x"):
            (top / name).mkdir()
    assert found(full) == {}
    assert full.sweep.partial_downloads() == []


def test_partial_downloads_are_listed_and_those_of_recorded_files_are_not(full: DiskStore) -> None:
    assert [each.name for each in full.sweep.partial_downloads()] == [str(FILE.blob)]
    full.content.begin(manifest_of(TWO).files[0]).close()
    assert [each.name for each in full.sweep.partial_downloads()] == [str(FILE.blob)]


def test_a_leftover_that_cannot_be_removed_frees_nothing() -> None:
    def fails() -> int:
        raise OSError("no")

    assert remove(Leftover("blob", "x", 1, 0.0, fails)) == 0
    assert remove(Leftover("blob", "x", 1, 0.0, lambda: 7)) == 7


def test_a_snapshot_in_use_or_kept_for_a_rollback_is_needed(root: Path) -> None:
    with DiskStore(root, keep_previous=1) as store:
        old, new = publish(store, ONE, revision=A), publish(store, TWO, revision=B)
        assert found(store) == {}
        assert (store.drop(old.manifest), store.drop(new.manifest)) == (0, 0)
        spec = ModelSpec(new.spec.ref, "other")
        store.publish(spec, manifest_of(TWO, revision=B), now=3.0)
        assert store.withdraw("org--model") == swept_bytes(ONE, TWO), "its history goes with it"
        assert store.manifests.ids() == [new.manifest]


def test_a_leftover_is_as_old_as_its_last_change(full: DiskStore) -> None:
    leftovers = found(full)
    blob = full.content.path(manifest_of(EXTRA).files[0].blob)
    (ingest,) = full.layout.ingests.iterdir()
    (damaged,) = full.layout.damaged_blobs.iterdir()
    assert leftovers["blob"].changed_at == blob.stat().st_ctime
    assert leftovers["damaged"].changed_at == damaged.stat().st_ctime
    places = (ingest, ingest / "data", ingest / "journal")
    assert leftovers["ingest"].changed_at == max(each.stat().st_ctime for each in places if each.exists())
    manifest = full.layout.manifest(leftovers["snapshot"].name)
    assert leftovers["snapshot"].changed_at == manifest.stat().st_ctime
    for kind in ("blob", "ingest", "damaged"):
        at = leftovers[kind].changed_at
        assert kind not in {each.kind for each in full.sweep.leftovers(before=at)}
        assert kind in {each.kind for each in full.sweep.leftovers(before=math.nextafter(at, math.inf))}


def test_partial_downloads_are_listed_the_oldest_first_and_those_without_data_are_the_first_of_all(
    full: DiskStore,
) -> None:
    names = [f"sha256-{digit * 64}-9" for digit in "12"]
    for name in names:
        (full.layout.ingests / name).mkdir()
    for name in reversed(names):
        (full.layout.ingests / name).chmod(0o700)
        (full.layout.ingests / name / "data").touch()
    listed = [each for each in full.sweep.partial_downloads() if each.name != str(FILE.blob)]
    assert {each.name for each in listed} == {f"sha256:{digit * 64}" for digit in "12"}
    assert [each.changed_at for each in listed] == sorted(each.changed_at for each in listed)


def test_what_was_swept_is_logged_and_so_is_what_could_not_be() -> None:
    def fails() -> int:
        raise NotFound("gone")

    removes: dict[str, Callable[[], int]] = {"swept": lambda: 7, "leftover not removed": fails, "": lambda: 0}
    for event, work in removes.items():
        with capture_logs() as logs:
            remove(Leftover("blob", "x", 1, 0.0, work))
        assert [each["event"] for each in logs] == ([event] if event else [])
