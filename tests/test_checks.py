"""Whether a response is the one that was asked for, by its status and its headers alone."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Changed, Forbidden, NotFound, Unavailable
from cachd.model import Extent
from cachd.sources.checks import UnknownRange, announced, check_encoding, check_status, check_validator
from cachd.sources.connection import Connection
from cachd.sources.http1 import Request
from cachd.sources.response import Response
from cachd.sources.routes import Dialled
from cachd.sources.source import NoRanges
from cachd.sources.wire import Wire

PATIENCE_SECONDS = 60.0
URL, SHOWN = "http://me@host/x?signature", "http://host/x"
MIB = 1 << 20


@contextmanager
def answered(status: str, *lines: str) -> Iterator[Response]:
    """The response with this status and these header lines."""
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, PATIENCE_SECONDS) as wire:
        theirs.sendall("\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode())
        connection = Connection(("http", "host", 80), None, stall_seconds=PATIENCE_SECONDS)
        connection.take({})
        head, body = connection.exchange(Request("GET", urlsplit(URL), {}), lambda: Dialled(wire, ()))
        theirs.shutdown(socket.SHUT_WR)
        with Response(head, body, connection, urlsplit(URL), stall_seconds=PATIENCE_SECONDS) as response:
            yield response


# --- the status ---


@pytest.mark.parametrize("status", ["200 OK", "206 Partial Content"])
def test_a_success_passes(status: str) -> None:
    with answered(status, "Content-Length: 0") as response:
        check_status(response, URL)


STATUSES: dict[str, tuple[type[CachdError], str]] = {
    "401 Unauthorized": (Forbidden, "source_unauthorized"),
    "402 Payment Required": (Forbidden, "source_forbidden"),
    "403 Forbidden": (Forbidden, "source_forbidden"),
    "406 Not Acceptable": (Forbidden, "source_forbidden"),
    "451 Unavailable": (Forbidden, "source_forbidden"),
    "404 Not Found": (NotFound, "file_not_found"),
    "405 Method Not Allowed": (NotFound, "file_not_found"),
    "410 Gone": (NotFound, "file_not_found"),
    "412 Precondition Failed": (Changed, "changed"),
    "416 Range Not Satisfiable": (Changed, "changed"),
    "429 Too Many Requests": (Unavailable, "rate_limited"),
    "400 Bad Request": (Unavailable, "origin_failed"),
    "407 Proxy": (Unavailable, "origin_failed"),
    "411 Length Required": (Unavailable, "origin_failed"),
    "500 Oops": (Unavailable, "origin_failed"),
    "503 Busy": (Unavailable, "origin_failed"),
}


@pytest.mark.parametrize(("status", "expected"), STATUSES.items(), ids=STATUSES)
def test_every_other_status_is_an_error_of_its_kind(
    status: str, expected: tuple[type[CachdError], str]
) -> None:
    kind, code = expected
    with answered(status, "Content-Length: 0") as response, pytest.raises(kind) as refused:
        check_status(response, URL)
    error = refused.value
    assert (type(error), error.code) == (kind, code)
    number = int(status[:3])
    assert error.origin_status == number
    if kind is Changed:
        assert error.detail == f"{SHOWN}: the file has changed ({number})"
    else:
        assert error.detail == f"{SHOWN}: {status}"
    if kind in (Forbidden, NotFound):
        assert error.hint


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
def test_a_refusal_has_what_the_hub_says_about_it(status: str) -> None:
    for lines, said in ((["X-Error-Code: GatedRepo"], "GatedRepo"), ([], None)):
        with answered(status, "Content-Length: 0", *lines) as response, pytest.raises(Forbidden) as refused:
            check_status(response, URL)
        assert refused.value.hub_error == said


@pytest.mark.parametrize(
    ("lines", "wait", "told"),
    [
        ([], None, ""),
        (["Retry-After: 0"], 0.0, ""),
        (["Retry-After: 7"], 7.0, "; the origin asks for a pause of 7 s"),
        (["Retry-After: 3600"], 600.0, "; the origin asks for a pause of 3600 s"),
    ],
)
def test_a_pause_that_the_origin_asks_for_is_told_and_kept(
    lines: list[str], wait: float | None, told: str
) -> None:
    with (
        answered("503 Busy", "Content-Length: 0", *lines) as response,
        pytest.raises(Unavailable) as refused,
    ):
        check_status(response, URL)
    assert refused.value.retry_after == wait
    assert refused.value.detail == f"{SHOWN}: 503 Busy{told}"


def test_a_status_without_a_reason_is_told_as_it_is() -> None:
    with answered("404 ", "Content-Length: 0") as response, pytest.raises(NotFound) as refused:
        check_status(response, URL)
    assert refused.value.detail == f"{SHOWN}: 404"


# --- the encoding and the validator ---


@pytest.mark.parametrize(
    ("coding", "is_plain"),
    [
        (None, True),
        ("identity", True),
        ("UTF-8", True),
        ("aws-chunked", True),
        ("aws-chunked, identity", True),
        (",", True),
        ("gzip", False),
        ("aws-chunked,gzip", False),
        ("identity br", False),
    ],
)
def test_a_body_that_is_encoded_is_refused(coding: str | None, *, is_plain: bool) -> None:
    lines = [] if coding is None else [f"Content-Encoding: {coding}"]
    with answered("200 OK", "Content-Length: 0", *lines) as response:
        if is_plain:
            check_encoding(response, URL)
            return
        with pytest.raises(Unavailable) as refused:
            check_encoding(response, URL)
    assert refused.value.code == "content_encoded"
    assert refused.value.detail.startswith(f"{SHOWN}: Content-Encoding is {coding}, ")
    assert refused.value.hint


@pytest.mark.parametrize(
    ("stated", "expected", "has_changed"),
    [
        ('"one"', '"one"', False),
        ('"one"', '"two"', True),
        ('"one"', None, False),
        (None, '"one"', False),
        (None, None, False),
    ],
)
def test_another_validator_is_another_file(
    stated: str | None, expected: str | None, *, has_changed: bool
) -> None:
    lines = [f"ETag: {stated}"] if stated else []
    with answered("200 OK", "Content-Length: 0", *lines) as response:
        if not has_changed:
            check_validator(response, URL, expected)
            return
        with pytest.raises(Changed) as refused:
            check_validator(response, URL, expected)
    assert refused.value.detail.startswith(f"{SHOWN}: the file has changed")
    assert '"two" and is now "one"' in refused.value.detail


# --- the extent ---


def part(first: int, last: int, total: int | str, *more: str) -> list[str]:
    return [f"Content-Range: bytes {first}-{last}/{total}", *more]


COMPLETE, PARTIAL = "200 OK", "206 Partial Content"
SIZE = 3 * MIB
ASKED = Extent(2 * MIB, 2 * MIB + 100)
GIVEN: list[tuple[str, list[str], Extent, Extent]] = [
    (COMPLETE, [f"Content-Length: {SIZE}"], Extent(0, SIZE), Extent(0, SIZE)),
    (COMPLETE, ["Transfer-Encoding: chunked"], Extent(0, SIZE), Extent(0, SIZE)),
    (PARTIAL, part(ASKED.start, ASKED.stop - 1, SIZE), ASKED, ASKED),
    (PARTIAL, part(ASKED.start, ASKED.stop - 1, "*"), ASKED, ASKED),
    (PARTIAL, part(ASKED.start, ASKED.stop - 1, SIZE, "Content-Length: 100"), ASKED, ASKED),
    (PARTIAL, part(ASKED.start, ASKED.start, SIZE), ASKED, Extent(ASKED.start, ASKED.start + 1)),
    (PARTIAL, part(ASKED.start - 5, ASKED.stop + 4, SIZE), ASKED, Extent(ASKED.start - 5, ASKED.stop + 5)),
    (PARTIAL, part(MIB, SIZE - 1, SIZE), ASKED, Extent(MIB, SIZE)),
    (PARTIAL, part(0, 9, SIZE), Extent(0, 10), Extent(0, 10)),
    (PARTIAL, part(0, SIZE - 1, SIZE), Extent(0, SIZE), Extent(0, SIZE)),
    (PARTIAL, part(0, SIZE - 1, SIZE), Extent(MIB, SIZE), Extent(0, SIZE)),
]


@pytest.mark.parametrize(("status", "lines", "asked", "found"), GIVEN)
def test_the_headers_say_which_part_comes(
    status: str, lines: list[str], asked: Extent, found: Extent
) -> None:
    with answered(status, *lines) as response:
        assert announced(response, URL, SIZE, asked) == found


OTHERS: list[tuple[str, list[str], Extent, type[Exception], str]] = [
    (COMPLETE, [f"Content-Length: {SIZE}"], ASKED, NoRanges, URL),
    (COMPLETE, [f"Content-Length: {SIZE - 1}"], Extent(0, SIZE), Changed, "of no type where"),
    (COMPLETE, ["Content-Length: 9", "Content-Type: text/html"], Extent(0, SIZE), Changed, "9 bytes of text"),
    (PARTIAL, part(0, SIZE - 1, SIZE), ASKED, NoRanges, URL),
    (PARTIAL, ["Content-Type: Multipart/Byteranges; boundary=x"], ASKED, NoRanges, URL),
    (PARTIAL, [], ASKED, UnknownRange, URL),
    (PARTIAL, ["Content-Type: text/plain"], ASKED, UnknownRange, URL),
    (PARTIAL, [], Extent(0, SIZE), Unavailable, "Content-Range is none, not bytes 0-"),
    (PARTIAL, part(ASKED.start + 1, ASKED.stop - 1, SIZE), ASKED, Unavailable, "Content-Range is bytes"),
    (PARTIAL, part(ASKED.start - 9, ASKED.start - 1, SIZE), ASKED, Unavailable, "Content-Range is bytes"),
    (PARTIAL, part(MIB - 1, SIZE - 1, SIZE), ASKED, Unavailable, f"/{SIZE}"),
    (PARTIAL, part(ASKED.start, SIZE, "*"), ASKED, Unavailable, f"not bytes {ASKED.start}-{ASKED.stop - 1}/"),
    (PARTIAL, part(ASKED.start, ASKED.stop - 1, SIZE + 1), ASKED, Unavailable, "Content-Range is bytes"),
    (
        PARTIAL,
        part(ASKED.start, ASKED.stop - 1, SIZE, "Content-Length: 99"),
        ASKED,
        Unavailable,
        "Content-Length is 99, not 100",
    ),
]


@pytest.mark.parametrize(("status", "lines", "asked", "kind", "told"), OTHERS)
def test_what_was_not_asked_for_is_refused(
    status: str, lines: list[str], asked: Extent, kind: type[Exception], told: str
) -> None:
    with answered(status, *lines) as response, pytest.raises(kind) as refused:
        announced(response, URL, SIZE, asked)
    assert type(refused.value) is kind
    assert told in str(refused.value)
    if isinstance(refused.value, Unavailable):
        assert refused.value.code == "origin_protocol"
