"""A short campaign, as `make torture` runs one for ten minutes, and that its reader notices what is wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import oracle
from tests.ground import pod
from tests.ground.models import noise
from tests.ground.needs import needs

PROJECT = Path(__file__).parent.parent.parent


@needs("pods")
def test_a_short_campaign_of_kills_and_faults_finds_no_promise_broken(tmp_path: Path) -> None:
    """Promised: After kill -9, every published model is complete or absent, and the restart needs no
    human."""
    told = tmp_path / "told.json"
    command = [sys.executable, "-m", "tests.faults.torture", "--rounds=1", "--workers=1", f"--json={told}"]
    ended = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    outcome = json.loads(told.read_bytes())
    assert outcome["violations"] == []
    assert outcome["looked"] > 10, "the reader saw ready models"
    assert outcome["held"] > 10, "and held some"
    assert {"killed before", "killed after", "EIO"} <= set(outcome["faults"])
    assert sum(outcome["faults"].values()) > 15
    assert "kill points tried" in ended.stdout


def overwrite(path: Path) -> None:
    """Other bytes, in place: what nothing may do to a file that is mapped."""
    path.chmod(0o644)
    with path.open("r+b") as opened:
        opened.write(b"other")


def shown_as_ready(tmp_path: Path) -> Path:
    """A model of one file, its ready file there, below a directory that other users may enter; its tree."""
    place = tmp_path / "place"
    tree = place / "root/models/.trees" / ("a" * 32)
    tree.mkdir(parents=True)
    (tree / "1.bin").write_bytes(noise(5000))
    (place / "root/models/m").symlink_to(f".trees/{tree.name}")
    (place / "root/ready").mkdir()
    (place / "root/ready/m.json").write_text(json.dumps({"manifest": tree.name}))
    oracle.write_known(place, {tree.name: {"1.bin": hashlib.sha256(noise(5000)).hexdigest()}})
    return tree


@needs("pods")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tree: overwrite(tree / "1.bin"), "root/m.json: 1.bin has other bytes"),
        (lambda tree: (tree / "1.bin").unlink(), "root/m.json: 1.bin is missing"),
        (lambda tree: tree.rename(tree.with_name("b" * 32)), "root/m.json: 1.bin is missing"),
        (lambda tree: (tree.parent.parent / "m").unlink(), "root/m.json: the link names m"),
        (lambda tree: None, None),
    ],
    ids=["a wrong byte", "a file gone", "a tree gone", "no name", "nothing"],
)
def test_the_reader_of_a_campaign_sees_what_is_wrong_behind_a_ready_file(
    tmp_path: Path, change: Callable[[Path], object], said: str | None
) -> None:
    change(shown_as_ready(tmp_path))
    with pod.pod(tmp_path / "place", oracle.SCRIPT) as reader:
        told = oracle.verdict(reader)
    assert told["looked"] > 0
    assert set(told["violations"]) == ({said} if said else set())


@needs("pods")
def test_the_reader_of_a_campaign_sees_a_mapped_file_change_after_its_model_has_gone(tmp_path: Path) -> None:
    tree = shown_as_ready(tmp_path)
    with pod.pod(tmp_path / "place", oracle.SCRIPT) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "looking\n"
        (tmp_path / "place" / "root" / "ready/m.json").unlink()
        overwrite(tree / "1.bin")
        told = oracle.verdict(reader)
    assert {violation[:21] for violation in told["violations"]} == {"a mapped file changed"}


@needs("pods")
@pytest.mark.parametrize("by_force", [False, True])
def test_the_reader_of_a_campaign_sees_a_file_go_that_it_holds(tmp_path: Path, by_force: bool) -> None:
    tree = shown_as_ready(tmp_path)
    holds = tree.parent.parent / ".holds"
    holds.mkdir()
    (holds / tree.name).touch()
    with pod.pod(tmp_path / "place", oracle.SCRIPT) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "looking\n"
        (tmp_path / "place" / "root" / "ready/m.json").unlink()
        if by_force:
            (holds / tree.name).unlink()
        (tree / "1.bin").unlink()
        told = oracle.verdict(reader)
    assert told["held"] > 0
    assert set(told["violations"]) == (set() if by_force else {"held, and 1.bin is missing"})
