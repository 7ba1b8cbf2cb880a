"""What a client of the API without a token tries."""

from __future__ import annotations

import resource
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

from tests.attacks.target import MIB, Target, attack

HEADS = {
    "lines": (b"GET / HTTP/1.1\r\nHost: x\r\n", b"x: y\r\n" * 4096),
    "one line": (b"GET / HTTP/1.1\r\nHost: x\r\nx: ", b"y" * 16384),
    "a path": (b"GET /", b"y" * 16384),
    "empty lines": (b"", b"\r\n" * 8192),
    "a chunked body": (
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"1\r\nx\r\n" * 4096,
    ),
}


def _sent(target: Target, begin: bytes, more: bytes, most: int) -> int:
    """Bytes that the daemon's end took before it closed."""
    sent = 0
    with target.dial() as sock, suppress(ConnectionError):
        sock.sendall(begin)
        while sent < most:
            sock.sendall(more)
            sent += len(more)
    return sent


@attack("endless-head")
def heads_and_bodies_without_end(target: Target) -> None:
    for begin, more in HEADS.values():
        most = target.many(640 * MIB)
        assert _sent(target, begin, more, most) < 32 * MIB, begin


@attack("slow-client")
def clients_that_stop_or_do_not_read(target: Target) -> None:
    said = [
        b"",
        b"GET /v1/models HT",
        b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    ]
    with ExitStack() as stack:
        for number in range(target.many(400)):
            sock = stack.enter_context(target.dial())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with suppress(ConnectionError):
                sock.sendall(said[number % len(said)])
        for _ in range(20):
            assert target.ask("GET", "/v1/models/served/ready").status == 200


@attack("many-connections")
def more_connections_than_there_are_descriptors(target: Target) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with ExitStack() as stack:
            for _ in range(target.many(1500)):
                stack.enter_context(target.dial())
            assert target.ask("GET", "/v1/models/served/ready").status == 200
            left = resource.prlimit(target.node.pid, resource.RLIMIT_NOFILE)[0]
            assert len(list(Path(f"/proc/{target.node.pid}/fd").iterdir())) < left / 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@attack("body-before-token")
def a_write_without_a_token_that_never_ends(target: Target) -> None:
    with target.dial() as sock:
        sock.sendall(b"POST /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n{")
        assert sock.recv(65536).startswith(b"HTTP/1.1 401")


@attack("another-port")
def a_page_of_another_port(target: Target) -> None:
    for origin in ("http://localhost:3000", "http://127.0.0.1:1", "https://evil.example", "null"):
        answer = target.ask("DELETE", "/v1/models/kept-1", Origin=origin)
        assert answer.status == 403, (origin, answer)


def at_once(count: int, target: Target, method: str, path: str, **asked: str) -> list[int]:
    """The statuses of so many equal requests at the same time."""
    statuses: list[int] = []

    def ask() -> None:
        with suppress(OSError):
            statuses.append(target.ask(method, path, **asked).status)

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


@attack("starved-probes")
def dry_runs_and_listings_without_number(target: Target) -> None:
    statuses = at_once(target.many(400), target, "GET", "/v1/models/many")
    statuses += at_once(target.many(330), target, "POST", "/v1/evictions?dry_run=true&bytes=1000000")
    statuses += at_once(target.many(400), target, "GET", "/metrics")
    assert {*statuses} <= {200, 401, 429, 503}, statuses
