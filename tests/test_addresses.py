"""Addresses, hold files, and what a Hub client expects beside a model: each part on its own directory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.model import Snapshot
from cachd.store import hub_places
from cachd.store.addresses import Addresses
from cachd.store.disk_store import DiskStore
from cachd.store.holds import Holds
from cachd.store.layout import Layout
from cachd.store.root import make_directories
from tests.ground import mount
from tests.ground.disks import FuseDisk
from tests.ground.stored import SMALL, A, B, publish
from tests.ground.synced import synced

OTHER = "f" * 32


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def snapshot(store: DiskStore) -> Snapshot:
    return publish(store, SMALL)


@pytest.fixture
def addresses(store: DiskStore) -> Addresses:
    return Addresses(store.layout)


# --- addresses ---


def link(store: DiskStore, address: str, manifest: str = OTHER) -> None:
    path = store.layout.address(address)
    path.unlink(missing_ok=True)
    path.symlink_to(f".trees/{manifest}")


def test_the_first_address_that_no_other_snapshot_has_is_chosen(
    store: DiskStore, addresses: Addresses, snapshot: Snapshot
) -> None:
    first, second, third = snapshot.addresses
    assert addresses.chosen(snapshot).address == first, "it has it already"
    store.layout.address(first).unlink()
    assert addresses.chosen(snapshot).address == first
    link(store, first)
    assert addresses.chosen(snapshot).address == second
    store.layout.address(second).write_text("of somebody")
    assert addresses.chosen(snapshot).address == third
    link(store, third)
    assert addresses.chosen(snapshot).address == third, "the last, whoever has it"


def test_an_address_that_is_right_stays_and_any_other_is_replaced(
    store: DiskStore, addresses: Addresses, snapshot: Snapshot
) -> None:
    path = store.layout.address(snapshot.address)
    before = path.lstat().st_ino
    addresses.make(snapshot)
    assert path.lstat().st_ino == before
    changes: list[Callable[[], object]] = [lambda: link(store, snapshot.address), path.unlink]
    for change in changes:
        change()
        addresses.make(snapshot)
        assert os.readlink(path) == f".trees/{snapshot.manifest}"
        assert list(store.layout.staging.iterdir()) == []


def test_an_address_that_cannot_be_made_leaves_nothing_in_staging(
    store: DiskStore, addresses: Addresses, snapshot: Snapshot
) -> None:
    path = store.layout.address(snapshot.address)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        addresses.make(snapshot)
    assert list(store.layout.staging.iterdir()) == []


def test_every_address_of_a_snapshot_is_removed_or_those_of_a_revision(
    store: DiskStore, addresses: Addresses, snapshot: Snapshot
) -> None:
    link(store, f"x@{B}", snapshot.manifest)
    link(store, f"y@{A}")
    (store.layout.models / f"z@{A}").write_text("of somebody")
    addresses.remove(snapshot.manifest, A)
    assert not store.layout.address(snapshot.address).is_symlink()
    assert store.layout.address(f"x@{B}").is_symlink(), "of another revision"
    addresses.remove(snapshot.manifest)
    assert sorted(p.name for p in store.layout.models.glob("*@*")) == [f"y@{A}", f"z@{A}"]
    assert store.layout.model(snapshot.name).is_symlink(), "a name is no address"


def test_a_start_gives_each_snapshot_its_address_and_removes_those_that_lead_nowhere(
    store: DiskStore, addresses: Addresses, snapshot: Snapshot
) -> None:
    known = {snapshot.address: snapshot.manifest}
    with synced() as paths:
        addresses.settle([snapshot], {snapshot.manifest})
    assert (paths, mount.addresses(store.layout.root)) == ([], known)
    store.layout.address(snapshot.address).unlink()
    link(store, f"x@{A}")
    with synced() as paths:
        addresses.settle([snapshot], {snapshot.manifest})
    assert (paths, mount.addresses(store.layout.root)) == ([str(store.layout.models)], known)
    addresses.settle([], set())
    assert mount.addresses(store.layout.root) == {}


# --- on a disk that fails ---

SETTLE: dict[str, Callable[[Layout, Snapshot], None]] = {
    "addresses": lambda layout, snapshot: Addresses(layout).settle([snapshot], {snapshot.manifest}),
    "hold files": lambda layout, snapshot: Holds(layout).settle({snapshot.manifest}),
}


@pytest.mark.parametrize("settle", SETTLE.values(), ids=SETTLE)
def test_a_start_goes_on_without_addresses_and_hold_files_on_a_full_disk_alone(
    tmp_path: Path, store: DiskStore, snapshot: Snapshot, settle: Callable[[Layout, Snapshot], None]
) -> None:
    with FuseDisk(tmp_path) as disk:
        make_directories(disk.path)
        disk.fail("rename_to", "ENOSPC", "/models/*")
        with capture_logs() as logs:
            settle(Layout(disk.path), snapshot)
        assert [each["event"].partition(":")[0] for each in logs] == ["disk full"]
        disk.heal()
        disk.fail("rename_to", "EIO", "/models/*")
        with pytest.raises(OSError, match="Input/output") as failed:
            settle(Layout(disk.path), snapshot)
        assert failed.value.errno == errno.EIO
        assert list(Layout(disk.path).staging.iterdir()) == []
        disk.heal()
        settle(Layout(disk.path), snapshot)
        assert mount.addresses(disk.path) or mount.holds(disk.path)


# --- hold files ---


def test_a_hold_file_is_made_durably_once_and_removed(store: DiskStore) -> None:
    holds, path = Holds(store.layout), store.layout.hold(OTHER)
    (store.layout.staging / f"{OTHER}.hold").write_text("left by a crash")
    with synced() as paths:
        holds.make(OTHER)
    assert paths == [str(store.layout.staging / f"{OTHER}.hold"), str(store.layout.holds)]
    assert (path.read_bytes(), mode(path)) == (b"", 0o444)
    before = path.stat().st_ino
    with synced() as paths:
        holds.make(OTHER)
    assert (paths, path.stat().st_ino) == ([], before)
    if store.reports_open_files:
        with path.open("rb"):
            assert holds.is_held(OTHER)
            assert not holds.take(OTHER)
    assert not holds.is_held(OTHER)
    assert holds.take(OTHER)
    assert not path.exists()
    holds.make(OTHER)
    for _ in range(2):
        holds.remove(OTHER)
    assert not path.exists()


def test_a_start_gives_exactly_the_recorded_snapshots_a_hold_file(store: DiskStore) -> None:
    holds, kept, lacking = Holds(store.layout), "a" * 32, "b" * 32
    for manifest in (kept, OTHER):
        holds.make(manifest)
    (store.layout.holds / "directory").mkdir()
    before = store.layout.hold(kept).stat().st_ino
    holds.settle({kept, lacking})
    assert mount.holds(store.layout.root) == {kept, lacking, "directory"}
    assert store.layout.hold(kept).stat().st_ino == before


# --- beside a repository ---


def test_a_folder_gets_the_empty_directories_that_old_clients_make(tmp_path: Path) -> None:
    for _ in range(2):
        hub_places.make_empty(tmp_path, "models--a--b")
        places = [tmp_path / name for name in ("models--a--b/blobs", ".locks/models--a--b")]
        assert [mode(place) for place in places] == [0o755, 0o755]
        for place in places:
            place.chmod(0o700)
    hub_places.make_locks(tmp_path, "models--a--new")
    for _ in range(2):
        hub_places.remove_locks(tmp_path, "models--a--b")
    assert [path.name for path in (tmp_path / ".locks").iterdir()] == ["models--a--new"]
    assert (tmp_path / "models--a--b/blobs").is_dir()


def marks(repo: Path, commit: str = A) -> set[str]:
    top = repo / ".no_exist" / commit
    return {str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()}


def test_exactly_the_absent_paths_are_marked_by_one_inode(tmp_path: Path) -> None:
    repo, beside = tmp_path / "repo", tmp_path / "beside"
    top = repo / ".no_exist" / A
    for paths in (["a", "b/c", "b/d"], ["b/c", "e"], ["b/c", "e"], ["f"], []):
        with synced() as paths_synced:
            before = marks(repo)
            hub_places.mark_absent(repo, A, paths, beside=beside)
        assert marks(repo) == set(paths)
        assert (str(top) in paths_synced) is (before != set(paths))
        found = [top / path for path in paths]
        assert len({path.stat().st_ino for path in found}) == bool(found)
        assert all((path.read_bytes(), mode(path)) == (b"", 0o444) for path in found)
    assert not beside.exists()


def test_modes_of_marks_are_restored(tmp_path: Path) -> None:
    repo, top = tmp_path / "repo", tmp_path / "repo/.no_exist" / A
    hub_places.mark_absent(repo, A, ["a/b"], beside=tmp_path / "beside")
    places = [top.parent, top, top / "a", top / "a/b"]
    for place in places:
        place.chmod(0o700)
    hub_places.mark_absent(repo, A, ["a/b"], beside=tmp_path / "beside")
    assert [mode(place) for place in places] == [0o755, 0o755, 0o755, 0o444]


def test_the_marks_of_a_commit_go_and_those_of_another_stay(tmp_path: Path) -> None:
    hub_places.mark_absent(tmp_path, A, [], beside=tmp_path / "beside")
    assert not (tmp_path / ".no_exist").exists()
    for commit in (A, B):
        hub_places.mark_absent(tmp_path, commit, ["a/b"], beside=tmp_path / "beside")
    for _ in range(2):
        hub_places.remove_marks(tmp_path, A)
    assert (marks(tmp_path), marks(tmp_path, B)) == (set(), {"a/b"})
