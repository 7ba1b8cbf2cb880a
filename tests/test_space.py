"""What is promised to pulls, and what a full disk leaves possible."""

from __future__ import annotations

import concurrent.futures
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from cachd.errors import (
    NoSpace,
    TooBig,
)
from cachd.model import Extent, File
from cachd.store import catalog
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout
from cachd.store.overhead import beside_file
from cachd.store.space import Space, bytes_beside
from tests.ground.disks import fill, take_inodes
from tests.ground.models import noise
from tests.ground.stored import (
    CONTENT,
    FILE,
    KIB,
    MIB,
    ONE,
    PARTS,
    SMALL,
    A,
    B,
    assert_nothing_left,
    assert_only,
    assert_whole,
    blobs_of,
    commit,
    file_of,
    give_back,
    hexes,
    hub,
    keep,
    manifest_of,
    publish,
    sha256,
    write,
)


def test_a_model_larger_than_the_file_system_is_too_big(store: DiskStore) -> None:
    total = store.space.capacity().total
    with pytest.raises(TooBig) as refusal, store.space.reserve(0, total=total + 1):
        pass
    assert refusal.value.facts == {"need": total + 1, "usable": total}


def test_what_is_kept_free_is_no_room_for_models(root: Path) -> None:
    total = os.statvfs(root).f_blocks * os.statvfs(root).f_frsize
    with DiskStore(root) as store:
        store.space.change(reserve_free=total - MIB, limit=None, reserve_inodes=0)
        with pytest.raises(TooBig), store.space.reserve(0, total=MIB + 1):
            pass
        assert store.space.capacity().reserve_free == total - MIB
        store.space.change(reserve_free=total + MIB, limit=None, reserve_inodes=0)
        with pytest.raises(TooBig), store.space.reserve(0, total=1):
            pass


def test_promises_add_up_and_end_with_their_pull(small_disk: Callable[..., Path]) -> None:
    space = Space(small_disk(8 * MIB), reserve_free=MIB)
    with space.reserve(4 * MIB, total=7 * MIB) as one:
        with space.reserve(2 * MIB, total=2 * MIB):
            assert space.capacity().reserved == 6 * MIB
            with pytest.raises(NoSpace) as refusal, space.reserve(MIB + 1, total=MIB + 1):
                pass
            assert refusal.value.facts == {"need": MIB + 1, "free": MIB, "short": 1}
            assert (refusal.value.short, refusal.value.short_inodes) == (1, 0)
            assert "cachd rm" in refusal.value.hint
        one.spend(3 * MIB)
        assert space.capacity().reserved == MIB
        one.spend(3 * MIB)
        assert space.capacity().reserved == 0, "more than was promised is not given back"
    assert space.capacity().reserved == 0


def test_a_promise_ends_with_a_pull_that_fails(store: DiskStore) -> None:
    with pytest.raises(RuntimeError), store.space.reserve(MIB, total=MIB):
        raise RuntimeError
    assert store.space.capacity().reserved == 0


def test_a_promise_that_many_streams_spend_is_spent_exactly(store: DiskStore) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            with store.space.reserve(8 * 500, total=8 * 500) as reservation:
                with concurrent.futures.ThreadPoolExecutor(8) as streams:
                    list(streams.map(reservation.spend, [1] * 8 * 500))
                assert store.space.capacity().reserved == 0
            assert store.space.capacity().reserved == 0
    finally:
        sys.setswitchinterval(interval)


def test_only_what_is_missing_is_promised(store: DiskStore) -> None:
    files = {"here": noise(8 * KIB, 1), "begun": CONTENT, "absent": noise(8 * KIB, 2)}
    keep(store, {"here": files["here"]})
    with closing(store.content.begin(file_of(CONTENT, "begun"))) as ingest:
        ingest.allocate(Extent(0, len(CONTENT)))
    with store.reserve(manifest_of(files)):
        beside = {
            f.blob: beside_file(f, by_ingest=name == "begun")
            for name in ("begun", "absent")
            for f in [file_of(files[name], name)]
        }
        promised = 8 * KIB + bytes_beside(beside)
        assert store.space.capacity().reserved == promised, "neither what is here nor blocks that are taken"


