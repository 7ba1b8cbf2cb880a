"""Small and hostile disks: what a pull, a daemon and its ready models do on them."""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cachd.errors import DiskFailed, NoSpace
from cachd.store.disk_store import DiskStore
from tests.conftest import Engine
from tests.ground.disks import MIB, FuseDisk, fill, loop, take_inodes, unmount
from tests.ground.models import noise
from tests.ground.needs import refuse
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import assert_problem, files_left

Engines = Callable[..., Engine]
Nodes = Callable[..., Node]
KINDS = ["ext4", "xfs", "btrfs"]
PATIENCE_SECONDS = 120
SPARSE = noise(MIB) + bytes(7 * MIB) + noise(MIB, 2)  # what a file system may compress or leave a hole for


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[FuseDisk]:
    """A disk that fails on demand."""
    with FuseDisk(tmp_path) as disk:
        yield disk


@pytest.fixture
def node_on(tmp_path: Path, node: Nodes) -> Callable[..., Node]:
    """Starts a daemon whose root is this file system."""

    def started(disk: Path, **options: object) -> Node:
        return node(root=disk.relative_to(tmp_path), **options)

    return started


# --- a call that fails ---

FULL_AT = [
    ("fallocate", "*/data"),
    ("write", "*/data"),
    ("fsync", "*/data"),
    ("write", "*/about.json"),
    ("create", "*/journal"),
    ("write", "*/journal"),
    ("fsync", "*/journal"),
    ("rename_to", "/.cachd/blobs/*"),
    ("fsyncdir", "/.cachd/blobs/*"),
    ("write", "/.cachd/manifests/*"),
    ("link", "/.cachd/staging/*"),
    ("symlink", "/.cachd/staging/*"),
    ("rename_to", "/models/*"),
    ("rename_to", "/ready/*"),
    ("fsyncdir", "/ready"),
]


@pytest.mark.parametrize("error", ["ENOSPC", "EIO"])
def test_wherever_the_disk_refuses_the_pull_fails_and_the_next_one_succeeds(
    broken: FuseDisk, origin: Origin, engine: Engines, error: str
) -> None:
    """What was ready stays so, nothing stays promised, a full disk is given back what was taken of it."""
    running = engine(root=broken.path, allow=(f"{origin.url}/",))
    kept = origin.add("/kept.bin", noise(MIB, 1))
    running.pull(kept)
    kind = DiskFailed if error == "EIO" else NoSpace
    for number, (operation, match) in enumerate(FULL_AT):
        content = noise((6 if "journal" in match else 1) * MIB, 2 + number)  # a file of one part has none
        ref = origin.add(f"/{number}.bin", content)
        broken.fail(operation, error, match)
        if "journal" in match and kind is DiskFailed:  # none is needed once every byte is here
            with suppress(DiskFailed):
                running.pull(ref)
            broken.heal()
            running.pulls.delete(f"{number}.bin")
            continue
        with pytest.raises(kind) as refusal:
            running.pull(ref)
        broken.heal()
        assert refusal.value.code == ("disk_failed" if error == "EIO" else "no_space"), operation
        told_ready = (broken.path / f"ready/{number}.bin.json").exists()
        assert told_ready == (running.store.names.get(f"{number}.bin") is not None)
        assert running.store.space.capacity().reserved == 0
        if kind is NoSpace:
            assert list((broken.path / ".cachd/ingest").iterdir()) == [], operation
        assert (broken.path / "models/kept.bin/kept.bin").read_bytes() == noise(MIB, 1)
        running.store.sweep_snapshots()
        running.pull(ref)
        assert (broken.path / f"models/{number}.bin/{number}.bin").read_bytes() == content
        running.pulls.delete(f"{number}.bin")
    for operation in ("create", "write"):  # what is kept for the next process, this one can do without
        broken.fail(operation, "ENOSPC", "*/received")
        running.pull(ref)
        broken.heal()
        running.pulls.delete(f"{number}.bin")
    running.pulls.delete("kept.bin")
    assert [name for name in files_left(broken.path) if not name.endswith(".new")] == []


