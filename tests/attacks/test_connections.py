"""A client of the API without a token, who wants its memory, its connections or its time."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from cachd.api.admission import Bounds, Connections, Stage
from cachd.api.connection import Connection
from tests.ground.node import Node
from tests.ground.site import until

PATIENCE_SECONDS = 60.0
SOON = Bounds(head_seconds=0.5, body_seconds=0.5, unread_seconds=0.5, refused_seconds=0.2)
MIB = 1 << 20
Nodes = Callable[..., Node]


class App:
    """Reads the body, then answers with it, or with so many bytes as the path says; `/held` waits."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.ended = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        message: Message = {"more_body": True}
        body = b""
        while message.get("more_body"):
            message = await receive()
            if message["type"] == "http.disconnect":
                self.ended += 1
                return
            body += message.get("body", b"")
        if scope["path"] == "/held":
            await asyncio.to_thread(self.release.wait, PATIENCE_SECONDS)
        size = scope["path"].removeprefix("/")
        answer = bytes(int(size)) if size.isdecimal() else body
        head = [(b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        with suppress(RuntimeError):
            await send({"type": "http.response.body", "body": answer})
        self.ended += 1


@contextmanager
def served(connections: Connections) -> Iterator[tuple[App, tuple[str, int]]]:
    """A server with these bounds over `App`; its address."""
    app = App()
    http = partial(Connection, connections=connections)
    config = uvicorn.Config(app, http=http, ws="none", lifespan="off", log_config=None)  # type: ignore[arg-type]  # any callable will do
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as sock, running(server, app, sockets=[sock]):
        yield app, sock.getsockname()[:2]


@contextmanager
def running(server: uvicorn.Server, app: App, **asked: list[socket.socket]) -> Iterator[None]:
    """Run a server in a thread until the block ends. `asked`: what `Server.run` takes."""
    thread = threading.Thread(target=server.run, kwargs=asked)
    thread.start()
    try:
        yield
    finally:
        app.release.set()
        server.should_exit = server.force_exit = True
        thread.join()


def dialled(address: tuple[str, int]) -> socket.socket:
    return socket.create_connection(address, timeout=PATIENCE_SECONDS)


def send_all(sock: socket.socket, content: bytes) -> None:
    """Send what the other end takes."""
    with suppress(ConnectionError):
        sock.sendall(content)


def end_of(sock: socket.socket) -> bytes:
    """All that comes until the other end closes."""
    got = b""
    with suppress(ConnectionError):
        while piece := sock.recv(65536):
            got += piece
    return got


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


def code(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["code"])


HEADS = {
    "lines without end": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"x: y\r\n" * 4096),
    "one line without end": (b"GET / HTTP/1.1\r\nHost: x\r\nx: ", b"y" * 16384),
    "a name without end": (b"GET / HTTP/1.1\r\n", b"y" * 16384),
    "a path without end": (b"GET /", b"y" * 16384),
    "folded lines without end": (b"GET / HTTP/1.1\r\nHost: x\r\nx: y", b"\r\n y" * 4096),
    "empty lines without end": (b"", b"\r\n" * 8192),
}


@pytest.mark.parametrize("attack", HEADS)
def test_a_head_without_end_is_refused_before_it_takes_memory(attack: str) -> None:
    begin, more = HEADS[attack]
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address), dialled(address) as sock:
        send_all(sock, begin)
        sent = 0
        with suppress(ConnectionError):
            while sent < 64 * MIB:
                sock.sendall(more)
                sent += len(more)
        assert sent < 32 * MIB, "what fits into the buffers of both sockets"
        assert status(end_of(sock)) in (0, 400, 431)


def test_a_head_of_too_many_lines_or_bytes_is_told_so() -> None:
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address):
        for head in (b"a: b\r\n" * 101, b"a: " + b"b" * (33 << 10) + b"\r\n"):
            with dialled(address) as sock:
                send_all(sock, b"GET / HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n")
                answer = end_of(sock)
                assert (status(answer), code(answer)) == (431, "head_too_long")
        with dialled(address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nconnection: close\r\n" + b"a: b\r\n" * 98 + b"\r\n")
            assert status(end_of(sock)) == 200


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 100000000\r\n\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_a_body_past_its_bound_is_refused_whatever_frames_it(framing: bytes) -> None:
    chunk = b"10000\r\n" + bytes(65536) + b"\r\n" if b"chunked" in framing else bytes(65536)
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address), dialled(address) as sock:
        send_all(sock, b"POST / HTTP/1.1\r\nHost: x\r\n" + framing)
        sent = 0
        with suppress(ConnectionError):
            while sent < 64 * MIB:
                sock.sendall(chunk)
                sent += len(chunk)
        assert sent < 32 * MIB
        assert status(end_of(sock)) in (0, 413)


