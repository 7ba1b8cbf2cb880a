"""The two views of a snapshot: what is restored in them, what is removed, and what stays as it is."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.model import Digest, File
from cachd.store.disk_store import DiskStore
from cachd.store.views import HubView, PlainView, Shown, directories_of
from tests.ground.models import digests
from tests.ground.stored import (
    ONE,
    SMALL,
    A,
    B,
    Files,
    fetched_anew,
    hub,
    keep,
    manifest_of,
    names_below,
    publish,
    refs_of,
    shown,
)

FOLDER, OTHER = "models--org--model", "models--org--other"


@pytest.fixture
def view(store: DiskStore) -> HubView:
    return HubView(store.layout, store.content, store.copies)


@pytest.fixture
def plain(store: DiskStore) -> PlainView:
    return PlainView(store.layout, store.content, store.copies)


def shown_of(files: Files, absent: tuple[str, ...] = ()) -> Shown:
    return Shown(files_of(files), (), absent)


def files_of(files: Files) -> dict[str, File]:
    return {f.path: f for f in manifest_of(files).files}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the list of files ---


@pytest.fixture
def listing(store: DiskStore, root: Path) -> Path:
    """The list of files of a published commit."""
    publish(store, SMALL)
    return hub(root) / "trees" / f"{A}.json"


def without(path: str) -> Callable[[Path], object]:
    def change(listing: Path) -> None:
        document = json.loads(listing.read_text())
        del document["files"][path]
        listing.write_text(json.dumps(document))

    return change


LOST: dict[str, Callable[[Path], object]] = {
    "it is gone": lambda listing: listing.unlink(),
    "its directory is gone": lambda listing: (listing.unlink(), listing.parent.rmdir()),
    "it lacks a file": without("config.json"),
    "it lacks a weight": without("dir/model.bin"),
    "it is empty": lambda listing: listing.write_text(""),
    "it is torn": lambda listing: listing.write_text('{"files": {'),
    "it is a list": lambda listing: listing.write_text("[]"),
    "it lists nothing": lambda listing: listing.write_text('{"format_version": 1}'),
    "it lists no object": lambda listing: listing.write_text('{"files": []}'),
    "it nests too deep": lambda listing: listing.write_text("[" * 100_000),
    "it has another size": lambda listing: listing.write_text(
        listing.read_text().replace('"size": 2', '"size": 3')
    ),
}


@pytest.mark.parametrize("lose", LOST.values(), ids=LOST.keys())
def test_a_list_of_files_that_lacks_one_is_restored(
    view: HubView, listing: Path, lose: Callable[[Path], object]
) -> None:
    before = listing.read_bytes()
    lose(listing)
    view.repair(FOLDER, A, shown_of(SMALL))
    assert listing.read_bytes() == before
    assert mode(listing) == 0o644


def test_a_list_that_has_every_file_is_not_written_again_and_everybody_may_read_it(
    view: HubView, listing: Path
) -> None:
    document = json.loads(listing.read_text())
    document["files"]["more"] = {"size": 1, "blob_id": "0" * 40}
    listing.write_text(json.dumps(document))
    listing.chmod(0o600)
    before = listing.stat().st_ino, listing.read_bytes()
    view.repair(FOLDER, A, shown_of(SMALL))
    assert (listing.stat().st_ino, listing.read_bytes()) == before
    assert mode(listing) == 0o644


def test_a_file_in_git_is_listed_without_lfs(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    git, lfs = Digest("git-sha1", "1" * 40), Digest("sha256", "2" * 64)
    files = {
        "a": File("a", 3, "https://host/a", git),
        "b": File("b", 4, "https://host/b", lfs),
    }
    view.repair(FOLDER, B, Shown(files, (), ()))
    listed = json.loads((hub(root) / "trees" / f"{B}.json").read_text())
    assert listed["format_version"] == 1
    assert listed["files"]["a"] == {"size": 3, "blob_id": git.hex}
    assert (listed["files"]["b"]["lfs_sha256"], listed["files"]["b"]["lfs_size"]) == (lfs.hex, 4)
    assert listed["files"]["b"]["blob_id"] != lfs.hex, "the pointer's own id"


def test_modes_of_a_hub_folder_are_restored(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL, "hf://org/model@a/b")
    places = [hub(root) / below for below in ("", "snapshots", "trees", "refs", "refs/a", "blobs")]
    for place in places:
        place.chmod(0o700)
    view.repair(FOLDER, A, shown_of(SMALL))
    assert {place.name: oct(mode(place)) for place in places} == {place.name: "0o755" for place in places}


# --- branches ---


def test_the_commit_of_main_is_known_only_if_it_can_be_read(
    view: HubView, store: DiskStore, root: Path
) -> None:
    assert view.main(FOLDER) is None
    publish(store, SMALL)
    main = hub(root) / "refs/main"
    assert view.main(FOLDER) == A
    for content in (b"\xff\xfe", b"x" * 101):
        main.write_bytes(content)
        assert view.main(FOLDER) is None
    main.write_bytes(b"x" * 100)
    assert view.main(FOLDER) == "x" * 100
    main.unlink()
    assert view.main(FOLDER) is None


def test_branches_are_exactly_those_that_are_asked_for(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    view.point(FOLDER, {"main": A, "a/b/c": B, "a/d": A})
    assert refs_of(root) == {"main": A, "a/b/c": B, "a/d": A}
    view.point(FOLDER, {"main": B, "a/d": A})
    assert refs_of(root) == {"main": B, "a/d": A}
    assert names_below(hub(root) / "refs/a") == {"d"}
    view.point(FOLDER, {})
    assert names_below(hub(root) / "refs") == set()


def test_a_branch_that_is_right_is_not_written_and_any_other_is_replaced(
    view: HubView, store: DiskStore, root: Path, tmp_path: Path
) -> None:
    publish(store, SMALL)
    main, branches = hub(root) / "refs/main", {"main": A}
    before = main.stat().st_ino
    main.chmod(0o600)
    view.point(FOLDER, branches)
    assert (main.stat().st_ino, mode(main)) == (before, 0o644)
    (tmp_path / "elsewhere").write_text(A)
    main.unlink()
    main.symlink_to(tmp_path / "elsewhere")
    view.point(FOLDER, branches)
    assert (main.is_symlink(), main.read_text()) == (False, A)
    for content in (B, f"{A}\n", ""):
        main.write_text(content)
        view.point(FOLDER, branches)
        assert main.read_text() == A


# --- other names of a folder ---


def test_another_name_leads_to_a_folder_and_goes_with_it(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    publish(store, SMALL, "hf://org/other", revision=B)
    link, locks = root / "hub/models--org--new", root / "hub/.locks/models--org--new"
    (store.layout.staging / f"{link.name}.link").symlink_to("left by a crash")
    for folder in (OTHER, FOLDER):
        view.alias(link.name, folder)
        assert os.readlink(link) == folder
        assert locks.is_dir()
    view.alias("models--org--newer", OTHER)
    view.narrow(FOLDER, A, SMALL, {})
    assert [place.exists() for place in (link, locks, hub(root))] == [False] * 3
    assert not link.is_symlink()
    assert not (root / f"hub/.locks/{FOLDER}").exists()
    assert os.readlink(root / "hub/models--org--newer") == OTHER, "it leads elsewhere, and stays"
    assert (root / "hub/.locks/models--org--newer").is_dir()
    assert digests(hub(root, "org/other") / "snapshots" / B) == shown(SMALL)


def test_a_folder_is_replaced_by_no_other_name(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    publish(store, SMALL, "hf://org/other", revision=B)
    view.alias(OTHER, FOLDER)
    view.alias(FOLDER, FOLDER)
    for repo in ("org/model", "org/other"):
        assert hub(root, repo).is_dir()
        assert not hub(root, repo).is_symlink()


def test_nothing_is_changed_through_another_name(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    view.alias(OTHER, FOLDER)
    before = {path: path.lstat().st_ino for path in hub(root).rglob("*")}
    view.point(OTHER, {})
    view.hide(OTHER, A, SMALL)
    view.narrow(OTHER, A, SMALL, {})
    fetched_anew(store, SMALL["dir/model.bin"])
    view.show_links(OTHER, A, files_of(SMALL))
    assert {path: path.lstat().st_ino for path in hub(root).rglob("*")} == before


def test_a_folder_replaces_another_name_of_its_own(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, SMALL)
    view.alias(OTHER, FOLDER)
    view.build(OTHER, B, shown_of(SMALL))
    assert not hub(root, "org/other").is_symlink()
    assert digests(hub(root, "org/other") / "snapshots" / B) == shown(SMALL)
    assert digests(hub(root) / "snapshots" / A) == shown(SMALL)


# --- files ---


def test_a_commit_that_is_shown_already_gets_what_it_lacks(view: HubView, store: DiskStore) -> None:
    keep(store, ONE)
    few = {"config.json": ONE["config.json"]}
    for files in (few, ONE, ONE):
        view.build(FOLDER, A, shown_of(files))
        assert digests(store.layout.commit(FOLDER, A)) == shown(files)


def test_a_commit_is_narrowed_to_the_files_that_are_left(view: HubView, store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    left = {path: ONE[path] for path in ("config.json", "empty.txt")}
    view.narrow(FOLDER, A, ("empty.txt", "model.safetensors", "twin.safetensors"), files_of(left))
    commit = hub(root) / "snapshots" / A
    assert set(digests(commit)) == {"config.json", "empty.txt", "1_Pooling/config.json"}
    listed = json.loads((hub(root) / "trees" / f"{A}.json").read_text())["files"]
    assert set(listed) == set(left)


def test_a_commit_goes_with_its_list_and_its_marks_and_the_others_stay(
    view: HubView, store: DiskStore, root: Path
) -> None:
    keep(store, SMALL)
    for commit in (A, B):
        view.build(FOLDER, commit, shown_of(SMALL, absent=("adapter_config.json",)))
    held = (hub(root) / f"snapshots/{A}/config.json").open("rb")
    with held:
        view.narrow(FOLDER, A, SMALL, {})
        assert names_below(root / ".cachd/trash") == set()
        assert held.read() == SMALL["config.json"], "who has it open keeps it"
    assert names_below(hub(root) / "snapshots") == names_below(hub(root) / ".no_exist") == {B}
    assert names_below(hub(root) / "trees") == {f"{B}.json"}
    view.narrow(FOLDER, A, SMALL, {})  # a crash may let it run again
    assert digests(hub(root) / "snapshots" / B) == shown(SMALL)


def test_files_are_hidden_and_the_directories_keep_their_modes(
    plain: PlainView, view: HubView, store: DiskStore, root: Path
) -> None:
    snapshot = publish(store, SMALL)
    tree, commit = store.layout.tree(snapshot.manifest), hub(root) / "snapshots" / A
    for _ in range(2):
        plain.hide(snapshot.manifest, ["dir/model.bin", "absent/file", "config.json/below"])
        view.hide(FOLDER, A, ["dir/model.bin"])
        assert set(digests(tree)) == set(digests(commit)) == {"config.json"}
    assert (mode(tree), mode(tree / "dir"), mode(commit / "dir")) == (0o555, 0o555, 0o755)


def test_what_differs_from_its_blob_is_wrong_in_either_view(
    plain: PlainView, view: HubView, store: DiskStore, root: Path
) -> None:
    snapshot, manifest = publish(store, SMALL), manifest_of(SMALL)
    wrongs: dict[Path, Callable[[], dict[str, bool]]] = {
        store.layout.tree(snapshot.manifest): lambda: plain.wrong(manifest),
        hub(root) / "snapshots" / A: lambda: view.wrong(FOLDER, manifest),
    }
    for top, wrong in wrongs.items():
        before = mode(top / "dir")
        for place in (top, top / "dir", top / "config.json"):
            place.chmod(0o700)
        assert wrong() == {}
        assert (mode(top), mode(top / "dir"), mode(top / "config.json")) == (before, before, 0o444)
        (top / "dir").chmod(0o755)
        (top / "dir/model.bin").unlink()
        assert wrong() == {"dir/model.bin": False}
        (top / "dir").chmod(0o755)
        (top / "dir/model.bin").write_bytes(SMALL["dir/model.bin"][::-1])
        assert wrong() == {"dir/model.bin": True}
        top.chmod(0o755)
        (top / "dir").rename(top / "moved")
        (top / "dir").write_bytes(b"a file where a directory was")
        assert wrong() == {"dir/model.bin": False}


def test_an_intact_tree_is_built_again_without_a_change_and_a_replaced_blob_is_linked(
    plain: PlainView, store: DiskStore
) -> None:
    snapshot = publish(store, SMALL)
    tree, blob = store.layout.tree(snapshot.manifest), manifest_of(SMALL).files[1].blob
    before = {path: path.stat().st_ctime_ns for path in tree.rglob("*") if path.is_file()}
    plain.build(manifest_of(SMALL))
    assert {path: path.stat().st_ctime_ns for path in before} == before
    fetched_anew(store, SMALL["dir/model.bin"])
    plain.build(manifest_of(SMALL))
    assert (tree / "dir/model.bin").stat().st_ino == store.content.inode(blob)
    assert [mode(path) for path in (tree, tree / "dir", tree / "dir/model.bin")] == [0o555, 0o555, 0o444]


def test_a_tree_goes_though_somebody_has_a_file_of_it_open(plain: PlainView, store: DiskStore) -> None:
    snapshot = publish(store, SMALL)
    tree = store.layout.tree(snapshot.manifest)
    with (tree / "dir/model.bin").open("rb") as held:
        for _ in range(2):
            plain.remove(snapshot.manifest)
            assert not tree.exists()
            assert names_below(store.layout.trash) == set()
        assert held.read() == SMALL["dir/model.bin"]


def test_directories_of_the_same_files_have_the_same_time_on_every_node(tmp_path: Path) -> None:
    found = []
    for name in ("one", "other"):
        root = tmp_path / name
        root.mkdir(mode=0o755)
        with DiskStore(root) as store:
            snapshot = publish(store, SMALL)
            tops = store.layout.tree(snapshot.manifest), hub(root) / "snapshots" / A
            found.append([(top / below).stat().st_mtime_ns for top in tops for below in ("", "dir")])
    assert found[0] == found[1]


def test_pods_may_read_every_directory_whatever_the_umask_of_the_daemon(store: DiskStore, root: Path) -> None:
    before = os.umask(0o077)
    try:
        snapshot = publish(store, SMALL)
    finally:
        os.umask(before)
    tree, commit = store.layout.tree(snapshot.manifest), hub(root) / "snapshots" / A
    assert [oct(mode(top / below)) for top in (tree, commit) for below in ("", "dir")] == (
        ["0o555"] * 2 + ["0o755"] * 2
    )


def test_what_a_crash_left_of_a_view_is_not_shown(plain: PlainView, view: HubView, store: DiskStore) -> None:
    keep(store, SMALL)
    for name in (manifest_of(SMALL).id, A):
        (store.layout.staging / name / "left").mkdir(parents=True)
        (store.layout.staging / name / "left/behind").write_bytes(b"x")
    plain.build(manifest_of(SMALL))
    view.build(FOLDER, A, shown_of(SMALL))
    assert digests(store.layout.tree(manifest_of(SMALL).id)) == shown(SMALL)
    assert digests(store.layout.commit(FOLDER, A)) == shown(SMALL)


def test_a_view_that_cannot_be_built_leaves_nothing_behind(plain: PlainView, store: DiskStore) -> None:
    keep(store, {"config.json": SMALL["config.json"]})  # and no blob of the other file
    with pytest.raises(FileNotFoundError):
        plain.build(manifest_of(SMALL))
    assert names_below(store.layout.staging) == names_below(store.layout.trees) == set()


@pytest.mark.parametrize(
    ("paths", "directories"),
    [
        ([], [""]),
        (["a"], [""]),
        (["a/b/c/d", "a/e"], ["", "a", "a/b", "a/b/c"]),
        (["x/a", "y/a"], ["", "x", "y"]),
    ],
)
def test_the_directories_of_a_model_lead_to_its_files(paths: list[str], directories: list[str]) -> None:
    assert directories_of(paths) == directories
