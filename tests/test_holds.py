"""Hold files and addresses on the disk: made, kept, taken, whatever happens at the same moment."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import InUse
from cachd.model import ModelSpec, Ref, Snapshot
from cachd.pod.mount import Mount
from cachd.store.disk_store import DiskStore
from cachd.store.holds import Holds
from cachd.store.layout import Layout
from cachd.store.root import make_directories
from tests.faults.children import in_child
from tests.ground import mount
from tests.ground.models import noise
from tests.ground.stored import A, B, keep, manifest_of, publish
from tests.ground.synced import synced


def revision(number: int) -> dict[str, bytes]:
    """A model whose files all differ from those of its other revisions."""
    return {"config.json": b"{%d}" % number, "model.safetensors": noise(30_000, number)}


@pytest.fixture
def store(root: Path) -> Iterator[DiskStore]:
    with DiskStore(root) as opened:
        yield opened


WAYS: dict[str, Callable[[DiskStore, Snapshot], object]] = {
    "removed": lambda store, snapshot: store.withdraw(snapshot.name),
    "evicted": lambda store, snapshot: store.evict(snapshot.manifest),
    "evicted without a name": lambda store, snapshot: store.evict(replaced(store, snapshot)),
    "swept": lambda store, snapshot: store.drop(replaced(store, snapshot)),
}


def replaced(store: DiskStore, snapshot: Snapshot) -> str:
    """Let the snapshot's name lead to another; the one before."""
    publish(store, revision(2), revision=B)
    return snapshot.manifest


@pytest.mark.parametrize("go", WAYS.values(), ids=WAYS)
def test_who_opens_the_hold_file_at_the_moment_the_snapshot_goes_does_not_believe_to_hold_it(
    store: DiskStore, monkeypatch: pytest.MonkeyPatch, go: Callable[[DiskStore, Snapshot], object]
) -> None:
    snapshot = publish(store, revision(1))
    hold, unlink = store.layout.hold(snapshot.manifest), os.unlink
    held: list[int | None] = []
    late = threading.Thread(target=lambda: held.append(Mount(store.layout.root).open_hold(snapshot.manifest)))

    def slow_unlink(path: str | Path, **more: int) -> None:
        if Path(path) == hold and not late.ident:
            late.start()
            late.join(0.3)  # either it opens the file at once, or it waits for us
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", slow_unlink)
    go(store, snapshot)
    late.join(30)
    assert held == [None]
    assert not store.layout.tree(snapshot.manifest).exists()


@pytest.mark.parametrize("go", WAYS.values(), ids=WAYS)
def test_who_opened_the_hold_file_before_keeps_the_snapshot(
    store: DiskStore, go: Callable[[DiskStore, Snapshot], object]
) -> None:
    """Promised: A model that a pod holds is not removed, evicted or swept until the pod ends, even if all
    its files are closed."""
    snapshot = publish(store, revision(1))
    held = Mount(store.layout.root).open_hold(snapshot.manifest)
    assert held is not None
    with suppress(InUse):
        assert go(store, snapshot) == 0
    tree = store.layout.tree(snapshot.manifest)
    assert {path.name: path.read_bytes() for path in tree.iterdir()} == revision(1)
    assert mount.wrong(store.layout.root) == mount.left_over(store.layout.root) == []
    os.close(held)
    assert store.evict(snapshot.manifest) > 0


# --- hold files and addresses on the disk ---


def test_each_snapshot_has_a_hold_file_of_its_own_where_they_share_files(store: DiskStore) -> None:
    shared = {"config.json": b"{}"}
    first, second = publish(store, shared, "hf://org/a"), publish(store, shared, "hf://org/b")
    config = store.layout.tree(first.manifest) / "config.json"
    assert config.samefile(store.layout.tree(second.manifest) / "config.json")
    held = Mount(store.layout.root).open_hold(first.manifest)
    assert held is not None
    assert store.protection.is_in_use(store.manifests.of(first))
    assert not store.protection.is_in_use(store.manifests.of(second))
    os.close(held)


def test_a_snapshot_published_again_is_held_by_the_same_file(store: DiskStore) -> None:
    snapshot = publish(store, revision(1))
    inode = store.layout.hold(snapshot.manifest).stat().st_ino
    held = os.open(store.layout.hold(snapshot.manifest), os.O_RDONLY)
    publish(store, revision(1), now=2.0)
    assert store.layout.hold(snapshot.manifest).stat().st_ino == inode
    assert store.protection.is_in_use(store.manifests.of(snapshot))
    os.close(held)


