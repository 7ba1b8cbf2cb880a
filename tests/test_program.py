"""A forked cachd is what an executed one is: its environment, directory, streams, signals and end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ground.node import Node
from tests.ground.program import CACHD, Program, run, server

PATIENCE_SECONDS = 120.0
WAYS = pytest.mark.parametrize("before", [(), ("env",)], ids=["forked", "executed"])


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def is_forked(pid: int) -> bool:
    return b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()


@WAYS
def test_it_has_the_environment_the_directory_and_the_streams_of_its_own(
    tmp_path: Path, before: tuple[str, ...]
) -> None:
    (tmp_path / "here.yaml").write_text("streams: 7\n")
    env = {**os.environ, "CACHD_RETRIES": "5", "CACHD_CONFIG": "here.yaml"}
    ended = run(
        [*before, *CACHD, "options", "--effective", "-o", "json"],
        env=env,
        cwd=tmp_path,
        timeout=PATIENCE_SECONDS,
    )
    found: dict[str, Any] = {each["key"]: each["value"] for each in json.loads(ended.stdout)["options"]}
    assert (found["streams"], found["retries"]) == (7, 5)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "CACHD_RETRIES" not in os.environ


@WAYS
def test_a_wrong_command_ends_with_its_status_and_words(before: tuple[str, ...]) -> None:
    ended = run([*before, *CACHD, "nothing"], timeout=PATIENCE_SECONDS)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "No such command 'nothing'" in ended.stderr


@WAYS
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_is_a_child_that_ends_by_signals(
    tmp_path: Path, before: tuple[str, ...], number: signal.Signals
) -> None:
    with Node(tmp_path / "node", before=before) as node:
        assert node.ask("GET", "/livez").status == 200
        assert parent_of(node.pid) == os.getpid()
        assert is_forked(node.pid) is not bool(before)
        assert node._end(number) == (-signal.SIGKILL if number == signal.SIGKILL else 0)


def test_a_program_whose_environment_differs_is_executed_and_not_forked(tmp_path: Path) -> None:
    for name in ("LD_PRELOAD", "HF_HOME", "PYTHONHASHSEED"):
        assert not server().can_start({**os.environ, name: "0"})
    mask = os.umask(0o077)
    try:
        assert not server().can_start(os.environ)
    finally:
        os.umask(mask)
    assert server().can_start(os.environ)
    read, write = os.openpty()
    with Program(
        [*CACHD, "hold", "x", "--cache", tmp_path], stderr=write, stdout=subprocess.DEVNULL
    ) as shown:
        assert not is_forked(shown.pid)
        shown.kill()
    os.close(read)
    os.close(write)


def test_a_start_loads_nothing_that_the_daemon_does_not_use(tmp_path: Path) -> None:
    with Node(tmp_path / "node", PYTHONPROFILEIMPORTTIME="1") as node:
        loaded = {line.rpartition("|")[2].strip() for line in node.output.splitlines()}
    assert {"structlog.dev", "fastapi.routing", "rich.filesize"} <= loaded
    assert not loaded & {"rich.traceback", "rich.pretty", "pydantic.v1.main"}
