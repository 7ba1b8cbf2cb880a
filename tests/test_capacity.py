"""A disk that never fills: limits, reserves, leases, and evictions that really free what they say."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import InUse, NoSpace, NotFound, TooBig
from cachd.kernel.leases import reports_open_files
from cachd.kubelet import is_used_by_node, thresholds, with_margin
from cachd.model import Digest, Percentage
from cachd.store.overhead import ENTRIES_BYTES, MODEL_BYTES, beside_file
from cachd.store.space import Space
from tests.conftest import Engine, paused_without_ready_file, spec_of
from tests.ground.disks import fill, remount
from tests.ground.models import noise
from tests.ground.needs import needs, refuse, require
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.pod import pod
from tests.ground.site import assert_problem, mapped, until

KIB, MIB = 1 << 10, 1 << 20
BLOB = Digest("sha256", "0" * 64)
PATIENCE_SECONDS = 120
Engines = Callable[..., Engine]
Nodes = Callable[..., Node]
Disks = Callable[..., Path]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disks]:
    """Makes small file systems, and an empty root on each: `disk(64 * MIB, kind="ext4")`."""
    with ExitStack() as stack:

        def made(size: int, *, kind: str = "tmpfs", inodes: int = 10_000) -> Path:
            require("mount", *(["root", "mkfs.ext4"] if kind == "ext4" else []))
            place = tmp_path / f"{kind}-{size}"
            place.mkdir()
            device, options = "tmpfs", f"size={size},nr_inodes={inodes},mode=0755"
            if kind == "ext4":
                device, options = str(place.with_suffix(".image")), "loop"
                Path(device).touch()
                os.truncate(device, size)
                subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", device], check=True)
            ended = subprocess.run(
                ["mount", "-t", kind, "-o", options, device, place], capture_output=True, text=True
            )
            if ended.returncode:
                refuse("loop", ended.stderr)
            stack.callback(partial(subprocess.run, ["umount", "--lazy", place], check=True))
            root = place / "root"
            root.mkdir(mode=0o755)
            return root

        yield made


class Store:
    """Files that an origin holds, and an engine that pulls them under short names."""

    def __init__(self, engine: Engine, origin: Origin) -> None:
        self.engine, self.origin = engine, origin

    def add(self, name: str, size: int = 8 * MIB) -> str:
        return self.origin.add(f"/{name}", noise(size, seed=sum(name.encode())))

    def pull(self, name: str, size: int = 8 * MIB) -> None:
        self.engine.pull(self.add(name, size))

    def age(self, name: str, seconds: float) -> None:
        """Let the last use of a model be so long ago."""
        uses = self.engine.store.usage_log
        uses._by_name.pop(name, None)
        uses.used(name, time.time() - seconds)

    @property
    def names(self) -> list[str]:
        return [s.name for s in self.engine.store.names.all()]


@pytest.fixture
def small(disk: Disks, engine: Engines, origin: Origin) -> Store:
    """Room for four models of 8 MiB and something beside."""
    return Store(engine(root=disk(40 * MIB), reserve_free=4 * MIB), origin)


def on_disk(*directories: Path) -> int:
    """Bytes allocated in the files below, each inode once, as du counts them."""
    found = subprocess.run(
        ["find", *directories, "-type", "f", "-printf", "%i %b\n"], capture_output=True, text=True, check=True
    )
    return sum(int(line.split()[1]) * 512 for line in set(found.stdout.splitlines()))


# --- what is taken and may be ---


def test_what_is_taken_is_what_du_and_the_file_system_count(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    """Two models share a file, a third was interrupted, a fourth is deleted and still mapped."""
    root = disk(96 * MIB, kind="ext4")
    on_it = Store(engine(root=root), origin)
    space, private = on_it.engine.store.space, root / ".cachd"
    empty = space.capacity()
    assert empty.usage.total == 0
    shared = noise(8 * MIB, 1)
    for name in ("one", "two"):
        on_it.engine.pull(
            origin.add_model(name, {"shared": shared, "own": noise(2 * MIB, len(name) + ord(name[0]))})
        )
    hold = origin.hold("/begun/f", after=3 * MIB)  # of each part
    pulling = on_it.engine.pulls.start(spec_of(origin.add_model("begun", {"f": noise(12 * MIB, 3)})))
    assert pulling is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: space.capacity().usage.ingests >= 12 * MIB)
    on_it.pull("mapped", 4 * MIB)
    with mapped(on_it.engine.store.layout.model("mapped") / "mapped"):
        on_it.engine.pulls.delete("mapped", force=True)
        now = space.capacity()
        assert now.usage.blobs == on_disk(private / "blobs") >= 12 * MIB
        assert now.usage.ingests == on_disk(private / "ingest") >= 12 * MIB
        assert now.usage.held == on_disk(private / "trash") >= 4 * MIB
        taken, counted = empty.free - now.free, now.usage.total
        assert counted <= taken < counted + MIB, "the rest is directories and what is written of models"
    hold.release()
    pulling.done.result(PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("limit", "reserve", "usable"),
    [
        (None, 0, 40),
        (20 * MIB, 0, 20),
        (None, 30 * MIB, 10),
        (Percentage(50), 0, 20),
        (20 * MIB, Percentage(75), 10),
    ],
)
def test_the_limit_and_the_reserve_bound_what_can_ever_be_held(
    disk: Disks, limit: int | Percentage | None, reserve: int | Percentage, usable: int
) -> None:
    space = Space(disk(40 * MIB), limit=limit, reserve_free=reserve)
    assert space.capacity().usable == usable * MIB
    with pytest.raises(TooBig) as refusal, space.reserve(0, total=usable * MIB + 1):
        pass
    assert refusal.value.facts == {"need": usable * MIB + 1, "usable": usable * MIB}


def test_a_model_that_can_never_fit_is_refused_before_its_first_byte(small: Store) -> None:
    small.pull("kept", 8 * MIB)
    with pytest.raises(TooBig):
        small.pull("big", 37 * MIB)
    assert small.origin.bytes_sent("/big") == 0
    assert small.names == ["kept"]


def test_a_limit_holds_though_the_disk_has_room(disk: Disks, engine: Engines, origin: Origin) -> None:
    limited = Store(engine(root=disk(64 * MIB), limit_bytes="20MiB", evict=False), origin)
    limited.pull("a")
    limited.pull("b")
    with pytest.raises(NoSpace) as refusal:
        limited.pull("c")
    taken = limited.engine.store.space.capacity().usage.total
    assert f"{taken} of limit_bytes {20 * MIB} used" in refusal.value.detail
    assert limited.origin.bytes_sent("/c") == 0


@pytest.mark.parametrize("evict", [False, True], ids=["evict: false", "evict: true"])
def test_only_where_cachd_may_evict_do_pressure_and_long_disuse_take_a_model(
    evict: bool, engine: Engines, origin: Origin
) -> None:
    store = Store(engine(evict=evict, evict_unused_seconds=60), origin)
    store.pull("a", MIB)
    store.age("a", 3600)
    store.engine.reclaim.watch.check_usage()
    assert store.names == ([] if evict else ["a"])
    store.pull("b", MIB)
    store.engine.store.space.change(reserve_free=0, limit=MIB // 2, reserve_inodes=0)
    store.engine.reclaim.watch.relieve()
    assert store.names == ([] if evict else ["a", "b"])
    reasons = [gone.reason for gone in store.engine.reclaim.evicted()]
    assert reasons == (["pressure", "unused"] if evict else [])


def test_an_operator_makes_room_though_cachd_may_evict_nothing_by_itself(
    engine: Engines, origin: Origin
) -> None:
    store = Store(engine(evict=False), origin)
    store.pull("a", MIB)
    store.engine.store.space.change(reserve_free=0, limit=MIB // 2, reserve_inodes=0)
    (gone,) = store.engine.reclaim.make_available(1)
    assert (gone.names, gone.reason, store.names) == (("a",), "asked", [])


def test_inodes_are_kept_free_too(disk: Disks, engine: Engines, origin: Origin) -> None:
    poor = Store(engine(root=disk(64 * MIB, inodes=300), reserve_inodes=150), origin)
    poor.pull("a", MIB)
    free = poor.engine.store.space.capacity().available_inodes
    assert free is not None
    root = poor.engine.store.layout.root
    for number in range(free - 60):
        (root.parent / f"file-{number}").touch()
    with pytest.raises(NoSpace) as refusal:
        poor.pull("b", MIB)
    assert "inodes are needed" in refusal.value.detail
    assert poor.names == ["a"], "what cannot make enough room stays"


def test_what_another_process_takes_of_a_promise_stops_grants_before_the_reserve(disk: Disks) -> None:
    root = disk(40 * MIB)
    space = Space(root, reserve_free=4 * MIB)
    with (
        space.reserve(30 * MIB, total=30 * MIB) as one,
        one.grant(20 * MIB, 20 * MIB) as first,
        one.grant(20 * MIB, 20 * MIB) as second,
    ):
        assert (first, second) == (20 * MIB, 0), "two at once would take the same bytes"
    with space.reserve(20 * MIB, total=20 * MIB) as reservation:
        (root.parent / "foreign").write_bytes(noise(20 * MIB))
        with reservation.grant(17 * MIB, 17 * MIB) as granted:
            assert not granted
        with reservation.grant(MIB, 15 * MIB) as granted:
            assert granted == 15 * MIB


def test_a_pull_that_lacks_less_than_its_overhead_is_made_room_for(small: Store, tmp_path: Path) -> None:
    """Bytes that fit on the disk, but not together with the overhead of their own pull, lack space."""
    for name in "abcd":
        small.pull(name)
    space = small.engine.store.space
    now = space.capacity()
    with space.reserve(now.available - MIB, total=MIB, files={BLOB: 24 * KIB}) as reservation:
        least = reservation.left - reservation.beside
        other = small.engine.store.layout.root / "of another process"
        other.write_bytes(noise(space.capacity().allocatable - least - reservation.beside // 2))
        with reservation.grant(least, least) as granted:
            assert not granted
        assert space.capacity().allocatable > least, "the bytes alone would fit"
        small.engine.reclaim.watch.relieve()
        with reservation.grant(least, least) as granted:
            assert granted == least


def test_grants_from_one_measurement_stop_soon_after_another_process_fills_a_large_disk(disk: Disks) -> None:
    root = disk(600 * MIB, kind="ext4")
    space = Space(root)
    with space.reserve(100 * MIB, total=100 * MIB) as reservation:

        def is_granted() -> bool:
            with reservation.grant(4096, 4096) as granted:
                return bool(granted)

        assert all(is_granted() for _ in range(100))
        filler = fill(root.parent)
        until(lambda: not is_granted())
        filler.unlink()
        assert is_granted()


def test_what_files_take_beside_their_bytes_is_reserved_until_each_is_here(tmp_path: Path) -> None:
    space = Space(tmp_path)

    def reserved() -> int:
        return space.capacity().reserved

    files = {Digest("sha256", f"{n:064}"): 20 * KIB for n in range(10)}
    begun, other = list(files)[:2]
    with space.reserve(MIB, total=MIB, files=files) as reservation:
        all_of_it = MIB + MODEL_BYTES + 10 * ENTRIES_BYTES + 10 * 20 * KIB
        assert reserved() == all_of_it
        reservation.expect(begun, 40 * KIB)
        assert reserved() == all_of_it + 20 * KIB, "it began an ingest"
        for _ in range(2):
            reservation.committed(begun)
            assert reserved() == all_of_it - 20 * KIB, "once, however often it is told"
        reservation.committed(Digest("sha256", "f" * 64))
        assert reserved() == all_of_it - 20 * KIB, "nothing was reserved for this blob"
        reservation.owed = 30 * KIB
        reservation.committed(other)
        assert reservation.owed == 10 * KIB, "what is not needed need not be freed"


@pytest.mark.parametrize("size", [3000, 4096, 300 * KIB])
def test_a_pull_that_has_all_files_but_one_reserves_what_this_one_needs(
    engine: Engines, origin: Origin, size: int
) -> None:
    running, files = engine(), {f"{number:02}": noise(size, number) for number in range(12)}
    hold = origin.hold("/many/11", after=size // 2)
    pulling = running.pulls.start(spec_of(origin.add_model("many", files)))
    assert pulling is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    until(lambda: pulling.progress.now.files_done == len(files) - 1)
    assert pulling.progress.manifest is not None
    last = beside_file(pulling.progress.manifest.files[-1], by_ingest=True)
    needed = size + last + MODEL_BYTES + len(files) * ENTRIES_BYTES
    until(lambda: running.store.space.capacity().reserved <= needed)
    hold.release()
    pulling.done.result(PATIENCE_SECONDS)
    assert running.store.space.capacity().reserved == 0


def test_a_model_of_many_small_files_that_fits_beside_another_evicts_nothing(
    engine: Engines, origin: Origin
) -> None:
    files = {f"{number:02}": noise(4 * KIB, number) for number in range(64)}
    need = 64 * (4 * KIB + ENTRIES_BYTES) + MODEL_BYTES
    both = Store(engine(), origin)
    both.pull("kept", MIB)
    space = both.engine.store.space
    space.change(reserve_free=0, limit=space.capacity().usage.total + need, reserve_inodes=0)
    both.engine.pull(origin.add_model("many", files))
    assert (both.names, both.engine.reclaim.evicted()) == (["kept", "many"], [])


# --- whose disk ---


def test_a_disk_that_the_node_uses_is_told_from_one_of_its_own(disk: Disks) -> None:
    assert is_used_by_node(Path("/etc"))
    assert not is_used_by_node(disk(MIB))


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("", (15, 5)),
        ("not: [yaml", (15, 5)),
        ("imageGCHighThresholdPercent: 70", (30, 5)),
        ("evictionHard: {nodefs.available: 25%, nodefs.inodesFree: 8%}", (25, 8)),
        ("evictionHard: {imagefs.available: 300Gi}", (30, 0)),
        ("evictionSoft: {nodefs.available: 40%}", (40, 5)),
        ("evictionHard: {nodefs.available: 25%, imagefs.available: 20%}", (25, 0)),
        ("evictionHard: {imagefs.available: 20%, nodefs.available: 25%}", (25, 0)),
        ("evictionHard: {nodefs.available: 40%}\nevictionSoft: {nodefs.available: 30%}", (40, 0)),
        ("evictionSoft: {nodefs.available: 30%, imagefs.available: 40%}", (40, 5)),
        ("imageGCHighThresholdPercent: 70\nevictionHard: {nodefs.available: 20%}", (30, 0)),
        ("imageGCHighThresholdPercent: 95", (15, 5)),
        ("imageGCHighThresholdPercent: 100\nevictionHard: {nodefs.available: 7%}", (7, 0)),
        ("imageGCHighThresholdPercent: 101", (15, 5)),
    ],
)
def test_the_kubelets_thresholds_are_read_from_its_file(
    tmp_path: Path, told: str, kept: tuple[float, float]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(told)
    found = thresholds(file, 1000 << 30)
    assert tuple(share.percent for share in found) == kept
    assert with_margin(found[0]).percent == kept[0] + 5, "cachd stops before the kubelet begins"


@pytest.mark.parametrize("order", [(10, 30), (30, 10)], ids=str)
def test_of_two_thresholds_cachd_keeps_to_the_larger(order: tuple[int, int]) -> None:
    assert with_margin(*map(Percentage, order)) == Percentage(35)
    assert with_margin(Percentage(98)) == Percentage(100)


def test_without_the_kubelets_file_a_fifth_of_a_shared_disk_stays_free(tmp_path: Path) -> None:
    free, _ = thresholds(tmp_path / "absent", 1 << 40)
    assert with_margin(free) == Percentage(20)


def test_the_reserve_of_a_shared_disk_is_the_nodes_and_of_another_nothing(
    disk: Disks, engine: Engines, root: Path
) -> None:
    own = engine(root=disk(8 * MIB), reserve_free="auto").store.space.capacity()
    assert (own.reserve_free, own.reserve_inodes) == (0, 0)
    if not is_used_by_node(root):
        pytest.skip("the test's directory is on a disk of its own")
    shared = engine(root=root, reserve_free="auto").store.space.capacity()
    assert shared.reserve_free == shared.total // 5


# --- room for a pull ---


def test_a_pull_that_needs_room_evicts_what_is_worth_least_and_nothing_else(small: Store) -> None:
    for name, age in (("a", 3000), ("b", 4000), ("c", 2000), ("d", 5000)):
        small.pull(name)
        small.age(name, age)
    free = small.engine.store.space.capacity().free
    small.pull("e")
    assert small.names == ["a", "b", "c", "e"]
    assert abs(small.engine.store.space.capacity().free - free) < MIB, "as much came free as went"
    (eviction,) = small.engine.reclaim.evicted()
    assert (eviction.names, eviction.reason) == (("d",), "pull")
    assert 8 * MIB <= eviction.freed < 9 * MIB
    assert eviction.why.startswith("last used 83 min ago")
    told = small.engine.metrics.text().decode()
    assert 'cachd_evictions_total{reason="pull"} 1.0' in told
    (told_bytes,) = re.findall(r"^cachd_evicted_bytes_total (.*)$", told, flags=re.MULTILINE)
    assert float(told_bytes) == eviction.freed
    assert small.engine.pulls.get("d") is None, "an evicted model is not told as ready"


def test_when_everything_is_protected_nothing_goes_and_the_refusal_says_what_holds_the_space(
    small: Store,
) -> None:
    for name in "abcd":
        small.pull(name)
        small.engine.store.pins.add(name)
    with pytest.raises(NoSpace) as refusal:
        small.pull("e")
    for name in "abcd":
        assert re.search(rf"\b{name} \(\d+ bytes, pinned as {name}\)", refusal.value.detail)
    assert small.names == list("abcd")
    assert small.engine.reclaim.evicted() == []
    assert small.engine.store.space.capacity().reserved == 0
    small.engine.store.pins.remove("c")
    small.pull("e")
    assert small.names == ["a", "b", "d", "e"]


def test_nothing_goes_for_a_pull_that_would_not_fit_all_the_same(small: Store) -> None:
    for name in "abcd":
        small.pull(name)
    for name in "abc":
        small.engine.store.pins.add(name)
    with pytest.raises(NoSpace):
        small.pull("e", 13 * MIB)
    assert small.names == list("abcd")


def test_pulls_at_once_make_room_for_each_other_and_the_reserve_is_never_crossed(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    store = Store(engine(root=disk(64 * MIB, kind="ext4"), reserve_free="8MiB", pulls=4, streams=8), origin)
    refs = [store.add(f"m{n}", 5 * MIB + n * 7919) for n in range(16)]
    space, least, stop = store.engine.store.space, [1 << 60], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            now = space.capacity()
            least[0] = min(least[0], now.free - now.reserve_free)

    watching = threading.Thread(target=watch)
    watching.start()
    with ThreadPoolExecutor(4) as crowd:
        ended = [crowd.submit(store.engine.pull, ref) for ref in refs]
        pulled = [future.result(PATIENCE_SECONDS) for future in ended]
    stop.set()
    watching.join()
    assert len(pulled) == 16
    assert least[0] >= 0, "it filled the disk to the reserve, and no further"
    assert len(store.engine.store.names.all()) < 16, "some went for others"
    assert space.capacity().reserved == 0
    root = store.engine.store.layout.root
    assert space.capacity().usage.total == on_disk(root / ".cachd/blobs")


def test_evictions_while_the_same_blobs_are_published_leave_every_ready_model_whole(
    small: Store,
) -> None:
    """One takes a snapshot away while another links its blobs anew: they go one after the other."""
    files = {f"f{n}": noise(8192, n + 1) for n in range(60)}
    ref = small.origin.add_model("shared", files)
    store = small.engine.store
    stop = threading.Event()

    def evict() -> None:
        while not stop.is_set():
            for manifest, _ in list(store.manifests.with_names()):
                with suppress(NotFound, InUse):
                    store.evict(manifest.id)

    evicting = threading.Thread(target=evict)
    evicting.start()
    try:
        for turn in range(20):
            small.engine.pull(ref, name=f"shared-{turn % 3}")
    finally:
        stop.set()
        evicting.join()
    small.engine.pull(ref, name="last")
    for snapshot in store.names.all():
        tree = small.engine.store.layout.model(snapshot.name)
        assert {path.name: path.read_bytes() for path in tree.iterdir()} == files


# --- protection ---


def test_a_lease_keeps_a_model_until_it_is_released(small: Store) -> None:
    small.pull("a")
    store = small.engine.store
    lease = store.leases.take("a", "pod/vllm-0", until=time.time() + 60)
    with pytest.raises(InUse) as refusal:
        store.withdraw("a")
    assert (refusal.value.code, "pod/vllm-0" in refusal.value.detail) == ("leased", True)
    with pytest.raises(NoSpace) as short:
        small.engine.reclaim.make_available(34 * MIB)
    assert "leased by pod/vllm-0" in short.value.detail
    assert small.names == ["a"]
    store.leases.release("a", lease.id)
    (eviction,) = small.engine.reclaim.make_available(34 * MIB)
    assert (eviction.names, small.names) == (("a",), [])


def test_a_model_opened_while_it_is_withdrawn_stays_ready(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    """A pod that saw the ready file just before it went opens the files just after."""
    small = Store(engine(root=disk(64 * MIB, kind="ext4")), origin)
    small.pull("a")
    layout, store = small.engine.store.layout, small.engine.store
    (manifest, _), *_ = store.manifests.with_names()
    with (
        paused_without_ready_file(lambda: store.evict(manifest.id)) as evicting,
        ExitStack() as pods,
    ):
        assert not layout.ready_file("a").exists()
        pods.enter_context(mapped(layout.model("a") / "a"))
        keep_it = pods.pop_all()
    with keep_it:
        with pytest.raises(InUse):
            evicting.result(PATIENCE_SECONDS)
        assert layout.ready_file("a").exists()
        assert (layout.model("a") / "a").read_bytes() == noise(8 * MIB, seed=ord("a"))
        assert small.names == ["a"]
    assert store.evict(manifest.id) > 0


def test_what_the_kernel_tells_is_tried_at_the_start(tmp_path: Path) -> None:
    assert reports_open_files(tmp_path / "probe")
    assert not (tmp_path / "probe").exists()
    assert not reports_open_files(Path("/proc/self/probe"))


@needs("pods")
def test_a_pod_that_has_a_shard_mapped_keeps_its_model_through_a_full_eviction_round(small: Store) -> None:
    """In another mount namespace, through a read-only bind, with the file closed: it never heard of cachd."""
    for name in "abcd":
        small.pull(name)
    script = """
