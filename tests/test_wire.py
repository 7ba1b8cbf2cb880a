"""A wire fills a large buffer, gives a small one what is there, and waits no longer than it may."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.sources.trust import Authorities
from cachd.sources.wire import LARGE_BYTES, TlsWire, Wire
from tests.fetching import PATIENCE_SECONDS
from tests.ground.origin import Tls
from tests.ground.scripted import Scripted
from tests.test_connections import pass_on


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def wired(stall_seconds: float = PATIENCE_SECONDS) -> Iterator[tuple[Wire, socket.socket, Clock]]:
    ours, theirs = socket.socketpair()
    clock = Clock()
    with theirs, Wire(ours, stall_seconds, clock) as wire:
        yield wire, theirs, clock


def room(size: int = 99) -> memoryview:
    return memoryview(bytearray(size))


@pytest.mark.parametrize(("size", "waits"), [(LARGE_BYTES, True), (LARGE_BYTES - 1, False)])
def test_a_large_buffer_is_waited_for_until_it_is_full(size: int, waits: bool) -> None:
    with wired(stall_seconds=0.05 if waits else PATIENCE_SECONDS) as (wire, theirs, _):
        theirs.sendall(b"hello")
        view, began = room(size), time.monotonic()
        assert (wire.recv_into(view), bytes(view[:5])) == (5, b"hello")
        assert not waits or time.monotonic() - began >= 0.05


def test_a_peer_that_sends_or_accepts_nothing_is_waited_for_no_longer_than_it_may() -> None:
    with wired(stall_seconds=0.02) as (wire, _, _):
        with pytest.raises(TimeoutError, match="no byte arrived"):
            wire.recv_into(room())
        with pytest.raises(TimeoutError, match="accepted no byte"):
            wire.sendall(bytes(8 << 20))


def test_the_end_of_a_peer_is_no_byte() -> None:
    with wired() as (wire, theirs, _):
        wire.handshake()
        wire.sendall(b"hello")
        assert theirs.recv(9) == b"hello"
        theirs.close()
        assert wire.recv_into(room()) == 0


def test_after_its_deadline_a_wire_receives_nothing_until_it_is_answered() -> None:
    with wired() as (wire, theirs, clock):
        theirs.sendall(b"hello")
        wire.answer_by = clock.now + 1
        assert wire.recv_into(room(1)) == 1
        clock.now += 1
        for _ in range(2):
            with pytest.raises(TimeoutError, match="no answer in time"):
                wire.recv_into(room())
        wire.answered()
        assert wire.recv_into(room()) == 4


def test_a_wait_ends_at_the_deadline_though_the_wire_may_wait_longer() -> None:
    with wired() as (wire, _, clock):
        wire.answer_by = clock.now + 0.02
        with pytest.raises(TimeoutError):
            wire.recv_into(room())


def test_an_aborted_wire_is_at_its_end_and_may_be_aborted_again() -> None:
    with wired() as (wire, theirs, _):
        wire.abort()
        assert wire.recv_into(room()) == 0
        assert theirs.recv(1) == b""
        wire.close()
        wire.abort()


def test_a_tls_wire_takes_over_the_deadline_and_waits_no_longer_for_a_handshake() -> None:
    ours, theirs = socket.socketpair()
    clock = Clock()
    with theirs, Wire(ours, 0.02, clock) as plain:
        plain.answer_by = clock.now + 1
        with plain.secured(ssl.create_default_context(), "host") as wire:
            assert isinstance(wire, TlsWire)
            assert (wire.answer_by, wire.stall_seconds, wire.clock) == (clock.now + 1, 0.02, clock)
            clock.now += 1
            with pytest.raises(TimeoutError, match="no answer in time"):
                wire.handshake()
            wire.answer_by = None
            with pytest.raises(TimeoutError):
                wire.handshake()
            inner = wire.secured(ssl.create_default_context(), "host")
            assert (inner.answer_by, inner.stall_seconds) == (None, 0.02)


@pytest.mark.parametrize("nested", [False, True], ids=["tls", "tls in tls"])
def test_bytes_pass_both_ways_over_tls_and_a_wait_for_more_ends(tmp_path: Path, nested: bool) -> None:
    served = Tls().context(tmp_path / "ca.pem")

    def echo(connection: socket.socket, _: int) -> None:
        with served.wrap_socket(connection, server_side=True) as encrypted:
            while data := encrypted.recv(4096):
                encrypted.sendall(data)

    def lead(connection: socket.socket, _: int) -> None:
        with (
            served.wrap_socket(connection, server_side=True) as outer,
            socket.create_connection(place_of(server)) as origin,
        ):
            pass_on(outer, origin)

    trusting = Authorities(str(tmp_path / "ca.pem")).context()
    with Scripted(echo) as server, Scripted(lead) as proxy, ExitStack() as opened:
        connected = socket.create_connection(place_of(proxy if nested else server))
        wire = opened.enter_context(Wire(connected, PATIENCE_SECONDS))
        for _ in range(2 if nested else 1):
            wire = opened.enter_context(wire.secured(trusting, "127.0.0.1"))
            wire.handshake()
        for said in (b"hello", b"again"):
            wire.sendall(said)
            view = room()
            assert (wire.recv_into(view), bytes(view[:5])) == (5, said)
            assert wire.sock.gettimeout() == PATIENCE_SECONDS
        wire.answer_by = time.monotonic() + 0.05
        with pytest.raises(TimeoutError):
            wire.recv_into(room())


def place_of(server: Scripted) -> tuple[str, int]:
    parts = urlsplit(server.url)
    return parts.hostname or "", parts.port or 0
