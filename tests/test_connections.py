"""Connections are kept, replaced, dialled and secured as the origin and the address demand."""

from __future__ import annotations

import gc
import selectors
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.errors import Forbidden, Invalid, Unavailable
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Target
from cachd.sources.http1 import Request
from cachd.sources.trust import Authorities
from cachd.sources.wire import TlsWire, Wire
from tests.fetching import KIB, MIB, PATIENCE_SECONDS, fetch, http, refused
from tests.ground.models import noise
from tests.ground.origin import (
    Origin,
    Tls,
)
from tests.ground.scripted import OK, Scripted, heard, saying

# --- connections ---


def test_a_thread_keeps_its_connection_to_an_origin() -> None:
    with Scripted(saying(OK)) as server:
        over = http()
        for _ in range(3):
            assert fetch(over, f"{server.url}/x", 2) == b"ok"
        assert server.accepted == 1


def test_kept_connections_close_with_what_keeps_them_and_wait_for_no_garbage_collection() -> None:
    """A daemon whose pull has ended may collect no garbage for hours; no connection is held for it."""
    closed = threading.Event()

    def twice(connection: socket.socket, _: int) -> None:
        for _ in range(2):
            heard(connection)
            connection.sendall(OK)
        if not connection.recv(1):
            closed.set()

    gc.disable()
    try:
        with Scripted(twice) as server:
            over = http()
            for _ in range(2):
                assert fetch(over, f"{server.url}/x", 2) == b"ok"
            assert not closed.is_set()
            del over
            assert closed.wait(PATIENCE_SECONDS)
            assert server.accepted == 1
    finally:
        gc.enable()


def test_a_connection_whose_answer_was_not_read_to_its_end_is_not_used_again(origin: Origin) -> None:
    over = http()
    target = Target(origin.add("/x", noise(KIB)), KIB)
    with over.open(target, Extent(0, 100), CancelToken()) as body:
        body.readinto(memoryview(bytearray(10)))
    assert fetch(over, target.url, KIB) == noise(KIB)


def test_a_request_with_a_body_is_never_sent_twice() -> None:
    heads = []

    def script(connection: socket.socket, number: int) -> None:
        while heard(connection):
            heads.append(number)
            if number == 2:
                return
            connection.sendall(OK)
            connection.settimeout(0.5)  # it is kept, and only then is the next one served

    with Scripted(script) as server:
        over = http()
        url = urlsplit(f"{server.url}/x")
        with over.relay(Request("GET", url, {}), CancelToken()) as response:
            assert response.content(CancelToken(), at_most=2) == b"ok"
        asked = Request("POST", url, {"Content-Length": "4"}, b"\r\n\r\n")
        refused(lambda: over.relay(asked, CancelToken()), "connection_failed")
        over.anew()
        over._pool._idle()
    assert heads == [1, 2]


