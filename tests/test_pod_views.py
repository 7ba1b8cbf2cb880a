"""What pods see of snapshots that share a folder or a commit: built, repaired and removed on a real store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import InUse
from cachd.model import Snapshot
from cachd.store.changes import Changes
from cachd.store.disk_store import DiskStore
from cachd.store.holds import Holds
from cachd.store.index import Index
from cachd.store.names import Names
from cachd.store.pod_views import PodViews
from tests.ground.disks import FuseDisk
from tests.ground.models import digests
from tests.ground.stored import (
    ONE,
    SMALL,
    A,
    B,
    C,
    assert_nothing_left,
    assert_whole,
    blobs_of,
    hexes,
    hub,
    manifest_of,
    names_below,
    publish,
    refs_of,
    sha256,
    shown,
)

FOLDER, NAME = "models--org--model", "org--model"
OLD = {"config.json": b"{}", "model.bin": b"old"}
NEW = {"config.json": b"{}", "model.bin": b"new"}


def views_of(store: DiskStore) -> PodViews:
    index = Index(store.layout, store.content, store.names, store.manifests, store.history, store.copies)
    return PodViews(index, Holds(store.layout))


@pytest.fixture
def views(store: DiskStore) -> PodViews:
    return views_of(store)


@pytest.fixture
def keeping(root: Path) -> Iterator[DiskStore]:
    """A store that keeps two previous snapshots, with one: `OLD` was replaced by `NEW`."""
    with DiskStore(root, keep_previous=2) as store:
        publish(store, OLD, "hf://org/model@v1", "m", revision=A, now=1.0)
        publish(store, NEW, "hf://org/model@v2", "m", revision=B, now=2.0)
        yield store


# --- branches ---

Published = tuple[str, str, str]  # ref, name, commit
BRANCHES: dict[str, tuple[list[Published], dict[str, str]]] = {
    "main": ([("hf://org/model", "m", A)], {"main": A}),
    "a tag": ([("hf://org/model@v1", "m", A)], {"v1": A}),
    "the last of two": ([("hf://org/model", "m", A), ("hf://org/model", "n", B)], {"main": B}),
    "a commit": ([(f"hf://org/model@{A}", "m", A)], {"main": A}),
    "a commit before main": (
        [(f"hf://org/model@{A}", "m", A), ("hf://org/model", "n", B)],
        {"main": B},
    ),
    "a commit after main": (
        [("hf://org/model", "n", B), (f"hf://org/model@{A}", "m", A)],
        {"main": B},
    ),
    "a second commit leaves main where it is": (
        [(f"hf://org/model@{A}", "m", A), (f"hf://org/model@{B}", "n", B)],
        {"main": A},
    ),
    "a commit beside a tag": (
        [("hf://org/model@v1", "m", B), (f"hf://org/model@{A}", "n", A)],
        {"v1": B, "main": A},
    ),
    "a commit beside a branch below main": (
        [("hf://org/model@main/x", "m", B), (f"hf://org/model@{A}", "n", A)],
        {"main/x": B},
    ),
    "a tag that moves": ([("hf://org/model@v1", "m", A), ("hf://org/model@v1", "m", B)], {"v1": B}),
}


@pytest.mark.parametrize(("published", "branches"), BRANCHES.values(), ids=BRANCHES)
def test_branches_name_what_was_published_last_and_main_is_there_for_a_commit(
    store: DiskStore, views: PodViews, root: Path, published: list[Published], branches: dict[str, str]
) -> None:
    for at, (ref, name, commit) in enumerate(published):
        snapshot = publish(store, SMALL, ref, name, revision=commit, now=float(at))
        is_main = refs_of(root).get("main") == commit and "@" + commit in ref
        assert snapshot.is_main is is_main
    assert refs_of(root) == branches
    for place in (hub(root) / "refs").rglob("*"):
        if place.is_file():
            place.write_text(C)
    (hub(root) / "refs/more").write_text(C)
    views.repair_branches(FOLDER)
    names = set(refs_of(root))
    assert names == set(branches)
    assert all(refs_of(root)[name] == commit for name, commit in branches.items() if name != "main")


def test_main_moves_to_the_newest_commit_that_is_left(store: DiskStore, root: Path) -> None:
    for at, (name, commit) in enumerate((("m", A), ("n", B), ("o", C))):
        publish(store, SMALL, f"hf://org/model@{commit}", name, revision=commit, now=float(at))
    for gone, main in (("m", C), ("n", C)):
        store.withdraw(gone)
        assert refs_of(root) == {"main": main}
    store.withdraw("o")
    assert_nothing_left(root)


def test_a_process_that_may_write_no_more_repairs_no_branch(store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    (hub(root) / "refs/main").write_text(B)

    def refuse() -> None:
        raise InUse("another process writes")

    names = Names(store.layout, Changes(), check=refuse)
    index = Index(store.layout, store.content, names, store.manifests, store.history, store.copies)
    with pytest.raises(InUse):
        PodViews(index, Holds(store.layout)).repair_branches(FOLDER)
    assert refs_of(root) == {"main": B}


FAILING: dict[str, tuple[str, str, Callable[[PodViews, DiskStore, Snapshot], object]]] = {
    "a branch": (
        "/hub/models--org--model/refs/*",
        "disk full: Hub branch not repaired",
        lambda views, store, _: views.repair_branches(FOLDER),
    ),
    "a hold file": (
        "/models/.holds/*",
        "disk full: hold file or address not restored",
        lambda views, store, snapshot: views.repair_hold(snapshot),
    ),
    "an address": (
        "/models/*@*",
        "disk full: hold file or address not restored",
        lambda views, store, snapshot: views.repair_hold(snapshot),
    ),
}


@pytest.mark.parametrize(("match", "event", "repair"), FAILING.values(), ids=FAILING)
def test_a_repair_that_finds_no_space_is_made_later_and_another_error_is_raised(
    tmp_path: Path, match: str, event: str, repair: Callable[[PodViews, DiskStore, Snapshot], object]
) -> None:
    with FuseDisk(tmp_path) as disk, DiskStore(disk.path) as store:
        snapshot, views = publish(store, SMALL), views_of(store)
        lost = (
            hub(disk.path) / "refs/main",
            store.layout.hold(snapshot.manifest),
            store.layout.address(snapshot.address),
        )
        for path in lost:
            path.unlink()
        disk.fail("rename_to", "ENOSPC", match)
        with capture_logs() as logs:
            repair(views, store, snapshot)
        assert [each["event"] for each in logs] == [event]
        disk.heal()
        disk.fail("rename_to", "EIO", match)
        with pytest.raises(OSError, match="Input/output"):
            repair(views, store, snapshot)
        disk.heal()
        views.repair_branches(FOLDER)
        views.repair_hold(snapshot)
        assert all(os.path.lexists(path) for path in lost)


# --- snapshots of one commit ---


def test_a_snapshot_that_goes_leaves_what_others_of_its_commit_show(store: DiskStore, root: Path) -> None:
    few = {path: ONE[path] for path in ("config.json", "empty.txt")}
    publish(store, ONE, "hf://org/model", "m")
    other = publish(store, few, "hf://org/model@v1", "n")
    store.withdraw("m")
    assert_whole(root, "n", few, commit=A)
    assert blobs_of(root) == hexes(few)
    store.withdraw(other.name)
    assert_nothing_left(root)


def test_what_a_snapshot_without_a_name_shows_stays_when_another_of_its_commit_goes(
    keeping: DiskStore, root: Path
) -> None:
    publish(keeping, {"model.bin": b"old", "more": b"more"}, "hf://org/model@v3", "n", revision=A, now=3.0)
    keeping.withdraw("n")
    assert digests(hub(root) / "snapshots" / A) == shown(OLD), "it is kept for a rollback"
    assert keeping.rollback("m", now=4.0).revision == A
    assert_whole(root, "m", OLD, commit=A)


def test_a_snapshot_without_a_tree_shows_nothing(keeping: DiskStore, root: Path) -> None:
    """It is being removed: the removal was interrupted after it had removed the tree."""
    publish(keeping, {"more": b"more"}, "hf://org/model@v3", "n", revision=A, now=3.0)
    (before,) = keeping.history.of("m")
    for path in (tree := keeping.layout.tree(before.manifest)).iterdir():
        tree.chmod(0o700)
        path.unlink()
    tree.rmdir()
    keeping.withdraw("n")
    assert set(digests(hub(root) / "snapshots" / A)) <= {"config.json", "model.bin"}
    listed = hub(root) / "trees" / f"{A}.json"
    assert not listed.exists()


def test_a_file_that_a_snapshot_lacks_is_absent_unless_another_of_its_commit_has_it(
    store: DiskStore, root: Path
) -> None:
    lacking = set(store.manifests.of(publish(store, SMALL, name="m")).absent)
    absent = hub(root) / ".no_exist" / A
    assert set(digests(absent)) == lacking
    path = min(lacking)
    publish(store, {path: b"{}"}, "hf://org/model@v1", "n", now=2.0)
    assert set(digests(absent)) == lacking - {path}


def test_links_to_a_damaged_blob_are_hidden_in_every_folder_and_come_back(
    store: DiskStore, views: PodViews, root: Path
) -> None:
    first = publish(store, SMALL)
    other = publish(store, SMALL, "hf://org/other", "o")
    manifest, blob = store.manifests.of(first), sha256(SMALL["dir/model.bin"])
    views.hide(blob, [(first.manifest, manifest)])
    places = [store.layout.tree(first.manifest), hub(root) / "snapshots" / A]
    assert [set(digests(place)) for place in places] == [{"config.json"}] * 2
    assert set(digests(store.layout.tree(other.manifest))) == set(SMALL)
    views.show(first, manifest)
    assert_whole(root, NAME, SMALL, commit=A)
    assert views.wrong(first, manifest) == []


def test_what_is_wrong_names_the_view_and_the_file(store: DiskStore, views: PodViews, root: Path) -> None:
    snapshot = publish(store, SMALL)
    manifest = store.manifests.of(snapshot)
    (hub(root) / "snapshots" / A / "config.json").unlink()
    tree = store.layout.tree(snapshot.manifest)
    tree.chmod(0o755)
    (tree / "config.json").unlink()
    (tree / "config.json").write_bytes(b"[]")
    config = next(f for f in manifest.files if f.path == "config.json")
    assert views.wrong(snapshot, manifest) == [
        (f"models/{NAME}/config.json", config, True),
        (f"hub/{FOLDER}/config.json", config, False),
    ]


# --- removing, and the start ---


def test_of_an_unreadable_manifest_the_plain_view_goes_and_the_blobs_stay(
    store: DiskStore, views: PodViews, root: Path
) -> None:
    snapshot = publish(store, SMALL)
    store.layout.manifest(snapshot.manifest).write_text("{")
    with capture_logs() as logs:
        assert views.remove(snapshot.manifest) is None
    assert [each["event"] for each in logs] == ["manifest unreadable: blobs not removed"]
    assert not store.layout.tree(snapshot.manifest).exists()
    assert not store.layout.address(snapshot.address).is_symlink()
    assert not store.layout.hold(snapshot.manifest).exists()
    assert blobs_of(root) == hexes(SMALL)
    assert (hub(root) / "snapshots" / A).is_dir()


def test_a_removal_returns_the_manifest_and_may_run_again(
    store: DiskStore, views: PodViews, root: Path
) -> None:
    snapshot = publish(store, SMALL)
    manifest = store.manifests.of(snapshot)
    store.names.undeclared(snapshot.name)
    for _ in range(2):
        assert views.remove(snapshot.manifest) == manifest
        assert not hub(root).exists()
        assert names_below(root / "models/.trees") == names_below(root / "models/.holds") == set()
        assert not store.layout.address(snapshot.address).is_symlink()


def test_a_start_removes_the_names_and_the_branches_that_an_interrupted_publish_left(
    root: Path, next_life: Callable[[], DiskStore]
) -> None:
    snapshot = publish(next_life(), SMALL)
    (root / "models/half").symlink_to(".trees/" + "f" * 32)
    (root / "models/directory").mkdir()
    (hub(root) / "refs/half").write_text(B)
    for lost in (root / "models/.holds" / snapshot.manifest, root / "models" / snapshot.address):
        lost.unlink()
    store = next_life()
    assert not (root / "models/half").is_symlink()
    assert (root / "models/directory").is_dir()
    assert store.layout.hold(snapshot.manifest).exists()
    assert_whole(root, NAME, SMALL, commit=A)
    assert refs_of(root) == {"main": A}


@pytest.mark.parametrize("state", ["quarantined", "without a name"])
def test_a_start_repairs_the_branches_of_folders_without_a_ready_name(
    root: Path, next_life: Callable[[], DiskStore], state: str
) -> None:
    store = next_life()
    snapshot = publish(store, SMALL)
    if state == "quarantined":
        file = next(iter(manifest_of(SMALL).files))
        store.quarantine(file, "damaged", store.content.inode(file.blob), now=5.0)
    else:
        (root / f"ready/{NAME}.json").unlink()
    (hub(root) / "refs/main").write_text(A)
    store = next_life()
    assert refs_of(root) == {}
    assert store.manifests.has(snapshot.manifest)
