"""What a root knows of its copies of blobs: which are intact, what they cost, and what is kept of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed
from cachd.model import File, Manifest, ModelSpec, Ref
from cachd.store.content.blobs import blocks_of
from cachd.store.copies import Copies, writable
from cachd.store.disk_store import DiskStore
from tests.ground.models import noise
from tests.ground.stored import A, keep, manifest_of, names_below

DATA = "onnx/data"
FILES = {"config.json": b"{}", DATA: noise(10_000, 1)}
MANIFEST = replace(manifest_of(FILES), copied=(DATA,))
PLAIN = manifest_of(FILES)
FILE = next(f for f in MANIFEST.files if f.path == DATA)
SPEC = ModelSpec(Ref.parse("hf://org/model"), "m")
FOLDER = SPEC.hub_folder
STEP = 8 << 20


def free(_: int) -> nullcontext[None]:
    return nullcontext()


@pytest.fixture
def copies(store: DiskStore) -> Copies:
    keep(store, FILES)
    return store.copies


@pytest.fixture
def shown(store: DiskStore, copies: Copies) -> list[Path]:
    """The two copies of a published snapshot: in the plain view, and in the Hub view."""
    store.publish(SPEC, MANIFEST, now=1.0)
    tops = [store.layout.tree(MANIFEST.id), store.layout.commit(FOLDER, A)]
    return [top / DATA for top in tops]


def replaced_by_link(place: Path) -> None:
    place.rename(place.with_name("moved"))
    place.symlink_to("moved")


SPOILT: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "another time": lambda place: os.utime(place, ns=(0, place.stat().st_mtime_ns + 1)),
    "a second link": lambda place: os.link(place, place.with_name("again")),
    "another size": lambda place: cut_with_its_time(place, 9_999),
    "a link": replaced_by_link,
    "no directory": lambda place: place.parent.rename(place.parent.with_name("moved")),
    "a file for its directory": lambda place: (
        place.parent.rename(place.parent.with_name("moved")),
        place.parent.touch(),
    ),
}


def cut_with_its_time(place: Path, size: int) -> None:
    time = place.stat().st_mtime_ns
    os.truncate(place, size)
    os.utime(place, ns=(time, time))


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_copy_is_intact_until_somebody_changes_it(
    copies: Copies, shown: list[Path], spoil: Callable[[Path], object]
) -> None:
    price = 0 if copies.shares_blocks else FILE.size
    place = shown[0]
    place.chmod(0o640)
    assert copies.is_intact(FILE, str(place))
    assert place.stat().st_mode & 0o777 == 0o444, "its mode is restored"
    assert copies.lacking(MANIFEST) == 0
    for directory in (place.parent, place.parent.parent):
        directory.chmod(0o755)
    spoil(place)
    assert not copies.is_intact(FILE, str(place))
    assert copies.lacking(MANIFEST) == price


def test_a_copy_whose_blob_is_gone_is_not_intact(store: DiskStore, copies: Copies, shown: list[Path]) -> None:
    store.content.path(FILE.blob).unlink()
    assert not copies.is_intact(FILE, str(shown[0]))


def test_copies_cost_their_size_in_either_view(copies: Copies) -> None:
    price = 0 if copies.shares_blocks else FILE.size
    assert (copies.lacking(MANIFEST), copies.all_of(MANIFEST)) == (2 * price, 2 * price)
    assert (copies.lacking(PLAIN), copies.all_of(PLAIN)) == (0, 0)
    assert (copies.places(), copies.all_places(), copies.of(MANIFEST.id)) == ([], set(), {})
    assert (copies.taken(MANIFEST.id), copies.is_open(MANIFEST.id)) == (0, False)


def test_copies_are_known_by_snapshot_and_by_blob_also_in_the_next_life(
    store: DiskStore, shown: list[Path], next_life: Callable[[], DiskStore]
) -> None:
    both = sorted(map(str, shown))
    for each in (store.copies, next_life().copies):
        takes = 0 if each.shares_blocks else sum(map(blocks_of, both))
        assert each.of(MANIFEST.id) == dict.fromkeys(both, FILE.blob)
        assert each.of_blob(FILE.blob) == both
        assert each.of_blob(PLAIN.files[0].blob if PLAIN.files[0].path != DATA else PLAIN.files[1].blob) == []
        assert each.all_places() == set(both)
        assert sorted(each.places()) == ([] if each.shares_blocks else both)
        assert each.taken(MANIFEST.id) == takes
        assert each.all_of(MANIFEST) == (0 if each.shares_blocks else 2 * FILE.size)


def test_pods_read_copies_of_the_plain_view_and_blobs(store: DiskStore, copies: Copies) -> None:
    config = next(f for f in MANIFEST.files if f.path == "config.json")
    blob = str(store.content.path(config.blob))
    copy = f"{store.layout.tree(MANIFEST.id)}/{DATA}"
    assert copies.read_by_pods(MANIFEST) == {blob: 2, copy: 10_000}
    assert copies.read_by_pods(PLAIN) == {blob: 2, str(store.content.path(FILE.blob)): 10_000}


def test_an_open_of_a_copy_is_cachds_own_and_one_of_a_blob_is_heard_by_nobody(
    store: DiskStore, copies: Copies, shown: list[Path]
) -> None:
    asked: list[object] = []

    @contextmanager
    def own(paths: object) -> Iterator[None]:
        asked.append(paths)
        yield

    asking = Copies(store.layout, store.content, own)
    with asking.opening(str(shown[0])):
        assert asked == [[str(shown[0])]]
    with asking.opening(str(store.content.path(FILE.blob))):
        assert len(asked) == 1
    assert asking.wrong(FILE, str(shown[0]), lambda _: None) is None
    assert asked[1:] == [[str(shown[0])]]
    asking.is_open(MANIFEST.id)
    assert asked[2:] == [asking.of(MANIFEST.id)]
    asking.is_open("f" * 32)
    assert len(asked) == 3


def test_a_damaged_copy_is_found_and_never_counts_as_intact_again(
    copies: Copies, shown: list[Path], store: DiskStore
) -> None:
    place, time = shown[0], shown[0].stat().st_mtime_ns
    place.chmod(0o644)
    with place.open("r+b") as opened:
        opened.write(b"spoilt")
    os.utime(place, ns=(time, time))
    assert copies.is_intact(FILE, str(place)), "its time says so"
    taken: list[int] = []
    assert "hashes to" in (copies.wrong(FILE, str(place), taken.append) or "")
    assert sum(taken) == FILE.size
    descriptors = sorted(os.listdir("/proc/self/fd"))
    copies.distrust(str(place))
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert (place.stat().st_mtime_ns, copies.is_intact(FILE, str(place))) == (0, False)
    place.parent.chmod(0o755)
    place.unlink()
    assert copies.wrong(FILE, str(place), taken.append) == "it is gone"
    copies.distrust(str(place))
    os.link(store.content.path(FILE.blob), place)
    copies.distrust(str(place))
    assert place.stat().st_mtime_ns == time, "a link to the blob is no copy"


def test_a_snapshot_is_open_while_somebody_reads_one_of_its_copies(
    store: DiskStore, copies: Copies, shown: list[Path]
) -> None:
    if not store.reports_open_files:
        pytest.skip("this file system does not report which files are open")
    for place in shown:
        with place.open("rb"):
            assert copies.is_open(MANIFEST.id)
        assert not copies.is_open(MANIFEST.id)


# --- making ---


def staged_in(store: DiskStore) -> set[str]:
    return {name for name in names_below(store.layout.staging) if name.startswith("copy-")}


def test_copies_are_staged_for_what_is_missing_and_what_is_not_taken_is_removed(
    store: DiskStore, copies: Copies, shown: list[Path]
) -> None:
    with copies.staged(MANIFEST, FOLDER, free):
        assert staged_in(store) == set()
    shown[0].parent.chmod(0o755)
    shown[0].unlink()
    other = SPEC.hub_folder + "-x"
    for folder, count in ((FOLDER, 1), (other, 2)):
        with copies.staged(MANIFEST, folder, free):
            assert len(staged_in(store)) == count
        assert staged_in(store) == set()
    with copies.staged(PLAIN, other, free):
        assert staged_in(store) == set()
    with copies.staged(MANIFEST, FOLDER, free):
        (name,) = staged_in(store)
        inode = (store.layout.staging / name).stat().st_ino
        copies.place(FILE, str(shown[0]))
        copies.place(FILE, str(shown[0]))
        assert (shown[0].stat().st_ino, staged_in(store)) == (inode, set())
    assert copies.is_intact(FILE, str(shown[0]))


def test_of_two_that_stage_the_same_copy_each_removes_its_own(store: DiskStore, copies: Copies) -> None:
    with copies.staged(MANIFEST, FOLDER, free):
        first = staged_in(store)
        with copies.staged(MANIFEST, FOLDER, free):
            assert len(staged_in(store)) == 4
        assert staged_in(store) == first
        copies.place(FILE, str(store.layout.staging / "placed"))
        assert len(staged_in(store)) == 1
    assert staged_in(store) == set()


def test_a_pull_pays_for_a_copy_before_its_bytes_come(store: DiskStore) -> None:
    files = {DATA: bytes(STEP) + b"x"}
    keep(store, files)
    manifest = replace(manifest_of(files), copied=(DATA,))
    paid: list[int] = []

    @contextmanager
    def pay(count: int) -> Iterator[None]:
        paid.append(count)
        yield

    with store.copies.staged(manifest, FOLDER, pay):
        assert paid == ([] if store.copies.shares_blocks else [STEP, 1] * 2)
        made = [store.layout.staging / name for name in staged_in(store)]
        blob = store.content.path(manifest.files[0].blob).stat()
        assert {(each.stat().st_mtime_ns, each.stat().st_mode & 0o777) for each in made} == {
            (blob.st_mtime_ns, 0o444)
        }


def test_a_copy_that_cannot_be_made_or_paid_leaves_nothing(store: DiskStore, copies: Copies) -> None:
    def refuses(_: int) -> nullcontext[None]:
        raise RuntimeError("no")

    if not copies.shares_blocks:
        with pytest.raises(RuntimeError), copies.staged(MANIFEST, FOLDER, refuses):
            pytest.fail("it was not paid")
    store.content.path(FILE.blob).unlink()
    with pytest.raises((DiskFailed, OSError)), copies.staged(MANIFEST, FOLDER, free):
        pytest.fail("there is nothing to copy")
    assert staged_in(store) == set()


# --- which snapshot has which ---


def test_the_folders_that_show_copies_add_up_and_go_with_the_snapshot(
    store: DiskStore, copies: Copies
) -> None:
    directory = store.layout.copies_of(MANIFEST.id)
    copies.record(PLAIN, FOLDER)
    assert not directory.exists()
    copies.record(MANIFEST, "b")
    copies.record(MANIFEST, "a")
    document = json.loads((directory / "places.json").read_text())
    tree = f"models/.trees/{MANIFEST.id}"
    assert document == {
        "shown": [f"hub/a/snapshots/{A}", f"hub/b/snapshots/{A}", tree],
        "files": {DATA: str(FILE.blob)},
    }
    link = directory / f"sha256-{FILE.blob.hex}"
    assert names_below(directory) == {"places.json", link.name}
    assert link.samefile(store.content.path(FILE.blob))
    copies.forget_blob("f" * 32, FILE.blob)
    copies.forget_blob(MANIFEST.id, FILE.blob)
    assert not link.exists()
    copies.settle([MANIFEST.id])
    assert len(copies.of(MANIFEST.id)) == 3
    copies.settle([])
    assert (copies.of(MANIFEST.id), directory.exists()) == ({}, False)
    assert copies.lacking(MANIFEST) == copies.all_of(MANIFEST), "no folder is known any more"


def test_copies_that_another_snapshot_shows_stay_when_one_is_discarded(
    store: DiskStore, copies: Copies, shown: list[Path]
) -> None:
    less: Manifest = replace(manifest_of({DATA: FILES[DATA]}), copied=(DATA,))
    store.publish(ModelSpec(SPEC.ref, "less"), less, now=2.0)
    takes = 0 if copies.shares_blocks else blocks_of(str(shown[0]))
    mode = shown[0].parent.stat().st_mode
    trashed = copies.discard(MANIFEST.id)
    assert list(trashed.values()) == [takes]
    assert all(path.exists() for path in trashed)
    assert [place.exists() for place in shown] == [False, True]
    assert shown[0].parent.stat().st_mode == mode
    assert (copies.of(MANIFEST.id), len(copies.of(less.id))) == ({}, 2)
    assert not store.layout.copies_of(MANIFEST.id).exists()
    assert copies.discard(MANIFEST.id) == {}


def test_a_list_of_copies_that_cannot_be_read_is_told_and_no_other_is_lost(
    store: DiskStore, shown: list[Path], next_life: Callable[[], DiskStore]
) -> None:
    (store.layout.copies / "empty").mkdir()
    (store.layout.copies / "broken").mkdir()
    (store.layout.copies / "broken/places.json").write_text('{"shown": [], "files": {"x": "none"}}')
    with capture_logs() as logs:
        found = Copies(store.layout, store.content, lambda _: nullcontext())
    assert [(each["event"], each["manifest"]) for each in logs] == [("list of copies unreadable", "broken")]
    assert found.all_places() == set(map(str, shown))


@pytest.mark.parametrize("mode", [0o555, 0o755, 0o500])
def test_a_directory_can_be_changed_for_a_moment(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)
    with suppress(RuntimeError), writable(tmp_path):
        assert tmp_path.stat().st_mode & 0o777 == mode | 0o200
        raise RuntimeError
    assert tmp_path.stat().st_mode & 0o777 == mode
    tmp_path.chmod(0o755)


def test_a_file_without_copies_is_no_copy(copies: Copies) -> None:
    absent: File = replace(FILE, path="absent")
    assert not copies.is_intact(absent, "/nowhere/absent")
