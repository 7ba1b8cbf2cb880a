"""The events of a node on the command line: those that happened, and those that happen."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachd.cli.sse import ServerSentEvent, events_of
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.program import CACHD, Program
from tests.ground.raw import RawServer, reply
from tests.ground.site import PATIENCE_SECONDS, Ground

Nodes = Callable[..., Node]


@contextmanager
def following(url: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    env = {**os.environ, "CACHD_URL": url}
    command = [*CACHD, "events", "-f", *words]
    with Program(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def next_of(process: subprocess.Popen[str], **facts: object) -> dict[str, object]:
    """The next event with these facts, of a process that prints JSON."""
    assert process.stdout is not None
    for line in process.stdout:
        event: dict[str, object] = json.loads(line)
        if facts.items() <= event.items():
            return event
    raise AssertionError(process.stderr.read() if process.stderr else "")


def test_events_shows_what_happened_to_a_model_and_who_asked(ground: Ground) -> None:
    ground.have("seen.bin")
    ground.have("unseen.bin")
    ended = ground.node.cli("events", "seen.bin")
    assert ended.returncode == 0, ended.stderr
    headings, *rows = (re.split(" {2,}", line) for line in ended.stdout.splitlines())
    assert headings == ["TIME", "KIND", "MODEL", "WHO", "DETAIL"]
    assert [(kind, model, who) for _, kind, model, who, *_ in rows] == [
        (kind, "seen.bin", "anonymous") for kind in ("pull_asked", "pull_began", "pull_ready")
    ]
    assert rows[-1][-1].startswith("1.0 MB in all, 1.0 MB fetched, in ")
    above, row, *_ = ground.node.cli("events", "seen.bin", "-o", "wide").stdout.splitlines()
    first = row.split()[0]
    assert above.startswith("ID ")
    page = json.loads(ground.node.cli("events", "-o", "json").stdout)
    assert page == ground.node.ask("GET", "/v1/events?follow=false").document
    later = json.loads(ground.node.cli("events", "--after", first, "-o", "json").stdout)
    assert page["events"][0]["id"] <= int(first) < later["events"][0]["id"]
    assert ground.node.cli("events", "../x").returncode == 2


def test_events_are_followed_until_ctrl_c(ground: Ground) -> None:
    with following(ground.node.url, "live.bin", "-o", "json") as process:
        ground.have("other.bin")
        ground.have("live.bin")
        assert next_of(process)["model"] == "live.bin"
        next_of(process, kind="pull_ready")
        ground.node.ask("PUT", "/v1/models/live.bin/pin")
        assert next_of(process)["kind"] == "pinned"
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, stderr) == (130, "")


def test_events_are_followed_through_a_restart_of_the_daemon(
    node: Nodes, origin: Origin, tmp_path: Path
) -> None:
    place = f"unix:{tmp_path}/s"
    running = node(listen=["127.0.0.1:0", place])
    with following(place, "-o", "json") as process:
        running.pull(origin.add("/before.bin", b"x" * 1000))
        seen = next_of(process, kind="pull_ready", model="before.bin")
        running.kill()
        running.start()
        running.pull(origin.add("/after.bin", b"y" * 1000))
        after = next_of(process, kind="pull_ready", model="after.bin")
        assert int(str(after["id"])) > int(str(seen["id"]))


def test_events_are_not_followed_where_no_daemon_ever_answered() -> None:
    with following("http://127.0.0.1:1") as process:
        stdout, stderr = process.communicate(timeout=PATIENCE_SECONDS)
    assert (process.returncode, stdout) == (6, "")
    assert "code: daemon_unreachable" in stderr


async def test_a_stream_of_events_is_read_as_the_standard_says() -> None:
    blocks = [
        "retry: 1",
        ": comment\nevent: pinned\ndata: {\ndata:}\nid: 7",
        "id:8",
        "data: x\nwrong",
        "event: lost",
    ]

    async def lines() -> AsyncIterator[str]:
        for line in "\n\n".join(blocks).split("\n"):
            yield line

    assert [event async for event in events_of(lines())] == [
        ServerSentEvent("message", "", ""),
        ServerSentEvent("pinned", "{\n}", "7"),
        ServerSentEvent("message", "", "8"),
        ServerSentEvent("message", "x", "8"),
    ]


@pytest.mark.parametrize("data", ["nonsense", "[1]", "[" * 100_000])
def test_an_event_that_is_none_of_cachd_is_refused(data: str) -> None:
    stream = f"event: pull_ready\ndata: {data}\nid: 1\n\n".encode()
    said = "Content-Type: text/event-stream"
    with (
        RawServer(lambda asked: reply(asked, "200 OK", said, body=stream)) as daemon,
        following(daemon.url, "-o", "json") as process,
    ):
        _, problem = process.communicate(timeout=PATIENCE_SECONDS)
    assert json.loads(problem)["code"] == "bad_event"