def test_a_kept_connection_that_the_origin_closed_is_replaced() -> None:
    closed = threading.Event()

    def once(connection: socket.socket, _: int) -> None:
        heard(connection)
        connection.sendall(OK)
        connection.shutdown(socket.SHUT_RDWR)
        closed.set()

    with Scripted(once) as server:
        over = http()
        for number in (1, 2, 3):
            assert fetch(over, f"{server.url}/x", 2) == b"ok"
            assert closed.wait(PATIENCE_SECONDS)
            closed.clear()
            assert server.accepted == number


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX: Content-Length: 2\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "connections"),
    [
        (OK, 1),
        (b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n" + OK, 1),
        (CHUNKED + b"2\r\nok\r\n0\r\n\r\n", 1),
        (CHUNKED + b"1;x=y\r\no\r\n1 \r\nk\r\n000\r\nX-Trailer: x\r\n\r\n", 1),
        (OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"), 2),
        (OK.replace(b"HTTP/1.1", b"HTTP/1.0"), 2),
        (OK.replace(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n"), 1),
        (OK + OK.replace(b"ok", b"no"), 2),
        (OK.replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n") + b"\r\n0\r\n\r\n", 2),
    ],
    ids=["plain", "announced", "chunked", "trailer", "close", "1.0", "1.0, kept", "more", "two lengths"],
)
def test_a_connection_is_used_again_where_its_answer_ended_beyond_doubt(
    answer: bytes, connections: int
) -> None:
    with Scripted(saying(answer)) as server:
        over = http()
        for _ in range(2):
            assert fetch(over, f"{server.url}/x", 2) == b"ok"
        assert server.accepted == connections


@pytest.mark.parametrize("end", [b"\r\n", b"\n"], ids=["crlf", "lf"])
def test_an_answer_may_come_a_byte_at_a_time(end: bytes) -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        heard(connection)
        for byte in OK.replace(b"\r\n", end):
            connection.sendall(bytes([byte]))

    with Scripted(script) as server:
        assert fetch(http(), f"{server.url}/x", 2) == b"ok"


def test_an_answer_that_ends_within_its_head_is_no_answer() -> None:
    def script(connection: socket.socket, _: int) -> None:
        heard(connection)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n")

    with Scripted(script) as server:
        refused(lambda: http().read(f"{server.url}/x", CancelToken(), at_most=1), "connection_failed")


def patience_of(wire: Wire) -> float:
    seconds, micros = struct.unpack("@ll", wire.sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16))
    return float(seconds + micros / 1e6)


def test_a_wire_asks_the_kernel_for_other_patience_only_where_it_differs_by_a_hundredth() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, 100.0) as wire:

        def patience_with(left: float) -> float:
            theirs.sendall(b"x")
            wire.answer_by = time.monotonic() + left
            wire.recv_into(memoryview(bytearray(1)))
            return patience_of(wire)

        assert patience_with(99.9) == 100
        shorter = patience_with(90.0)
        assert 80 < shorter <= 90
        assert patience_with(89.9) == shorter
        wire.answered()
        assert patience_of(wire) == 100


@contextmanager
def broken_off(place: Path, sent: bytes, *, nested: bool = False) -> Iterator[TlsWire]:
    """A wire to a server that hangs up after these bytes without TLS's own word for it; `nested`: in TLS."""
    served = Tls().context(place / "ca.pem")

    def speaks(connection: socket.socket, _: int) -> None:
        with served.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.sendall(sent)

    def leads(connection: socket.socket, _: int) -> None:
        with (
            served.wrap_socket(connection, server_side=True) as outer,
            socket.create_connection(listening) as origin,
        ):
            pass_on(outer, origin)

    trusting = Authorities(str(place / "ca.pem")).context()
    with Scripted(speaks) as server, Scripted(leads) as proxy:
        listening = urlsplit(server.url).hostname or "", urlsplit(server.url).port or 0
        first = urlsplit((proxy if nested else server).url)
        wire = Wire(socket.create_connection((first.hostname or "", first.port)), PATIENCE_SECONDS)
        with ExitStack() as opened:
            for _ in range(2 if nested else 1):
                wire = opened.enter_context(wire.secured(trusting, "127.0.0.1"))
                wire.handshake()
            yield wire


def pass_on(outer: ssl.SSLSocket, origin: socket.socket) -> None:
    """Bytes both ways until one of the two ends."""
    with selectors.DefaultSelector() as ready:
        ready.register(outer, selectors.EVENT_READ, (outer, origin))
        ready.register(origin, selectors.EVENT_READ, (origin, outer))
        while True:
            for key, _ in ready.select():
                sender, receiver = key.data
                data = sender.recv(16 * KIB)
                if not data:
                    return
                receiver.sendall(data)


@pytest.mark.parametrize("nested", [False, True], ids=["tls", "tls in tls"])
def test_what_came_over_tls_before_the_end_counts_and_then_the_end_is_told(
    tmp_path: Path, nested: bool
) -> None:
    sent = noise(200 * KIB)
    with broken_off(tmp_path, sent, nested=nested) as wire:
        view = memoryview(bytearray(MIB))
        assert wire.recv_into(view) == len(sent)
        assert view[: len(sent)] == sent
        with pytest.raises(ssl.SSLError, match=r"(?i)\beof\b|unexpected_eof"):  # before 3.11.4 no SSLEOFError
            wire.recv_into(view)


@pytest.mark.parametrize("nested", [False, True], ids=["tls", "tls in tls"])
def test_a_broken_tls_wire_is_freed_at_once(tmp_path: Path, nested: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        with broken_off(tmp_path, noise(200 * KIB), nested=nested) as wire:
            wire.recv_into(memoryview(bytearray(MIB)))
            gone = weakref.ref(wire)
        del wire
        assert gone() is None
    finally:
        gc.enable()


def test_a_new_connection_that_breaks_is_the_origins_failure() -> None:
    with Scripted(lambda connection, _: None) as server:
        assert isinstance(
            refused(lambda: http().head(f"{server.url}/x", CancelToken()), "connection_failed"), Unavailable
        )
        assert server.accepted == 1


def test_a_port_where_nobody_listens_is_unavailable() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        refused(
            lambda: http().head(f"http://127.0.0.1:{bound.getsockname()[1]}/x", CancelToken()),
            "connection_failed",
        )


def test_a_name_that_does_not_resolve_is_unavailable() -> None:
    error = refused(lambda: http().head("http://no-such-host.invalid/x", CancelToken()), "dns_failed")
    assert isinstance(error, Unavailable)
    assert "no-such-host.invalid" in error.detail


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.com", ".a"])
def test_a_name_that_no_host_can_have_is_not_blamed_on_the_token(host: str) -> None:
    with pytest.raises((Invalid, Unavailable)) as refusal:
        http().head(f"http://{host}/x", CancelToken())
    assert refusal.value.code != "bad_header"
    assert "token" not in refusal.value.hint


# --- TLS ---


def test_a_certificate_of_an_unknown_authority_is_refused_and_of_a_known_one_is_not() -> None:
    with Origin(tls=True) as origin:
        url = origin.add("/x", noise(KIB))
        error = refused(lambda: http().head(url, CancelToken()), "tls_untrusted")
        assert isinstance(error, Forbidden)
        assert "ca_file" in error.hint
        assert fetch(http(ca_file=origin.ca_file), url, KIB) == noise(KIB)


def test_a_certificate_of_another_host_is_refused() -> None:
    with Origin(tls=True) as origin:
        url = origin.add("/x", b"ok").replace("127.0.0.1", "0x7f.1")
        refused(lambda: http(ca_file=origin.ca_file).head(url, CancelToken()), "tls_untrusted")


def test_an_origin_without_tls_is_unavailable_by_https(origin: Origin) -> None:
    url = origin.add("/x", b"ok").replace("http:", "https:")
    assert isinstance(refused(lambda: http().head(url, CancelToken()), "connection_failed"), Unavailable)
