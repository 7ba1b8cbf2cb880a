"""What a check of a ready name finds, restores, or takes as a reason to withdraw readiness."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import InUse, NotFound
from cachd.model import Manifest, ModelSpec, Ref, Snapshot
from cachd.store.disk_store import DiskStore
from cachd.store.pins import PinnedBy
from cachd.store.protection import InUseBy, UseRules
from cachd.store.scrub import Replaced
from tests.attacks.test_leases import leased
from tests.ground.stored import (
    SMALL,
    A,
    B,
    assert_whole,
    hub,
    keep,
    manifest_file,
    manifest_of,
    names_below,
    publish,
    refs_of,
)
from tests.ground.synced import synced

NAME, PATH = "org--model", "dir/model.bin"
FILE = next(f for f in manifest_of(SMALL).files if f.path == PATH)
LINK = f"models/{NAME}"


@pytest.fixture
def snapshot(store: DiskStore) -> Snapshot:
    return publish(store, SMALL)


def in_tree(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def changed(root: Path) -> None:
        place = (root / LINK).resolve() / PATH
        place.parent.chmod(0o755)
        change(place)

    return changed


def replaced(place: Path) -> None:
    content = place.read_bytes()
    place.unlink()
    place.write_bytes(content[::-1])


WRONG: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "no link": (lambda root: (root / LINK).unlink(), f"{LINK} is not a link to its snapshot", False),
    "another link": (
        lambda root: ((root / LINK).unlink(), (root / LINK).symlink_to(".trees/other")),
        f"{LINK} is not a link to its snapshot",
        False,
    ),
    "no ready file": (
        lambda root: (root / f"ready/{NAME}.json").unlink(),
        f"ready/{NAME}.json is gone",
        False,
    ),
    "another ready file": (
        lambda root: (root / f"ready/{NAME}.json").write_text("{}"),
        f"ready/{NAME}.json was changed",
        False,
    ),
    "no file": (in_tree(Path.unlink), f"{LINK}/{PATH} is gone", False),
    "another file": (in_tree(replaced), f"{LINK}/{PATH} is another file", True),
    "no file in the Hub view": (
        lambda root: (hub(root) / "snapshots" / A / PATH).unlink(),
        f"hub/models--org--model/{PATH} is gone",
        False,
    ),
    "no file in either": (
        lambda root: (in_tree(Path.unlink)(root), (hub(root) / "snapshots" / A / PATH).unlink()),
        f"2 wrong files; the first: {LINK}/{PATH} is gone",
        False,
    ),
    "no blob": (
        lambda root: next((root / ".cachd/blobs").glob(f"*/{FILE.blob.hex}")).unlink(),
        f"2 wrong files; the first: {LINK}/{PATH} is another file",
        False,
    ),
    "no manifest": (lambda root: manifest_file(root).unlink(), "its manifest cannot be read", False),
}


@pytest.mark.parametrize(("change", "says", "is_doubtful"), WRONG.values(), ids=WRONG.keys())
def test_what_pods_would_miss_withdraws_readiness(
    store: DiskStore,
    root: Path,
    snapshot: Snapshot,
    change: Callable[[Path], object],
    says: str,
    is_doubtful: bool,
) -> None:
    assert store.check(NAME, now=1.0) is None
    inode = store.content.inode(FILE.blob)
    change(root)
    assert (store.check(NAME, now=5.0) or "").startswith(says)
    found = store.names.quarantine_of(NAME)
    assert found is not None
    assert (found.snapshot, found.since, found.reason.startswith(says)) == (snapshot, 5.0, True)
    assert found.inodes == ({FILE.blob: inode} if is_doubtful else {})
    assert store.content.damaged.has(FILE.blob) is is_doubtful
    assert (names_below(root / "ready"), (root / LINK).is_symlink(), refs_of(root)) == (set(), False, {})
    assert store.check(NAME, now=6.0) is None, "it is not ready any more"


def test_what_needs_no_byte_is_restored_and_the_model_stays_ready(
    store: DiskStore, root: Path, snapshot: Snapshot
) -> None:
    for path in (store.layout.hold(snapshot.manifest), store.layout.address(snapshot.address)):
        path.unlink()
    (hub(root) / "refs/main").write_text(B)
    (hub(root) / "trees" / f"{A}.json").unlink()
    (root / f"ready/{NAME}.json").chmod(0o600)
    for name in ("models", "hub", "ready", "status"):
        (root / name).chmod(0o700)
    assert store.check(NAME, now=5.0) is None
    assert_whole(root, NAME, SMALL, commit=A)
    assert (refs_of(root), (hub(root) / "trees" / f"{A}.json").exists()) == ({"main": A}, True)
    assert store.layout.hold(snapshot.manifest).is_file()
    assert store.layout.address(snapshot.address).is_symlink()
    assert (root / f"ready/{NAME}.json").stat().st_mode & 0o777 == 0o644
    assert [(root / name).stat().st_mode & 0o777 for name in ("models", "hub", "ready", "status")] == [
        0o755
    ] * 4


def test_damage_concerns_every_name_that_uses_the_blob_and_is_recorded_with_its_inode(
    store: DiskStore, root: Path, snapshot: Snapshot
) -> None:
    too = publish(store, SMALL, name="too")
    other = publish(store, {"x": b"x"}, "hf://org/other", revision=B)
    inode = store.content.inode(FILE.blob)
    with pytest.raises(Replaced):
        store.quarantine(FILE, "wrong", inode + 1, now=5.0)
    assert sorted(store.quarantine(FILE, "wrong", inode, now=5.0)) == [NAME, "too"]
    for each in (snapshot, too):
        found = store.names.quarantine_of(each.name)
        assert found is not None
        assert (found.reason, found.inodes) == (f"{PATH}: wrong", {FILE.blob: inode})
    assert store.names.all() == [other]
    assert not (hub(root) / "snapshots" / A / PATH).exists()
    assert not (store.layout.tree(snapshot.manifest) / PATH).exists()
    with pytest.raises(Replaced):
        store.quarantine(FILE, "it is gone", 0, now=6.0)  # no ready name uses it


def test_a_second_damaged_blob_is_added_to_a_quarantine(store: DiskStore, snapshot: Snapshot) -> None:
    config = manifest_of(SMALL).files[0]
    inodes = {f.blob: store.content.inode(f.blob) for f in (FILE, config)}
    assert store.quarantine(FILE, "wrong", inodes[FILE.blob], now=5.0) == [snapshot.name]
    assert store.quarantine(config, "wrong", inodes[config.blob], now=6.0) == []
    found = store.names.quarantine_of(NAME)
    assert found is not None
    assert (found.since, found.inodes) == (5.0, inodes)


def test_only_the_quarantined_spec_gets_its_files_back(
    store: DiskStore, root: Path, snapshot: Snapshot
) -> None:
    spec = snapshot.spec
    assert store.to_repair(spec) is None
    store.quarantine(FILE, "wrong", store.content.inode(FILE.blob), now=5.0)
    assert store.to_repair(spec) == manifest_of(SMALL)
    assert store.to_repair(ModelSpec(Ref.parse("hf://org/model@v1"), NAME)) is None
    store.layout.manifest(snapshot.manifest).write_text("{")
    assert store.to_repair(spec) is None


def test_a_start_ends_what_a_crash_left_of_a_quarantine(
    store: DiskStore, root: Path, snapshot: Snapshot, next_life: Callable[[], DiskStore]
) -> None:
    ready = (root / f"ready/{NAME}.json").read_text()
    inode = store.content.inode(FILE.blob)
    store.quarantine(FILE, "wrong", inode, now=5.0)
    store.layout.damaged(FILE.blob).rename(store.content.path(FILE.blob))
    (root / f"ready/{NAME}.json").write_text(ready)
    (root / LINK).symlink_to(f".trees/{snapshot.manifest}")
    store = next_life()
    assert (store.names.all(), names_below(root / "ready"), (root / LINK).is_symlink()) == ([], set(), False)
    assert (store.content.damaged.has(FILE.blob), store.content.has(FILE)) == (True, False)


def test_damage_of_what_no_snapshot_uses_has_no_result(store: DiskStore, snapshot: Snapshot) -> None:
    unused = {"x": b"unused"}
    keep(store, unused)
    (file,) = manifest_of(unused).files
    with pytest.raises(Replaced):
        store.quarantine(file, "wrong", store.content.inode(file.blob), now=5.0)
    assert (store.content.has(file), store.names.quarantined()) == (True, [])


def test_a_blob_that_is_gone_has_no_inode_and_its_names_wait_for_it(
    store: DiskStore, snapshot: Snapshot
) -> None:
    store.content.path(FILE.blob).unlink()
    assert store.quarantine(FILE, "it is gone", 0, now=5.0) == [NAME]
    found = store.names.quarantine_of(NAME)
    assert found is not None
    assert (found.inodes, found.reason, store.content.damaged.has(FILE.blob)) == (
        {},
        f"{PATH}: it is gone",
        False,
    )
    store.layout.manifest(snapshot.manifest).unlink()
    assert store.to_repair(snapshot.spec) is None


def test_a_quarantine_is_recorded_before_the_ready_file_goes(
    store: DiskStore, root: Path, snapshot: Snapshot
) -> None:
    with synced() as paths:
        store.quarantine(FILE, "wrong", store.content.inode(FILE.blob), now=5.0)
    private, repo = root / ".cachd", hub(root)
    first = [private / f"quarantined/.{NAME}.json.new", private / "quarantined", root / "ready"]
    first += [repo / "refs", root / "models"]
    assert paths[:5] == list(map(str, first))
    tree = store.layout.tree(snapshot.manifest)
    assert {str(tree / "dir"), str(repo / "snapshots" / A / "dir")} < {*paths[5:]}


def test_a_view_that_cannot_be_repaired_is_told_and_its_files_are_checked_all_the_same(
    store: DiskStore, root: Path, snapshot: Snapshot
) -> None:
    trees = hub(root) / "trees"
    trees.rename(trees.with_name("moved"))
    trees.touch()
    with capture_logs() as logs:
        assert store.check(NAME, now=5.0) is None
    assert [each["name"] for each in logs if each["event"] == "views not repaired"] == [NAME]
    (hub(root) / "snapshots" / A / PATH).unlink()
    assert store.check(NAME, now=6.0) == f"hub/models--org--model/{PATH} is gone"


def test_a_ready_file_that_is_leased_for_now_is_no_damage(store: DiskStore, snapshot: Snapshot) -> None:
    if not store.reports_open_files:
        pytest.skip("this file system has no leases")
    with leased("write", [store.layout.ready_file(NAME)]):
        assert store.check(NAME, now=5.0) is None


# --- who uses a snapshot ---


def test_who_uses_a_snapshot_is_known_or_it_counts_as_used(store: DiskStore, snapshot: Snapshot) -> None:
    manifest, protection = manifest_of(SMALL), store.protection
    assert (protection.in_use_by(manifest), protection.is_in_use(manifest)) == (None, False)
    for path, by in (
        (store.layout.hold(manifest.id), InUseBy.POD),
        (store.content.path(FILE.blob), InUseBy.PROCESS),
    ):
        if store.reports_open_files:
            with path.open("rb"):
                assert (protection.in_use_by(manifest), protection.is_in_use(manifest)) == (by, True)
                assert refusal(store, manifest).detail == f"{NAME} is {by}"
    protection.rules = UseRules(is_unknown=True)
    assert protection.in_use_by(manifest) is InUseBy.ANYBODY
    assert refusal(store, manifest).code == "shared_volume"
    publish(store, SMALL, name="too")
    protection.check_unused(NAME)  # the snapshot stays under its other name
    with pytest.raises(InUse):
        protection.check_unnamed_unopened(snapshot.manifest)


def refusal(store: DiskStore, manifest: Manifest) -> InUse:
    with pytest.raises(InUse) as refused:
        store.protection.check_unused(NAME)
    assert store.manifests.has(manifest.id)
    return refused.value


@pytest.mark.parametrize("keep", [0.0, 300.0])
def test_a_snapshot_that_was_opened_lately_may_be_withdrawn_and_not_evicted(
    store: DiskStore, snapshot: Snapshot, keep: float
) -> None:
    protection, manifest = store.protection, manifest_of(SMALL)
    protection.rules = UseRules(keep_opened_seconds=keep)
    assert protection.opened_lately(snapshot.manifest) == ""
    protection.check_names_unopened([snapshot], manifest)
    store.watch_all()
    (store.layout.model(NAME) / PATH).open("rb").close()
    assert bool(protection.opened_lately(snapshot.manifest)) is bool(keep)
    protection.check_unused(NAME)
    checks: list[Callable[[], None]] = [
        lambda: protection.check_names_unopened([snapshot], manifest),
        lambda: protection.check_unnamed_unopened(snapshot.manifest),
    ]
    for check in checks:
        if not keep:
            check()
            continue
        with pytest.raises(InUse) as refused:
            check()
        assert refused.value.code == "opened_lately"


def test_a_pin_and_a_lease_end_with_their_name(store: DiskStore, snapshot: Snapshot) -> None:
    protection = store.protection
    protection.check_unused("absent")
    store.pins.add(NAME)
    assert refusal(store, manifest_of(SMALL)).code == "pinned"
    store.leases.take(NAME, "pod", until=1e12)
    protection.end(NAME)
    assert (store.pins.has(NAME), store.leases.of(NAME, 0.0)) == (False, [])
    store.leases.take(NAME, "", until=1e12)
    error = refusal(store, manifest_of(SMALL))
    assert (error.code, "an unnamed holder" in error.detail) == ("leased", True)
    store.leases.take(NAME, "pod", until=1e13)
    error = refusal(store, manifest_of(SMALL))
    assert "by pod (leases: 2)" in error.detail


def test_a_refusal_says_who_keeps_a_model_and_how_to_end_it(store: DiskStore, snapshot: Snapshot) -> None:
    protection, leases = store.protection, store.leases
    with pytest.raises(NotFound):
        store.manifests.of(replace(snapshot, manifest="f" * 32))
    protection.check_unused("absent")
    leases.take(NAME, "expired", until=1.0)
    protection.check_unused(NAME)
    leases.take(NAME, "first", until=1e11)
    leases.take(NAME, "", until=2e11)
    refused = refusal(store, manifest_of(SMALL))
    assert refused.code == "leased"
    assert refused.detail == f"{NAME} is leased by an unnamed holder (leases: 2)"
    store.pins.add(NAME)
    refused = refusal(store, manifest_of(SMALL))
    assert (refused.code, f"cachd unpin {NAME}" in refused.hint) == ("pinned", True)
    store.pins.add(NAME, PinnedBy.configuration)
    assert "in the configuration" in refusal(store, manifest_of(SMALL)).hint
    with pytest.raises(InUse):
        protection.check_names_unused([publish(store, SMALL, name="too"), snapshot], manifest_of(SMALL))


def test_a_hold_is_taken_once_and_not_while_a_pod_has_it(store: DiskStore, snapshot: Snapshot) -> None:
    protection, hold = store.protection, store.layout.hold(snapshot.manifest)
    if store.reports_open_files:
        with hold.open("rb"):
            assert not protection.takes_hold(snapshot.manifest)
            with pytest.raises(InUse, match=f"^m is {InUseBy.POD}"):
                protection.take_hold(snapshot.manifest, of="m")
        assert hold.exists()
    protection.take_hold(snapshot.manifest, of="m")
    assert not hold.exists()
