"""The Hub endpoint pulls what is not here: its clients read along, and none ends with unverified bytes."""

from __future__ import annotations

import hashlib
import http.client
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ground.hub import Hub
from tests.ground.hub_client import Reader, client_env, endpoint_node, get, hf, withhold
from tests.ground.models import noise
from tests.ground.node import PATIENCE_SECONDS, Node
from tests.ground.origin import Flip, Late
from tests.ground.s3 import free_ports
from tests.ground.site import until

SIZE = 24 << 20
LARGE = "model.safetensors"
FILES = {"config.json": b'{"a": 1}', LARGE: noise(SIZE), "sub/tokenizer.json": noise(500, 2)}
PLACE = f"/org/model/resolve/main/{LARGE}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


@pytest.fixture
def node(hub: Hub, tmp_path: Path) -> Iterator[Node]:
    hub.add("org/model", FILES)
    with endpoint_node(tmp_path / "root", hub, stall_seconds=2) as started:
        yield started


def address(node: Node) -> str:
    """The address of the attempt at the large file that runs now."""
    redirect = get(node, PLACE, "HEAD")
    assert redirect.status == 307, redirect
    assert redirect.headers["x-linked-size"] == str(SIZE)
    assert redirect.headers["x-linked-etag"] == f'"{hashlib.sha256(FILES[LARGE]).hexdigest()}"'
    return redirect.headers["location"]


def test_hf_download_pulls_a_model_that_is_not_here(hub: Hub, node: Node, tmp_path: Path) -> None:
    ended = hf(node, tmp_path / "home", "download", "org/model", "--local-dir", str(tmp_path / "got"))
    assert ended.returncode == 0, ended.stderr
    assert {path: (tmp_path / "got" / path).read_bytes() for path in FILES} == FILES
    assert node.ready("org--model").status == 200
    assert hub.cdn.bytes_sent() == SIZE


def test_a_client_gets_bytes_before_the_file_has_arrived(hub: Hub, node: Node) -> None:
    withhold(hub, "org/model", LARGE, 12 << 20)
    with Reader(node, address(node)) as reader:
        assert reader.status == 200
        first = reader.read(4 << 20)
        assert first == FILES[LARGE][: 4 << 20]
        assert node.ask("GET", "/v1/models/org--model").document["state"] == "downloading"
        hub.cdn.clear()
        assert first + reader.read() == FILES[LARGE]


