"""What an origin says about a file, by HEAD or, where that is wrong or missing, by GET."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachd.errors import CachdError
from cachd.sources.cancel import CancelToken
from cachd.sources.probe import FileFacts, Probe
from cachd.sources.secrets import Secrets
from tests.fetching import http, refused
from tests.ground.raw import Asked, RawServer, chunked, ranged, reply

CONTENT = b"content"
SECRETS = Secrets({"X-Key": "x"})
Answer = Callable[[Asked], bytes]


def whole(asked: Asked) -> bytes:
    return reply(asked, "200 OK", 'ETag: "one"', body=CONTENT)


def part(asked: Asked) -> bytes:
    return ranged(asked, CONTENT, 'ETag: "one"')


def probed(
    head: Answer, get: Answer, *, may_be_empty: bool = False
) -> tuple[FileFacts | str, list[str], bool]:
    """What is found, or the code of its error; the requests; and whether the origin is asked by GET later."""

    def answer(asked: Asked) -> bytes:
        return head(asked) if asked.method == "HEAD" else get(asked)

    with RawServer(answer) as server:
        probe, url = Probe(http()), f"{server.url}/x"
        found: FileFacts | str
        try:
            found = probe.ask(url, CancelToken(), SECRETS, may_be_empty=may_be_empty)
        except CachdError as error:
            found = error.code
        assert all(asked.headers["x-key"] == "x" for asked in server.asked)
        methods = [asked.method + " part" * ("range" in asked.headers) for asked in server.asked]
        return found, methods, probe.doubts(url)


def sized(size: int | None) -> Answer:
    return lambda asked: reply(asked, length=size)


def status(code: int) -> Answer:
    return lambda asked: reply(asked, f"{code} X")


def test_a_head_that_states_a_size_is_enough() -> None:
    found, methods, doubts = probed(whole, whole)
    assert isinstance(found, FileFacts)
    assert (found.size, found.validator, found.begin) == (7, '"one"', b"")
    assert found.headers.get("ETag") == '"one"'
    assert (methods, doubts) == (["HEAD"], False)


@pytest.mark.parametrize("head", [sized(0), sized(None), status(500), status(403), status(404), status(412)])
def test_a_head_that_states_no_size_or_fails_is_followed_by_a_get(head: Answer) -> None:
    for get in (whole, part):
        found, methods, doubts = probed(head, get)
        assert isinstance(found, FileFacts)
        assert (found.size, found.validator, found.begin) == (7, '"one"', b"c")
        assert (methods, doubts) == (["HEAD", "GET part"], True)


@pytest.mark.parametrize("code", [401, 429, 503])
def test_a_refusal_that_is_not_about_head_is_the_answer(code: int) -> None:
    found, methods, _ = probed(status(code), whole)
    assert found in ("source_unauthorized", "rate_limited", "origin_failed")
    assert methods == ["HEAD"]


def test_an_empty_file_is_one_by_head_if_its_digest_says_so_and_by_get_else() -> None:
    found, methods, doubts = probed(sized(0), sized(0), may_be_empty=True)
    assert isinstance(found, FileFacts)
    assert (found.size, methods, doubts) == (0, ["HEAD"], False)
    found, methods, doubts = probed(sized(0), sized(0))
    assert isinstance(found, FileFacts)
    assert (found.size, found.begin, methods, doubts) == (0, b"", ["HEAD", "GET part"], False)


@pytest.mark.parametrize("code", [400, 405, 416, 500, 501])
def test_a_server_that_does_not_understand_a_range_is_asked_for_the_file(code: int) -> None:
    found, methods, _ = probed(
        status(404), lambda asked: reply(asked, f"{code} X") if "range" in asked.headers else whole(asked)
    )
    assert isinstance(found, FileFacts)
    assert (found.size, found.begin, methods) == (7, b"c", ["HEAD", "GET part", "GET"])


def test_a_part_of_a_file_of_one_byte_may_be_the_begin_of_a_longer_one() -> None:
    def get(asked: Asked) -> bytes:
        if "range" in asked.headers:
            return reply(asked, "206 X", "Content-Range: bytes 0-0/1", body=b"c")
        return whole(asked)

    found, methods, _ = probed(status(404), get)
    assert isinstance(found, FileFacts)
    assert (found.size, methods) == (7, ["HEAD", "GET part", "GET"])


@pytest.mark.parametrize("in_part", [True, False])
def test_a_get_is_refused_by_its_status_and_by_a_coding(in_part: bool) -> None:
    def get(bad: Answer) -> Answer:
        return lambda asked: bad(asked) if ("range" in asked.headers) is in_part else reply(asked, "400 X")

    assert probed(status(404), get(status(403)))[0] == "source_forbidden"
    coded = get(lambda asked: reply(asked, "200 OK", "Content-Encoding: gzip", body=CONTENT))
    assert probed(status(404), coded)[0] == "content_encoded"


def test_a_body_in_chunks_is_counted() -> None:
    def get(asked: Asked) -> bytes:
        return reply(asked, "200 OK", "Transfer-Encoding: Chunked", body=chunked(CONTENT), length=None)

    found, methods, doubts = probed(status(404), get)
    assert isinstance(found, FileFacts)
    assert (found.size, found.begin, methods, doubts) == (7, b"", ["HEAD", "GET part", "GET"], True)


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ([], "serve it with a Content-Length"),
        (["X-Goog-Stored-Content-Encoding: identity"], "serve it with a Content-Length"),
        (["X-Goog-Stored-Content-Encoding: gzip"], "store it without Content-Encoding"),
    ],
)
def test_a_size_that_nothing_states_is_refused_unless_head_stated_it(lines: list[str], hint: str) -> None:
    def get(asked: Asked) -> bytes:
        return reply(asked, "200 OK", "Connection: close", *lines, body=CONTENT, length=None)

    with RawServer(lambda asked: get(asked) if asked.method == "GET" else reply(asked, "404 X")) as server:
        probe = Probe(http())
        error = refused(lambda: probe.ask(f"{server.url}/x", CancelToken(), SECRETS), "size_unknown")
        assert error.hint == hint
        assert ("stored as gzip" in error.detail) is ("gzip" in str(lines))
    with RawServer(lambda asked: get(asked) if asked.method == "GET" else whole(asked)) as server:
        probe = Probe(http())
        probe.doubt(f"{server.url}/y")
        assert probe.ask(f"{server.url}/x", CancelToken(), SECRETS).size == 7
        assert [asked.method for asked in server.asked] == ["GET", "GET", "HEAD"]


def test_an_origin_whose_head_was_wrong_is_asked_by_get_and_no_other() -> None:
    with RawServer(part) as server, RawServer(part) as other:
        probe = Probe(http())
        assert not probe.doubts(f"{server.url}/x")
        probe.doubt(f"{server.url}/x")
        assert probe.doubts(f"{server.url}/y")
        assert not probe.doubts(f"{other.url}/x")
        for each in (server, other):
            assert probe.ask(f"{each.url}/x", CancelToken(), SECRETS).size == 7
        assert [asked.method for asked in server.asked + other.asked] == ["GET", "HEAD"]
