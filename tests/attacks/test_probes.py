"""Clients that ask for much, so that nobody else is answered: probes first of all."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.api.admission import Bounds, Connections, peer_of
from cachd.api.lanes import Lane, Waits
from cachd.client import Client
from cachd.errors import Unavailable
from tests.attacks.test_connections import dialled, end_of, send_all, served, status
from tests.ground.models import noise
from tests.ground.node import Answer, Node
from tests.ground.origin import Origin
from tests.ground.site import Ground, received, until

PATIENCE_SECONDS = 120.0
SLACK_SECONDS = 0.05
PROBES = ("/livez", "/readyz", "/v1/models/ready.bin/ready", "/v1/models/no-such/ready")
FILES = 8000
ROUNDS = 300  # of probes, so that the slowest thirty of each do not count: others use the machine, too
LAST = b"Host: localhost\r\nConnection: close\r\n\r\n"
Nodes = Callable[..., Node]


def address_of(node: Node) -> tuple[str, int]:
    url = urlsplit(node.url)
    return str(url.hostname), int(url.port or 0)


def p90(seconds: list[float]) -> float:
    return sorted(seconds)[math.ceil(len(seconds) * 0.9) - 1]


class Bare(BaseHTTPRequestHandler):
    """Answers at once, whatever is asked."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def bare() -> Iterator[tuple[str, int]]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Bare) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield "127.0.0.1", server.server_port
        finally:
            server.shutdown()
            thread.join()


