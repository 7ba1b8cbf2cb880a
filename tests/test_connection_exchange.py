"""A connection dials at its first request, names its host, is kept in a pool, and can be aborted."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from urllib.parse import urlsplit

import pytest

from cachd.sources.connection import MAX_KEPT, Connection, Origin, origin_of
from cachd.sources.http1 import Request
from cachd.sources.routes import Dialled
from cachd.sources.wire import Wire
from tests.fetching import PATIENCE_SECONDS
from tests.ground.scripted import OK

GET = Request("GET", urlsplit("http://host/x"), {})
HOST: Origin = ("http", "host", 80)
BROKEN = (OSError, HTTPException)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def connection(origin: Origin = HOST, clock: Clock | None = None) -> Connection:
    return Connection(origin, None, stall_seconds=PATIENCE_SECONDS, clock=clock or Clock())


@contextmanager
def peer(clock: Clock | None = None) -> Iterator[tuple[socket.socket, Callable[[], Dialled]]]:
    """The end of a server, and a dial that gives the wire to it."""
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, PATIENCE_SECONDS, clock or Clock()) as wire:
        yield theirs, lambda: Dialled(wire, ("10.0.0.1",), "http://proxy:3128")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://host/x", ("http", "host", 80)),
        ("https://HOST/x", ("https", "host", 443)),
        ("http://host:443", ("http", "host", 443)),
        ("https://u:p@host:80?q", ("https", "host", 80)),
        ("https://[::1]/", ("https", "::1", 443)),
        ("https:///x", ("https", "", 443)),
    ],
)
def test_an_origin_is_a_scheme_a_host_and_a_port(url: str, origin: Origin) -> None:
    assert origin_of(urlsplit(url)) == origin


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (("http", "host", 80), "host"),
        (("http", "host", 443), "host:443"),
        (("https", "host", 443), "host"),
        (("https", "host", 80), "host:80"),
        (("http", "::1", 80), "[::1]"),
        (("https", "::1", 8443), "[::1]:8443"),
    ],
)
def test_a_request_names_the_host_and_a_port_that_is_not_the_usual_one(origin: Origin, host: str) -> None:
    with peer() as (theirs, dial):
        theirs.sendall(OK)
        connection(origin).exchange(GET, dial)
        assert theirs.recv(999) == f"GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()


def test_a_connection_is_dialled_once_and_then_knows_where_it_leads() -> None:
    dialled = 0
    with peer() as (theirs, dial):

        def counted() -> Dialled:
            nonlocal dialled
            dialled += 1
            return dial()

        one = connection()
        assert (one.addresses, one.proxy, one.wire) == ((), "", None)
        for _ in range(2):
            theirs.sendall(OK)
            head, body = one.exchange(GET, counted)
            assert (head.status, body.length) == (200, 2)
            assert body.readinto(memoryview(bytearray(2))) == 2
        assert dialled == 1
        assert (one.addresses, one.proxy, one.wire) == (("10.0.0.1",), "http://proxy:3128", dial().wire)


@pytest.mark.parametrize("taken", [PATIENCE_SECONDS - 1, PATIENCE_SECONDS])
def test_an_answer_has_a_deadline_from_its_request_on_and_its_body_has_none(taken: float) -> None:
    clock = Clock()
    with peer(clock) as (theirs, dial):

        def slow() -> Dialled:
            clock.now += taken
            return dial()

        theirs.sendall(OK)
        one = connection(clock=clock)
        if taken < PATIENCE_SECONDS:
            one.exchange(GET, slow)
            assert dial().wire.answer_by is None
        else:
            with pytest.raises(TimeoutError):
                one.exchange(GET, slow)


def test_an_abort_ends_the_wait_for_an_answer() -> None:
    with peer() as (theirs, dial), ThreadPoolExecutor(1) as pool:
        one = connection()
        waiting = pool.submit(one.exchange, GET, dial)
        assert theirs.recv(999).startswith(b"GET")
        one.abort()
        with pytest.raises(BROKEN):
            waiting.result(PATIENCE_SECONDS / 2)


def test_a_connection_that_was_aborted_before_it_was_dialled_sends_nothing() -> None:
    with peer() as (theirs, dial):
        theirs.sendall(OK)
        one = connection()
        one.abort()
        with pytest.raises(BROKEN):
            one.exchange(GET, dial)
        assert theirs.recv(1) == b""


def test_a_closed_connection_is_closed_for_its_peer_too() -> None:
    connection().close()  # there is nothing to close yet
    with peer() as (theirs, dial):
        theirs.sendall(OK)
        one = connection()
        one.exchange(GET, dial)
        one.close()
        assert theirs.recv(999)
        assert theirs.recv(1) == b""


def test_a_pool_keeps_a_few_connections_and_closes_the_one_that_is_idle_longest() -> None:
    pool: dict[Origin, Connection] = {}
    with peer() as (theirs, dial):
        oldest = connection()
        theirs.sendall(OK)
        oldest.exchange(GET, dial)
        assert theirs.recv(999)
        kept = [oldest, *(connection(("http", f"host-{number}", 80)) for number in range(MAX_KEPT - 1))]
        for each in kept:
            each.take(pool)
            assert each not in pool.values()
            each.keep()
        assert list(pool.values()) == kept
        one_more = connection(("https", "host", 443))
        one_more.take(pool)
        one_more.keep()
        assert list(pool.values()) == [*kept[1:], one_more]
        assert theirs.recv(1) == b"", "it is closed"