import hashlib, mmap, os, sys
with open(os.environ["CACHE"] + "/models/a/a", "rb") as opened:
    seen = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
print(hashlib.sha256(seen).hexdigest(), flush=True)
"""
    root, reclaim = small.engine.store.layout.root, small.engine.reclaim
    with pod(root, script) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "mapped\n"
        with pytest.raises(NoSpace) as refusal:
            reclaim.make_available(35 * MIB)
        assert "bytes, open in a process on this node)" in refusal.value.detail
        assert small.names == list("abcd")
        gone = reclaim.make_available(27 * MIB)
        assert sorted(e.names[0] for e in gone) == ["b", "c", "d"]
        assert sum(e.freed for e in gone) >= 24 * MIB
        assert small.names == ["a"]
        read, _ = reader.communicate("", timeout=PATIENCE_SECONDS)
    assert read.strip() == hashlib.sha256(noise(8 * MIB, seed=ord("a"))).hexdigest()
    (last,) = reclaim.make_available(35 * MIB)
    assert (last.names, small.names) == (("a",), [])


@needs("pods")
def test_a_pod_that_mounts_one_model_is_left_with_nothing_unless_it_has_a_lease(small: Store) -> None:
    """Its mount keeps the directory it found at start: why the README says to mount the root."""
    small.pull("a")
    store, reclaim = small.engine.store, small.engine.reclaim
    script = """
