"""What a start reads of names, quarantines and manifests, and what it makes of damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed, Leased, NotFound
from cachd.kernel.leases import reports_open_files
from cachd.model import Digest, LeftOut, Manifest, ModelSpec, Ref, Snapshot
from cachd.store import catalog
from cachd.store.catalog import Quarantine
from cachd.store.disk_store import DiskStore
from cachd.store.history import Histories, History, Rollback
from cachd.store.layout import Layout
from tests.attacks.test_leases import leased
from tests.ground.models import noise
from tests.ground.stored import (
    DIGESTS,
    ONE,
    SMALL,
    A,
    B,
    C,
    commit,
    file_of,
    keep,
    manifest_file,
    manifest_of,
    names_below,
    publish,
    sha256,
)

WRONG = {"since": 5.0, "reason": "wrong", "inodes": {f"sha256:{'1' * 64}": 7}}


def changed(path: Path, **members: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


# --- ready files ---


def full() -> Snapshot:
    """A snapshot with a value in every field."""
    spec = ModelSpec(
        Ref.parse("hf://org/model@v1"), "m", ("*.gguf",), ("x",), weights="gguf", copy=("a",), formats="safe"
    )
    return Snapshot(
        spec=spec,
        manifest="1" * 32,
        revision="a" * 40,
        size=5,
        files=2,
        verified=False,
        published_at=1_700_000_000.25,
        repo="org/model",
        commit="a" * 40,
        file="x.gguf",
        address=f"m@{'a' * 40}-{'1' * 8}",
        verified_by=(("sha256", 1), ("none", 1)),
        left_out=LeftOut(3, 4, ("bin",)),
        warnings=("careful",),
        advice="do this",
        renamed_to="org/new",
        is_main=False,
    )


FIELDS = [*Snapshot.__dataclass_fields__]


@pytest.mark.parametrize(
    "change", [{}, {"file": None}, {"left_out": None}, {"renamed_to": None}, {"advice": None}]
)
def test_a_snapshot_is_read_as_it_was_written(change: dict[str, None]) -> None:
    before = replace(full(), **change)  # type: ignore[arg-type]
    after = catalog.snapshot_from(json.loads(json.dumps(catalog.ready_document(before))))
    assert {name: getattr(after, name) for name in FIELDS} == {name: getattr(before, name) for name in FIELDS}


def test_a_commit_that_main_names_is_known_to_be_main() -> None:
    spec = ModelSpec(Ref.parse(f"hf://org/model@{'a' * 40}"), "m")
    for is_main in (True, False):
        snapshot = replace(full(), spec=spec, address=f"m@{'a' * 40}", is_main=is_main)
        document = catalog.ready_document(snapshot)
        assert document["hub"]["refs"] == (["main"] if is_main else [])  # type: ignore[index]
        assert catalog.snapshot_from(document).is_main is is_main


def test_a_ready_file_of_an_older_version_gets_what_it_lacks(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    before = publish(store, ONE)
    path = root / "ready/org--model.json"
    document = json.loads(path.read_text())
    for member in ("verified_by", "left_out", "warnings", "preflight", "advice", "immutable_path"):
        del document[member]
    del document["hub"]["refs"]
    path.write_text(json.dumps(document))
    after = next_life().names.ready("org--model")
    assert after == before
    assert after.verified_by == before.verified_by == (("sha256", len(ONE)),)


def test_a_model_counts_as_ready_for_others_only_if_its_files_are_there(store: DiskStore, root: Path) -> None:
    layout = Layout(root)
    assert catalog.ready_snapshot(layout, "org--model") is None
    snapshot = publish(store, SMALL)
    assert catalog.ready_snapshot(layout, "org--model") == snapshot
    assert catalog.is_ready_file_of(layout.ready_file("org--model"), snapshot)
    assert not catalog.is_ready_file_of(layout.ready_file("org--model"), replace(snapshot, size=9))
    assert not catalog.is_ready_file_of(layout.ready_file("absent"), snapshot)
    tree = layout.tree(snapshot.manifest)
    tree.chmod(0o755)
    (tree / "config.json").unlink()
    (tree / "config.json").write_bytes(SMALL["config.json"] + b" ")
    assert catalog.ready_snapshot(layout, "org--model") is None
    assert layout.ready_file("org--model").exists(), "it only asked"


def test_a_start_removes_the_ready_files_that_promise_what_is_not_there(store: DiskStore, root: Path) -> None:
    layout = Layout(root)
    kept = publish(store, SMALL, name="kept")
    publish(store, {"only": b"1"}, "https://host/only", "only")
    odd: dict[str, Callable[[Path], object]] = {
        "broken": lambda path: path.write_text("{"),
        "moved": lambda path: path.rename(layout.ready_file("other")),
        "linked": lambda _: (layout.model("linked").unlink(), layout.model("linked").symlink_to("kept")),
        "unlinked": lambda _: layout.model("unlinked").unlink(),
        "told": lambda path: changed(path, file="models/told/absent"),
    }
    for number, (name, spoil) in enumerate(odd.items()):
        publish(store, {"x": b"%d" % number}, f"https://host/{name}", name)
        spoil(layout.ready_file(name))
    listless = publish(store, {"y": b"y"}, "https://host/y", "listless")
    changed(layout.manifest(listless.manifest), files=[])
    changed(layout.ready_file("only"), file="models/only/only")
    (layout.ready / ".hidden.json").write_text("mine")
    with capture_logs() as logs:
        found = catalog.read_snapshots(layout)
    assert sorted(found) == ["kept", "only"]
    assert (found["kept"], found["only"].file) == (kept, "only")
    assert names_below(layout.ready) == {"kept.json", "only.json", ".hidden.json"}
    assert {each["file"] for each in logs} == {
        *(f"{name}.json" for name in odd if name != "moved"),
        *("other.json", "listless.json"),
    }


def test_what_another_process_has_leased_is_kept_and_read_later(store: DiskStore, root: Path) -> None:
    layout, snapshot = Layout(root), publish(store, SMALL)
    if not reports_open_files(layout.staging / "probe"):
        pytest.skip("this file system has no leases")
    ready, manifest = layout.ready_file("org--model"), layout.manifest(snapshot.manifest)
    quarantine = Quarantine(snapshot, 5.0, "wrong", {})
    layout.quarantine_file("org--model").write_text(json.dumps(quarantine.as_document()))
    layout.previous_file("m").write_text(json.dumps(History((snapshot,)).as_document()))
    layout.rollback_file("org--model").write_text(
        json.dumps(Rollback(snapshot, None, snapshot.spec, 1.0).as_document())
    )
    reads: dict[Path, Callable[[], object]] = {
        ready: lambda: catalog.read_snapshots(layout),
        layout.quarantine_file("org--model"): lambda: catalog.read_quarantined(layout, {}),
        layout.previous_file("m"): lambda: Histories(layout, 1),
        layout.rollback_file("org--model"): lambda: Histories(layout, 1),
    }
    for path, read in reads.items():
        with leased("write", [path]), pytest.raises(Leased):
            read()
        assert path.exists()
    with leased("write", [ready]):
        assert catalog.ready_snapshot(layout, "org--model") is None
        with pytest.raises(Leased):
            catalog.is_ready_file_of(ready, snapshot)
    with leased("write", [manifest]):
        for ask in (
            lambda: catalog.read_shown(manifest),
            lambda: catalog.read_manifest(layout, snapshot.manifest),
        ):
            with pytest.raises(Leased):
                ask()
    assert catalog.read_snapshots(layout) == {"org--model": snapshot}
    assert Histories(layout, 1).begun_rollback("org--model") is not None


# --- quarantines ---


def test_a_quarantine_survives_a_start_until_the_name_is_published_again(
    store: DiskStore, root: Path
) -> None:
    layout, snapshot = Layout(root), publish(store, SMALL)
    quarantine = Quarantine(snapshot, 5.0, "wrong", {Digest("sha256", "1" * 64): 7})
    path = layout.quarantine_file("org--model")
    for named in ({}, {"org--model": snapshot}):  # a crash may leave the ready file
        path.write_text(json.dumps(quarantine.as_document()))
        assert catalog.read_quarantined(layout, named) == {"org--model": quarantine}
    later = replace(snapshot, published_at=snapshot.published_at + 1)
    assert catalog.read_quarantined(layout, {"org--model": later}) == {}
    assert not path.exists()


@pytest.mark.parametrize(
    "member",
    [
        {"damage": None},
        {"damage": {**WRONG, "since": "x"}},
        {"damage": {**WRONG, "inodes": {"x": 1}}},
        {"damage": {**WRONG, "inodes": []}},
        {"damage": WRONG, "name": "other"},
        {"damage": WRONG, "manifest": "f" * 32},
    ],
)
def test_a_quarantine_that_makes_no_sense_is_removed(
    store: DiskStore, root: Path, member: dict[str, Any]
) -> None:
    layout, snapshot = Layout(root), publish(store, SMALL)
    path = layout.quarantine_file("org--model")
    path.write_text(json.dumps({**catalog.ready_document(snapshot), "damage": WRONG}))
    (layout.quarantined / ".hidden.json").write_text("mine")
    assert list(catalog.read_quarantined(layout, {})) == ["org--model"]
    changed(path, **member)
    assert catalog.read_quarantined(layout, {}) == {}
    assert names_below(layout.quarantined) == {".hidden.json"}


# --- manifests ---


def test_a_manifest_is_read_or_its_absence_and_damage_are_told_apart(store: DiskStore, root: Path) -> None:
    snapshot, manifests = publish(store, SMALL), store.manifests
    assert manifests.of(snapshot) == manifests.read(snapshot.manifest) == manifest_of(SMALL)
    assert (manifests.has(snapshot.manifest), manifests.ids()) == (True, [snapshot.manifest])
    assert manifests.shown_in(snapshot.manifest) == ["models--org--model"]
    assert list(manifests.readable()) == [(snapshot.manifest, manifest_of(SMALL))]
    assert (list(manifests.readable(["x"])), list(manifests.readable([]))) == ([], [])
    (root / ".cachd/manifests/.hidden.json").write_text("{}")
    (root / ".cachd/manifests/other").write_text("{}")
    assert manifests.ids() == [snapshot.manifest]
    manifest_file(root).write_text("{")
    with pytest.raises(DiskFailed) as refusal:
        manifests.of(snapshot)
    assert refusal.value.code == "manifest_unreadable"
    assert (list(manifests.readable()), manifests.shown_in(snapshot.manifest)) == ([], [])
    with pytest.raises(DiskFailed):
        manifests.blobs()
    manifest_file(root).unlink()
    with pytest.raises(NotFound):
        manifests.of(snapshot)
    assert (manifests.has(snapshot.manifest), manifests.ids(), manifests.blobs()) == (False, [], set())


def test_manifests_are_listed_with_their_names(store: DiskStore) -> None:
    old, new = publish(store, ONE, revision=A), publish(store, SMALL, revision=B)
    other = publish(store, SMALL, "hf://org/other", revision=C)
    found = {manifest.id: names for manifest, names in store.manifests.with_names()}
    assert found == {old.manifest: [], new.manifest: [new], other.manifest: [other]}
    assert store.manifests.unnamed() == [old.manifest]
    assert store.manifests.blobs() == {f.blob for files in (ONE, SMALL) for f in manifest_of(files).files}
    assert store.manifests.owned("hf://org/other") == {f.blob for f in manifest_of(SMALL).files}
    assert store.manifests.owned("hf://org/absent") == set()
    file = manifest_of(SMALL).files[1]
    store.quarantine(file, "wrong", store.content.inode(file.blob), now=5.0)
    assert {m.id for m, _ in store.manifests.with_names()} == {old.manifest}
    assert store.manifests.unnamed() == [old.manifest]


def test_every_folder_that_showed_a_manifest_is_remembered(store: DiskStore) -> None:
    manifest = manifest_of(SMALL)
    keep(store, SMALL)
    for folder in ("b", "a", "b"):
        store.manifests.record(manifest, folder)
    store.manifests.record(manifest)
    assert store.manifests.shown_in(manifest.id) == ["a", "b"]
    store.manifests.remove(manifest.id)
    store.manifests.remove(manifest.id)
    assert store.manifests.ids() == store.manifests.shown_in(manifest.id) == []


def in_git(content: bytes) -> Manifest:
    """A manifest whose source states the git-sha1 of its only file."""
    file = replace(file_of(content), digest=DIGESTS["git-sha1"](content))
    return Manifest("hf://org/model", A, (file,))


def test_a_computed_sha256_is_recorded_in_the_manifests_that_have_the_blob(store: DiskStore) -> None:
    content = noise(5000)
    plain = in_git(content)
    commit(store, plain.files[0], content)
    document = plain.as_document({})
    store.layout.manifest(plain.id).write_text(json.dumps(document))
    before = publish(store, SMALL, "hf://org/other", revision=B)
    unchanged = store.layout.manifest(before.manifest).stat().st_ino
    assert store.manifests.read(plain.id).files[0].sha256 is None
    store.manifests.record_hashes()
    assert store.manifests.read(plain.id).files[0].sha256 == sha256(content)
    assert store.layout.manifest(before.manifest).stat().st_ino == unchanged
    written = store.layout.manifest(plain.id).stat().st_ino
    store.manifests.record_hashes()
    assert store.layout.manifest(plain.id).stat().st_ino == written, "nothing new was computed"


def test_what_is_known_of_the_files_of_a_base_completes_a_new_list_of_them(store: DiskStore) -> None:
    content = noise(5000)
    listed = in_git(content)
    (file,) = listed.files
    commit(store, file, content)
    assert store.manifests.as_kept(listed) is listed
    store.manifests.record(listed)
    (known,) = store.manifests.as_kept(listed).files
    assert (known.sha256, known.kept) == (sha256(content), None)
    elsewhere = replace(listed, base="hf://org/other")
    assert store.manifests.as_kept(elsewhere) is elsewhere
    named = manifest_of({"model.bin": content}, base="hf://org/other")
    (alike,) = store.manifests.as_kept(named).files
    assert alike.kept == file.blob, "a blob with this sha256 is here under another name"


def test_copies_of_the_same_snapshot_are_taken_over(store: DiskStore) -> None:
    manifest = manifest_of(SMALL)
    assert store.manifests.with_copied(manifest) is manifest
    keep(store, SMALL)
    store.manifests.record(replace(manifest, copied=("dir/model.bin",)))
    assert store.manifests.with_copied(manifest).copied == ("dir/model.bin",)
    both = store.manifests.with_copied(replace(manifest, copied=("config.json",)))
    assert both.copied == ("config.json", "dir/model.bin")
