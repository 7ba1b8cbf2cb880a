"""The log says when a pull begins, how far it is, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cachd.report.progress_log import Seen
from cachd.transfer.waits import Reason
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.program import CACHD, Program, run

MIB = 1 << 20
PATIENCE_SECONDS = 120.0
Nodes = Callable[..., Node]
BEFORE = Seen(100.0, "downloading", None, 1000, 100_000)


@pytest.mark.parametrize(
    ("now", "is_logged"),
    [
        (Seen(109.9, "downloading", None, 5999, 100_000), False),
        (Seen(101.0, "downloading", None, 6000, 100_000), True),
        (Seen(110.0, "downloading", None, 1001, 100_000), True),
        (Seen(110.0, "downloading", None, 1000, 100_000), False),
        (Seen(160.0, "downloading", None, 1000, 100_000), True),
        (Seen(101.0, "downloading", Reason.origin, 1000, 100_000), True),
        (Seen(101.0, "publishing", None, 1000, 100_000), True),
    ],
    ids=["neither", "5 %", "10 seconds", "nothing came", "a minute", "it waits", "another state"],
)
def test_a_line_comes_after_10_seconds_or_5_percent_or_a_change(now: Seen, is_logged: bool) -> None:
    assert now.deserves_a_line(BEFORE) is is_logged


def test_the_daemon_logs_the_beginning_the_progress_and_the_end_of_a_pull(
    origin: Origin, node: Nodes
) -> None:
    ref = origin.add("/it", noise(6 * MIB))
    running = node(allow=[f"{origin.url}/"], limit_bytes_per_second="1MB")
    running.pull(ref)
    assert running.wait_for("pull began", name="it")["who"] == "anonymous"
    progress = running.wait_for("pull progress", name="it", state="downloading")
    assert 0 < progress["done_bytes"] <= progress["size_bytes"] == 6 * MIB
    assert progress["percent"] == 100 * progress["done_bytes"] // (6 * MIB)
    running.ask("PUT", "/v1/limits", {})
    assert running.wait_for("pull ended", name="it", state="ready")["who"] == "anonymous"


def direct(origin: Origin, root: Path) -> tuple[list[object], dict[str, Any]]:
    command = [*CACHD, "pull", f"{origin.url}/it", "--direct", "--name", "it", "--root", root]
    command += ["--allow", "127.0.0.0/8"]
    return command, {"env": {**os.environ, "CACHD_RESERVE_FREE": "0"}}


def test_a_direct_pull_without_a_terminal_logs_its_beginning_and_its_end(origin: Origin, root: Path) -> None:
    origin.add("/it", noise(MIB))
    command, how = direct(origin, root)
    ended = run(command, timeout=PATIENCE_SECONDS, **how)
    *lines, last, verified = ended.stderr.splitlines()
    log = {each["event"]: each for each in map(json.loads, lines)}
    assert log["pull began"]["who"] == "cachd:direct"
    assert log["pull ended"]["state"] == "ready"
    assert last.startswith("it: 1.0 MB in 1 file, in "), "the last two lines are for people"
    assert verified == "  no file is verified, because the source states no digest"
    assert ended.stdout == f"{root}/models/it/it\n"


def test_an_interrupted_direct_pull_is_not_called_cancelled(origin: Origin, root: Path) -> None:
    origin.add("/it", noise(6 * MIB))
    hold = origin.hold("/it", after=MIB)
    command, how = direct(origin, root)
    with Program(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how) as running:
        assert hold.reached.wait(PATIENCE_SECONDS)
        running.send_signal(signal.SIGTERM)
        _, stderr = running.communicate(timeout=PATIENCE_SECONDS)
    hold.release()
    assert "interrupted by a stop" in stderr
    assert "cancelled" not in stderr