def test_a_disk_whose_syncs_fail_for_good_ends_the_pull_and_is_counted(
    broken: FuseDisk, origin: Origin, engine: Engines
) -> None:
    running = engine(root=broken.path, allow=(f"{origin.url}/",))
    ref = origin.add("/model.bin", noise(6 * MIB))
    broken.fail("fsync", "EIO", "*/data")
    with pytest.raises(DiskFailed) as refusal:
        running.pull(ref)
    assert refusal.value.code == "disk_failed"
    assert b"cachd_disk_failures_total 1.0" in running.metrics.text()
    broken.heal()
    origin.forget()
    running.pull(ref)
    assert origin.bytes_sent("/model.bin") == 0, "what a failed sync covered is written again from memory"
    assert (broken.path / "models/model.bin/model.bin").read_bytes() == noise(6 * MIB)


def test_bytes_that_cannot_be_read_back_are_fetched_anew_and_never_published(
    broken: FuseDisk, origin: Origin, node_on: Callable[..., Node]
) -> None:
    """A resume reads what its journal holds, and the disk cannot."""
    running = node_on(broken.path, allow=[f"{origin.url}/"])
    ref = origin.add("/model.bin", noise(6 * MIB))
    hold = origin.hold("/model.bin", after=3 * MIB)
    running.pull(ref)
    assert hold.reached.wait(PATIENCE_SECONDS)
    running.wait_for("part made durable", path="model.bin")
    running.kill()
    hold.release()
    origin.forget()
    broken.fail("read", "EIO", "*/data")
    hold = origin.hold("/model.bin", after=MIB)
    running.start()
    assert hold.reached.wait(PATIENCE_SECONDS)
    broken.heal()
    hold.release()
    assert running.ready("model.bin").status == 200
    assert origin.bytes_sent("/model.bin") >= 6 * MIB, "the part that was durable, too"
    broken.heal()
    assert (broken.path / "models/model.bin/model.bin").read_bytes() == noise(6 * MIB)


def test_a_published_file_that_the_disk_cannot_read_any_more_is_damage_and_is_repaired(
    broken: FuseDisk, origin: Origin, node_on: Callable[..., Node]
) -> None:
    content = noise(6 * MIB)
    ref = f"{origin.add('/model.bin', content)}#sha256={hashlib.sha256(content).hexdigest()}"
    running = node_on(broken.path, allow=[f"{origin.url}/"])
    running.pull(ref)
    assert running.ready("model.bin").status == 200
    broken.fail("read", "EIO", "/.cachd/blobs/*")
    assert running.ask("POST", "/v1/models/model.bin/verify").status == 202
    running.wait_for("verified", name="model.bin", state="damaged")
    told = running.ask("GET", "/v1/models/model.bin").document["verification"]
    assert told["damaged"] == [{"path": "model.bin", "wrong": "the disk cannot read it"}]
    broken.heal()
    assert running.ready("model.bin").status == 200
    assert (broken.path / "models/model.bin/model.bin").read_bytes() == content


def test_a_disk_that_cannot_allocate_ahead_holds_the_same_bytes(
    broken: FuseDisk, origin: Origin, engine: Engines
) -> None:
    broken.fail("fallocate", "EOPNOTSUPP")
    running = engine(root=broken.path, allow=(f"{origin.url}/",))
    running.pull(origin.add("/model.bin", noise(6 * MIB)))
    assert (broken.path / "models/model.bin/model.bin").read_bytes() == noise(6 * MIB)


def test_a_disk_slower_than_the_network_costs_no_memory(
    broken: FuseDisk, origin: Origin, node_on: Callable[..., Node]
) -> None:
    """The file is many times what a daemon may take while it waits for the disk."""
    small, large = origin.add("/small.bin", noise(24 * MIB)), origin.add("/large.bin", noise(80 * MIB, 2))
    running = node_on(broken.path, streams=4, allow=[f"{origin.url}/"])
    running.pull(small)
    assert running.ready("small.bin").status == 200
    before = peak_memory(running.pid)
    broken.fail("write", match="*/data", delay=0.01)
    running.pull(large)
    assert running.ready("large.bin").status == 200
    assert peak_memory(running.pid) - before < 32 * MIB