def asked(address: tuple[str, int], path: str) -> tuple[int, float]:
    """The status of one request on a connection of its own, and how long it took."""
    began = time.monotonic()
    with closing(http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        answer.read()
        return answer.status, time.monotonic() - began


def answer_of(sock: socket.socket) -> Answer:
    """The next answer that comes."""
    with http.client.HTTPResponse(sock) as response:
        response.begin()
        return received(response)


def probed_during(
    node: Node, load: list[Callable[[], Any]], enough: threading.Event | None = None
) -> list[Any]:
    """Probe while the calls of `load` run, each in a thread; what they returned. `enough` is set in between.

    A probe is asked in turn with a bare responder of this process, so that what the machine does to one it
    does to the other.
    """
    took: dict[str, list[float]] = {path: [] for path in ("bare", *PROBES)}
    with bare() as beside, ThreadPoolExecutor(len(load)) as crowd:
        running = [crowd.submit(each) for each in load]
        while not all(each.done() for each in running) or len(took["bare"]) < ROUNDS:
            took["bare"].append(asked(beside, "/")[1])
            for path in PROBES:
                answered, seconds = asked(address_of(node), path)
                assert answered == (404 if "no-such" in path else 200), path
                took[path].append(seconds)
            if enough and len(took["bare"]) >= ROUNDS:
                enough.set()
    for path in PROBES:
        assert p90(took[path]) <= 3 * p90(took["bare"]) + SLACK_SECONDS, (path, len(took[path]))
    return [each.result() for each in running]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A node with a model of 8,000 files, and one of a single file."""
    from tests.ground.hub import Hub

    root = tmp_path_factory.mktemp("large") / "node"
    with Origin() as origin, Hub() as hub, Node(root, {"hf_endpoint": hub.url, "retries": 0}) as node:
        hub.add("org/large", {f"part-{n:05}.json": b"%d" % n for n in range(FILES)})
        ground = Ground(node, origin, hub)
        ground.have("ready.bin")
        node.pull("hf://org/large")
        assert node.ready("org--large", wait=600).status == 200
        yield ground


@pytest.mark.alone("it compares times")
def test_anonymous_listings_of_a_large_model_starve_no_probe(large: Ground) -> None:
    paths = ["/v1/models", "/v1/models/org--large", "/v1/models?limit=1", "/v1/capacity", "/metrics"]

    def listings(number: int) -> list[int]:
        return [large.node.ask("GET", paths[(number + turn) % len(paths)]).status for turn in range(3)]

    answered = probed_during(large.node, [lambda n=n: listings(n) for n in range(40)])
    assert {status for each in answered for status in each} <= {200, 503}
    assert sum(each.count(200) for each in answered) > 20, "they are answered as well"


@pytest.mark.alone("it compares times")
def test_listings_of_as_many_pages_as_there_are_names_starve_no_probe(large: Ground) -> None:
    """Pages that nobody else asks for are not shared: they wait for each other, and some are told `busy`."""

    def listed(number: int) -> int:
        return large.node.ask("GET", f"/v1/models?after=a{number}").status

    answered = probed_during(large.node, [lambda n=n: listed(n) for n in range(100)])
    assert set(answered) <= {200, 503}
    assert 200 in answered
    assert large.node.ask("GET", "/metrics").status == 200


@pytest.mark.alone("it compares times")
def test_dry_runs_of_evictions_that_wait_for_an_origin_starve_neither_probes_nor_reads(large: Ground) -> None:
    hold, enough = large.hub.hold("/api/models/org/slow", after=0), threading.Event()
    large.hub.add("org/slow", {"config.json": b"{}"})

    def dry_run() -> int:
        return large.node.ask("POST", "/v1/evictions?dry_run=true", {"ref": "hf://org/slow"}).status

    def released() -> int:
        assert hold.reached.wait(PATIENCE_SECONDS)
        told = [large.node.ask("GET", path).status for path in ("/v1/models/ready.bin", "/v1/evictions")]
        told.append(large.node.pull(f"{large.origin.url}/ready.bin", name="ready.bin").status)
        assert enough.wait(PATIENCE_SECONDS)
        hold.release()
        return max(told)

    answered = probed_during(large.node, [dry_run] * 33 + [released], enough)
    assert answered.pop() == 200
    assert set(answered) <= {200, 503}


# --- pages ---


def test_a_listing_comes_in_pages(node: Nodes, origin: Origin) -> None:
    running = node()
    names = [f"m{number}" for number in range(7)]
    for name in names:
        running.pull(origin.add(f"/{name}", noise(10, 1)), name=name)
    for name in names:
        assert running.ready(name).status == 200
    seen, after = [], ""
    while after is not None:
        page = running.ask("GET", f"/v1/models?limit=3&after={after}").document
        seen.append([model["name"] for model in page["models"]])
        after = page.get("next")
    assert seen == [names[:3], names[3:6], names[6:]]
    assert "next" not in running.ask("GET", "/v1/models").document, "all fit on one page"
    for wrong in ("limit=0", "limit=501", "limit=x", f"after={'x' * 201}"):
        assert running.ask("GET", f"/v1/models?{wrong}").status == 422


async def test_a_client_follows_every_page_there_is_and_asks_a_busy_daemon_again() -> None:
    busy = {"code": "busy", "detail": "later", "error_class": "Unavailable"}
    first, second = {"models": [{"name": "a"}], "next": "a"}, {"models": [], "next": "b"}
    pages: list[dict[str, Any]] = [first, busy, second, {"models": [{"name": "c"}]}]
    requests: list[str] = []

    async def answered(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append((await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode())
        page = pages.pop(0)
        body = json.dumps(page).encode()
        head = (
            f"HTTP/1.1 {503 if page is busy else 200} -\r\nConnection: close\r\nContent-Length: {len(body)}"
        )
        writer.write(head.encode() + b"\r\n\r\n" + body)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answered, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Client(f"http://127.0.0.1:{port}") as client:
            assert [model["name"] for model in await client.models()] == ["a", "c"]
    assert requests == ["/v1/models", "/v1/models?after=a", "/v1/models?after=a", "/v1/models?after=b"]


# --- lanes ---


async def test_what_many_ask_for_at_once_is_made_once_and_never_older_than_the_question() -> None:
    lane, begun = Lane("test", 1, callers=64), threading.Semaphore(0)
    made: list[int] = []
    gates = [threading.Event() for _ in range(2)]

    def make() -> int:
        number = len(made)
        made.append(number)
        begun.release()
        assert gates[number].wait(PATIENCE_SECONDS)
        return number

    first = asyncio.create_task(lane.shared("key", make))
    await asyncio.to_thread(begun.acquire)
    later = [asyncio.create_task(lane.shared("key", make)) for _ in range(40)]
    await asyncio.sleep(0)
    later[0].cancel()
    for gate in gates:
        gate.set()
    assert await first == 0
    assert set(await asyncio.gather(*later[1:])) == {1}
    assert made == [0, 1]
    lane.close()


async def test_calls_past_a_lanes_places_are_told_when_to_come_back() -> None:
    lane, gate = Lane("test", 1, callers=2, patience_seconds=0.05), threading.Event()
    running = asyncio.create_task(lane.run(lambda: gate.wait(PATIENCE_SECONDS)))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(lane.run(int))
    await asyncio.sleep(0)
    for late in (lane.run(int), waiting):
        with pytest.raises(Unavailable) as refusal:
            await late
        assert (refusal.value.code, refusal.value.retry_after) == ("busy", 2.0)
    gate.set()
    assert await running
    assert await lane.run(int) == 0, "places are free again"
    with pytest.raises(ZeroDivisionError):
        await lane.shared("key", lambda: 1 // 0)
    assert await lane.shared("key", lambda: 5) == 5
    lane.close()


# --- waiting ---


def test_a_wait_past_its_bound_is_refused(ground: Ground) -> None:
    for wait in ("1000000000", "3601", "-1", "nan", "inf", "1e9", "x", ""):
        answer = ground.node.ask("GET", f"/v1/models/no-such/ready?wait={wait}")
        assert answer.status == 422, wait


def test_waits_of_clients_that_hung_up_are_forgotten(tmp_path: Path, origin: Origin) -> None:
    """Sixteen connections, eight waits: each wait is given up, and the last one waits all the same."""
    with Node(tmp_path / "node", before=("prlimit", "--nofile=64")) as node:
        hold = origin.hold("/held.bin", after=1000)
        node.pull(origin.add("/held.bin", noise(1 << 20)), name="held.bin")
        assert hold.reached.wait(PATIENCE_SECONDS)
        for _ in range(100):
            with dialled(address_of(node)) as sock:
                sock.sendall(b"GET /v1/models/held.bin/ready?wait=3600 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        with ThreadPoolExecutor(1) as pod:
            until(lambda: not_at_once(node, pod))
            hold.release()


def not_at_once(node: Node, pod: ThreadPoolExecutor, name: str = "held.bin") -> bool:
    """Whether a pod may wait for a second."""
    began = time.monotonic()
    assert pod.submit(node.ready, name, wait=1).result().status == 503
    return time.monotonic() - began >= 1


def test_pods_that_wait_leave_connections_for_probes(tmp_path: Path, origin: Origin) -> None:
    """All from one address, as pods behind SNAT are: half of the connections wait, others are answered."""
    with Node(tmp_path / "node", before=("prlimit", "--nofile=128")) as node, ExitStack() as stack:
        hold = origin.hold("/held.bin", after=1000)
        node.pull(origin.add("/held.bin", noise(1 << 20)), name="held.bin")
        assert hold.reached.wait(PATIENCE_SECONDS)
        pods = [stack.enter_context(dialled(address_of(node))) for _ in range(24)]
        for sock in pods:
            sock.sendall(b"GET /v1/models/held.bin/ready?wait=3600 HTTP/1.1\r\n" + LAST)
        at_once = [sock for sock in pods[16:] if status(sock.recv(12) + b" ") == 503]
        assert len(at_once) == 8, "no more than 16 of 32 connections wait"
        for path in ("/livez", "/readyz", "/v1/models"):
            assert asked(address_of(node), path)[0] == 200
        hold.release()
        assert [status(end_of(sock)) for sock in pods[:16]] == [200] * 16


class CountingFuture(Future[None]):
    """Counts the callbacks that it gets."""

    added = 0

    def add_done_callback(self, fn: Callable[[Future[None]], object]) -> None:
        self.added += 1
        super().add_done_callback(fn)


async def test_all_who_wait_for_one_pull_leave_one_callback_at_it() -> None:
    waits, done = Waits(8), CountingFuture()
    for _ in range(100):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0):
                await waits.end_of(done)
    last = asyncio.create_task(waits.end_of(done))
    await asyncio.sleep(0)
    assert done.added == 1
    done.set_result(None)
    await last


# --- one address ---


def test_many_honest_pods_of_one_address_are_all_answered(ground: Ground) -> None:
    """A node whose pods come from one address by hostNetwork or SNAT: 1,500 keep their connections open."""
    address = address_of(ground.node)
    ground.have("shared.bin")
    with ExitStack() as stack:
        pods = [stack.enter_context(dialled(address)) for _ in range(1500)]
        for _ in range(2):
            for sock in pods:
                sock.sendall(b"GET /v1/models/shared.bin/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert {answer_of(sock).status for sock in pods} == {200}


@pytest.mark.parametrize(
    "begun", [b"", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nContent-Length: 9\r\n\r\nhalf"]
)
def test_connections_that_hold_a_request_back_give_way_to_one_of_the_same_address(begun: bytes) -> None:
    connections = Connections(most=16, bounds=Bounds(head_seconds=60, body_seconds=60))
    with served(connections) as (_, address), ExitStack() as stack:
        for _ in range(40):
            send_all(stack.enter_context(dialled(address)), begun)
        for _ in range(20):
            with dialled(address) as sock:
                sock.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
                assert status(end_of(sock)) == 200


def test_addresses_of_one_ipv6_network_are_one_peer_and_users_of_a_socket_are_peers() -> None:
    with socket.socket() as tcp:
        assert peer_of(tcp, ("10.0.0.1", 1)) == "10.0.0.1"
        assert peer_of(tcp, ("2001:db8::1", 1, 0, 0)) == peer_of(tcp, ("2001:db8::ffff:1", 2, 0, 0))
        assert peer_of(tcp, ("2001:db8::1", 1, 0, 0)) != peer_of(tcp, ("2001:db8:0:1::1", 1, 0, 0))
    left, right = socket.socketpair(socket.AF_UNIX)
    with left, right:
        assert peer_of(left, "").startswith("uid ")


# --- requests of all shapes ---

ODD = {
    "HEAD": (b"HEAD /livez HTTP/1.1\r\nHost: localhost\r\n", 200),
    "HEAD of a listing": (b"HEAD /v1/models HTTP/1.1\r\nHost: localhost\r\n", 200),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\nHost: localhost\r\n", 200),
    "HTTP/1.0 without a host": (b"GET /livez HTTP/1.0\r\n", 403),
    "HTTP/1.1 without a host": (b"GET /livez HTTP/1.1\r\n", 403),
    "an absolute target": (b"GET http://localhost/livez HTTP/1.1\r\nHost: localhost\r\n", 200),
    "an absolute target elsewhere": (b"GET http://evil/livez HTTP/1.1\r\nHost: evil\r\n", 403),
    "OPTIONS": (b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\n", 405),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n", 404),
    "CONNECT": (b"CONNECT localhost:443 HTTP/1.1\r\nHost: localhost\r\n", 400),
    "TRACE": (b"TRACE /livez HTTP/1.1\r\nHost: localhost\r\n", 405),
    "an upgrade to HTTP/2": (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n",
        200,
    ),
    "a websocket": (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n",
        200,
    ),
    "two lengths": (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nContent-Length: 1\r\n",
        400,
    ),
    "a length and chunks": (
        b"GET /livez HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        400,
    ),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n", 400),
}


@pytest.mark.parametrize("shape", ODD)
def test_a_request_of_an_odd_shape_is_answered_or_refused_and_the_next_one_answered(
    ground: Ground, shape: str
) -> None:
    said, expected = ODD[shape]
    with dialled(address_of(ground.node)) as sock:
        sock.sendall(said + b"\r\n")
        with http.client.HTTPResponse(sock, method=said.partition(b" ")[0].decode()) as response:
            response.begin()
            content = response.read()
        assert response.status == expected, content
        if expected == 400:
            assert json.loads(content)["code"] == "invalid_request"
    assert asked(address_of(ground.node), "/livez")[0] == 200


def test_a_client_that_awaits_100_continue_is_told_to_go_on_when_its_body_is_wanted(ground: Ground) -> None:
    head = b"POST /v1/models HTTP/1.1\r\nContent-Type: application/json\r\n" + LAST.removesuffix(b"\r\n")
    with dialled(address_of(ground.node)) as sock:
        sock.sendall(head + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert status(end_of(sock)) == 422
    with dialled(address_of(ground.node)) as sock:
        sock.sendall(head + b"Content-Length: 2000000\r\nExpect: 100-continue\r\n\r\n")
        assert status(end_of(sock)) == 413, "and not when it is too long"


def test_clients_that_talk_nonsense_fill_no_log(node: Nodes) -> None:
    running = node()
    before = len(running.output)
    for _ in range(50):
        for said in (b"nonsense\r\n\r\n", *(said + b"\r\n" for said, _ in ODD.values())):
            with dialled(address_of(running)) as sock:
                sock.sendall(said)
                sock.recv(65536)
    assert len(running.output) - before < 20_000, "audit lines alone, 30 at most"