def test_trailers_without_end_are_refused() -> None:
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address), dialled(address) as sock:
        send_all(sock, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        sent = 0
        with suppress(ConnectionError):
            while sent < 64 * MIB:
                sock.sendall(b"x: y\r\n" * 4096)
                sent += 6 * 4096
        assert sent < 32 * MIB


SLOW = {
    "nothing": b"",
    "half a head": b"GET / HTTP/1.1\r\nHost: x\r\n",
    "half a line": b"GE",
    "half a body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf",
    "a body that is awaited": b"POST / HTTP/1.1\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n",
}


@pytest.mark.parametrize("attack", SLOW)
def test_a_client_that_stops_in_mid_request_is_disconnected(attack: str) -> None:
    with served(Connections(bounds=SOON)) as (_, address), dialled(address) as sock:
        sock.sendall(SLOW[attack])
        told = end_of(sock).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        if attack == "nothing":
            assert told == b""
        else:
            assert (status(told), code(told)) == (408, "too_late")


def test_a_request_that_was_only_begun_behind_another_is_answered_408() -> None:
    begun = b"GET / HTTP/1.1\r\nHost: x\r\n\r\nGET / HT"
    with served(Connections(bounds=SOON)) as (_, address), dialled(address) as sock:
        sock.sendall(begun)
        first, mark, second = end_of(sock).partition(b"HTTP/1.1 408")
        assert (status(first), code(mark + second)) == (200, "too_late")


def test_the_first_piece_of_a_head_counts_to_its_size() -> None:
    """A head has at most 32 KiB."""
    with (
        served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address),
        dialled(address) as sock,
    ):
        sock.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 4000)
        sock.settimeout(0.5)
        with suppress(TimeoutError):
            assert sock.recv(1) == b"", "too early"
        sock.settimeout(PATIENCE_SECONDS)
        sock.sendall(b"y" * (30 << 10))
        assert status(end_of(sock)) == 431


