"""The demonstration, run as `make demo` runs it, from a path with spaces."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from bench.demo import Daemon
from tests.ground.site import until

PROJECT = Path(__file__).parent.parent
PATIENCE_SECONDS = 120.0


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Path]:
    """What the demonstration needs of the project, in a directory with spaces; no daemon of it stays."""
    place = tmp_path / "a path with spaces"
    for part in ("cachd", "bench", "tests/ground"):
        shutil.copytree(PROJECT / part, place / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(PROJECT / "tests/__init__.py", place / "tests")
    yield place
    for pid in daemons(place):
        os.kill(pid, signal.SIGKILL)


def daemons(place: Path) -> list[int]:
    """The processes that work in a directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").samefile(place) and (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


def begun(place: Path, **env: str) -> subprocess.Popen[str]:
    told = {**os.environ, "PYTHONPATH": str(place), **env}
    return subprocess.Popen(
        [sys.executable, "-m", "bench.demo"],
        cwd=place,
        env=told,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_it_says_what_the_kill_cost_and_keeps_the_daemon_and_the_next_stops_it_and_leaves_nothing(
    copied: Path,
) -> None:
    with begun(copied, KEEP="1") as running:
        output, errors = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 0, errors
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output), "no control characters into a pipe"
    for command in ("serve --root", "pull hf://", "wait ", "ls"):
        assert f"$  cachd {command}" in output
    assert re.search(r"cost  [\d.]+ (bytes|kB|MB) were sent twice: ", output)
    assert "try next" in output
    (kept,) = daemons(copied)
    with begun(copied) as running:
        until(lambda: len(now := daemons(copied)) > 1 and kept not in now)
        running.send_signal(signal.SIGINT)
        output, errors = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 130
    assert "Traceback" not in errors
    assert f"stopped pid {kept}" in output
    assert "done" not in output
    until(lambda: not daemons(copied))


def test_one_that_fails_says_why_and_ends_with_a_failure(copied: Path) -> None:
    (copied / "cachd/__main__.py").write_text("raise SystemExit('nothing works')\n")
    with begun(copied) as running:
        _, errors = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 1
    assert errors.startswith("make demo failed: cachd serve ended with 1:\nnothing works")
    assert daemons(copied) == []


def test_a_port_that_somebody_takes_meanwhile_is_given_up(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        try:
            daemon.start(taken.getsockname()[1])
            assert urlsplit(daemon.url).port != taken.getsockname()[1]
        finally:
            daemon.close()
