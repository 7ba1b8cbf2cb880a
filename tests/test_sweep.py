"""Sweeps: what nothing needs goes, at start, in time, and when asked; what a pull or a model needs stays."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ground.hub import Hub
from tests.ground.models import digests, noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Status
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, assert_problem

ORPHAN = "ab" * 32


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A daemon that sweeps only when asked."""
    root = tmp_path_factory.mktemp("quiet") / "node"
    options = {"retries": 0, "streams": 4, "sweep_interval_seconds": 0, "keep_unfinished_seconds": 3600}
    with Origin() as origin, Hub() as hub, Node(root, {**options, "hf_endpoint": hub.url}) as node:
        yield Ground(node, origin, hub)


def lay(root: Path) -> dict[str, Path]:
    """What dead daemons leave: a blob and an ingest; by kind."""
    left = {
        "blob": root / f".cachd/blobs/sha256/{ORPHAN}",
        "ingest": root / f".cachd/ingest/sha256-{ORPHAN[::-1]}-65536/data",
    }
    for path in left.values():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(noise(64 << 10))
    return left


def swept(answer: Any) -> dict[str, int]:
    """Bytes freed by kind."""
    freed: dict[str, int] = {}
    for each in answer.document["swept"]:
        freed[each["kind"]] = freed.get(each["kind"], 0) + each["freed_bytes"]
    return freed


def settled(root: Path) -> dict[str, str]:
    """The digest of every file; of those that a running pull writes to, that they are there."""
    grows = re.compile(r"\.cachd/ingest/.*|status/.*")
    return {path: "" if grows.fullmatch(path) else digest for path, digest in digests(root).items()}


def sweep(node: Node, **asked: bool) -> dict[str, int]:
    answer = node.ask("POST", "/v1/sweeps", asked)
    assert answer.status == 200, answer
    return swept(answer)


def test_leftovers_go_when_asked_and_a_dry_run_only_says_so(quiet: Ground) -> None:
    node = quiet.node
    left = lay(node.root)
    before = {kind: node.metric("cachd_swept_bytes_total", kind=kind) for kind in left}
    told = sweep(node, dry_run=True, everything=True)
    assert told == {"blob": 64 << 10, "ingest": 64 << 10}
    assert all(path.exists() for path in left.values())
    assert sweep(node, everything=True) == told
    assert not any(path.exists() for path in left.values())
    for kind, freed in told.items():
        assert node.metric("cachd_swept_bytes_total", kind=kind) - before[kind] == freed
    assert sweep(node, everything=True) == {}


def test_what_an_ended_pull_left_is_kept_for_the_next_one_so_long_as_told(
    quiet: Ground,
) -> None:
    node = quiet.node
    left = lay(node.root)
    assert sweep(node) == {}
    assert left["blob"].exists()
    assert left["ingest"].exists()
    assert sweep(node, everything=True) == {"blob": 64 << 10, "ingest": 64 << 10}


def test_a_daemon_sweeps_at_its_start_and_again_in_time(node: Callable[..., Node]) -> None:
    running = node(sweep_interval_seconds=0.05, keep_unfinished_seconds=0)
    running.kill()
    lay(running.root)
    running.start()
    for _ in range(2):
        for kind in ("blob", "ingest"):
            assert running.wait_for("swept", kind=kind)["freed_bytes"] == 64 << 10
        running.log.clear()
        lay(running.root)


def test_nothing_that_a_running_pull_needs_is_swept(quiet: Ground) -> None:
    """Its ingest with a finished part, and a blob that another pull committed and no view links to yet."""
    ground = quiet
    with ground.held("running.bin") as hold:
        before = settled(ground.node.root)
        assert sweep(ground.node, everything=True) == {}
        assert settled(ground.node.root) == before
        hold.release()
        assert ground.node.ready("running.bin").status == 200
    assert ground.origin.bytes_sent("/running.bin") <= 6 * MIB


def test_a_pull_that_has_not_said_what_it_needs_keeps_everything(quiet: Ground) -> None:
    """One that a restart goes on with finds its ingest, though its source has not answered yet."""
    ground = quiet
    left = lay(ground.node.root)
    hold = ground.origin.hold("/models/SHA256SUMS", after=0)
    ground.origin.add("/models/SHA256SUMS", b"x" * 100)
    ground.node.pull(f"{ground.origin.url}/models/")
    assert hold.reached.wait(PATIENCE_SECONDS)
    assert sweep(ground.node, everything=True) == {}
    assert left["blob"].exists()
    assert left["ingest"].exists()
    hold.release()
    assert_problem(ground.node.ready("models"), 400, "bad_checksums")
    assert sweep(ground.node, everything=True) == {"blob": 64 << 10, "ingest": 64 << 10}


def test_what_a_failed_pull_left_goes_with_a_sweep_of_everything(quiet: Ground) -> None:
    ground = quiet
    ref = ground.add("gone.bin", 24 * MIB)
    ground.origin.fault("/gone.bin", Status(404), when=lambda seen: (seen.extent or (0, 0))[0] >= 16 * MIB)
    ground.node.pull(ref)
    assert_problem(ground.node.ready("gone.bin"), 404, "file_not_found")
    assert list((ground.node.root / ".cachd/ingest").iterdir())
    assert sweep(ground.node, everything=True)["ingest"] > 0
    assert list((ground.node.root / ".cachd/ingest").iterdir()) == []


def test_the_blobs_of_a_ready_model_stay_though_somebody_deleted_its_views(
    quiet: Ground,
) -> None:
    ground = quiet
    ground.have("viewless.bin")
    for view in ("models/.trees", "hub"):
        for path in (ground.node.root / view).rglob("viewless.bin"):
            path.parent.chmod(0o755)
            path.unlink()
    blobs = [path for path in (ground.node.root / ".cachd/blobs").glob("*/*") if path.stat().st_nlink == 1]
    assert blobs
    assert sweep(ground.node, everything=True) == {}
    assert all(path.exists() for path in blobs)


def test_files_that_are_not_cachds_are_left_alone(quiet: Ground) -> None:
    node = quiet.node
    foreign = [
        node.root / ".cachd/blobs/sha256/README",
        node.root / ".cachd/blobs/notes/todo",
        node.root / ".cachd/ingest/something/data",
        node.root / "mine.txt",
    ]
    for path in foreign:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text("mine")
    assert sweep(node, everything=True) == {}
    assert all(path.read_text() == "mine" for path in foreign)


def test_the_command_tells_what_it_removed(quiet: Ground) -> None:
    node = quiet.node
    lay(node.root)
    told = json.loads(node.cli("sweep", "--dry-run", "--everything", "-o", "json").stdout)
    assert told["dry_run"]
    ended = node.cli("sweep", "--everything")
    assert ended.returncode == 0
    lines = ended.stdout.splitlines()
    assert lines[0].split() == ["KIND", "NAME", "FREED"]
    assert {line.split()[0] for line in lines[1:]} == {"blob", "ingest"}
    assert all(each["name"] in ended.stdout for each in told["swept"])
