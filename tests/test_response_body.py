"""The body of a response: its rate, an end that comes too early, and bytes after the expected end."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Unavailable
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection, Origin
from cachd.sources.http1 import Request
from cachd.sources.response import SLOWEST_BYTES_PER_SECOND, Response
from cachd.sources.routes import Dialled
from cachd.sources.wire import Wire
from tests.fetching import PATIENCE_SECONDS
from tests.ground.raw import chunked

STALL_SECONDS = 10.0
CHUNKED = "Transfer-Encoding: chunked"


class Clock:
    """Each look at it takes `step` seconds."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 1000.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


@contextmanager
def answered(
    line: str, sent: bytes, clock: Clock | None = None, pool: dict[Origin, Connection] | None = None
) -> Iterator[Response]:
    """The response with this header line, whose connection ends after these bytes."""
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, PATIENCE_SECONDS) as wire:
        theirs.sendall(f"HTTP/1.1 200 OK\r\n{line}\r\n\r\n".encode() + sent)
        url = urlsplit("http://host/x?signature")
        connection = Connection(("http", "host", 80), None, stall_seconds=PATIENCE_SECONDS)
        connection.take({} if pool is None else pool)
        head, body = connection.exchange(Request("GET", url, {}), lambda: Dialled(wire, ()))
        theirs.shutdown(socket.SHUT_WR)
        clock = clock or Clock()
        with Response(head, body, connection, url, stall_seconds=STALL_SECONDS, clock=clock) as response:
            yield response


def read(response: Response, size: int) -> int:
    return response.readinto(memoryview(bytearray(size)))


def refusal(response: Response, size: int) -> CachdError:
    with pytest.raises(CachdError) as refused:
        read(response, size)
    return refused.value


def test_a_response_says_its_url_without_its_query_and_its_size() -> None:
    with answered("Content-Length: 5", b"hello") as response:
        assert (response.url, response.size, response.file_size) == ("http://host/x", 5, 5)
        assert (response.size_is_unstated, response.is_partial) == (False, False)
    with answered(CHUNKED, chunked(b"hello")) as response:
        assert (response.size, response.file_size, response.size_is_unstated) == (None, None, True)


def test_bytes_before_an_early_end_are_given_and_then_the_end_is_an_error() -> None:
    with answered("Content-Length: 10", b"hello") as response:
        assert read(response, 10) == 5
        for _ in range(2):
            error = refusal(response, 5)
            assert (error.code, "after 5 of 10 bytes" in error.detail) == ("ended_early", True)
    with answered("Content-Length: 10", b"hello") as response:
        assert read(response, 5) == 5
        assert refusal(response, 5).code == "ended_early"


@pytest.mark.parametrize(("sent", "code"), [(b"hello, and more", "origin_protocol"), (b"hello", "")])
def test_bytes_after_the_expected_end_are_an_error_at_once(sent: bytes, code: str) -> None:
    with answered(CHUNKED, chunked(sent)) as response:
        response.expect(Extent(0, 5), asked=Extent(0, 5))
        if code:
            assert refusal(response, 5).code == code
        else:
            assert (read(response, 9), read(response, 9)) == (5, 0)


def test_what_was_not_asked_for_is_dropped_before_and_left_unread_after() -> None:
    pool: dict[Origin, Connection] = {}
    with answered("Content-Length: 10", b"0123456789", pool=pool) as response:
        response.expect(Extent(0, 10), asked=Extent(3, 6))
        view = memoryview(bytearray(9))
        assert (response.readinto(view), bytes(view[:3])) == (3, b"345")
        assert read(response, 9) == 0
    assert pool == {}, "the rest is still on its way"
    with answered("Content-Length: 10", b"0123456789", pool=pool) as response:
        response.expect(Extent(0, 10), asked=Extent(3, 10))
        assert read(response, 9) == 7
    assert len(pool) == 1


@pytest.mark.parametrize(("size", "is_closed"), [(4, True), (5, False)])
def test_a_body_that_was_not_read_to_its_end_closes_the_socket_at_once(size: int, *, is_closed: bool) -> None:
    with answered("Content-Length: 5", b"hello") as response:
        assert read(response, size) == size
        before = len(os.listdir("/proc/self/fd"))
        response.close()
        assert len(os.listdir("/proc/self/fd")) == before - is_closed


def test_a_connection_that_ends_before_the_first_byte_that_was_asked_for_ended_early() -> None:
    with answered("Content-Length: 10", b"012") as response:
        response.expect(Extent(0, 10), asked=Extent(5, 10))
        assert "before its first byte" in refusal(response, 9).detail


def test_a_body_that_has_less_than_was_asked_for_says_so_at_its_end() -> None:
    with answered("Content-Length: 5", b"hello") as response:
        response.expect(Extent(0, 5), asked=Extent(0, 9))
        assert read(response, 9) == 5
        error = refusal(response, 9)
        assert isinstance(error, Unavailable)
        assert (error.code, error.retry_after) == ("ended_early", 0.0)


@pytest.mark.parametrize(
    ("step", "size", "is_slow"),
    [
        (STALL_SECONDS, int(SLOWEST_BYTES_PER_SECOND * STALL_SECONDS), False),
        (STALL_SECONDS, int(SLOWEST_BYTES_PER_SECOND * STALL_SECONDS) - 1, True),
        (STALL_SECONDS - 0.01, 5, False),
        (STALL_SECONDS, 5, True),
    ],
)
def test_a_window_must_bring_so_many_bytes_a_second(step: float, size: int, is_slow: bool) -> None:
    with answered(f"Content-Length: {size}", bytes(size), Clock(step)) as response:
        if is_slow:
            assert refusal(response, size).code == "too_slow"
        else:
            assert read(response, size) == size


def test_each_window_counts_its_own_bytes() -> None:
    enough = int(SLOWEST_BYTES_PER_SECOND * STALL_SECONDS)
    with answered(f"Content-Length: {enough + 5}", bytes(enough + 5), Clock(STALL_SECONDS)) as response:
        assert read(response, enough) == enough
        assert refusal(response, 5).code == "too_slow"


def test_the_time_that_the_caller_takes_does_not_count() -> None:
    clock = Clock()
    with answered("Content-Length: 10", bytes(10), clock) as response:
        clock.now += 1000
        assert read(response, 5) == 5
        clock.now += 1000
        assert read(response, 5) == 5


def test_the_content_is_complete_or_too_large() -> None:
    for line, sent in (("Content-Length: 5", b"hello"), (CHUNKED, chunked(b"hello"))):
        token = CancelToken()
        with answered(line, sent) as response:
            assert response.content(token, at_most=5) == b"hello"
            assert token.answered == 1
        with answered(line, sent) as response, pytest.raises(CachdError) as refused:
            response.content(token, at_most=4)
        assert refused.value.code == "document_too_large"