def test_a_file_that_does_not_fit_leaves_no_block_behind(small_disk: Callable[..., Path]) -> None:
    root = small_disk(MIB)
    with DiskStore(root) as store:
        before, open_before = os.statvfs(root).f_bfree, sorted(os.listdir("/proc/self/fd"))
        ingest = store.content.begin(File("big", 2 * MIB, "https://host/big", sha256(b"big")))
        with pytest.raises(NoSpace):
            ingest.allocate(Extent(0, 2 * MIB))
        ingest.discard()
        assert os.statvfs(root).f_bfree == before
        assert sorted(os.listdir("/proc/self/fd")) == open_before
        assert_nothing_left(root)


def test_a_journal_that_finds_no_room_ends_the_pull_and_the_next_goes_on(
    small_disk: Callable[..., Path],
) -> None:
    root = small_disk(MIB)
    with DiskStore(root) as store:
        with closing(store.content.begin(FILE)) as ingest:
            filler = fill(root)
            with pytest.raises(NoSpace):
                write(ingest, CONTENT, PARTS[0])
        filler.unlink()
        commit(store, FILE, CONTENT)
        assert store.content.path(FILE.blob).read_bytes() == CONTENT


@pytest.mark.parametrize(("before", "after"), [("v1", "v2"), ("main", "main")])
def test_a_publish_on_a_full_disk_leaves_memory_and_disk_consistent(
    small_disk: Callable[..., Path], before: str, after: str
) -> None:
    """Out of inodes at the first step that needs one, the second, the third... until it has enough."""
    disk = small_disk(16 * MIB, inodes=400)
    old, new = SMALL, {**SMALL, "dir/model.bin": noise(KIB, 2)}
    base = disk / "base"
    base.mkdir()
    with DiskStore(base) as store:
        publish(store, old, f"hf://org/model@{before}", "mine", revision=A)
        keep(store, new)
    for leave in itertools.count():
        root = disk / "root"
        subprocess.run(["cp", "-a", base, root], check=True)
        with DiskStore(root) as store:
            fillers = take_inodes(disk, leave=leave)
            try:
                published = publish(store, new, f"hf://org/model@{after}", "mine", revision=B) is not None
            except NoSpace:
                published = False
            give_back(fillers)
            assert store.names.get("mine") == catalog.read_snapshots(Layout(root)).get("mine")
            for snapshot in store.names.all():
                assert_whole(root, "mine", {A: old, B: new}[snapshot.commit], commit=snapshot.commit)
            if not published:
                store.sweep_snapshots()
            for snapshot in store.names.all():
                assert_whole(root, "mine", {A: old, B: new}[snapshot.commit], commit=snapshot.commit)
            final = publish(store, new, f"hf://org/model@{after}", "mine", revision=B)
            store.sweep_snapshots()
            assert_whole(root, "mine", new, commit=B)
            assert_only(root, {"mine": final}, new)
        subprocess.run(["rm", "-rf", root], check=True)
        if published:
            assert leave > 3
            return


def test_a_publish_that_found_no_room_is_swept_to_the_last_byte(small_disk: Callable[..., Path]) -> None:
    disk = small_disk(16 * MIB, inodes=400)
    for leave in itertools.count():
        root = disk / "root"
        root.mkdir()
        with DiskStore(root) as store:
            keep(store, SMALL)
            fillers = take_inodes(disk, leave=leave)
            try:
                publish(store, SMALL)
            except NoSpace:
                give_back(fillers)
                store.sweep_snapshots()
                store.content.removal.free(manifest_of(SMALL))
                assert_nothing_left(root)
            else:
                give_back(fillers)
                assert leave > 3
                return
        subprocess.run(["rm", "-rf", root], check=True)


def test_a_full_disk_can_be_opened_and_emptied(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, ONE)
    fill(root)
    with DiskStore(root) as store:
        assert_whole(root, "org--model", ONE, commit=A)
        assert store.withdraw("org--model") > 0
        assert_nothing_left(root)


def test_a_full_disk_can_be_opened_after_a_start_that_was_cut_off(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, SMALL)
    os.truncate(root / ".cachd/lock", 0)  # killed before it wrote who it is
    fill(root)
    with DiskStore(root) as store:
        assert store.names.get("org--model")