import os, sys
for _ in sys.stdin:
    try:
        print(os.listdir(os.environ["CACHE"]), flush=True)
    except OSError as error:
        print(repr(error), flush=True)
"""
    lease = store.leases.take("a", "pod/leaf", until=time.time() + 60)
    with pod(small.engine.store.layout.root, script, subpath="models/a") as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None

        def seen() -> str:
            assert reader.stdin is not None
            assert reader.stdout is not None
            reader.stdin.write("look\n")
            reader.stdin.flush()
            return reader.stdout.readline().strip()

        with pytest.raises(NoSpace):
            reclaim.make_available(35 * MIB)
        assert seen() == "['a']"
        store.leases.release("a", lease.id)
        reclaim.make_available(35 * MIB)
        assert "'a'" not in seen()


def test_a_reader_that_starts_after_the_ready_file_went_fails_to_open(small: Store) -> None:
    small.pull("a")
    layout = small.engine.store.layout
    small.engine.reclaim.make_available(35 * MIB)
    assert not layout.ready_file("a").exists()
    with pytest.raises(FileNotFoundError):
        (layout.model("a") / "a").open("rb")


def test_what_is_deleted_by_force_and_still_open_counts_as_taken_until_it_is_closed(small: Store) -> None:
    for name in "abc":
        small.pull(name)
    store, reclaim = small.engine.store, small.engine.reclaim
    with mapped(store.layout.model("a") / "a") as reader:
        assert small.engine.pulls.delete("a", force=True) == 0, "nothing came free"
        now = store.space.capacity()
        assert now.usage.held == on_disk(store.layout.trash) == 8 * MIB
        assert now.usage.blobs == on_disk(store.layout.blobs)
        plan = reclaim.plan(20 * MIB)
        assert sorted(c.names for c in plan.candidates) == [("b",), ("c",)], "it cannot be evicted again"
        with pytest.raises(NoSpace) as refusal:
            reclaim.make_available(30 * MIB)
        assert f"deleted models that are still open ({8 * MIB} bytes)" in refusal.value.detail
        assert small.names == ["b", "c"], "no round empties the cache for what cannot come free"
        store.content.trash.empty_all()
        assert store.space.capacity().usage.held == 8 * MIB
        reader.communicate(timeout=PATIENCE_SECONDS)
    store.content.trash.empty_all()
    assert store.space.capacity().usage.held == 0
    assert store.space.capacity().free >= now.free + 8 * MIB


# --- how it is known what was used ---


def test_a_model_asked_for_stays_and_one_that_is_only_read_by_the_clock_of_its_file_goes(
    small: Store,
) -> None:
    """Access times are no use: read-only mounts keep none. What was asked for counts, not what came last."""
    for name in "bcda":
        small.pull(name)
        small.age(name, 10_000)
    read = (small.engine.store.layout.model("a") / "a").stat()
    os.utime(small.engine.store.layout.model("a") / "a", (time.time(), read.st_mtime))
    for name in "bcd":
        small.engine.pull(small.add(name))
    small.pull("e")
    assert small.names == ["b", "c", "d", "e"]


def test_uses_outlive_the_daemon(disk: Disks, engine: Engines, origin: Origin) -> None:
    root = disk(40 * MIB)
    from cachd.config import Config
    from cachd.daemon.parts import assembled

    options = Config(root=root, allow=("127.0.0.0/8", f"{origin.url}/"), reserve_free=4 * MIB)
    with assembled(options) as parts:
        first = Store(Engine(parts), origin)
        for name, age in (("a", 9000), ("b", 400_000), ("c", 9000), ("d", 9000)):
            first.pull(name)
            first.age(name, age)
        parts.store.usage_log.set_priority("b", 5)
    with assembled(options) as parts:
        second = Store(Engine(parts), origin)
        assert parts.store.usage_log.priority("b") == 5
        assert (parts.store.usage_log.rate("http") or 0) > 0
        second.pull("e")
        assert second.names == ["a", "c", "d", "e"]


def test_a_torn_file_of_uses_is_no_hindrance(small: Store) -> None:
    from cachd.store.usage_log import UsageLog

    layout = small.engine.store.layout
    layout.usage_log.write_text('{"names": {"a": [1')
    assert UsageLog(layout).of("a") is None


def test_what_is_open_in_a_process_counts_as_used(small: Store) -> None:
    small.pull("a")
    small.age("a", 10_000)
    before = small.engine.store.usage_log.of("a")
    with (small.engine.store.layout.model("a") / "a").open("rb"):
        small.engine.reclaim.watch.check_usage()
    after = small.engine.store.usage_log.of("a")
    assert before is not None
    assert after is not None
    assert after.last > before.last + 9000
    assert 1.9 < after.weight < 2


def test_what_nobody_used_for_long_goes_by_itself(disk: Disks, engine: Engines, origin: Origin) -> None:
    store = Store(engine(root=disk(40 * MIB), evict_unused_seconds=3600), origin)
    for name, age in (("old", 4000), ("new", 3000), ("kept", 4000)):
        store.pull(name, MIB)
        store.age(name, age)
    store.engine.store.pins.add("kept")
    store.engine.reclaim.watch.check_usage()
    assert store.names == ["kept", "new"]
    (eviction,) = store.engine.reclaim.evicted()
    assert (eviction.names, eviction.reason) == (("old",), "unused")


def test_what_the_configuration_lists_is_not_evicted(disk: Disks, engine: Engines, origin: Origin) -> None:
    ref = origin.add("/listed", noise(8 * MIB))
    store = Store(engine(root=disk(40 * MIB), models=[{"ref": ref, "name": "listed"}]), origin)
    store.engine.pull(ref)
    store.age("listed", 10_000)
    for name in "abc":
        store.pull(name)
    store.pull("d")
    assert "listed" in store.names


# --- under pressure ---


def test_while_another_process_fills_the_disk_models_go_down_to_the_low_watermark(
    disk: Disks, engine: Engines, origin: Origin
) -> None:
    root = disk(64 * MIB, kind="ext4")
    store = Store(engine(root=root, reserve_free="8MiB", low_watermark="80%"), origin)
    for name, age in (("a", 5000), ("b", 4000), ("c", 3000)):
        store.pull(name)
        store.age(name, age)
    store.engine.reclaim.watch.relieve()
    assert store.names == ["a", "b", "c"], "no pressure, no eviction"
    free = store.engine.store.space.capacity().free
    (root.parent / "foreign").write_bytes(noise(free - 4 * MIB))
    store.engine.reclaim.watch.relieve()
    now = store.engine.store.space.capacity()
    room = now.total - now.reserve_free
    assert now.free - now.reserve_free >= room - Percentage(80).of(room)
    assert store.names == ["c"]
    assert [e.reason for e in store.engine.reclaim.evicted()] == ["pressure", "pressure"]


def test_a_limit_lowered_at_run_time_lets_go_what_may_and_keeps_what_is_pinned(
    disk: Disks, node: Nodes, origin: Origin
) -> None:
    running = node(str(disk(64 * MIB)), allow=[f"{origin.url}/"], limit_bytes="40MiB")
    for name in ("a", "b", "c", "kept"):
        running.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name[0]))))
        assert running.ready(name).status == 200
    running.ask("PUT", "/v1/models/kept/pin")
    running.configure(**{**running.options, "limit_bytes": "20MiB"})
    for _ in range(2):
        running.wait_for("evicted", reason="pressure")
    until(lambda: len(ready_names(running)) == 2)
    assert "kept" in ready_names(running)
    running.configure(**{**running.options, "limit_bytes": "4MiB"})
    told = running.wait_for("too little space can be freed: the other models are protected")
    until(lambda: len(ready_names(running)) == 1)
    capacity = running.ask("GET", "/v1/capacity").document
    (kept,) = (snapshot["bytes"] for snapshot in capacity["snapshots"])
    assert told["held_by"] == [f"kept ({kept} bytes, pinned as kept)"]
    assert ready_names(running) == ["kept"]
    assert capacity["over_bytes"] == capacity["used_bytes"] - 4 * MIB > 0
    doctor = running.cli("doctor")
    assert (doctor.returncode, "over limit_bytes or reserve_free" in doctor.stdout) == (1, True)


def test_a_pull_pauses_while_another_process_has_its_room_and_goes_on_when_it_is_back(
    disk: Disks, node: Nodes, origin: Origin
) -> None:
    """Its first file is here; the blocks promised to the second are taken. Nothing crosses the reserve."""
    root = disk(64 * MIB, kind="ext4")
    running = node(str(root), streams=1, reserve_free="8MiB")
    ref = origin.add_model("two", {"first.bin": noise(12 * MIB, 1), "second.bin": noise(10 * MIB, 2)})
    hold = origin.hold("/two/second.bin", after=0)
    running.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    free = running.ask("GET", "/v1/capacity").document["free_bytes"]
    filler = root.parent / "foreign"
    filler.write_bytes(noise(free - 12 * MIB))
    hold.release()
    running.wait_for("paused: the disk is at its reserve", file="second.bin")
    told = running.ask("GET", "/v1/models/two").document["pull"]
    assert (told["state"], told["paused"]) == ("downloading", True)
    now = running.ask("GET", "/v1/capacity").document
    assert now["free_bytes"] >= now["reserve_free_bytes"]
    assert now["over_bytes"] > 0
    filler.unlink()
    assert running.ready("two").status == 200
    assert running.ask("GET", "/v1/models/two").document["pull"]["paused"] is False
    assert origin.bytes_sent("/two/first.bin") == 12 * MIB, "nothing was fetched twice"


def test_a_disk_that_shrank_while_the_daemon_was_down_is_relieved_at_the_start(
    disk: Disks, node: Nodes, origin: Origin
) -> None:
    root = disk(64 * MIB)
    running = node(str(root), allow=[f"{origin.url}/"], reserve_free="4MiB")
    for name in ("a", "b", "c", "d"):
        running.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name))))
        assert running.ready(name).status == 200
    running.ask("PUT", "/v1/models/c/pin")
    running.kill()
    remount(root.parent, f"size={34 * MIB}")
    running.start()
    until(lambda: len(ready_names(running)) < 4)
    capacity = until(lambda: (now := running.ask("GET", "/v1/capacity").document)["over_bytes"] == 0 and now)
    assert capacity["free_bytes"] >= capacity["reserve_free_bytes"]
    assert "c" in ready_names(running)


def ready_names(running: Node) -> list[str]:
    return sorted(path.stem for path in (running.root / "ready").glob("*.json"))


# --- the API and the command line ---


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Node, Origin]]:
    """A daemon with 40 MiB for models, and four models of 8 MiB that are used now and then."""
    place = tmp_path_factory.mktemp("served")
    with Origin() as origin, Node(place / "node", {"limit_bytes": "40MiB", "retries": 0}) as running:
        for name in ("a", "b", "c", "d"):
            running.pull(origin.add(f"/{name}", noise(8 * MIB, seed=ord(name))))
            assert running.ready(name).status == 200
        running.ask("PUT", "/v1/models/d/pin")
        yield running, origin


def test_a_dry_run_tells_what_would_go_in_order_and_why_and_changes_nothing(
    served: tuple[Node, Origin],
) -> None:
    running, origin = served
    before = ready_names(running)
    told = running.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "14MiB"}).document
    assert (told["dry_run"], told["enough"]) == (True, True)
    assert told["short_bytes"] == 14 * MIB - running.ask("GET", "/v1/capacity").document["available_bytes"]
    assert [e["frees_bytes"] // MIB for e in told["evictions"]] == [8]
    assert told["frees_bytes"] >= told["short_bytes"]
    assert "last used" in told["evictions"][0]["why"]
    assert [(p["names"], p["protected_by"]) for p in told["protected"]] == [(["d"], "pinned as d")]
    ref = origin.add("/e", noise(18 * MIB, seed=5))
    for_ref = running.ask("POST", "/v1/evictions?dry_run=true", {"ref": ref}).document
    assert 18 * MIB <= for_ref["need_bytes"] < 19 * MIB
    assert len(for_ref["evictions"]) == 2
    never = running.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "39MiB"}).document
    assert (never["enough"], len(never["evictions"])) == (False, 3)
    assert_problem(running.ask("POST", "/v1/evictions", {"bytes": "39MiB"}), 507, "no_space")
    assert ready_names(running) == before
    assert running.ask("GET", "/v1/evictions").document == {"evictions": []}


@pytest.mark.parametrize("body", [{}, {"bytes": 1, "ref": "hf://o/m"}, {"bytes": -1}, {"bytes": "much"}])
def test_room_asked_for_without_sense_is_refused(served: tuple[Node, Origin], body: dict[str, Any]) -> None:
    assert_problem(served[0].ask("POST", "/v1/evictions", body), 422, "invalid_request")


def test_capacity_tells_each_snapshot_and_what_protects_it(served: tuple[Node, Origin]) -> None:
    running, _ = served
    told = running.ask("GET", "/v1/capacity").document
    assert told["limit_bytes"] == told["usable_bytes"] == 40 * MIB
    assert told["used_bytes"] == told["blob_bytes"] == on_disk(running.root / ".cachd/blobs")
    assert told["available_bytes"] == 40 * MIB - told["used_bytes"]
    assert told["in_use_reported_by"] == "kernel"
    protected = {s["names"][0]: s["protected_by"] for s in told["snapshots"]}
    assert protected == {"a": None, "b": None, "c": None, "d": "pinned as d"}
    assert all(s["last_used"] for s in told["snapshots"])
    assert running.metric("cachd_cache_size_bytes") == told["used_bytes"]
    assert running.metric("cachd_cache_limit_bytes") == 40 * MIB
    assert running.metric("cachd_available_bytes") == told["available_bytes"]


def test_a_lease_is_taken_renewed_and_released_over_the_api(served: tuple[Node, Origin]) -> None:
    running, _ = served
    taken = running.ask("POST", "/v1/models/a/leases", {"seconds": 60, "holder": "pod/x"})
    assert taken.status == 201
    where = taken.headers["location"]
    assert where == f"/v1/models/a/leases/{taken.document['id']}"
    assert [lease["holder"] for lease in running.ask("GET", "/v1/models/a").document["leases"]] == ["pod/x"]
    assert_problem(running.ask("DELETE", "/v1/models/a"), 409, "leased")
    assert running.metric("cachd_leases") == 1
    renewed = running.ask("PUT", where, {"seconds": 600})
    assert renewed.document["expires_at"] > taken.document["expires_at"]
    assert_problem(running.ask("PUT", where.replace("/a/", "/b/"), {"seconds": 1}), 404, "no_such_lease")
    assert running.ask("DELETE", where).status == 204
    assert running.ask("DELETE", where).status == 204
    assert_problem(running.ask("PUT", where, {"seconds": 1}), 404, "no_such_lease")
    assert running.ask("GET", "/v1/models/a").document["leases"] == []
    assert_problem(running.ask("POST", "/v1/models/none/leases", {"seconds": 1}), 404, "no_such_model")
    for seconds in (0, -1, 1e9, "long"):
        refused = running.ask("POST", "/v1/models/a/leases", {"seconds": seconds})
        assert_problem(refused, 422, "invalid_request")


def test_a_lease_outlives_a_killed_daemon_and_a_dead_holder_for_its_time_only(
    node: Nodes, origin: Origin
) -> None:
    running = node(limit_bytes="10MiB")
    running.pull(origin.add("/a", noise(8 * MIB)))
    assert running.ready("a").status == 200
    long = running.ask("POST", "/v1/models/a/leases", {"seconds": 600, "holder": "dead"}).document
    running.kill()
    running.start()
    assert [lease["holder"] for lease in running.ask("GET", "/v1/models/a").document["leases"]] == ["dead"]
    room = {"bytes": "9MiB"}
    assert_problem(running.ask("POST", "/v1/evictions", room), 507, "no_space")
    running.ask("PUT", f"/v1/models/a/leases/{long['id']}", {"seconds": 0.2})
    running.wait_for("lease expired", holder="dead")
    assert running.ask("POST", "/v1/evictions", room).document["freed_bytes"] >= 8 * MIB
    assert list((running.root / ".cachd/leases").iterdir()) == []


def test_the_command_line_tells_capacity_and_makes_room(served: tuple[Node, Origin]) -> None:
    """Last of those that share the daemon: it evicts."""
    running, _ = served
    text = running.cli("capacity").stdout
    assert "reported by kernel" in text
    assert any(
        line.split()[0] == "d" and line.endswith("pinned as d") for line in map(str.rstrip, text.splitlines())
    )
    assert json.loads(running.cli("capacity", "-o", "json").stdout)["limit_bytes"] == 40 * MIB
    for command in ("evict", "gc"):
        dry = running.cli(command, "20MiB", "--dry-run")
        assert dry.returncode == 0
        assert re.search(r"12\.6 MB short, 16\.8 MB would be freed: enough", dry.stdout)
        assert "last used" in dry.stdout
        assert "pinned as d" in dry.stdout
    refused = running.cli("evict", "39MiB")
    assert refused.returncode == 7
    assert "pinned as d" in refused.stderr
    done = json.loads(running.cli("evict", "14MiB", "-o", "json").stdout)
    assert 8 * MIB <= done["freed_bytes"] < 9 * MIB
    (gone,) = (e["names"][0] for e in done["evictions"])
    assert gone not in ready_names(running)
    assert gone in running.cli("evictions").stdout
    assert_problem(running.ask("GET", f"/v1/models/{gone}"), 404, "no_such_model")
    assert running.metric("cachd_evictions_total", reason="asked") == 1
