"""Which change of a root concerns which models, and which open is a use. The kernel reports both at once."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cachd.kernel import inotify
from cachd.model import Snapshot
from cachd.store.content.blobs import inode_of
from cachd.store.disk_store import DiskStore
from cachd.store.ingest.part_lines import parts_of
from cachd.store.watch import ViewChanges, Watch, Watched, _Directory, _Kind, _Queue, _reason_of
from tests.ground.stored import SMALL, A, B, hub, manifest_of, publish

PATH = "dir/model.bin"
FILE = next(f for f in manifest_of(SMALL).files if f.path == PATH)
FOLDER = "models--org--model"


class Place:
    """A published model and the paths that lead to it."""

    def __init__(self, store: DiskStore, snapshot: Snapshot) -> None:
        self.root, self.manifest, layout = store.layout.root, snapshot.manifest, store.layout
        self.link, self.ready = layout.model(snapshot.name), layout.ready_file(snapshot.name)
        self.address, self.tree = layout.address(snapshot.address), layout.tree(snapshot.manifest)
        self.repo, self.blob = hub(self.root), store.content.path(FILE.blob)
        self.commit = self.repo / "snapshots" / A


@pytest.fixture
def place(store: DiskStore) -> Place:
    snapshot = publish(store, SMALL, name="m")
    store.watch_all()
    return Place(store, snapshot)


@pytest.fixture
def watch(store: DiskStore, place: Place) -> Watch:
    assert place.link.is_symlink()
    assert not store.watch.changes()
    return store.watch


def write(path: Path) -> None:
    path.chmod(0o644)
    with path.open("r+b") as opened:
        opened.write(b"x")


def remade(path: Path) -> None:
    path.rename(path.with_name("moved"))


def written(place: Place, top: Path) -> set[tuple[str, str, str]]:
    return {(place.manifest, PATH, f"{top}/{PATH}")}


Expected = Callable[[Place], ViewChanges]
CHANGES: dict[str, tuple[Callable[[Place], object], Expected]] = {
    "a name": (lambda p: p.link.unlink(), lambda _: ViewChanges(names={"m"})),
    "an address": (lambda p: p.address.unlink(), lambda _: ViewChanges(names={"m"})),
    "a ready file": (lambda p: p.ready.write_text("x"), lambda _: ViewChanges(names={"m"})),
    "another ready file": (
        lambda p: p.ready.rename(p.ready.with_name("n.json")),
        lambda _: ViewChanges(names={"m", "n"}),
    ),
    "a tree": (
        lambda p: p.tree.with_name("f" * 32).mkdir() or p.tree.with_name("f" * 32).rmdir(),
        lambda _: ViewChanges(manifests={"f" * 32}),
    ),
    "the mode of a file": (
        lambda p: (p.tree / PATH).chmod(0o640),
        lambda p: ViewChanges(manifests={p.manifest}),
    ),
    "bytes in a tree": (
        lambda p: write(p.tree / PATH),
        lambda p: ViewChanges(manifests={p.manifest}, written=written(p, p.tree)),
    ),
    "bytes in the Hub view": (
        lambda p: write(p.commit / PATH),
        lambda p: ViewChanges(manifests={p.manifest}, written=written(p, p.commit)),
    ),
    "bytes of a blob": (lambda p: write(p.blob), lambda _: ViewChanges(blobs={FILE.blob})),
    "part hashes": (lambda p: parts_of(p.blob).write_text("x"), lambda _: ViewChanges()),
    "a branch": (
        lambda p: (p.repo / "refs/main").unlink(),
        lambda _: ViewChanges(folders={FOLDER}),
    ),
    "the commits": (
        lambda p: (p.repo / "snapshots/x").mkdir() or (p.repo / "snapshots/x").rmdir(),
        lambda _: ViewChanges(folders={FOLDER}),
    ),
    "another folder": (
        lambda p: p.repo.with_name("other").mkdir() or p.repo.with_name("other").rmdir(),
        lambda _: ViewChanges(folders={"other"}),
    ),
    "a view": (lambda p: remade(p.root / "ready"), lambda _: ViewChanges(everything=True)),
    "the mode of a view": (lambda p: p.ready.parent.chmod(0o700), lambda _: ViewChanges(everything=True)),
    "all trees": (lambda p: remade(p.tree.parent), lambda _: ViewChanges(everything=True, names={"moved"})),
    "a file in the root": (lambda p: (p.root / "x").write_text("x"), lambda _: ViewChanges()),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES.keys())
def test_a_change_says_what_to_check_and_nothing_else(
    watch: Watch, place: Place, change: Callable[[Place], object], expected: Expected
) -> None:
    change(place)
    found = watch.changes()
    assert found == expected(place)
    assert bool(found) == (expected(place) != ViewChanges())
    assert watch.changes() == ViewChanges(), "each is reported once"


def test_the_files_that_somebody_wrote_into_are_one_for_each_blob(place: Place) -> None:
    manifests = [(place.manifest, manifest_of(SMALL)), ("other", manifest_of(SMALL))]
    assert ViewChanges().files_written(manifests, ()) == []
    in_tree = ViewChanges(written=written(place, place.tree))
    assert in_tree.files_written(manifests, ()) == [FILE]
    assert in_tree.files_written(manifests, (f"{place.tree}/{PATH}",)) == []
    assert in_tree.files_written(manifests[1:], ()) == []
    for changes in (ViewChanges(blobs={FILE.blob}), replace(in_tree, blobs={FILE.blob})):
        assert changes.files_written(manifests, (f"{place.tree}/{PATH}",)) == [FILE]


def test_a_snapshot_that_is_left_is_watched_no_more_and_a_shared_directory_is(
    store: DiskStore, watch: Watch, place: Place
) -> None:
    before = watch.watched()
    assert (before.unwatched, before.reason) == (0, "")
    assert before.directories > 8
    other = publish(store, {"x": b"x"}, "hf://org/model@v1", "n", revision=B)
    assert watch.watched().directories > before.directories
    watch.changes()
    watch.leave(other.manifest)
    (store.layout.tree(other.manifest) / "x").chmod(0o640)
    assert watch.changes().manifests == set()
    (place.tree / PATH).chmod(0o640)
    (place.repo / "refs/main").write_text(A)
    assert (watch.changes().manifests, watch.changes().folders) == ({place.manifest}, set())
    watch.keep_only([place.manifest])
    kept = watch.watched().directories
    watch.keep_only([])
    (place.tree / PATH).chmod(0o444)
    assert watch.changes() == ViewChanges()
    assert 0 < watch.watched().directories < kept
    place.link.unlink()
    assert watch.changes().names == {"m"}, "what all snapshots share stays watched"


def test_nothing_is_watched_before_the_start_and_after_the_end(store: DiskStore) -> None:
    snapshot = publish(store, SMALL, name="m")
    watch, manifest = store.watch, manifest_of(SMALL)
    assert (watch.watched(), watch.sees_all_opens()) == (Watched(0, 0, ""), False)
    store.layout.model("m").unlink()
    assert watch.changes() == ViewChanges()
    watch.start()
    assert watch.watched() == Watched(5, 0, ""), "what all snapshots share"
    watch.cover(manifest, [FOLDER])
    assert watch.sees_all_opens()
    watched = watch.watched()
    watch.start()
    watch.cover(manifest, [FOLDER])
    assert watch.watched() == watched
    descriptors = len(os.listdir("/proc/self/fd"))
    watch.close()
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 2
    assert (watch.watched().directories, watch.sees_all_opens()) == (0, False)
    watch.cover(manifest, [FOLDER])
    assert (watch.changes(), watch.opened_at(snapshot.manifest, 1.0)) == (ViewChanges(), None)


def test_a_directory_that_is_absent_is_no_reason_to_complain_and_is_watched_once_it_is_there(
    store: DiskStore, place: Place, watch: Watch
) -> None:
    manifest, before = manifest_of(SMALL), watch.watched()
    place.tree.chmod(0o755)
    (place.tree / "dir").rename(place.tree / "moved")
    watch.cover(manifest, [FOLDER])
    gone = watch.watched()
    assert (gone.directories, gone.unwatched) == (before.directories - 1, 0)
    (place.tree / "dir").mkdir()
    (place.tree / PATH).write_bytes(b"x")
    watch.cover(manifest, [FOLDER])
    assert watch.watched() == before
    watch.changes()
    assert watch.watched() == before, "the end of the earlier watch ends no later one"
    write(place.tree / PATH)
    assert watch.changes().written == written(place, place.tree)
    assert inode_of(place.tree / PATH)


# --- opens ---


def opened(path: Path) -> None:
    path.open("rb").close()


def test_an_open_in_either_view_is_a_use_of_its_snapshot(
    watch: Watch, place: Place, store: DiskStore
) -> None:
    assert watch.opened_at(place.manifest, 1.0) is None
    for now, top in ((2.0, place.tree), (3.0, place.commit), (4.0, place.link), (5.0, place.address)):
        opened(top / PATH)
        assert watch.opened_at(place.manifest, now) == now
    assert watch.opened_at(place.manifest, 9.0) == 5.0, "nobody opened it since"
    opened(place.tree / PATH)
    watch.note_opens(10.0)
    assert store.usage_log.opened_at(place.manifest) == 10.0
    assert watch.changes() == ViewChanges(), "an open changes nothing"
    assert not watch.lost_opens()


@pytest.mark.parametrize("below", ["", "dir"])
def test_who_lists_a_directory_uses_nothing(watch: Watch, place: Place, below: str) -> None:
    os.listdir(place.tree / below)
    os.listdir(place.tree)
    opened(place.blob)
    assert watch.opened_at(place.manifest, 1.0) is None


def test_only_those_opens_that_cachd_names_are_its_own(watch: Watch, place: Place) -> None:
    with watch.own_opens([f"{place.tree}/{PATH}"]):
        opened(place.tree / PATH)
    assert watch.opened_at(place.manifest, 1.0) is None
    opened(place.tree / PATH)
    with watch.own_opens([f"{place.tree}/{PATH}"]):
        pass
    assert watch.opened_at(place.manifest, 2.0) == 2.0, "it was opened before"
    with watch.own_opens([f"{place.tree}/{PATH}"]):
        opened(place.tree / "config.json")
    assert watch.opened_at(place.manifest, 3.0) == 3.0


def test_opens_that_the_kernel_dropped_are_told_once(watch: Watch, place: Place) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    both = [place.tree / PATH, place.tree / "config.json"]  # the kernel merges equal events in a row
    for number in range(most + 1):
        opened(both[number % 2])
    watch.note_opens(1.0)
    assert [watch.lost_opens(), watch.lost_opens()] == [True, False]


# --- one queue ---


def test_a_queue_watches_so_many_directories_and_each_of_them_again(tmp_path: Path) -> None:
    places = [tmp_path / name for name in ("a", "b", "c")]
    for each in places:
        each.mkdir()
    a, b, c = (_Directory(str(each), _Kind.FOLDER, each.name) for each in places)
    with closing(_Queue(inotify.DELETE, 2)) as queue:
        for directory in (a, b, a, b):
            queue.add(directory)
        with pytest.raises(OSError, match="no more than 2") as refused:
            queue.add(c)
        assert (refused.value.errno, queue.count) == (errno.ENOSPC, 2)
        places[0].rmdir()
        assert list(queue.read()) == []
        assert queue.count == 1, "a directory that is gone makes room"
        queue.add(c)
        queue.remove(b.path)
        queue.remove(b.path)
        assert queue.count == in_kernel() == 1
        (places[2] / "x").mkdir()
        (places[2] / "x").rmdir()
        (places[1] / "x").mkdir()
        (places[1] / "x").rmdir()
        assert [(directory, event.name) for directory, event in queue.read()] == [(c, "x")]


def test_a_new_directory_at_a_watched_path_is_watched_instead(tmp_path: Path) -> None:
    directory = _Directory(str(tmp_path / "a"), _Kind.FOLDER)
    with closing(_Queue(inotify.DELETE, 2)) as queue:
        for name in ("first", "second"):
            (tmp_path / "a").mkdir()
            queue.add(directory)
            (tmp_path / "a").rename(tmp_path / name)
        (tmp_path / "a").mkdir()
        queue.add(directory)
        for name in ("first", "second", "a"):
            (tmp_path / name / name).touch()
            (tmp_path / name / name).unlink()
        assert [event.name for _, event in queue.read()] == ["a"]
        assert queue.count == in_kernel() == 1


def in_kernel() -> int:
    """How many directories the kernel watches for this process (man 5 proc: fdinfo)."""
    count = 0
    for each in Path("/proc/self/fdinfo").iterdir():
        with suppress(FileNotFoundError):
            count += each.read_text().count("inotify wd:")
    return count


def test_what_the_kernel_refuses_to_watch_is_told_until_nobody_needs_it(watch: Watch, place: Place) -> None:
    manifest, before = manifest_of(SMALL), watch.watched()
    watch.cover(manifest, ["x" * 300])
    refused = watch.watched()
    assert (refused.directories, refused.reason) == (before.directories, "File name too long")
    assert (refused.unwatched, watch.sees_all_opens()) == (5, False)
    watch.leave(place.manifest)
    assert (watch.watched().unwatched, watch.watched().reason) == (0, "")
    assert watch.sees_all_opens()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "full"), "full (sysctl fs.inotify.max_user_watches)"),
        (OSError(errno.EMFILE, "many"), "many (sysctl fs.inotify.max_user_instances)"),
        (OSError(errno.EACCES, "closed"), "closed"),
        (OSError("odd"), "odd"),
    ],
)
def test_the_reason_names_the_limit_that_an_administrator_can_raise(error: OSError, reason: str) -> None:
    assert _reason_of(error) == reason
