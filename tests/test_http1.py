"""The head of a response is parsed as RFC 9112 says; what httptools would let pass is refused, too."""

from __future__ import annotations

import socket
from http.client import HTTPException
from urllib.parse import urlsplit

import pytest

from cachd.sources.http1 import FramedBody, Head, ReceiveBuffer, Request, number, receive_head
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


@pytest.mark.parametrize(("interim", "lines"), [(20, 100), (21, 1), (1, 101)])
def test_so_many_interim_answers_and_header_lines_are_read_and_no_more(interim: int, lines: int) -> None:
    sent = b"HTTP/1.1 100 Continue\r\n\r\n" * interim + b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * lines + b"\r\n"
    if (interim, lines) == (20, 100):
        head = head_of(sent)
        assert (head.status, head.headers.get("X")) == (200, "y")
    else:
        with pytest.raises(HTTPException):
            head_of(sent)


@pytest.mark.parametrize(
    ("version", "connection", "stays_open"),
    [
        ("1.1", "", True),
        ("1.1", "Close", False),
        ("1.1", "keep-alive", True),
        ("1.0", "", False),
        ("1.0", "Keep-Alive", True),
        ("1.0", "close", False),
    ],
)
def test_a_connection_stays_open_as_its_version_and_its_header_say(
    version: str, connection: str, stays_open: bool
) -> None:
    line = f"Connection: {connection}\r\n" if connection else ""
    assert head_of(f"HTTP/{version} 200 OK\r\n{line}\r\n".encode()).stays_open is stays_open


@pytest.mark.parametrize(
    ("sent", "why"),
    [(b"", "closed without a response"), (b"HTTP/1.1 200 OK\r\n", "closed within the head")],
)
def test_an_end_before_or_within_a_head_is_told_apart(sent: bytes, why: str) -> None:
    with pytest.raises((HTTPException, ConnectionError), match=why):
        head_of(sent)


def body_of(lines: str, sent: bytes, *, method: str = "GET", status: int = 200) -> tuple[FramedBody, bytes]:
    """The body after a head with these lines, and its bytes: up to `length`, or to its end."""
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, PATIENCE_SECONDS) as wire:
        theirs.sendall(f"HTTP/1.1 {status} OK\r\n{lines}\r\n".encode())
        received = ReceiveBuffer(wire)
        body = FramedBody(received, receive_head(received), method)
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        content, buffer = b"", memoryview(bytearray(64))
        left = 1 << 30 if body.length is None else body.length
        while left and (count := body.readinto(buffer[:left])):
            content, left = content + bytes(buffer[:count]), left - count
        return body, content


CHUNKED = "Transfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("lines", "sent", "content", "length", "stated"),
    [
        ("Content-Length: 5\r\n", b"hello, and more", b"hello", 5, "5"),
        ("Content-Length: 0\r\n", b"", b"", 0, "0"),
        ("", b"hello", b"hello", None, None),
        (CHUNKED, b"5\r\nhello\r\n0\r\n\r\n", b"hello", None, None),
        (CHUNKED, b"0\r\n\r\n", b"", None, None),
        (CHUNKED, b"10\r\n0123456789abcdef\r\n0\r\n\r\n", b"0123456789abcdef", None, None),
        (CHUNKED, b"A;x=y\n0123456789\n1\r\nx\r\n00\r\nT: x\r\nU: y\r\n\r\n", b"0123456789x", None, None),
        (CHUNKED + "Content-Length: 9\r\n", b"5\r\nhello\r\n0\r\n\r\n", b"hello", None, None),
    ],
)
def test_a_body_ends_where_its_framing_says(
    lines: str, sent: bytes, content: bytes, length: int | None, stated: str | None
) -> None:
    body, found = body_of(lines, sent)
    assert (found, body.length, body.stated_length) == (content, length, stated)


@pytest.mark.parametrize(
    ("lines", "sent", "is_over"),
    [
        ("Content-Length: 5\r\n", b"hello", True),
        ("Content-Length: 5\r\nConnection: close\r\n", b"hello", False),
        ("", b"hello", False),
        (CHUNKED, b"0\r\n\r\n", True),
        (CHUNKED + "Connection: close\r\n", b"0\r\n\r\n", False),
        (CHUNKED + "Content-Length: 0\r\n", b"0\r\n\r\n", False),
        (CHUNKED, b"0\r\n\r\nmore", False),
    ],
)
def test_a_connection_takes_the_next_request_if_its_body_ended_beyond_doubt(
    lines: str, sent: bytes, is_over: bool
) -> None:
    assert body_of(lines, sent)[0].is_over is is_over


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_an_answer_without_a_body_has_none_whatever_its_headers_say(method: str, status: int) -> None:
    for lines, stated in (("Content-Length: 5\r\n", "5"), (CHUNKED, None)):
        body, content = body_of(lines, b"", method=method, status=status)
        assert (body.length, content, body.stated_length) == (0, b"", stated)


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"5\r\nhel", "closed within a chunk"),
        (b"5\r\nhello!\r\n0\r\n\r\n", "longer than its stated size"),
        (b"x\r\n", "malformed chunk size"),
        (b"\r\n", "malformed chunk size"),
        (b"1" * 16 + b"\r\n", "malformed chunk size"),
        (b"1;" + b"x" * 1023 + b"\r\nx\r\n0\r\n\r\n", "malformed chunk size"),
        (b"1\r\nx\r\n" * 10_200 + b"0\r\n\r\n", r"\d+ chunks for \d+ bytes"),
        (b"0\r\n" + b"T: x\r\n" * 101 + b"\r\n", "the trailers have at least 101 lines"),
        (b"0\r\n" + (b"T: " + b"x" * 995 + b"\r\n") * 66 + b"\r\n", "the trailers have at least"),
    ],
)
def test_chunks_that_break_their_framing_are_refused(sent: bytes, why: str) -> None:
    with pytest.raises(HTTPException, match=why):
        body_of(CHUNKED, sent)


def test_long_lines_many_small_chunks_and_trailers_are_read_up_to_their_limits() -> None:
    assert body_of(CHUNKED, b"1;" + b"x" * 1020 + b"\r\nx\r\n0\r\n\r\n")[1] == b"x"
    assert body_of(CHUNKED, b"1\r\nx\r\n" * 10_000 + b"0\r\n\r\n")[1] == b"x" * 10_000
    assert body_of(CHUNKED, b"0\r\n" + b"T: x\r\n" * 100 + b"\r\n")[0].is_over


@pytest.mark.parametrize(
    ("text", "found"),
    [("5", 5), ("0", 0), ("", None), (None, None), ("-1", None), ("1" * 19, None), ("1" * 18, int("1" * 18))],
)
def test_a_number_is_of_decimal_digits(text: str | None, found: int | None) -> None:
    assert number(text) == found


def test_a_request_has_its_host_its_headers_and_its_body() -> None:
    asked = Request("POST", urlsplit("http://host/a?b=c#d"), {"A": "b"}, b"body")
    assert asked.as_bytes("host:1") == b"POST /a?b=c HTTP/1.1\r\nHost: host:1\r\nA: b\r\n\r\nbody"
    assert Request("GET", urlsplit("http://host"), {}).as_bytes("h") == b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"
    for text in ("a\nb", "a\rb", "a\0b", "a\x7fb"):
        with pytest.raises(ValueError, match="control character"):
            Request("GET", urlsplit("http://host"), {"A": text}).as_bytes("h")
    assert b"A: a\tb" in Request("GET", urlsplit("http://host"), {"A": "a\tb"}).as_bytes("h")
