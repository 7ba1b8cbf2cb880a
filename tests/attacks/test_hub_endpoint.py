"""A client of the Hub endpoint, who wants its memory, its threads, its connections, or models of others."""

from __future__ import annotations

import socket
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.config import Config
from cachd.daemon.parts import assembled
from cachd.errors import Forbidden, TooBig, Unavailable
from cachd.metrics import Metrics
from cachd.model import Digest, File, Manifest
from cachd.policy.hosts import OwnNames
from cachd.policy.peers import peer_of
from cachd.serve import listings
from cachd.serve.answer import Answer, document
from cachd.serve.bounds import PerMinute, Places, Waits
from cachd.serve.call import call_of
from cachd.serve.exchange import Request
from cachd.serve.outlet import Ending, Left, Outlet
from cachd.serve.repositories import Repositories
from cachd.serve.server import HubServer, Size
from tests.attacks.test_connections import dialled, end_of, status
from tests.ground.hub import Hub
from tests.ground.hub_client import endpoint_node, endpoint_of, get
from tests.ground.models import noise
from tests.ground.node import PATIENCE_SECONDS, Node
from tests.ground.site import until

FILES = {"config.json": b"{}", "model.safetensors": noise(5000)}
FILE = "/org/model/resolve/main/config.json"
OK = b"HEAD /ok HTTP/1.1\r\nHost: x\r\n\r\n"
MIB = 1 << 20


