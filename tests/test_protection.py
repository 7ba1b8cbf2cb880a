"""What keeps a model: leases, and whoever has it open or mapped."""

from __future__ import annotations

import hashlib
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cachd.errors import InUse, NoSpace
from cachd.kernel.leases import reports_open_files
from tests.conftest import paused_without_ready_file
from tests.ground.models import noise
from tests.ground.needs import needs
from tests.ground.origin import Origin
from tests.ground.pod import pod
from tests.ground.site import mapped
from tests.ground.small import MIB, PATIENCE_SECONDS, Disks, Engines, Small, on_disk


def test_a_lease_keeps_a_model_until_it_is_released(small: Small) -> None:
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
    small = Small(engine(root=disk(64 * MIB, kind="ext4")), origin)
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
def test_a_pod_that_has_a_shard_mapped_keeps_its_model_through_a_full_eviction_round(small: Small) -> None:
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
def test_a_pod_that_mounts_one_model_is_left_with_nothing_unless_it_has_a_lease(small: Small) -> None:
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


def test_a_reader_that_starts_after_the_ready_file_went_fails_to_open(small: Small) -> None:
    small.pull("a")
    layout = small.engine.store.layout
    small.engine.reclaim.make_available(35 * MIB)
    assert not layout.ready_file("a").exists()
    with pytest.raises(FileNotFoundError):
        (layout.model("a") / "a").open("rb")


def test_what_is_deleted_by_force_and_still_open_counts_as_taken_until_it_is_closed(small: Small) -> None:
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
