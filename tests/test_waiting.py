"""A second daemon on one root lives, is not ready, says for whom it waits, and takes over at once."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.site import assert_problem, said, until

Nodes = Callable[..., Node]
WAITS = "waiting for another daemon to end"


@pytest.fixture
def first(node: Nodes) -> Node:
    return node()


@pytest.fixture
def second(first: Node) -> Iterator[Node]:
    """A daemon that waits for the root of `first`."""
    waiting = beside(first)
    waiting.start(until="answering probes")
    yield waiting
    if waiting._process is not None:
        waiting.kill()


def beside(first: Node, **options: object) -> Node:
    """Another daemon over the same root, with a file of its own."""
    other = Node(first.root, {**first.options, **options})
    other.config = first.config.with_name("second.yaml")
    other.configure(**other.options)
    return other


def test_a_second_daemon_lives_unready_and_says_for_whom_it_waits(first: Node, second: Node) -> None:
    assert second.ask("GET", "/livez").document == {"status": "alive"}
    refused = second.ask("GET", "/readyz")
    assert_problem(refused, 503, "root_locked")
    assert said(refused, "Retry-After") == "5"
    detail = refused.document["detail"]
    assert f"pid {first.pid} on {socket.gethostname()}, since " in detail
    since = time.strptime(detail.partition("since ")[2][:20], "%Y-%m-%dT%H:%M:%SZ")
    assert abs(time.time() - (time.mktime(since) - time.timezone)) < 120
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/models"),
        ("GET", "/metrics"),
        ("POST", "/livez"),
    ):
        assert_problem(second.ask(method, path), 503, "root_locked")
    assert first.ask("GET", "/readyz").status == 200
    assert [entry["level"] for entry in second.log if entry["event"] == WAITS] == ["warning"]


def test_commands_to_a_daemon_that_waits_say_so(second: Node) -> None:
    listed = second.cli("ls")
    assert (listed.returncode != 0, "another cachd" in listed.stderr) == (True, True)
    examined = second.cli("doctor", "--config", str(second.config), "--root", str(second.root), "-o", "json")
    found = {each["code"]: each for each in json.loads(examined.stdout)["findings"]}
    assert (found["daemon"]["state"], found["daemon"]["error"]) == ("wrong", "root_locked")
    assert "token" not in found["daemon"]["hint"]
    assert {"root", "file_system", "space"} <= found.keys()


@pytest.mark.parametrize("ends", ["stop", "kill"])
def test_it_takes_over_as_soon_as_the_first_ends(
    origin: Origin, first: Node, second: Node, ends: str
) -> None:
    first.pull(origin.add("/it", noise(1000)))
    assert first.ready("it").status == 200
    getattr(first, ends)()
    taken_over = time.monotonic()
    assert second.wait_for("listening")["port"] == second._address[1]
    assert time.monotonic() - taken_over < 5
    until(lambda: second.ask("GET", "/readyz").status == 200)
    assert second.ready("it").status == 200
    assert f"pid {second.pid} on" in (second.root / ".cachd/lock").read_text()
    assert second.stop() == 0


def test_connections_that_come_during_the_take_over_are_answered(first: Node, second: Node) -> None:
    first.kill()
    second.wait_for("the root is free")
    assert second.ask("GET", "/livez").status == 200, "the socket stays open between the two servers"
    second.wait_for("listening")


def test_a_stop_during_the_wait_ends_cleanly(first: Node, second: Node) -> None:
    assert second.stop() == 0
    assert first.ask("GET", "/readyz").status == 200
    assert f"pid {first.pid} on" in (first.root / ".cachd/lock").read_text()


def test_an_address_of_the_first_daemon_is_waited_for_too(node: Nodes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    path = tmp_path / "api.sock"
    first = node(listen=[f"127.0.0.1:{port}", f"unix:{path}"])
    second = beside(first, listen=[f"127.0.0.1:{port}", f"unix:{path}", "127.0.0.1:0 probes"])
    second.start(until="answering probes")
    assert second.ask("GET", "/livez").status == 200, "on the address that nobody else has"
    first.kill()
    second.wait_for("listening", port=port)
    second.wait_for("listening", path=str(path))
    assert second.cli("ls", "--url", f"unix:{path}").returncode == 0
    assert second.stop() == 0
    assert not path.exists()


def test_while_all_its_addresses_are_taken_it_waits_all_the_same(node: Nodes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    first = node(listen=f"127.0.0.1:{port}")
    second = beside(first)
    second.start(until=WAITS)
    first.stop()
    assert second.wait_for("listening")["port"] == port
    assert second.stop() == 0


def test_without_waiting_it_ends_with_the_exit_code_of_something_in_use(first: Node) -> None:
    ended = first.cli("serve", "--no-wait", "--root", str(first.root), "--listen", "127.0.0.1:0")
    assert (ended.returncode, "code: root_locked" in ended.stderr) == (9, True)
    assert os.kill(first.pid, 0) is None
