"""An origin that is slow, silent or cut off delays its caller for a limited time."""

from __future__ import annotations

import concurrent.futures
import socket
import threading
from dataclasses import dataclass, replace

import pytest

from cachd.errors import Cancelled, Unavailable
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Target
from tests.fetching import KIB, PATIENCE_SECONDS, SOON_SECONDS, fetch, http, read, refused
from tests.ground.models import noise
from tests.ground.origin import (
    Fault,
    Origin,
    Reply,
    Seen,
    Stall,
    Trickle,
)
from tests.ground.scripted import Scripted, heard


def test_a_connection_without_a_byte_for_too_long_is_stalled(origin: Origin) -> None:
    url = origin.add("/x", noise(100 * KIB))
    origin.fault("/x", Stall(at=5000))
    refused(lambda: fetch(http(stall_seconds=SOON_SECONDS), url, 100 * KIB), "stalled")


def test_an_origin_that_does_not_answer_is_stalled() -> None:
    def silent(connection: socket.socket, _: int) -> None:
        while heard(connection):
            pass

    with Scripted(silent) as server:
        refused(lambda: http(stall_seconds=SOON_SECONDS).head(f"{server.url}/x", CancelToken()), "stalled")


def test_a_trickle_is_too_slow(origin: Origin) -> None:
    url = origin.add("/x", noise(4 * KIB))
    origin.fault("/x", Trickle(500))
    refused(lambda: fetch(http(stall_seconds=SOON_SECONDS), url, 4 * KIB), "too_slow")


@dataclass(frozen=True)
class ChunkedTrickle(Fault):
    """The whole file without Content-Length, this slowly."""

    bytes_per_second: float

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply.whole(), length=None, rate=self.bytes_per_second)


def test_a_trickle_in_chunks_is_too_slow(origin: Origin) -> None:
    url = origin.add("/x", noise(2 * KIB))
    origin.fault("/x", ChunkedTrickle(500))
    with pytest.raises(Unavailable):  # too slow; or, on a busy machine, no byte for too long
        fetch(http(stall_seconds=SOON_SECONDS), url, 2 * KIB)
    assert origin.bytes_sent() < KIB, "long before its end"


def test_a_trickle_of_headers_is_too_slow() -> None:
    def drip(connection: socket.socket, _: int) -> None:
        if heard(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: ")
            for _ in range(20):
                server.stopped.wait(0.05)
                connection.sendall(b"x")
            connection.sendall(b"\r\n\r\nok")

    with Scripted(drip) as server, pytest.raises(Unavailable):
        fetch(http(stall_seconds=SOON_SECONDS), f"{server.url}/x", 2)


def test_a_slow_origin_that_is_not_too_slow_is_waited_for(origin: Origin) -> None:
    url = origin.add("/x", noise(20 * KIB))
    origin.fault("/x", Trickle(20 * KIB))
    assert fetch(http(stall_seconds=SOON_SECONDS), url, 20 * KIB) == noise(20 * KIB)


ABORTED = {"plain": {}, "that closes": {"Connection": "close"}}


@pytest.mark.parametrize("headers", ABORTED.values(), ids=ABORTED.keys())
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_an_abort_ends_a_read_that_waits_in_another_thread(tls: bool, headers: dict[str, str]) -> None:
    with Origin(tls=tls) as origin, concurrent.futures.ThreadPoolExecutor(1) as other:
        url = origin.add("/x", noise(10 * KIB), headers=headers)
        hold = origin.hold("/x", after=5 * KIB)
        body = http(ca_file=origin.ca_file).open(Target(url, 10 * KIB), Extent(0, 10 * KIB), CancelToken())
        reading = other.submit(read, body, 10 * KIB)
        assert hold.reached.wait(PATIENCE_SECONDS)
        try:
            body.abort()
            with pytest.raises(Unavailable):
                reading.result(PATIENCE_SECONDS / 4)
        finally:
            hold.release()


def test_a_cut_ends_the_wait_for_an_answer_and_forbids_the_next_question() -> None:
    asked = threading.Event()

    def silent(connection: socket.socket, _: int) -> None:
        if heard(connection):
            asked.set()
            heard(connection)

    with Scripted(silent) as server, concurrent.futures.ThreadPoolExecutor(1) as other:
        over, token, target = http(), CancelToken(), Target(f"{server.url}/x", 2)
        asking = other.submit(over.open, target, Extent(0, 2), token)
        assert asked.wait(PATIENCE_SECONDS)
        token.cancel()
        with pytest.raises((Unavailable, Cancelled)):
            asking.result(PATIENCE_SECONDS / 4)
        with pytest.raises(Cancelled):
            over.open(target, Extent(0, 2), token)
        assert server.accepted == 1


def test_a_cut_ends_a_handshake_that_nobody_answers() -> None:
    greeted = threading.Event()

    def silent(connection: socket.socket, _: int) -> None:
        connection.recv(64 * KIB)
        greeted.set()
        connection.recv(64 * KIB)

    with Scripted(silent) as server, concurrent.futures.ThreadPoolExecutor(1) as other:
        token, target = CancelToken(), Target(server.url.replace("http:", "https:") + "/x", 2)
        asking = other.submit(http().open, target, Extent(0, 2), token)
        assert greeted.wait(PATIENCE_SECONDS)
        token.cancel()
        with pytest.raises((Unavailable, Cancelled)):
            asking.result(PATIENCE_SECONDS / 4)
