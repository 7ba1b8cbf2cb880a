"""What the next daemon makes of a root: the truth is on the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from tests.ground import mount
from tests.ground.models import noise
from tests.ground.stored import (
    KIB,
    ONE,
    SMALL,
    TWO,
    A,
    B,
    C,
    assert_nothing_left,
    assert_whole,
    manifest_file,
    names_below,
    publish,
    swept_bytes,
)
from tests.ground.users import as_another_user


def lie(**members: object) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        ready = root / "ready/org--model.json"
        document = json.loads(ready.read_text())
        ready.write_text(json.dumps({**document, **members}))

    return change


def relink(root: Path, target: str) -> None:
    (root / "models/org--model").unlink()
    (root / "models/org--model").symlink_to(target)


def remove_tree_of(root: Path) -> None:
    tree = (root / "models/org--model").resolve()
    for directory, _, _ in os.walk(tree):
        os.chmod(directory, 0o755)
    subprocess.run(["rm", "-rf", tree], check=True)


LIES: dict[str, Callable[[Path], object]] = {
    "no link": lambda root: (root / "models/org--model").unlink(),
    "its link is elsewhere": lambda root: relink(root, ".trees/" + "0" * 32),
    "its link is absolute": lambda root: relink(root, str((root / "models/org--model").resolve())),
    "no tree": remove_tree_of,
    "no manifest": lambda root: manifest_file(root).unlink(),
    "a garbage manifest": lambda root: manifest_file(root).write_text("{"),
    "a manifest of nothing": lambda root: manifest_file(root).write_text("{}"),
    "a manifest that is a list": lambda root: manifest_file(root).write_text("[]"),
    "empty": lambda root: (root / "ready/org--model.json").write_text(""),
    "garbage": lambda root: (root / "ready/org--model.json").write_text("{"),
    "binary": lambda root: (root / "ready/org--model.json").write_bytes(noise(100)),
    "a list": lambda root: (root / "ready/org--model.json").write_text("[]"),
    "nothing": lambda root: (root / "ready/org--model.json").write_text("{}"),
    "another name": lie(name="other"),
    "no ref": lie(ref=None),
    "another manifest": lie(manifest="0" * 32),
    "no date": lie(published_at=None),
    "no number": lie(bytes="many"),
    "no number but infinity": lie(bytes=float("inf")),
    "no hub": lie(hub=None),
    "a file that it has not": lie(file="models/org--model/nothing"),
    "a file of another model": lie(file="models/org--other/config.json"),
    "a file that climbs": lie(file="models/org--model/../org--other/config.json"),
    "a number for a file": lie(file=1),
    "its file under another name": lambda root: (root / "ready/org--model.json").rename(
        root / "ready/x.json"
    ),
}


@pytest.mark.parametrize("change", LIES.values(), ids=LIES.keys())
def test_a_ready_file_that_lies_is_withdrawn_and_the_model_can_be_pulled_again(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore], change: Callable[[Path], object]
) -> None:
    publish(store, ONE)
    publish(store, SMALL, "hf://org/other", revision=C)
    change(root)
    store = next_life()
    assert [snapshot.name for snapshot in store.names.all()] == ["org--other"]
    assert names_below(root / "ready") == {"org--other.json"}
    store.sweep_snapshots()
    publish(store, ONE)
    assert_whole(root, "org--model", ONE, commit=A)
    assert_whole(root, "org--other", SMALL, commit=C, repo="org/other")


def test_unreadable_manifests_do_not_keep_the_others_from_being_swept(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    for number, garbage in enumerate(["{", "{}", "[]", "", '{"base": 1, "revision": 2, "files": [3]}']):
        (root / f".cachd/manifests/{number:032}.json").write_text(garbage)
    publish(store, ONE, revision=A)
    store = next_life()
    publish(store, TWO, revision=B)
    assert store.sweep_snapshots() == swept_bytes(ONE, TWO)


def test_a_model_whose_manifest_became_unreadable_can_still_be_withdrawn(
    store: DiskStore, root: Path
) -> None:
    publish(store, ONE)
    manifest_file(root).write_text("{")
    store.withdraw("org--model", force=True)
    assert names_below(root / "ready") == set()
    assert mount.names(root) == set()
    publish(store, ONE)
    assert_whole(root, "org--model", ONE, commit=A)


def test_a_name_without_a_ready_file_is_removed(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, ONE)
    (root / "ready/org--model.json").unlink()
    store = next_life()
    assert mount.names(root) == set()
    assert store.sweep_snapshots() > 0
    assert_nothing_left(root)


def test_what_a_cut_off_life_was_building_or_deleting_is_gone(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, ONE)
    for place in (root / ".cachd/staging", root / ".cachd/trash"):
        (place / "dir/sub").mkdir(parents=True)
        (place / "dir/sub/file").write_bytes(b"x")
        (place / "dir/sub").chmod(0o500)
        (place / "file").write_bytes(b"x")
        (place / "link").symlink_to(root / "models/org--model")
    next_life()
    for place in (root / ".cachd/staging", root / ".cachd/trash"):
        assert names_below(place) == set()
    assert_whole(root, "org--model", ONE, commit=A)


def test_pending_pulls_are_remembered_until_they_are_forgotten(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    pending = [
        ModelSpec(Ref.parse("hf://org/model@main"), "a", ("*.safetensors",), ("*.bin",)),
        ModelSpec(Ref.parse("s3://bucket/prefix/"), "b"),
    ]
    for spec in pending:
        store.pending.remember(spec)
        store.pending.remember(spec)
    (root / ".cachd/pending/garbage.json").write_text("{")
    (root / ".cachd/pending/list.json").write_text("[]")
    store = next_life()
    assert [found.spec for found in store.pending.all()] == pending
    assert names_below(root / ".cachd/pending") == {"a.json", "b.json"}
    store.pending.forget("a")
    store.pending.forget("a")
    assert [found.spec for found in next_life().pending.all()] == pending[1:]


def test_a_store_of_300_models_is_opened_without_reading_them(root: Path) -> None:
    files = {"model.bin": noise(256 * KIB)}
    names = [f"model-{number:03}" for number in range(300)]
    with DiskStore(root) as store:
        for name in names:
            publish(store, files, name=name)
    before = bytes_read()
    with DiskStore(root) as store:
        assert [snapshot.name for snapshot in store.names.all()] == names
    assert bytes_read() - before < 300 * 8 * KIB


def bytes_read() -> int:
    """Bytes this process has asked of the kernel so far (man 5 proc, /proc/pid/io)."""
    told = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(told["rchar"])


def test_the_sweep_after_a_pull_reads_no_manifest_but_those_it_may_remove(root: Path) -> None:
    with DiskStore(root, keep_previous=1) as store:
        for number in range(20):
            publish(store, SMALL, f"hf://org/model-{number}")
        publish(store, ONE, name="m", revision=A)
        replaced = publish(store, TWO, name="m", revision=B)
        before = bytes_read()
        assert store.sweep_snapshots() == 0
        assert bytes_read() - before < 400  # /proc/self/io itself
        publish(store, SMALL, name="m", revision=C)
        publish(store, ONE, name="m", revision=A)
        before = bytes_read()
        assert store.sweep_snapshots(keep=["hf://org/model"]) == 0
        assert bytes_read() - before < 2 * store.layout.manifest(replaced.manifest).stat().st_size + 400


def test_a_start_opens_no_blob() -> None:
    """The daemon's own user may not, and everything is ready all the same."""
    with as_another_user() as place:
        with DiskStore(place) as store:
            publish(store, ONE, revision=A)
            publish(store, SMALL, "hf://org/other", revision=C)
        for blob in (place / ".cachd/blobs").glob("*/*"):
            blob.chmod(0)
            with pytest.raises(PermissionError):
                blob.read_bytes()
        with DiskStore(place) as store:
            assert [snapshot.name for snapshot in store.names.all()] == ["org--model", "org--other"]
            assert store.sweep_snapshots() == 0


def test_the_work_of_a_start_grows_with_the_models_and_no_faster(tmp_path: Path) -> None:
    work = []
    for count in (60, 120):
        root = tmp_path / str(count)
        root.mkdir(mode=0o755)
        with DiskStore(root) as store:
            for number in range(count):
                publish(store, {"model.bin": b"same"}, f"hf://org/model-{number}")
        work.append(calls_of(lambda root=root: opened_and_swept(root)))
    assert work[1] < 2.1 * work[0]


def opened_and_swept(root: Path) -> None:
    with DiskStore(root) as store:
        store.sweep_snapshots()


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called, Python's and C's."""
    count = 0

    def seen(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event.endswith("call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count