def value(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(name) or 0.0


def empty(_: Request) -> Answer:
    return document({})


@contextmanager
def served(
    metrics: Metrics,
    size: Size,
    answer: Callable[[Request], Answer] = empty,
    waits: Waits | None = None,
) -> Iterator[tuple[str, int]]:
    """The address of a server of this size."""
    waits = waits or Waits(size.threads, metrics.hub_waiting.set)
    with (
        socket.create_server(("127.0.0.1", 0)) as sock,
        closing(HubServer([sock], answer, metrics, waits=waits, size=size)) as server,
    ):
        server.start()
        yield sock.getsockname()


def from_address(client: str, at: tuple[str, int]) -> socket.socket:
    return socket.create_connection(at, PATIENCE_SECONDS, source_address=(client, 0))


def answered(sock: socket.socket, asked: bytes = OK) -> int:
    """The status of the answer to a request."""
    sock.sendall(asked)
    return status(sock.recv(1 << 16))


# --- connections ---

PARTS = (
    b"G",
    b"GET /ok HTTP/1.1\r\nHost: x\r\n",
    b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf",
)


def test_the_rest_of_a_request_is_awaited_by_no_thread() -> None:
    metrics = Metrics()
    with served(metrics, Size(threads=2)) as at, ExitStack() as stack:
        for number in range(30):
            sock = stack.enter_context(dialled(at))
            sock.sendall(PARTS[number % len(PARTS)])
        until(lambda: value(metrics, "cachd_hub_connections") == 30)
        with dialled(at) as other:
            assert answered(other) == 200
        until(lambda: value(metrics, "cachd_hub_requests_in_progress") == 0)
        assert value(metrics, "cachd_hub_connections") >= 30


def test_a_request_that_comes_in_pieces_is_answered() -> None:
    with served(Metrics(), Size(threads=1)) as at, dialled(at) as sock, dialled(at) as other:
        said = b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody"
        for at_byte in range(len(said) - 1):
            sock.sendall(said[at_byte : at_byte + 1])
            if at_byte % 10 == 0:
                assert answered(other) == 200
        assert answered(sock, said[-1:]) == 200


def test_requests_sent_ahead_without_end_leave_the_threads_to_others() -> None:
    with served(Metrics(), Size(threads=1)) as at, dialled(at) as ahead, dialled(at) as other:
        ahead.sendall(OK * 200)
        assert answered(other) == 200
        got = b""
        while got.count(b"HTTP/1.1 200") < 200:
            got += ahead.recv(1 << 16)


def test_a_client_with_few_connections_loses_none_to_one_with_many() -> None:
    metrics = Metrics()
    with served(metrics, Size(threads=2, connections=20)) as at, ExitStack() as stack:
        pod = stack.enter_context(from_address("127.0.0.2", at))
        assert answered(pod) == 200
        for _ in range(60):
            stack.enter_context(dialled(at)).sendall(b"G")
        with from_address("127.0.0.3", at) as new:
            assert answered(new) == 200
        assert answered(pod) == 200
        assert value(metrics, "cachd_hub_connections") <= 20


def test_one_client_has_three_quarters_of_the_threads() -> None:
    metrics, size = Metrics(), Size(threads=4)
    waits = Waits(16)
    goes_on = threading.Event()

    def answer(request: Request) -> Answer:
        if request.peer == "127.0.0.1":
            with waits.one(request.peer):
                goes_on.wait(PATIENCE_SECONDS)
        return document({})

    with served(metrics, size, answer, waits) as at, ExitStack() as stack:
        many = [stack.enter_context(dialled(at)) for _ in range(10)]
        for sock in many:
            sock.sendall(OK)
        until(lambda: value(metrics, "cachd_hub_requests_in_progress") == 3)
        with from_address("127.0.0.2", at) as other:
            assert answered(other) == 200
        assert value(metrics, "cachd_hub_requests_in_progress") >= 3
        goes_on.set()
        assert [status(sock.recv(1 << 16)) for sock in many] == [200] * 10


def test_a_body_without_a_length_or_that_is_too_long_is_refused_before_it_is_sent() -> None:
    refused = {
        b"Transfer-Encoding: chunked": 411,
        b"Content-Length: 1048577": 413,
        b"Content-Length: 99999999999999999999": 413,
        b"X: y\r\n" * 120 + b"Content-Length: 1": 431,
    }
    with served(Metrics(), Size(threads=1)) as at:
        for line, code in refused.items():
            with dialled(at) as sock:
                assert answered(sock, b"POST /ok HTTP/1.1\r\nHost: x\r\n" + line + b"\r\n\r\n") == code


def test_of_one_client_few_bodies_are_in_memory() -> None:
    with served(Metrics(), Size(threads=2)) as at, ExitStack() as stack:
        head = b"POST /ok HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
        begun = [stack.enter_context(dialled(at)) for _ in range(25)]
        for sock in begun:
            sock.sendall(head + b"x")
        (refused,) = until(lambda: _readable(begun))
        assert status(end_of(refused)) == 503
        with from_address("127.0.0.2", at) as other:
            assert answered(other, head + b"xy") == 200
        begun[0].close()
        for sock in begun[1:]:
            if sock is not refused:
                assert answered(sock, b"y") == 200
        with dialled(at) as again:
            assert answered(again, head + b"xy") == 200


def _readable(socks: list[socket.socket]) -> list[socket.socket]:
    found = []
    for sock in socks:
        sock.setblocking(False)
        try:
            if sock.recv(1, socket.MSG_PEEK):
                found.append(sock)
        except BlockingIOError:
            pass
        finally:
            sock.settimeout(PATIENCE_SECONDS)
    return found


@pytest.mark.parametrize(("is_wanted", "seconds"), [(True, 5.0), (False, 60.0)])
def test_a_client_that_takes_no_bytes_is_cut_sooner_while_others_wait(
    is_wanted: bool, seconds: float
) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += seconds / 5
        return now[0]

    ours, theirs = socket.socketpair()
    with ours, theirs:
        outlet = Outlet(ours, Ending(lambda: now[0] > 500, lambda: is_wanted), clock)
        with pytest.raises(Left):
            outlet.send(bytes(8 * MIB))
        assert seconds < now[0] <= 2 * seconds


# --- bounds ---


def test_one_client_has_at_most_three_quarters_of_the_places() -> None:
    places = Places(8, "full")
    for _ in range(6):
        places.take("a")
    for peer, left in (("a", 0), ("b", 2), ("c", 0)):
        for _ in range(left):
            places.take(peer)
        with pytest.raises(Unavailable):
            places.take(peer)
    places.leave("b")
    places.take("c")


def test_a_client_does_something_so_often_in_a_minute() -> None:
    now = [0.0]
    minute = PerMinute(2, "full", lambda: now[0])
    minute.count("a")
    minute.count("a")
    with pytest.raises(Unavailable) as refused:
        minute.count("a")
    assert refused.value.retry_after == 60.0
    minute.count("b")
    now[0] = 60.0
    minute.count("a")


def test_the_addresses_of_one_machine_are_one_client() -> None:
    assert peer_of("fd00::1") == peer_of("fd00::2:3%eth0") != peer_of("fd00:0:0:1::1")
    assert peer_of("::ffff:10.0.0.1") == peer_of("10.0.0.1") != peer_of("::ffff:10.0.0.2")


def test_two_requests_are_worked_on_at_a_time_beside_those_that_wait() -> None:
    """So that the API's event loop gets the interpreter soon, however many clients ask."""
    metrics, size = Metrics(), Size(threads=16)
    waits = Waits(size.threads, metrics.hub_waiting.set)
    goes_on, comes = threading.Event(), threading.Event()
    working: list[str] = []

    def answer(request: Request) -> Answer:
        if request.target == "/late":
            with waits.one(request.peer):
                comes.wait(PATIENCE_SECONDS)
        else:
            working.append(request.target)
            goes_on.wait(PATIENCE_SECONDS)
        return document({})

    with served(metrics, size, answer, waits) as at, ExitStack() as stack:
        late = [stack.enter_context(dialled(at)) for _ in range(4)]
        for sock in late:
            sock.sendall(OK.replace(b"/ok", b"/late"))
        until(lambda: value(metrics, "cachd_hub_waiting") == 4)
        asking = [stack.enter_context(dialled(at)) for _ in range(6)]
        for sock in asking:
            sock.sendall(OK)
        until(lambda: value(metrics, "cachd_hub_requests_in_progress") == 10)
        until(lambda: len(working) == 2)
        comes.set()
        assert len(working) == 2
        goes_on.set()
        assert [status(sock.recv(1 << 16)) for sock in (*asking, *late)] == [200] * 10
    assert len(working) == 6


# --- listings ---


def manifest_of(paths: Iterator[str]) -> Manifest:
    digest = Digest("git-sha1", "0" * 40)
    files = tuple(File(path, 1, path, digest) for path in paths)
    return Manifest("hf://org/model", "1" * 40, files)


class Nowhere:
    """A client that keeps nothing."""

    def send(self, content: bytes) -> None:
        assert len(content) < MIB

    def send_file(self, fd: int, offset: int, count: int) -> None:
        raise AssertionError

    def check(self) -> None:
        pass


def test_a_listing_of_very_many_files_takes_little_memory() -> None:
    manifest = manifest_of(f"d{n % 100}/{n}" for n in range(20_000))
    asked = [file.path for file in manifest.files[:5000]]
    tracemalloc.start()
    try:
        for listing in (
            listings.info("org/model", manifest, blobs=True),
            listings.some(manifest, asked),
        ):
            assert listing.size > 100_000
            listing.send(Nowhere())
        assert sum(1 for _ in listings.tree(manifest, "", recursive=True)) == 20_100
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * MIB


def test_directories_without_number_end_a_listing() -> None:
    deep = "/".join("d" * 400)
    manifest = manifest_of(f"{n}/{deep}" for n in range(600))
    with pytest.raises(TooBig):
        listings.some(manifest, ["x"])
    assert sum(1 for _ in listings.tree(manifest, "", recursive=False)) == 600


# --- requests ---


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


@pytest.fixture
def node(hub: Hub, tmp_path: Path) -> Iterator[Node]:
    hub.add("org/model", FILES)
    with endpoint_node(tmp_path / "root", hub) as started:
        yield started


@pytest.mark.parametrize("target", ["//[", "http://[/x", "//[::1", "/a?b=[//["])
def test_a_target_that_is_no_url_is_no_call(target: str) -> None:
    assert call_of(Request("GET", target, {}, b"", "127.0.0.1")) is None


def test_a_target_in_absolute_form_is_its_path() -> None:
    call = call_of(Request("GET", f"http://node:8471{FILE}?x=y", {}, b"", "127.0.0.1"))
    assert call is not None
    assert (call.repo, call.path) == ("org/model", "config.json")


def test_a_web_page_of_another_site_gets_no_answer(node: Node) -> None:
    place = urlsplit(endpoint_of(node)).netloc
    foreign: tuple[dict[str, Any], ...] = (
        {"Host": "evil.example"},
        {"Host": f"{place}.evil.example"},
        {"Origin": f"http://{place}"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
    )
    for headers in foreign:
        assert get(node, FILE, **headers).status == 403, headers
    assert get(node, FILE, Sec_Fetch_Site="none").status == 200
    assert OwnNames(["Cachd.local"]).has("cachd.LOCAL:8471")


def test_one_client_starts_so_many_pulls_in_a_minute(hub: Hub, root: Path) -> None:
    now = [1000.0]
    config = Config(root=root, reserve_free=0, hf_endpoint=hub.url, allow=("127.0.0.0/8",))
    with assembled(config) as parts:
        waits = Waits(Size().threads, parts.metrics.hub_waiting.set)
        repositories = Repositories(parts.models, parts.sources, waits, clock=lambda: now[0])

        def ask(name: str, peer: str = "a") -> None:
            with pytest.raises(Forbidden):
                repositories.revision(f"org/{name}", "main", peer)

        for number in range(120):
            ask(f"absent-{number}")
        with pytest.raises(Unavailable):
            repositories.revision("org/absent-120", "main", "a")
        assert len(hub.requests) == 120
        ask("absent-0")  # what is remembered costs nothing
        ask("absent-120", "b")
        now[0] += 60.0
        ask("absent-121")
        assert len(hub.requests) == 122


def test_what_cannot_be_a_token_costs_the_hub_no_request(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/private", FILES, private=True)
    (tmp_path / "token").write_text(hub.token)
    options = {"hub_share": "token", "hf_token_file": str(tmp_path / "token")}
    with endpoint_node(tmp_path / "root", hub, **options) as node:
        for odd in ("x" * 5000, "a b", "\xe9", "x\ty", f"{hub.token}, Bearer {hub.token}"):
            got = get(node, "/org/private/resolve/main/config.json", Authorization=f"Bearer {odd}")
            assert got.status == 404
        assert hub.requests == []
        assert node.metric("cachd_hub_token_checks_total", verdict="refused") == 5


def test_a_stranger_is_counted_and_no_header_makes_it_another(node: Node) -> None:
    """The node's own address is a stranger to a listener of its loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))  # sends nothing: it finds the address of this machine
        except OSError:
            pytest.skip("this machine has only its loopback")
        own = sock.getsockname()[0]
    place = urlsplit(endpoint_of(node))
    said = b"GET %s HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n\r\n"
    with from_address(own, (place.hostname or "", place.port or 0)) as stranger:
        stranger.sendall(said % FILE.encode())
        assert status(end_of(stranger)) in (403, 0)
    until(lambda: node.metric("cachd_hub_refused_connections_total") == 1)


def test_metrics_count_what_clients_get(hub: Hub, node: Node) -> None:
    assert get(node, FILE).body == FILES["config.json"]  # it is pulled meanwhile
    assert node.ready("org--model").status == 200
    assert get(node, "/org/model/resolve/main/model.safetensors").body == FILES["model.safetensors"]
    assert get(node, "/org/model/resolve/main/absent").status == 404
    assert get(node, "/nothing").status == 404
    requests = {
        ("file", "2xx"): 2.0,
        ("file", "4xx"): 1.0,
        ("none", "4xx"): 1.0,
        ("info", "2xx"): 0.0,
    }
    for (call, result), count in requests.items():
        assert node.metric("cachd_hub_requests_total", call=call, result=result) == count
    sent = {state: node.metric("cachd_hub_sent_bytes_total", state=state) for state in ("ready", "arriving")}
    assert sum(sent.values()) == 5002
    assert sent["ready"] >= 5000
    until(lambda: node.metric("cachd_hub_connections") == 0)
    assert node.metric("cachd_hub_waiting") == 0
