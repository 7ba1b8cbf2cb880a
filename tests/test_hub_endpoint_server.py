"""The server of the Hub endpoint alone: which connections it keeps, and what it answers to odd requests."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from contextlib import ExitStack, closing

import pytest
from structlog.testing import capture_logs

from cachd.metrics import Metrics
from cachd.model import Digest, File, Manifest
from cachd.serve import listings
from cachd.serve.answer import Answer, document, listing
from cachd.serve.bounds import Waits
from cachd.serve.exchange import Request
from cachd.serve.server import HubServer, Size
from tests.ground.node import PATIENCE_SECONDS
from tests.ground.site import until
from tests.test_hub_endpoint_callers import HEAD, OK, asked, served, value

ONE = Size(threads=1, connections=1)


def in_progress(metrics: Metrics) -> float:
    return value(metrics, "cachd_hub_requests_in_progress")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_clients_of_two_listening_sockets_wait_while_all_connections_are_busy() -> None:
    """Both sockets have a new client in the same moment."""
    ends, is_held, goes_on = threading.Event(), threading.Event(), threading.Event()
    goes_on.set()

    def clock() -> float:  # the thread that watches asks it, and so can be held
        if not goes_on.is_set():
            is_held.set()
            goes_on.wait(PATIENCE_SECONDS)
        return time.monotonic()

    def answer(request: Request) -> Answer:
        if request.target == "/late":
            ends.wait(PATIENCE_SECONDS)
        return document({})

    metrics = Metrics()
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as other,
        closing(HubServer([one, other], answer, metrics, waits=Waits(2), size=ONE, clock=clock)) as server,
    ):
        server.start()
        with socket.create_connection(one.getsockname(), PATIENCE_SECONDS) as busy:
            busy.sendall(OK.replace(b"/ok", b"/late"))
            until(lambda: in_progress(metrics) == 1)
            goes_on.clear()
            assert is_held.wait(PATIENCE_SECONDS)
            new = [socket.create_connection(each.getsockname(), PATIENCE_SECONDS) for each in (one, other)]
            goes_on.set()
            ends.set()
            assert busy.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        for each in new:
            each.close()
        for each in (one, other):
            assert asked(each.getsockname(), OK).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_may_not_ask_takes_no_place_of_another() -> None:
    metrics = Metrics()
    with (
        served(
            lambda _: document({}), metrics, size=ONE, may_connect=lambda client, _: client != "127.0.0.2"
        ) as at,
        socket.create_connection(at, PATIENCE_SECONDS) as client,
    ):
        client.sendall(HEAD)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
        until(lambda: in_progress(metrics) == 0)
        with socket.create_connection(at, PATIENCE_SECONDS, source_address=("127.0.0.2", 0)) as stranger:
            assert stranger.recv(1 << 16).startswith(b"HTTP/1.1 403 ")
        client.sendall(HEAD)
        assert client.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("line", [b"Content-Length: 9999999", b"Transfer-Encoding: chunked"])
def test_a_refused_head_has_no_body_and_logs_no_error(line: bytes) -> None:
    with capture_logs() as logs, served(lambda _: document({})) as at:
        got = asked(at, HEAD.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n"))
    assert got.startswith(b"HTTP/1.1 41")
    assert got.endswith(b"\r\n\r\n")
    assert not [each for each in logs if each["log_level"] == "error"]


def test_a_stop_closes_the_connections_that_no_thread_came_to() -> None:
    metrics, ends = Metrics(), threading.Event()

    def answer(request: Request) -> Answer:
        ends.wait(PATIENCE_SECONDS)
        return document({})

    with socket.create_server(("127.0.0.1", 0)) as sock, ExitStack() as stack:
        server = HubServer([sock], answer, metrics, waits=Waits(2), size=Size(threads=1))
        before = descriptors()
        server.start()
        stopping = threading.Thread(target=server.close)
        for number in range(5):  # each client may have one request under way
            client = socket.create_connection(
                sock.getsockname(), PATIENCE_SECONDS, source_address=(f"127.0.0.{number + 1}", 0)
            )
            stack.enter_context(client).sendall(OK)
        until(lambda: in_progress(metrics) == 5)
        stopping.start()
        assert client.recv(1 << 16) == b""
        ends.set()
        stopping.join(PATIENCE_SECONDS)
        assert not stopping.is_alive()
        stack.close()
        assert descriptors() == before - 2  # without the two ends of the server's own wake


def test_a_client_with_many_long_requests_does_not_delay_others_by_all_of_them() -> None:
    metrics, goes_on, ended = Metrics(), threading.Semaphore(0), []

    def answer(request: Request) -> Answer:
        if request.peer == "127.0.0.1":
            goes_on.acquire(timeout=PATIENCE_SECONDS)
        ended.append(request.peer)
        return document({})

    with served(answer, metrics, size=Size(threads=32)) as at, ExitStack() as stack:
        many = [stack.enter_context(socket.create_connection(at, PATIENCE_SECONDS)) for _ in range(20)]
        for sock in many:
            sock.sendall(HEAD)
        until(lambda: in_progress(metrics) == 20)
        other = socket.create_connection(at, PATIENCE_SECONDS, source_address=("127.0.0.2", 0))
        stack.enter_context(other).sendall(HEAD)
        until(lambda: in_progress(metrics) == 21)
        for number in range(20):
            goes_on.release()
            until(lambda number=number: ended.count("127.0.0.1") > number)
        until(lambda: len(ended) == 21)
        assert ended.index("127.0.0.2") < 18


def test_a_client_that_does_not_read_a_listing_does_not_slow_the_pulls() -> None:
    """The short switch interval of Python slows pulls of many small files."""
    usual, metrics = sys.getswitchinterval(), Metrics()
    paths, digest = (f"{number:05}" + "x" * 200 for number in range(40_000)), Digest("git-sha1", "0" * 40)
    manifest = Manifest("hf://org/model", "1" * 40, tuple(File(path, 1, path, digest) for path in paths))
    with (
        served(lambda _: listing(listings.info("org/model", manifest, blobs=True)), metrics) as at,
        socket.socket() as client,
    ):
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(at)
        client.sendall(OK)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        until(lambda: sys.getswitchinterval() == usual)
        assert in_progress(metrics) == 1