def test_a_root_of_an_older_cachd_gets_hold_files_and_addresses_at_the_start(root: Path) -> None:
    with DiskStore(root) as store:
        publish(store, revision(1))
        replaced(store, publish(store, revision(1)))
        expected = mount.holds(root)
        assert len(expected) == 2
    for path in (*(root / "models/.holds").iterdir(), *(root / "models").glob("*@*")):
        path.unlink()
    (root / "models/.holds").rmdir()
    ready = root / "ready/org--model.json"
    old = json.loads(ready.read_bytes())
    del old["immutable_path"]
    ready.write_text(json.dumps(old))
    with DiskStore(root, keep_previous=1) as store:
        assert mount.holds(root) == expected
        assert mount.addresses(root) == {f"org--model@{B}": old["manifest"]}
        assert mount.left_over(root) == []


@pytest.mark.parametrize("gone", ["models/.holds/ID", "models/ADDRESS"])
def test_what_pods_hold_a_model_by_is_made_anew_where_somebody_deleted_it(
    store: DiskStore, gone: str
) -> None:
    snapshot = publish(store, revision(1))
    path = store.layout.root / gone.replace("ID", snapshot.manifest).replace("ADDRESS", snapshot.address)
    path.unlink()
    assert store.check(snapshot.name, now=2.0) is None
    assert mount.wrong(store.layout.root) == []


def test_a_hold_file_or_an_address_that_leads_nowhere_is_removed_at_the_start(root: Path) -> None:
    with DiskStore(root) as store:
        publish(store, revision(1))
        expected = mount.holds(root), mount.addresses(root)
    (root / "models/.holds" / ("f" * 32)).touch()
    (root / f"models/org--model@{B}").symlink_to(".trees/" + "f" * 32)
    with DiskStore(root):
        assert (mount.holds(root), mount.addresses(root)) == expected


def test_what_is_not_cachds_and_looks_like_an_address_is_left_alone(root: Path) -> None:
    (root / "models").mkdir()
    (root / f"models/org--model@{A}").mkdir()
    (root / "models/mine@home").write_text("mine")
    with DiskStore(root) as store:
        snapshot = publish(store, revision(1))
        assert snapshot.address == f"org--model@{A}-{snapshot.manifest[:8]}"
        assert mount.wrong(root) == []
        store.withdraw(snapshot.name)
    with DiskStore(root):
        assert {path.name for path in (root / "models").glob("*@*")} == {f"org--model@{A}", "mine@home"}


def test_current_and_previous_snapshots_of_a_name_have_addresses_until_they_go(root: Path) -> None:
    with DiskStore(root, keep_previous=1) as store:
        first = publish(store, revision(1), revision=A)
        second = publish(store, revision(2), revision=B)
        assert mount.addresses(root) == {
            f"org--model@{A}": first.manifest,
            f"org--model@{B}": second.manifest,
        }
    with DiskStore(root, keep_previous=1) as store:
        assert len(mount.addresses(root)) == 2
        assert (root / f"models/org--model@{A}/config.json").read_bytes() == revision(1)["config.json"]
        assert store.rollback("org--model", now=3.0).address == f"org--model@{A}"
        store.withdraw("org--model")
        assert mount.addresses(root) == {}
        assert mount.holds(root) == set()


def test_an_address_stays_while_another_name_keeps_its_snapshot(store: DiskStore, root: Path) -> None:
    one, two = publish(store, revision(1), name="one"), publish(store, revision(1), name="two")
    assert one.manifest == two.manifest
    store.withdraw("one")
    assert mount.addresses(root) == {f"one@{A}": one.manifest, f"two@{A}": one.manifest}
    store.withdraw("two")
    assert mount.addresses(root) == {}


def published_as(store: DiskStore, base: str, number: int, **patterns: Any) -> Snapshot:
    """Publish a revision as `m`, as one repository and one choice of its files have it."""
    keep(store, revision(number))
    spec = ModelSpec(Ref.parse(base), "m", **patterns)
    return store.publish(spec, manifest_of(revision(number), base=base, revision=A), now=1.0)


def test_patterns_make_an_address_of_their_own(store: DiskStore, root: Path) -> None:
    narrowed = published_as(store, "hf://org/a", 1, exclude=("*.bin",))
    assert narrowed.address == f"m@{A}-{narrowed.manifest[:8]}"
    assert mount.addresses(root) == {narrowed.address: narrowed.manifest}


