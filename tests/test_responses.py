"""What a response says about its body and its file, and how much of it is read."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from cachd.errors import Invalid
from cachd.sources.cancel import CancelToken
from cachd.sources.http1 import Request
from cachd.sources.response import content_range
from tests.fetching import http, refused
from tests.ground.raw import RawServer, chunked, reply

Stated = tuple[int, int, int | None]


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes 0-9/10", (0, 9, 10)),
        ("bytes 3-3/*", (3, 3, None)),
        ("BYTES=0 - 9 / 10", (0, 9, 10)),
        ("bytes 9-8/10", None),
        ("bytes 0-10/10", None),
        ("bytes 0-9/9", None),
        ("bytes */10", None),
        ("bytes 0-9", None),
        ("items 0-9/10", None),
        (f"bytes 0-{'9' * 19}/*", None),
        ("", None),
        (None, None),
    ],
)
def test_a_range_is_known_by_numbers_that_agree(header: str | None, found: Stated | None) -> None:
    assert content_range(header) == found


@pytest.mark.parametrize(
    ("status", "lines", "length", "is_partial", "file_size"),
    [
        (200, [], 2, False, 2),
        (200, [], None, False, None),
        (206, ["Content-Range: bytes 0-1/10"], 2, True, 10),
        (206, ["Content-Range: bytes 0-1/*"], 2, True, None),
        (206, [], 2, True, None),
        (200, ["Content-Range: bytes 0-1/10"], 2, True, 10),
        (200, ["Content-Range: bytes 1-2/10"], 2, True, 10),
        (200, ["Content-Range: bytes 0-2/10"], 2, False, 2),
        (200, ["Content-Range: bytes 0-1/2"], 2, False, 2),
        (200, ["Content-Range: bytes 0-1/*"], 2, False, 2),
        (404, ["Content-Range: bytes 0-1/10"], 2, False, 2),
    ],
)
def test_a_body_is_a_part_by_its_status_or_by_headers_that_agree(
    status: int, lines: list[str], length: int | None, is_partial: bool, file_size: int | None
) -> None:
    def answer(asked: object) -> bytes:
        closes = [] if length is not None else ["Connection: close"]
        return reply(asked, f"{status} X", *lines, *closes, body=b"ok", length=length)  # type: ignore[arg-type]

    with RawServer(answer) as server, http().get(f"{server.url}/x?y", CancelToken()) as response:
        assert (response.is_partial, response.file_size, response.size) == (is_partial, file_size, length)
        assert response.size_is_unstated == (length is None)
        assert (response.status, response.url) == (status, f"{server.url}/x")


@pytest.mark.parametrize("framing", ["Content-Length", "chunked"])
def test_a_body_is_read_up_to_its_limit(framing: str) -> None:
    content = bytes(100_000)

    def answer(asked: object) -> bytes:
        if framing == "chunked":
            head = reply(asked, "200 OK", "Transfer-Encoding: chunked", length=None)  # type: ignore[arg-type]
            return head + chunked(content)
        return reply(asked, body=content)  # type: ignore[arg-type]

    with RawServer(answer) as server:
        over, url = http(), f"{server.url}/x"
        assert over.read(url, CancelToken(), at_most=100_000) == content
        for at_most in (99_999, 0):
            error = refused(
                lambda most=at_most: over.read(url, CancelToken(), at_most=most), "document_too_large"
            )
            assert isinstance(error, Invalid)
            known = "has 100000 bytes" if framing == "Content-Length" else f"has more than {at_most} bytes"
            assert known in error.detail


def test_a_read_counts_each_block_that_arrives() -> None:
    token = CancelToken()
    with RawServer(lambda asked: reply(asked, body=bytes(200_000))) as server:
        http().read(f"{server.url}/x", token, at_most=200_000)
    assert token.answered == 1 + 4, "the head, and blocks of 64 KiB"


@pytest.mark.parametrize(("status", "connections"), [(200, [1, 1]), (404, [1, 1]), (421, [1, 2])])
def test_a_connection_to_a_server_that_does_not_serve_the_origin_is_not_used_again(
    status: int, connections: list[int]
) -> None:
    with RawServer(lambda asked: reply(asked, f"{status} X", body=b"ok")) as server:
        over = http()
        for _ in range(2):
            asked = Request("GET", urlsplit(f"{server.url}/x"), {})
            with over.relay(asked, CancelToken()) as response:
                assert response.content(CancelToken(), at_most=2) == b"ok"
        assert [asked.connection for asked in server.asked] == connections


def test_an_answer_that_was_not_read_to_its_end_closes_its_connection() -> None:
    with RawServer(lambda asked: reply(asked, body=b"ok")) as server:
        over = http()
        for _ in range(2):
            with over.get(f"{server.url}/x", CancelToken()) as response:
                assert response.readinto(memoryview(bytearray(1))) == 1
        assert [asked.connection for asked in server.asked] == [1, 2]
