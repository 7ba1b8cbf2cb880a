"""The head of a response is parsed as RFC 9112 says; what httptools would let pass is refused, too."""

from __future__ import annotations

import socket
from http.client import HTTPException

import pytest

from cachd.sources.http1 import FramedBody, Head, ReceiveBuffer, receive_head
from cachd.sources.wire import Wire
from tests.fetching import PATIENCE_SECONDS


def head_of(sent: bytes) -> Head:
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, PATIENCE_SECONDS) as wire:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        return receive_head(ReceiveBuffer(wire))


def test_a_head_is_its_status_its_reason_and_its_headers() -> None:
    head = head_of(b'HTTP/1.1 206 Partial Content\r\nContent-Length:  5 \r\nETag: "x"\r\n\r\n')
    assert (head.status, head.reason, head.stays_open) == (206, "Partial Content", True)
    assert head.headers.items() == [("content-length", "5"), ("etag", '"x"')]
    assert (head.headers.get("CONTENT-length"), head.headers.get("Date")) == ("5", None)


@pytest.mark.parametrize("second", ["Via", "via"])
def test_repeated_headers_are_joined_in_their_order(second: str) -> None:
    head = head_of(f"HTTP/1.1 200 OK\r\nVia: a\r\nX: y\r\n{second}: b\r\n\r\n".encode())
    assert head.headers.items() == [("via", "a, b"), ("x", "y")]


def test_lines_may_be_folded_and_end_with_a_line_feed() -> None:
    assert head_of(b"HTTP/1.1 200 OK\nX: y\n\t z\nVia: a\r\n\n").headers.items() == [
        ("x", "y z"),
        ("via", "a"),
    ]


@pytest.mark.parametrize(
    "sent",
    [
        b"RTSP/1.0 200 OK\r\n\r\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 099 OK\r\n\r\n",
        b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n folded: before any\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX : y\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5, 6\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: +5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 101 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (32 << 10) + b"\r\n\r\n",
    ],
)
def test_a_malformed_head_is_refused(sent: bytes) -> None:
    with pytest.raises(HTTPException):
        head_of(sent)


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 5\r\nContent-Length: 5",
        b"content-length:5\r\nX: y\r\nCONTENT-LENGTH: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: 5,5\nContent-Length:\t5",
    ],
)
def test_a_length_that_is_repeated_is_one_length(lines: bytes) -> None:
    head = head_of(b"HTTP/1.1 200 OK\r\n" + lines + b"\r\nETag: a\r\netag: a\r\n\r\n")
    assert (head.headers.get("Content-Length"), head.headers.get("ETag")) == ("5", "a")


@pytest.mark.parametrize("coding", ["gzip", "gzip, chunked", "chunked, gzip", "br"])
def test_a_transfer_coding_that_was_not_asked_for_is_refused(coding: str) -> None:
    head = head_of(f"HTTP/1.1 200 OK\r\nTransfer-Encoding: {coding}\r\n\r\n".encode())
    received = ReceiveBuffer(Wire(socket.socket(), 1.0))
    with received.wire:
        assert FramedBody(received, head, "HEAD").length == 0
        with pytest.raises(HTTPException):
            FramedBody(received, head, "GET")