def test_a_client_of_a_slow_origin_gets_bytes_before_a_part_is_complete(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    large = hub.cdn_path("org/model", LARGE)
    before, within = hub.cdn.hold(large, 0), hub.cdn.hold(large, (4 << 20) - 1)
    started = endpoint_node(tmp_path / "root", hub, stall_seconds=600)
    with started as node, Reader(node, address(node)) as reader:
        before.release()
        first = reader.read(1000)
        assert first == FILES[LARGE][:1000]
        within.release()
        assert first + reader.read() == FILES[LARGE]


def test_the_end_of_a_file_waits_for_its_digest(hub: Hub, node: Node) -> None:
    """All bytes but one part have arrived; that part is at the start, and the client has none before it."""
    hub.cdn.fault(hub.cdn_path("org/model", LARGE), Late(), when=lambda s: "bytes=0-" in s.headers["range"])
    place = address(node)
    with Reader(node, place, Range=f"bytes={SIZE - 100}-") as reader:
        assert reader.status == 206
        got: list[bytes] = []
        reading = threading.Thread(target=lambda: got.append(reader.read()))
        reading.start()
        for _ in range(3):  # all other parts are durable
            node.wait_for("part made durable")
        assert not got
        hub.cdn.clear()
        reading.join(PATIENCE_SECONDS)
        assert got == [FILES[LARGE][-100:]]


def test_two_clients_at_once_cost_the_bytes_of_one(hub: Hub, node: Node, tmp_path: Path) -> None:
    got: dict[int, bytes] = {}

    def read(number: int) -> None:
        got[number] = get(node, get(node, PLACE).headers["location"]).body

    readers = [threading.Thread(target=read, args=(number,)) for number in range(2)]
    for each in readers:
        each.start()
    for each in readers:
        each.join(PATIENCE_SECONDS)
    assert got == {0: FILES[LARGE], 1: FILES[LARGE]}
    assert hub.cdn.bytes_sent() == SIZE


def test_a_file_that_a_client_waits_for_is_fetched_before_the_others(hub: Hub, tmp_path: Path) -> None:
    shards = {f"{number}.safetensors": noise((20 - number) << 19, number) for number in range(6)}
    hub.add("org/shards", {**shards, "config.json": b"{}"})
    first = hub.cdn.hold(hub.cdn_path("org/shards", "0.safetensors"), 1 << 20)
    with endpoint_node(tmp_path / "root", hub, streams=1) as node:
        node.pull("hf://org/shards")
        assert first.reached.wait(PATIENCE_SECONDS)
        with Reader(node, "/org/shards/resolve/main/config.json") as reader:
            first.release()
            assert reader.read() == b"{}"
        assert node.ready("org--shards").status == 200
    asked = [seen.path.rpartition("/")[2] for seen in hub.requests]
    assert asked.index("config.json") < asked.index("5.safetensors")


def test_a_client_resumes_after_its_connection_was_cut(hub: Hub, node: Node) -> None:
    withhold(hub, "org/model", LARGE, 12 << 20)
    place = address(node)
    with Reader(node, place) as reader:
        first = reader.read(1 << 20)
    with Reader(node, place, Range=f"bytes={1 << 20}-") as reader:
        hub.cdn.clear()
        assert first + reader.read() == FILES[LARGE]
    assert hub.cdn.bytes_sent() == SIZE


# --- wrong bytes ---

LAST_BYTE = Flip(SIZE - 1)


def test_a_client_never_gets_all_bytes_of_a_file_that_is_wrong(hub: Hub, node: Node) -> None:
    """Promised: A client of the Hub endpoint never ends with a file that was not verified."""
    hub.cdn.fault(hub.cdn_path("org/model", LARGE), Flip(10))
    place = address(node)
    with Reader(node, place) as reader, pytest.raises(http.client.IncompleteRead):
        reader.read()
    assert get(node, place, Range="bytes=1000-").status == 410
    assert node.ready("org--model").status == 502


def test_hf_download_fails_when_the_bytes_are_wrong(hub: Hub, node: Node, tmp_path: Path) -> None:
    hub.cdn.fault(hub.cdn_path("org/model", LARGE), Flip(10))
    ended = hf(node, tmp_path / "home", "download", "org/model", LARGE)
    assert ended.returncode != 0
    files = (path for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert not [path for path in files if path.stat().st_size == SIZE]
    assert not list((tmp_path / "home").rglob(LARGE))


def test_the_address_of_wrong_bytes_stays_gone_when_right_ones_have_arrived(hub: Hub, node: Node) -> None:
    """Promised: A client of the Hub endpoint never ends with a file that was not verified."""
    wrong = hub.cdn_path("org/model", LARGE)
    hub.cdn.fault(wrong, Flip(10), when=lambda seen: "bytes=0-" in seen.headers["range"], times=1)
    first = address(node)
    with Reader(node, first) as reader, pytest.raises(http.client.IncompleteRead):
        reader.read()
    assert node.ready("org--model").status == 200
    for _ in range(2):  # before and after a restart of the daemon
        assert get(node, first, Range="bytes=1000-").status == 410
        assert get(node, PLACE).body == FILES[LARGE]
        # A client that kept its part of the wrong bytes asks only for the rest, and must not get it.
        for asked in ("bytes=1000-", f"bytes=1000-{SIZE - 1}", f"bytes=-{SIZE - 1000}"):
            resumed = get(node, PLACE, Range=asked)
            assert (resumed.status, resumed.body) == (200, FILES[LARGE])
        assert get(node, PLACE, Range="bytes=1000-1999").body == FILES[LARGE][1000:2000]
        node.stop()
        node.start()


def test_wrong_bytes_of_one_attempt_are_not_joined_with_those_of_the_next(hub: Hub, node: Node) -> None:
    """Promised: A client of the Hub endpoint never ends with a file that was not verified."""
    hub.cdn.fault(hub.cdn_path("org/model", LARGE), Flip(10))
    first = address(node)
    with Reader(node, first) as reader, pytest.raises(http.client.IncompleteRead):
        reader.read()
    assert node.ready("org--model").status >= 500
    hub.cdn.clear()
    withhold(hub, "org/model", LARGE, 12 << 20)
    node.pull("hf://org/model")
    second = address(node)
    assert second != first
    for asked in ("bytes=1000-", f"bytes=1000-{SIZE - 1}"):
        with Reader(node, second, Range=asked) as reader:
            assert (reader.status, reader.headers["content-length"]) == (200, str(SIZE))


@pytest.mark.parametrize(
    "client",
    [
        "unknown/None; hf_hub/0.34.4; python/3.11.2",
        "unknown/None; hf_hub/1.17.0; python/3.11.2",
        "llama-cpp/b10000",
        "unknown/None; hf-hub/0.4.1; rust/unknown",
        "",
    ],
)
def test_a_client_that_may_resume_elsewhere_gets_no_byte_before_the_file_is_verified(
    hub: Hub, node: Node, client: str
) -> None:
    """Promised: A client of the Hub endpoint never ends with a file that was not verified."""
    hub.cdn.fault(hub.cdn_path("org/model", LARGE), Flip(10))
    place = address(node)
    assert get(node, PLACE, "HEAD", User_Agent=client).status == 200
    for asked in (PLACE, place):
        with Reader(node, asked, User_Agent=client) as reader:
            with pytest.raises(http.client.IncompleteRead) as cut:
                reader.read()
            assert cut.value.partial == b""


# --- restarts ---

DOWNLOAD = """
from huggingface_hub import hf_hub_download
print(hf_hub_download("org/model", "model.safetensors"))
"""


@pytest.fixture
def fixed(hub: Hub, tmp_path: Path) -> Iterator[Node]:
    """A node whose endpoint has the same port after a restart."""
    hub.add("org/model", FILES)
    (port,) = free_ports(1)
    with endpoint_node(tmp_path / "root", hub, stall_seconds=2, hub_listen=f"127.0.0.1:{port}") as node:
        yield node


def test_a_client_goes_on_after_the_daemon_was_killed(hub: Hub, fixed: Node) -> None:
    withhold(hub, "org/model", LARGE, 12 << 20)
    place = address(fixed)
    with Reader(fixed, place) as reader:
        first = reader.read(2 << 20)
        fixed.kill()
    fixed.start()
    with Reader(fixed, place, Range=f"bytes={2 << 20}-") as reader:
        assert reader.status == 206
        hub.cdn.clear()
        assert first + reader.read() == FILES[LARGE]


def test_wrong_bytes_of_a_killed_daemon_are_not_completed_by_the_next_one(hub: Hub, fixed: Node) -> None:
    wrong = hub.cdn_path("org/model", LARGE)
    hub.cdn.fault(wrong, Flip(10), when=lambda seen: "bytes=0-" in seen.headers["range"])
    withhold(hub, "org/model", LARGE, 12 << 20)
    place = address(fixed)
    with Reader(fixed, place) as reader:
        first = reader.read(1 << 20)
        assert first != FILES[LARGE][: 1 << 20]
        fixed.kill()
    hub.cdn.clear()
    fixed.start()
    with Reader(fixed, place, Range=f"bytes={1 << 20}-") as reader:
        if reader.status == 206:
            with pytest.raises(http.client.IncompleteRead):
                reader.read()
        else:
            assert reader.status == 410
    assert fixed.ready("org--model").status == 200
    assert get(fixed, place, Range=f"bytes={1 << 20}-").status == 410


def test_huggingface_hub_survives_a_restart_of_the_daemon(hub: Hub, fixed: Node, tmp_path: Path) -> None:
    withhold(hub, "org/model", LARGE, 12 << 20)
    env = client_env(fixed, tmp_path / "home")
    with subprocess.Popen([sys.executable, "-c", DOWNLOAD], env=env, stdout=subprocess.PIPE, text=True) as it:
        # More than all buffers between them take, so the client is in the middle of the file.
        until(lambda: fixed.metric("cachd_hub_sent_bytes_total", state="arriving") >= 12 << 20)
        fixed.kill()
        fixed.start()
        hub.cdn.clear()
        out, _ = it.communicate(timeout=PATIENCE_SECONDS)
    assert it.returncode == 0
    assert Path(out.strip()).read_bytes() == FILES[LARGE]