def test_a_client_that_asks_ever_more_before_it_is_answered_is_disconnected() -> None:
    with served(Connections(bounds=SOON)) as (app, address), dialled(address) as sock:
        send_all(sock, b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n" * 200)
        assert b"pipelined" in end_of(sock)
        assert app.ended <= 1


@pytest.mark.parametrize(
    "begin", [b"GET / HTTP/1.1\r\nx: ", b"POST / HTTP/1.1\r\nContent-Length: 99999\r\n\r\n"]
)
def test_a_client_that_drips_is_disconnected_however_steadily(begin: bytes) -> None:
    with served(Connections(bounds=SOON)) as (_, address), dialled(address) as sock:
        began = time.monotonic()
        send_all(sock, begin)
        sock.settimeout(0.05)
        over = False
        while not over and time.monotonic() - began < PATIENCE_SECONDS:
            send_all(sock, b"y")
            with suppress(TimeoutError):
                over = status(sock.recv(65536)) in (0, 408)
        assert over


def test_a_client_that_does_not_read_is_disconnected() -> None:
    with served(Connections(bounds=SOON)) as (app, address), dialled(address) as sock:
        sock.sendall(b"GET /50000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not app.ended and time.monotonic() < deadline:
            assert not threading.Event().wait(0.01)
        assert app.ended
        assert len(end_of(sock)) < 50_000_000, "the rest was dropped with the connection"


def test_a_client_that_reads_a_long_answer_slowly_gets_all_of_it() -> None:
    bounds = replace(SOON, unread_seconds=PATIENCE_SECONDS)
    with served(Connections(bounds=bounds)) as (app, address), dialled(address) as sock:
        sock.sendall(b"GET /50000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert len(sock.recv(1)) == 1
        assert not app.release.wait(4 * SOON.head_seconds), "a wait, so that deadlines would have passed"
        assert len(end_of(sock).partition(b"\r\n\r\n")[2]) == 50_000_000, "then it is idle, and closed"


def test_a_request_that_waits_for_its_answer_has_no_deadline_here() -> None:
    with served(Connections(bounds=SOON)) as (app, address), dialled(address) as sock:
        sock.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert not app.release.wait(4 * SOON.head_seconds), "a wait, so that deadlines would have passed"
        app.release.set()
        assert status(end_of(sock)) == 200


def test_requests_sent_ahead_without_end_end_the_connection() -> None:
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address), dialled(address) as sock:
        sent = 0
        with suppress(ConnectionError):
            while sent < 64 * MIB:
                sock.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n" * 500)
                sent += 15_000
        assert sent < 32 * MIB


def test_the_request_before_those_sent_ahead_fails_silently_when_they_end_the_connection(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with served(Connections(bounds=Bounds(refused_seconds=30))) as (app, address), dialled(address) as sock:
        sock.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\n\r\n" * 100)
        assert status(sock.recv(65536)) == 503
        app.release.set()
        until(lambda: app.ended)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_few_requests_sent_ahead_are_answered_in_order() -> None:
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address), dialled(address) as sock:
        bodies = [b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n%d" % n for n in range(8)]
        sock.sendall(b"".join(bodies) + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        answers = end_of(sock).split(b"HTTP/1.1 200 OK\r\n")[1:]
        assert [a.partition(b"\r\n\r\n")[2] for a in answers] == [b"%d" % n for n in range(8)] + [b""]


def test_when_all_connections_are_taken_the_idlest_gives_way_to_a_new_one() -> None:
    with served(Connections(most=8)) as (_, address):
        idle = [dialled(address) for _ in range(20)]
        with dialled(address) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert status(end_of(sock)) == 200
        assert end_of(idle[0]) == b"", "the first of the idle ones was closed"
        for sock in idle:
            sock.close()


@dataclass(eq=False)
class Waiting:
    """A connection of one peer, which has waited for its client since `since`."""

    stage: Stage
    since: float
    loop: asyncio.AbstractEventLoop
    peer: str = "192.0.2.1"
    has_ended: bool = False

    def check_deadlines(self, now: float) -> None: ...

    def end(self) -> None:
        self.has_ended = True


def test_a_request_that_stays_half_said_gives_way_before_a_pod_that_is_idle_for_less_long() -> None:
    loop = asyncio.new_event_loop()
    try:
        connections = Connections(most=4)
        half, late_half = Waiting(Stage.BODY, 5.0, loop), Waiting(Stage.BODY, 9.5, loop)
        pod, others = Waiting(Stage.HEAD, 9.0, loop), [Waiting(Stage.HEAD, 11.0, loop) for _ in range(3)]
        for each in (half, late_half, pod):
            assert connections.admit(each)
        gone = []
        for each in others:
            assert connections.admit(each)
            gone += [c for c in (half, late_half, pod) if c.has_ended and c not in gone]
        assert gone == [half, pod, late_half]
    finally:
        loop.close()


def test_connections_whose_answers_are_awaited_give_way_to_nobody() -> None:
    with served(Connections(most=8)) as (app, address):
        busy = [dialled(address) for _ in range(6)]
        for sock in busy:
            sock.sendall(b"GET /held HTTP/1.1\r\nConnection: close\r\n\r\n")
        with dialled(address) as sock:
            # the six are counted once they are accepted, which is in the order they were dialled
            sock.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            answer = end_of(sock)
        assert (status(answer), code(answer)) == (503, "too_many_connections")
        app.release.set()
        assert {status(end_of(sock)) for sock in busy} == {200}
        for sock in busy:
            sock.close()


def test_garbage_is_answered_with_a_problem_document() -> None:
    with served(Connections(bounds=Bounds(refused_seconds=0.2))) as (_, address), dialled(address) as sock:
        send_all(sock, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        answer = end_of(sock)
        assert (status(answer), code(answer)) == (400, "invalid_request")


def memory_mib(node: Node) -> float:
    """The most memory that the daemon ever had, in MiB."""
    with open(f"/proc/{node.pid}/status") as told:
        return next(int(line.split()[1]) for line in told if line.startswith("VmHWM")) / 1024


def test_the_daemon_itself_is_bounded_so(node: Nodes) -> None:
    """Promised: A client without a token can exhaust neither the memory nor the connections of the daemon."""
    running = node()
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    for begin, more in HEADS.values():
        with dialled(address) as sock:
            send_all(sock, begin)
            with suppress(ConnectionError):
                for _ in range(64 * MIB // len(more)):
                    sock.sendall(more)
    assert memory_mib(running) < 400
    with ExitStack() as idle:
        for _ in range(3000):
            idle.enter_context(dialled(address))
        assert running.ask("GET", "/livez").status == 200


def test_a_write_without_the_token_is_refused_before_its_body_is_read(node: Nodes, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("the token")
    running = node(token_file=str(tmp_path / "token"))
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    for framing in (b"Content-Length: 1000000", b"Transfer-Encoding: chunked"):
        with dialled(address) as sock:
            head = b"POST /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            sock.sendall(head + framing + b"\r\n\r\n")
            answer = end_of(sock)
            assert (status(answer), code(answer)) == (401, "unauthorized")