def test_an_address_leads_to_what_it_led_to_though_the_name_has_the_same_revision_of_another_source(
    store: DiskStore, root: Path
) -> None:
    first = published_as(store, "hf://org/a", 1)
    held = os.open(store.layout.hold(first.manifest), os.O_RDONLY)
    second = published_as(store, "hf://org/b", 2)
    assert (first.address, second.address) == (f"m@{A}", f"m@{A}-{second.manifest[:8]}")
    assert mount.addresses(root) == {first.address: first.manifest, second.address: second.manifest}
    assert mount.wrong(root) == []
    os.close(held)


def without_leases() -> None:
    """Let the kernel refuse this process all leases from here on, as a file system does that has none."""
    fcntl_call, f_setlease, offset_of_command = {"x86_64": 72, "aarch64": 25}[platform.machine()], 1024, 24
    load, equal, answer = 0x20, 0x15, 0x06  # man 2 seccomp; linux/filter.h
    refuse, allow = 0x00050000 | errno.EINVAL, 0x7FFF0000
    steps = [
        (load, 0, 0, 0),
        (equal, 0, 3, fcntl_call),
        (load, 0, 0, offset_of_command),
        (equal, 0, 1, f_setlease),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, program) == 0  # a filter


def test_a_held_snapshot_stays_whole_in_the_hub_view_when_others_of_its_commit_go(
    store: DiskStore, root: Path
) -> None:
    wide, narrow = revision(1), {"config.json": revision(1)["config.json"]}
    first = publish(store, wide)
    held = os.open(store.layout.hold(first.manifest), os.O_RDONLY)
    publish(store, narrow, now=2.0)
    shown = root / "hub/models--org--model/snapshots" / A
    listing = root / f"hub/models--org--model/trees/{A}.json"
    store.withdraw("org--model")
    assert {path.name: path.read_bytes() for path in shown.iterdir()} == wide
    assert json.loads(listing.read_text())["files"].keys() == wide.keys()
    os.close(held)
    store.sweep_snapshots()
    assert not shown.exists()


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"),
    reason="the filter of system calls has the numbers of x86-64 and arm64",
)
def test_where_the_kernel_tells_no_use_a_hold_protects_nothing_and_that_is_said(root: Path) -> None:
    def life() -> list[str]:
        without_leases()
        found = []
        with DiskStore(root) as store:
            snapshot = publish(store, revision(1))
            held = Mount(root).open_hold(snapshot.manifest)
            found += ["it tells use"] if store.reports_open_files else []
            found += ["in use"] if store.protection.is_in_use(store.manifests.of(snapshot)) else []
            store.withdraw(snapshot.name)
            return found + ([] if held else ["not held"]) + mount.left_over(root)

    ended = in_child(life)
    assert not ended.killed
    assert ended.told == []


# --- hold files by themselves ---


@pytest.fixture
def layout(root: Path) -> Layout:
    make_directories(root)
    return Layout(root)


def test_a_hold_file_is_made_once_readable_by_everybody_and_durable(layout: Layout) -> None:
    holds, hold = Holds(layout), layout.hold("1" * 32)
    (layout.staging / f"{'1' * 32}.hold").write_text("left by a crash")
    with synced() as paths:
        holds.make("1" * 32)
    assert paths == [str(layout.staging / f"{'1' * 32}.hold"), str(layout.holds)]
    assert (hold.stat().st_mode & 0o777, hold.read_bytes()) == (0o444, b"")
    inode = hold.stat().st_ino
    with synced() as paths:
        holds.make("1" * 32)
    assert (paths, hold.stat().st_ino) == ([], inode)
    for _ in range(2):
        holds.remove("1" * 32)
        assert not hold.exists()


def test_a_hold_file_that_cannot_be_moved_into_its_place_leaves_nothing(layout: Layout) -> None:
    layout.holds.rmdir()
    with pytest.raises(FileNotFoundError):
        Holds(layout).make("1" * 32)
    assert list(layout.staging.iterdir()) == []
    layout.holds.touch()
    with pytest.raises(NotADirectoryError):
        Holds(layout).settle([])


def test_a_start_gives_exactly_the_recorded_snapshots_a_hold_file(layout: Layout) -> None:
    holds = Holds(layout)
    kept, gone, new = ("1" * 32, "2" * 32, "3" * 32)
    for each in (kept, gone):
        holds.make(each)
    inode = layout.hold(kept).stat().st_ino
    (layout.holds / "directory").mkdir()
    holds.settle([kept, new])
    assert {path.name for path in layout.holds.iterdir()} == {kept, new, "directory"}
    assert layout.hold(kept).stat().st_ino == inode
