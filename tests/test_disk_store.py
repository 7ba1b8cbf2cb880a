"""A root is opened as a store only if it is one, and closed so that the next process can open it."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import pytest

from cachd.errors import DiskFailed, InUse, Invalid, NoSpace, TooBig
from cachd.model import Extent
from cachd.store.disk_store import DiskStore
from cachd.store.overhead import beside_file
from cachd.store.space import bytes_beside
from tests.ground.models import noise
from tests.ground.stored import (
    CONTENT,
    KIB,
    SMALL,
    A,
    B,
    file_of,
    keep,
    manifest_of,
    names_below,
    publish,
)

FILES = {"here": noise(8 * KIB, 1), "begun": CONTENT, "absent": noise(8 * KIB, 2)}


def inventory(root: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(root)): (p.lstat().st_mode, p.lstat().st_ino) for p in root.rglob("*")}


def test_a_root_of_a_newer_format_is_left_as_it_is(root: Path) -> None:
    DiskStore(root).close()
    (root / ".cachd/format").write_text("cachd 2\n")
    (root / ".cachd/pending").rmdir()  # that version may have no such directory
    before = inventory(root)
    with pytest.raises(Invalid) as refusal:
        DiskStore(root)
    assert refusal.value.code == "bad_format"
    assert inventory(root) == before


def test_a_root_on_a_smaller_disk_than_intended_is_left_as_it_is(root: Path) -> None:
    size = os.statvfs(root).f_blocks * os.statvfs(root).f_frsize
    with pytest.raises(DiskFailed) as refusal:
        DiskStore(root, disk_at_least=size + 1)
    assert (refusal.value.code, refusal.value.facts) == ("disk_too_small", {"size": size})
    assert list(root.iterdir()) == []
    DiskStore(root, disk_at_least=size).close()


def test_the_lock_names_its_process_until_the_store_is_closed(root: Path) -> None:
    lock = root / ".cachd/lock"
    with DiskStore(root) as store:
        assert lock.read_text().startswith(f"pid {os.getpid()} on ")
        with pytest.raises(InUse):
            DiskStore(root)
        assert store.names.all() == []
    assert lock.read_bytes() == b""
    DiskStore(root).close()


def test_what_is_missing_or_begun_needs_space_and_what_is_here_does_not(store: DiskStore) -> None:
    keep(store, {"here": FILES["here"]})
    manifest = manifest_of(FILES)
    assert store.need(manifest_of({"here": FILES["here"]})) == 0
    with closing(store.content.begin(file_of(CONTENT, "begun"))) as ingest:
        assert store.need(manifest) == needed("begun", "absent", begun="begun")
        ingest.allocate(Extent(0, 4 * KIB))
        allocated = store.content.allocated(file_of(CONTENT, "begun"))
        assert 4 * KIB <= allocated < len(CONTENT)
        assert store.need(manifest) == needed("begun", "absent", begun="begun") - allocated


def needed(*names: str, begun: str) -> int:
    """The bytes of these files and their overhead."""
    files = [file_of(FILES[name], name) for name in names]
    beside = {f.blob: beside_file(f, by_ingest=f.path == begun) for f in files}
    return sum(f.size for f in files) + bytes_beside(beside)


def test_a_reservation_may_owe_what_evictions_will_free_and_no_byte_more(store: DiskStore) -> None:
    keep(store, {"other": b"1"})
    used = store.space.capacity().usage.total
    manifest = manifest_of(FILES)
    need = store.need(manifest)
    store.space.change(reserve_free=0, limit=used + need - 1, reserve_inodes=0)
    with pytest.raises(NoSpace) as refusal, store.reserve(manifest):
        pass
    assert refusal.value.short == 1
    with store.reserve(manifest, owed=1) as reservation:
        assert (reservation.left, reservation.owed) == (need, 1)
        assert store.content.claims.blobs() == {f.blob for f in manifest.files}
    assert store.content.claims.blobs() == set()


def test_a_model_counts_with_all_its_bytes_even_if_they_are_here(store: DiskStore) -> None:
    keep(store, FILES)
    size = manifest_of(FILES).size
    taken = store.space.capacity().usage.total
    store.space.change(reserve_free=0, limit=max(size, taken), reserve_inodes=0)
    with store.reserve(manifest_of(FILES)) as reservation:
        assert reservation.left == 0
    store.space.change(reserve_free=0, limit=size - 1, reserve_inodes=0)
    with pytest.raises(TooBig), store.reserve(manifest_of(FILES)):
        pass


def test_every_recorded_snapshot_is_watched_and_no_other(store: DiskStore) -> None:
    publish(store, SMALL, revision=A)
    assert store.watch.watched().directories == 0
    store.watch_all()
    before = store.watch.watched().directories
    publish(store, {"other": b"1"}, "hf://org/other", revision=B)
    assert store.watch.watched().directories > before
    gone = store.names.ready("org--other").manifest
    store.layout.manifest(gone).unlink()  # such as by an operator
    files = store.watch_all()
    assert files == {f.blob: f for f in manifest_of(SMALL).files}
    assert store.watch.watched().directories == before
    store.watch.close()
    assert store.watch.watched().directories == 0


def test_what_was_in_the_trash_is_gone_at_the_next_start(root: Path) -> None:
    DiskStore(root).close()
    (root / ".cachd/trash/dir").mkdir()
    (root / ".cachd/trash/dir/file").write_bytes(b"x")
    (root / ".cachd/trash/blob").write_bytes(b"x")
    with DiskStore(root):
        assert names_below(root / ".cachd/trash") == set()
