"""kill -9 at any moment: what the next life of the daemon believes, fetches again, and publishes."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.ground.checksums import sha256sums
from tests.ground.hub import Hub
from tests.ground.models import digests, noise
from tests.ground.node import Node
from tests.ground.origin import Origin

MIB = 1 << 20
Nodes = Callable[..., Node]


def journalled(root: Path) -> list[tuple[int, int]]:
    """The extents that the journals of a dead daemon hold."""
    found = []
    for journal in (root / ".cachd/ingest").glob("*/journal"):
        lines = journal.read_text().splitlines()
        found += [(int(line.split()[0]), int(line.split()[1])) for line in lines if len(line.split()) == 3]
    return found


def overlap(extents: list[tuple[int, int]], asked: tuple[int, int]) -> int:
    return sum(max(0, min(stop, asked[1]) - max(start, asked[0])) for start, stop in extents)


def test_a_killed_pull_goes_on_by_itself_and_fetches_no_part_its_journal_holds(hub: Hub, node: Nodes) -> None:
    """Promised: No part that the journal holds is fetched again."""
    content = noise(96 * MIB)
    hub.add("org/model", {"model.safetensors": content})
    path = hub.cdn_path("org/model", "model.safetensors")
    running = node(hf_endpoint=hub.url, streams=3)
    holds = hub.cdn.hold(path, after=2 * MIB)
    running.pull("hf://org/model")
    assert holds.reached.wait(30)
    holds.release()
    running.wait_for("part made durable")
    running.kill()
    held = journalled(running.root)
    assert held, "the daemon was killed with finished parts behind it"
    hub.cdn.forget()
    running.start()
    ready = running.ready("org--model")
    assert ready.status == 200
    assert (running.root / "models/org--model/model.safetensors").read_bytes() == content
    asked = [seen.extent for seen in hub.cdn.requests if seen.extent]
    assert sum(overlap(held, extent) for extent in asked) == 0
    assert running.metric("cachd_resumed_bytes_total") >= sum(stop - start for start, stop in held)


@pytest.mark.parametrize("seed", range(6))
def test_whenever_it_is_killed_the_model_is_whole_or_absent_and_then_ready(
    origin: Origin, node: Nodes, seed: int
) -> None:
    """Promised: After kill -9, every published model is complete or absent, and the restart needs no
    human.

    The moment: a random number of bytes after which the origin holds, or none: while it publishes.
    """
    shards = {f"model-{i}.safetensors": noise(12 * MIB, seed * 10 + i) for i in range(3)}
    for name, content in shards.items():
        origin.add(f"/model/{name}", content)
    origin.add("/model/SHA256SUMS", sha256sums(shards))
    running = node(streams=2, allow=[f"{origin.url}/"])
    chosen = random.Random(seed)
    hold = origin.hold(f"/model/model-{chosen.randrange(3)}.safetensors", after=chosen.randrange(4 * MIB))
    running.pull(f"{origin.url}/model/")
    assert hold.reached.wait(30)
    if seed % 2:
        hold.release()
        running.wait_for("blob committed")
    running.kill()
    hold.release()
    assert_whole_or_absent(running.root, shards)
    running.start()
    assert running.ready("model").status == 200
    assert {p: (running.root / "models/model" / p).read_bytes() for p in shards} == shards


def test_a_stopped_daemon_exits_cleanly_and_goes_on_when_started_again(origin: Origin, node: Nodes) -> None:
    origin.add("/model.bin", noise(24 * MIB))
    running = node(allow=[f"{origin.url}/"])
    hold = origin.hold("/model.bin", after=MIB)
    running.pull(f"{origin.url}/model.bin")
    assert hold.reached.wait(30)
    assert running.stop() == 0
    hold.release()
    running.start()
    assert running.ready("model.bin").status == 200


@pytest.fixture
def mute() -> Iterator[tuple[str, threading.Event]]:
    """An origin that tells of a file and, asked for it, says nothing at all: its URL, and set when asked."""
    asked = threading.Event()

    class Mute(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(24 * MIB))
            self.send_header("ETag", '"it"')
            self.end_headers()

        def do_GET(self) -> None:
            asked.set()
            self.rfile.read()  # until the client goes

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Mute) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            serving.join()


def test_an_origin_that_never_answers_holds_up_neither_a_stop_nor_a_delete(
    mute: tuple[str, threading.Event], node: Nodes
) -> None:
    """Both end long before a connection without a byte is given up."""
    url, asked = mute
    running = node(stall_seconds=600, allow=[f"{url}/"])
    running.pull(f"{url}/deleted.bin")
    assert asked.wait(30)
    assert running.ask("DELETE", "/v1/models/deleted.bin").status == 200
    asked.clear()
    running.pull(f"{url}/stopped.bin")
    assert asked.wait(30)
    assert running.stop() == 0
    assert "should not" not in running.output
    assert "Traceback" not in running.output


def test_a_ready_model_survives_a_kill_and_is_ready_before_any_request_to_its_source(
    origin: Origin, node: Nodes
) -> None:
    origin.add("/model.bin", noise(6 * MIB))
    running = node(allow=[f"{origin.url}/"])
    running.pull(f"{origin.url}/model.bin")
    assert running.ready("model.bin").status == 200
    running.kill()
    origin.forget()
    running.start()
    assert running.ready("model.bin", wait=0).status == 200
    assert running.pull(f"{origin.url}/model.bin").status == 200
    assert origin.requests == []


def assert_whole_or_absent(root: Path, expected: dict[str, bytes]) -> None:
    if (root / "ready/model.json").exists():
        assert set(digests(root / "models/model")) == set(expected)
        assert all((root / "models/model" / p).read_bytes() == content for p, content in expected.items())