def test_a_full_disk_can_be_opened_though_a_branch_needs_repair(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    with DiskStore(root) as store:
        publish(store, SMALL)
    (hub(root) / "refs/main").unlink()  # killed while it moved
    fill(root)
    with DiskStore(root) as store:
        assert store.withdraw("org--model") > 0
        assert_nothing_left(root)


def test_one_of_two_filters_can_be_withdrawn_on_a_full_disk(small_disk: Callable[..., Path]) -> None:
    root = small_disk(8 * MIB)
    many = {f"shard-{number:03}-of-200.bin": noise(10, number) for number in range(200)}
    big = {"big.bin": noise(MIB, 999)}
    with DiskStore(root) as store:
        publish(store, many, name="many")
        publish(store, big, name="big")
        filler = fill(root)
        assert store.withdraw("big") >= MIB
        assert blobs_of(root) == hexes(many)
        filler.unlink()
        store.withdraw("many")
        assert_nothing_left(root)


# --- reservations by themselves ---


class Tight:
    """A disk of 8 MiB on which another process has left 1 MiB above the reserve of 4 MiB."""

    def __init__(self, root: Path) -> None:
        self.root, self.filler = root, root / "filler"
        self.filler.write_bytes(bytes(3 * MIB))
        self.space = Space(root, reserve_free=4 * MIB)

    def take(self, size: int) -> None:
        """Another process takes more."""
        with self.filler.open("ab") as opened:
            opened.write(bytes(size))


@pytest.fixture
def tight(small_disk: Callable[..., Path]) -> Tight:
    return Tight(small_disk(8 * MIB))


def test_what_is_owed_is_not_usable_until_it_is_freed(tight: Tight) -> None:
    with pytest.raises(NoSpace), tight.space.reserve(3 * MIB, total=3 * MIB, owed=2 * MIB - 1):
        pass
    with tight.space.reserve(3 * MIB, total=3 * MIB, owed=9 * MIB) as one:
        assert (one.left, one.owed, one.backed, one.usable) == (3 * MIB, 2 * MIB, MIB, MIB)
        assert (tight.space.capacity().reserved, tight.space.capacity().backed) == (3 * MIB, MIB)
        assert (one.has_space_for(MIB), one.has_space_for(MIB + 1)) == (True, False)
        with pytest.raises(NoSpace), tight.space.reserve(1, total=1):
            pass
        tight.filler.write_bytes(bytes(2 * MIB))
        assert tight.space.take_unclaimed(one) == one.owed == MIB
        tight.filler.unlink()
        assert tight.space.take_unclaimed(one) == one.owed == 0
        assert (one.backed, one.usable) == (3 * MIB, 3 * MIB)
    assert one.has_ended
    assert tight.space.capacity().reserved == 0


def test_what_evictions_free_for_a_pull_is_owed_no_more(tight: Tight) -> None:
    with tight.space.reserve(3 * MIB, total=3 * MIB, owed=2 * MIB) as one:
        with tight.space.freeing(one, MIB) as freed:
            assert one.owed == MIB
            freed(MIB // 4)
            freed(MIB // 4)
        assert one.owed == 2 * MIB - MIB // 2
        with tight.space.freeing(one, 9 * MIB) as freed:
            assert one.owed == 0
            freed(9 * MIB)
        assert one.owed == 0
        with pytest.raises(RuntimeError), tight.space.freeing(one, MIB):
            raise RuntimeError
        assert one.owed == 0, "nothing was owed any more"


def test_a_grant_hands_over_reserved_bytes_and_no_more_than_are_there(tight: Tight) -> None:
    with tight.space.reserve(MIB // 2, total=MIB) as one:
        with one.grant(1, MIB // 4) as granted:
            assert (granted, one.left) == (MIB // 4, MIB // 4)
        with one.grant(1, 9 * MIB) as granted:  # what nobody reserved, too
            assert (granted, one.left) == (MIB, 0)
            assert not one.has_space_for(1), "granted bytes count as used before they have blocks"
            with one.grant(1, 1) as another:
                assert (another, one.waits_for) == (0, 1)
        one.return_unused(MIB // 4)
        assert one.left == MIB // 4
        one.return_unused(-MIB)
        assert one.left == 0
        one.return_unused(MIB)
        one.spend(MIB // 4)
        assert one.left == MIB - MIB // 4


def test_a_grant_that_finds_too_little_asks_for_space_and_waits_for_the_rest(tight: Tight) -> None:
    asked: list[int] = []

    def makes(least: int) -> bool:
        asked.append(least)
        if len(asked) < 3:
            return True
        if len(asked) == 3:
            return False
        tight.filler.unlink()
        return True

    with tight.space.reserve(MIB, total=MIB) as one:
        one.make_space = makes
        assert one.waits_for == 0
        assert tight.space.waited_for() == 0
        tight.take(MIB // 2)
        with one.grant(MIB, MIB) as granted:
            assert granted == 0
        assert (asked, one.waits_for, one.left) == ([MIB] * 3, MIB, MIB)
        assert tight.space.waited_for() == MIB // 2
        assert (one.has_space_for(MIB // 2), one.has_space_for(MIB // 2 + 1)) == (True, False)
        with one.grant(MIB, MIB) as granted:
            assert granted == MIB
        assert (len(asked), one.waits_for, tight.space.waited_for()) == (4, 0, 0)


def test_the_overhead_of_a_file_is_reserved_until_its_blob_is_here(tight: Tight) -> None:
    one_file, other = sha256(b"1"), sha256(b"2")
    with tight.space.reserve(100 * KIB, total=100 * KIB, files={one_file: 20 * KIB}) as one:
        beside = bytes_beside({one_file: 20 * KIB})
        assert (one.beside, one.left) == (beside, 100 * KIB + beside)
        one.committed(other)
        assert one.beside == beside
        one.expect(other, 8 * KIB)
        assert (one.beside, one.left) == (beside + 8 * KIB, 108 * KIB + beside)
        one.expect(other, 4 * KIB)
        assert one.beside == beside + 4 * KIB
        for _ in range(2):
            one.committed(one_file)
            one.committed(other)
            assert (one.beside, one.left) == (beside - 20 * KIB, 80 * KIB + beside)
            assert one.files == {}
        one.has_arrived()
        assert one.left == one.beside == beside - 20 * KIB


def test_overhead_that_is_not_needed_is_not_owed(tight: Tight) -> None:
    file = sha256(b"1")
    with tight.space.reserve(2 * MIB, total=2 * MIB, files={file: 100 * KIB}, owed=9 * MIB) as one:
        owed = one.owed
        assert one.usable == one.left - owed - one.beside
        one.committed(file)
        assert one.owed == owed - 100 * KIB
        one.spend(9 * MIB)
        assert (one.owed, one.left, one.backed) == (0, 0, 0)


def test_inodes_are_reserved_for_a_pull_and_may_be_owed(small_disk: Callable[..., Path]) -> None:
    space = Space(small_disk(8 * MIB, inodes=200))
    files = {sha256(b"%d" % number): 0 for number in range(10)}
    free = space.capacity().free_inodes
    space.change(reserve_free=0, limit=None, reserve_inodes=free - 74)
    assert not space.lacks_inodes()
    with space.reserve(0, total=0, files=files):  # 10 and 64 for directories, ingests and journals
        pass
    space.change(reserve_free=0, limit=None, reserve_inodes=free - 73)
    with pytest.raises(NoSpace) as refusal, space.reserve(0, total=0, files=files):
        pass
    assert (refusal.value.short, refusal.value.short_inodes) == (0, 1)
    with space.reserve(0, total=0):
        pass
    for reserve_inodes, lacks in ((free - 64, False), (free - 63, True)):
        space.change(reserve_free=0, limit=None, reserve_inodes=reserve_inodes)
        assert space.lacks_inodes() is lacks
        with space.reserve(KIB, total=KIB, files=files, owed_inodes=100) as one, one.grant(1, 1) as granted:
            assert granted == (0 if lacks else 1)


@pytest.mark.parametrize(
    ("limit", "hint"),
    [(None, "lower reserve_free"), (MIB, "raise limit_bytes"), (7 * MIB, "lower reserve_free")],
)
def test_a_refusal_says_which_bound_is_in_the_way(tight: Tight, limit: int | None, hint: str) -> None:
    tight.space.change(reserve_free=0 if limit == MIB else 4 * MIB, limit=limit, reserve_inodes=0)
    with pytest.raises(NoSpace) as refusal, tight.space.reserve(MIB + 1, total=MIB):
        pass
    assert refusal.value.hint.endswith(hint)
    assert (refusal.value.short, refusal.value.facts["free"]) == (1, MIB)
    assert ("limit_bytes" in refusal.value.detail) == (limit is not None)