def peak_memory(pid: int) -> int:
    """Most bytes a process ever held in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) * 1024


# --- real file systems ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_of_any_kind_serves_refuses_and_can_be_emptied(
    kind: str, tmp_path: Path, origin: Origin, node_on: Callable[..., Node]
) -> None:
    options = "noexec,nosuid,nodev" + (",compress-force=zstd" if kind == "btrfs" else "")
    with loop(tmp_path, kind, options=options) as disk:
        kept, second = origin.add("/kept.bin", noise(9 * MIB)), origin.add("/second.bin", SPARSE)
        running = node_on(disk)
        running.pull(kept)
        assert running.ready("kept.bin").status == 200
        filler = fill(disk)
        running.pull(second)
        assert running.ready("second.bin").document["code"] in ("no_space", "no_such_model")
        assert (disk / "models/kept.bin/kept.bin").read_bytes() == noise(9 * MIB)
        assert running.ready("kept.bin", wait=0).status == 200
        running.kill()
        running.start()
        assert running.ready("kept.bin", wait=0).status == 200
        assert running.ask("DELETE", "/v1/models/kept.bin").status == 200
        filler.unlink()
        running.pull(second)
        assert running.ready("second.bin").status == 200
        assert (disk / "models/second.bin/second.bin").read_bytes() == SPARSE
        assert running.ask("DELETE", "/v1/models/second.bin").status == 200
        assert files_left(disk) == []
        running.kill()


def test_a_disk_without_inodes_is_a_full_disk(
    tmp_path: Path, origin: Origin, node_on: Callable[..., Node]
) -> None:
    with loop(tmp_path, "ext4", inodes=256) as disk:
        running = node_on(disk)
        running.pull(origin.add("/kept.bin", noise(MIB)))
        assert running.ready("kept.bin").status == 200
        before = files_left(disk)
        take_inodes(disk, leave=40)
        shards = {f"shard-{n}.bin": noise(1000, n) for n in range(60)}
        running.pull(origin.add_model("many", shards))
        assert_problem(running.ready("many"), 503, "no_space")
        assert running.ready("kept.bin", wait=0).status == 200
        assert running.ask("DELETE", "/v1/models/many").status == 200
        assert [name for name in files_left(disk) if not name.startswith("fillers/")] == before
        subprocess.run(["rm", "-r", disk / "fillers"], check=True)
        running.pull(f"{origin.url}/many/")
        assert running.ready("many").status == 200
        running.kill()


def test_a_quota_is_a_full_disk(tmp_path: Path, origin: Origin, node_on: Callable[..., Node]) -> None:
    with loop(tmp_path, "btrfs") as disk:
        subprocess.run(["btrfs", "quota", "enable", disk], check=True, capture_output=True)
        subprocess.run(["btrfs", "qgroup", "limit", "8M", disk], check=True, capture_output=True)
        running = node_on(disk)
        running.pull(origin.add("/kept.bin", noise(3 * MIB)))
        assert running.ready("kept.bin").status == 200
        big = origin.add("/big.bin", noise(9 * MIB, 2))
        running.pull(big)
        refused = running.ready("big.bin")
        assert_problem(refused, 503, "no_space")
        assert "quota" in refused.document["detail"].lower()
        assert running.ready("kept.bin", wait=0).status == 200
        subprocess.run(["btrfs", "qgroup", "limit", "none", disk], check=True, capture_output=True)
        running.pull(big)
        assert running.ready("big.bin").status == 200
        running.kill()


def test_a_pull_whose_room_another_process_takes_waits_until_there_is_some_again(
    tmp_path: Path, origin: Origin, node_on: Callable[..., Node]
) -> None:
    """The first file is here; the blocks that were promised to the second one are taken."""
    with loop(tmp_path, "ext4") as disk:
        running = node_on(disk, streams=1)
        running.pull(origin.add("/kept.bin", noise(MIB)), pin=True)  # or it may make room
        assert running.ready("kept.bin").status == 200
        ref = origin.add_model("two", {"first.bin": noise(9 * MIB, 1), "second.bin": noise(8 * MIB, 2)})
        hold = origin.hold("/two/second.bin", after=0)
        running.pull(ref)
        assert hold.reached.wait(PATIENCE_SECONDS)
        filler = fill(disk, leave=4 * MIB)
        hold.release()
        running.wait_for("paused: the disk is at its reserve", file="second.bin")
        assert running.ready("kept.bin", wait=0).status == 200
        assert_problem(running.ready("two", wait=0), 503, "not_ready")
        filler.unlink()
        assert running.ready("two").status == 200
        running.kill()


def test_a_disk_that_fails_in_mid_pull_and_becomes_read_only_still_serves(
    tmp_path: Path, origin: Origin, node_on: Callable[..., Node]
) -> None:
    """ext4 does so after an error: the pull ends, probes say why, pods read on, a new start says why not."""
    with loop(tmp_path, "ext4", options="errors=remount-ro") as disk:
        running = node_on(disk)
        running.pull(origin.add("/kept.bin", noise(MIB)))
        assert running.ready("kept.bin").status == 200
        assert running.ask("GET", "/readyz").status == 200
        ref = origin.add("/pulled.bin", noise(12 * MIB, 2))
        hold = origin.hold("/pulled.bin", after=MIB)
        running.pull(ref)
        assert hold.reached.wait(PATIENCE_SECONDS)
        break_down(disk)
        hold.release()
        assert_problem(running.ready("pulled.bin"), 500, "read_only")
        assert_problem(running.ask("GET", "/readyz"), 503, "read_only")
        assert running.ask("GET", "/livez").status == 200
        assert running.metric("cachd_disk_failures_total") == 1
        assert running.ready("kept.bin", wait=0).status == 200
        assert (disk / "models/kept.bin/kept.bin").read_bytes() == noise(MIB)
        running.kill()
        with pytest.raises(DiskFailed) as refusal:
            DiskStore(disk)
        assert refusal.value.code == "read_only"
        assert (disk / "models/kept.bin/kept.bin").read_bytes() == noise(MIB)


def break_down(disk: Path) -> None:
    """Let ext4 meet an error, as it would a block that makes no sense."""
    source = subprocess.run(
        ["findmnt", "-n", "-o", "SOURCE", disk], check=True, capture_output=True, text=True
    )
    trigger = Path("/sys/fs/ext4") / Path(source.stdout.strip()).name / "trigger_fs_error"
    if not trigger.exists():
        refuse("trigger_fs_error", "this kernel's ext4 has none")
    trigger.write_text("made by a test")


def test_a_mount_point_whose_disk_is_missing_is_refused_and_stays_empty(tmp_path: Path) -> None:
    with loop(tmp_path, "ext4") as disk:
        DiskStore(disk, disk_at_least=32 * MIB).close()
        unmount(disk)
        own = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "tmpfs", disk])
        assert own.returncode == 0, "the node's own disk, which is smaller"
        with pytest.raises(DiskFailed) as refusal:
            DiskStore(disk, disk_at_least=32 * MIB)
        assert refusal.value.code == "disk_too_small"
        assert "disk_at_least" in refusal.value.hint
        assert list(disk.iterdir()) == []


def test_foreign_files_are_told_of_and_left_alone(tmp_path: Path, node: Nodes) -> None:
    root = tmp_path / "root"
    (root / "backup").mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    running = node(root="root")
    assert running.wait_for("entries that cachd did not make are left alone")["names"] == [
        "backup",
        "notes.txt",
    ]
    assert (root / "notes.txt").read_text() == "mine"
