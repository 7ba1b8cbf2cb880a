"""A response is the one that was asked for, or an error says what is wrong with it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from email.utils import formatdate
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cachd.errors import CachdError, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.http import Target, parsed
from cachd.sources.source import NoRanges
from tests.fetching import EITHER, EXTENTS, KIB, MIB, fetch, http, read, refused
from tests.ground.models import noise
from tests.ground.origin import (
    Chunked,
    ContentRange,
    Fault,
    Gzip,
    IgnoreRange,
    Origin,
    Reply,
    Reset,
    Saying,
    Seen,
    Short,
    Status,
    TooLong,
    WrongRange,
)
from tests.ground.raw import Asked, RawServer, reply
from tests.ground.scripted import Scripted, saying

# --- URLs ---


@settings(max_examples=200)
@given(
    st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "http:/", ""]),
    st.text(alphabet="ab.:19/?#@[]%;&=~-\\ \t\x7fé", max_size=24),
)
@example("http://", "h:99999/x")
@example("http://", "[::1]:8080/x?a=b#c")
@example("https://", "h?a#b?c/d")
@example("http://", "user@h/")
@example("http://", "h]/")
def test_a_url_has_the_parts_that_the_standard_library_finds_or_is_refused(scheme: str, rest: str) -> None:
    url = scheme + rest
    try:
        parts = urlsplit(url)
        is_url = parts.port is not False and bool(parts.hostname)
    except ValueError:
        is_url = False
    if is_url and "@" not in parts.netloc and not re.search(r"[^!-\[\]-~]", url):
        assert parsed(url) == parts
    else:
        with pytest.raises(Invalid):
            parsed(url)


# --- what an origin says of a file ---


def test_a_strong_etag_marks_a_file(origin: Origin) -> None:
    head = http().head(origin.add("/x", noise(100), etag="tag"), CancelToken())
    assert (head.file_size, head.validator) == (100, '"tag"')


@pytest.mark.parametrize("etag", ['W/"tag"', None, "*"])
def test_without_a_strong_etag_the_date_marks_a_file(origin: Origin, etag: str | None) -> None:
    url = origin.add("/x", noise(100))
    origin.fault("/x", Tagged(etag), methods=EITHER)
    head = http().head(url, CancelToken())
    assert head.validator == head.headers.get("Last-Modified")
    assert fetch(http(), url, 100, validator=head.validator) == noise(100)
    assert origin.requests[-1].headers["if-unmodified-since"] == head.validator
    assert "if-match" not in origin.requests[-1].headers


@dataclass(frozen=True)
class Tagged(Fault):
    """The ETag header is `etag` as it stands."""

    etag: str | None

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.tagged(ETag=self.etag)


def test_an_origin_that_knows_no_head_is_asked_for_one_byte(origin: Origin) -> None:
    url = origin.add("/x", noise(100))
    for status in (405, 501):
        origin.fault("/x", Status(status), times=1, methods=["HEAD"])
        assert http().head(url, CancelToken()).file_size == 100
    assert [seen.method for seen in origin.requests] == ["HEAD", "GET"] * 2
    assert origin.bytes_sent() <= 2


# --- bytes, and the headers that must agree with them ---


@pytest.mark.parametrize("step", [1 << 20, 4 * KIB, 777])
@pytest.mark.parametrize(("start", "stop"), EXTENTS)
def test_an_extent_is_exactly_its_bytes(origin: Origin, start: int, stop: int, step: int) -> None:
    content = noise(100_000)
    target = Target(origin.add("/x", content, etag="tag"), len(content), validator='"tag"')
    assert (
        read(http().open(target, Extent(start, stop), CancelToken()), stop - start, step)
        == content[start:stop]
    )
    seen = origin.requests[-1]
    assert seen.headers["if-match"] == '"tag"'
    assert seen.headers["accept-encoding"] == "identity"
    assert ("range" in seen.headers) == (stop - start < len(content))


DISAGREEMENTS = {
    "coded": (Gzip(), "content_encoded"),
    "another range": (WrongRange(), "origin_protocol"),
    "longer": (TooLong(extra=5), "origin_protocol"),
    "cut": (Short(at=5000), "ended_early"),
    "reset": (Reset(at=5000), "connection_failed"),
}


@pytest.mark.parametrize(("fault", "code"), DISAGREEMENTS.values(), ids=DISAGREEMENTS.keys())
def test_bytes_that_are_not_the_ones_asked_for_are_refused(origin: Origin, fault: Fault, code: str) -> None:
    target = Target(origin.add("/x", noise(100 * KIB)), 100 * KIB)
    origin.fault("/x", fault)
    refusal = refused(
        lambda: read(http().open(target, Extent(10 * KIB, 90 * KIB), CancelToken()), 80 * KIB), code
    )
    assert isinstance(refusal, Unavailable)


@pytest.mark.parametrize("step", [MIB, 777])
@pytest.mark.parametrize(("before", "after"), [(0, 5000), (3000, 0), (3000, 5000), (MIB, 0)])
def test_a_block_that_has_the_bytes_asked_for_is_taken_and_the_others_are_dropped(
    before: int, after: int, step: int
) -> None:
    content = noise(2 * MIB)

    def said(asked: Asked) -> bytes:
        extent = asked.extent(len(content))
        assert extent
        start, stop = extent[0] - before, extent[1] + after
        stated = f"Content-Range: bytes {start}-{stop - 1}/{len(content)}"
        return reply(asked, "206 Partial Content", stated, body=content[start:stop])

    with RawServer(said) as origin:
        over, target = http(), Target(f"{origin.url}/x", len(content))
        for at in (MIB + 5, MIB + 50_000):
            extent = Extent(at, at + 40_000)
            got = read(over.open(target, extent, CancelToken()), extent.size, step)
            assert got == content[extent.start : extent.stop]
        connections = {asked.connection for asked in origin.asked}
    assert len(connections) == (2 if after else 1), "no request follows a body that was not read to its end"


def saying_part(stated: str) -> RawServer:
    return RawServer(lambda asked: reply(asked, "206 Partial", f"Content-Range: {stated}", body=b"x"))


@pytest.mark.parametrize("stated", ["bytes 1500-1999/3000", "bytes 1000-1999/4000", "bytes 1000-3000/*"])
def test_a_block_without_the_first_byte_or_of_another_file_is_refused(stated: str) -> None:
    with saying_part(stated) as origin:
        target = Target(f"{origin.url}/x", 3000)
        refused(lambda: http().open(target, Extent(1000, 2000), CancelToken()), "origin_protocol")


@pytest.mark.parametrize("stated", ["none", "bytes 1000-1999/1000", "bytes 1999-1000/3000", "bytes */3000"])
def test_a_part_of_which_nothing_says_where_it_is_makes_the_complete_file_be_asked_for(stated: str) -> None:
    with saying_part(stated) as origin:
        over, target = http(), Target(f"{origin.url}/x", 3000)
        refused(lambda: over.open(target, Extent(1000, 2000), CancelToken()), "origin_protocol")
        with pytest.raises(NoRanges):  # the first time may have been a passing fault
            over.open(target, Extent(1000, 2000), CancelToken())


def test_an_unending_answer_is_cut_at_the_size_of_the_file(origin: Origin) -> None:
    url = origin.add("/x", noise(KIB))
    origin.fault("/x", TooLong(extra=1, length="absent"))
    refused(lambda: fetch(http(), url, KIB), "origin_protocol")


def test_a_whole_file_where_a_part_was_asked_for_is_no_failure(origin: Origin) -> None:
    target = Target(origin.add("/x", noise(KIB)), KIB)
    origin.fault("/x", IgnoreRange())
    with pytest.raises(NoRanges):
        http().open(target, Extent(1, 5), CancelToken())
    origin.clear()
    origin.fault("/x", Chunked())
    assert fetch(http(), target.url, KIB) == noise(KIB)


MOVED = {
    "another tag (412)": lambda origin: origin.add("/x", noise(KIB), etag="new"),
    "a shorter file (416)": lambda origin: origin.add("/x", noise(100), etag="old"),
    "a tag that If-Match overlooked": lambda origin: origin.fault("/x", Tagged('"new"')),
    "a whole file of another size": lambda origin: origin.fault("/x", Status(200, {"ETag": '"old"'}, b"new")),
}


@pytest.mark.parametrize("move", MOVED.values(), ids=MOVED.keys())
def test_a_file_that_is_not_what_it_was_is_changed(origin: Origin, move: Callable[[Origin], object]) -> None:
    target = Target(origin.add("/x", noise(KIB), etag="old"), KIB, validator='"old"')
    extent = Extent(512, KIB) if move is not MOVED["a whole file of another size"] else Extent(0, KIB)
    over = http()
    assert (
        read(over.open(target, extent, CancelToken()), extent.size) == noise(KIB)[extent.start : extent.stop]
    )
    move(origin)
    with pytest.raises(Changed):
        over.open(target, extent, CancelToken())


def test_an_origin_that_refuses_its_own_tag_is_asked_without_it(origin: Origin) -> None:
    target = Target(origin.add("/x", noise(KIB), etag="one"), KIB, validator='"one"')
    origin.fault("/x", Status(412), when=lambda seen: "if-match" in seen.headers)
    assert read(http().open(target, Extent(5, KIB), CancelToken()), KIB - 5) == noise(KIB)[5:]
    origin.add("/x", noise(KIB), etag="two")
    with pytest.raises(Changed):
        http().open(target, Extent(5, KIB), CancelToken())
    origin.add("/x", noise(KIB), etag=None, last_modified=False)
    with pytest.raises(Changed):
        http().open(target, Extent(5, KIB), CancelToken())


RANGES = {
    "as it should be": "bytes {start}-{last}/{size}",
    "no total": "bytes {start}-{last}/*",
    "an equals sign": "bytes={start}-{last}/{size}",
    "spaces": "BYTES  {start} - {last} / {size}",
    "no space": "bytes {start}-{last}/{size}",
}


@pytest.mark.parametrize("said", RANGES.values(), ids=RANGES.keys())
def test_a_range_is_known_by_its_numbers(origin: Origin, said: str) -> None:
    target = Target(origin.add("/x", noise(KIB)), KIB)
    origin.fault("/x", ContentRange(said))
    assert read(http().open(target, Extent(5, 50), CancelToken()), 45) == noise(KIB)[5:50]


def test_the_first_bytes_of_a_range_are_taken_and_its_end_is_said(origin: Origin) -> None:
    target = Target(origin.add("/x", noise(KIB)), KIB)
    origin.fault("/x", Begins(20))
    with http().open(target, Extent(5, 50), CancelToken()) as body:
        view = memoryview(bytearray(45))
        assert body.readinto(view) == 20
        assert view[:20] == noise(KIB)[5:25]
        error = refused(lambda: body.readinto(view[20:]), "ended_early")
        assert isinstance(error, Unavailable)


@dataclass(frozen=True)
class Begins(Fault):
    """Only so many bytes of a range."""

    count: int

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        stop = reply.start + self.count
        stated = f"bytes {reply.start}-{stop - 1}/{reply.content.size}"
        return replace(reply.tagged(Content_Range=stated), stop=stop, length=self.count)


def test_a_range_that_comes_as_several_is_asked_for_as_a_complete_file(origin: Origin) -> None:
    target = Target(origin.add("/x", noise(KIB)), KIB)
    origin.fault("/x", Saying({"Content_Type": "multipart/byteranges; boundary=x"}))
    with pytest.raises(NoRanges):
        http().open(target, Extent(5, 50), CancelToken())


@pytest.mark.parametrize("coding", ["aws-chunked", "UTF-8", "identity", "", "aws-chunked, identity", "none"])
def test_a_coding_that_changes_no_byte_is_no_coding(origin: Origin, coding: str) -> None:
    url = origin.add("/x", noise(KIB))
    origin.fault("/x", Saying({"Content_Encoding": coding}), methods=EITHER)
    assert fetch(http(), url, KIB) == noise(KIB)
    assert http().head(url, CancelToken()).file_size == KIB


def test_a_date_that_moved_is_changed(origin: Origin) -> None:
    old, new = (formatdate(seconds, usegmt=True) for seconds in (1e9, 1e9 + 1))
    url = origin.add("/x", noise(KIB), etag=None, last_modified=False, headers={"Last-Modified": old})
    assert fetch(http(), url, KIB, validator=old) == noise(KIB)
    origin.add("/x", noise(KIB), etag=None, last_modified=False, headers={"Last-Modified": new})
    with pytest.raises(Changed):
        fetch(http(), url, KIB, validator=old)


STATUSES = {
    401: (Forbidden, "source_unauthorized"),
    403: (Forbidden, "source_forbidden"),
    451: (Forbidden, "source_forbidden"),
    402: (Forbidden, "source_forbidden"),
    406: (Forbidden, "source_forbidden"),
    405: (NotFound, "file_not_found"),
    404: (NotFound, "file_not_found"),
    410: (NotFound, "file_not_found"),
    412: (Changed, "changed"),
    416: (Changed, "changed"),
    400: (Unavailable, "origin_failed"),
    408: (Unavailable, "origin_failed"),
    429: (Unavailable, "rate_limited"),
    500: (Unavailable, "origin_failed"),
    503: (Unavailable, "origin_failed"),
    302: (Unavailable, "origin_failed"),
}


@pytest.mark.parametrize(("status", "meaning"), STATUSES.items())
def test_a_status_is_an_error_of_its_class(
    origin: Origin, status: int, meaning: tuple[type[CachdError], str]
) -> None:
    kind, code = meaning
    url = origin.add("/x", noise(KIB))
    origin.fault("/x", Status(status), methods=EITHER)
    for call in (
        lambda: fetch(http(), url, KIB),
        lambda: http().head(url, CancelToken()),
        lambda: http().read(url, CancelToken(), at_most=9),
    ):
        error = refused(call, code)
        assert type(error) is kind
        assert error.origin_status == status


IN_A_MINUTE = "in a minute"  # in Unix seconds
AN_HOUR_FROM_NOW = "an hour from now"  # a date, which the test makes when its turn has come

WAITS: dict[str, tuple[dict[str, str], float | None]] = {
    "seconds": ({"Retry-After": "7"}, 7),
    "no seconds": ({"Retry-After": "0"}, 0),
    "ten years": ({"Retry-After": "315360000"}, 600),
    "a date": ({"Retry-After": AN_HOUR_FROM_NOW}, 600),
    "a date that is past": ({"Retry-After": formatdate(1e9, usegmt=True)}, 0),
    "words": ({"Retry-After": "soon"}, None),
    "a negative number": ({"Retry-After": "-5"}, None),
    "a limit": ({"RateLimit": '"api";r=0;t=55'}, 56),
    "a limit without a time": ({"RateLimit": '"api";r=0'}, None),
    "a limit that is not reached": ({"RateLimit": '"resolvers";r=4987;t=40'}, None),
    "a limit without a count": ({"RateLimit": '"resolvers";t=40'}, None),
    "one of two limits": ({"RateLimit": '"burst";r=12;t=300, "daily";r=0;t=20'}, 21),
    "the longer of two limits": ({"RateLimit": '"a";r=0;t=20, "b";r=0;t=30'}, 31),
    "a limit of an earlier draft": ({"RateLimit": "limit=10, remaining=0, reset=50"}, 51),
    "an earlier draft, not reached": ({"RateLimit": "limit=10, remaining=3, reset=50"}, None),
    "a reset": ({"RateLimit-Reset": "33"}, 33),
    "a reset of GitHub's kind": ({"X-RateLimit-Remaining": "0", "X-RateLimit-Reset": IN_A_MINUTE}, 60),
    "a reset that is past": ({"X-RateLimit-Reset": "1600000000"}, 0),
    "a reset that is not needed": ({"X-RateLimit-Remaining": "5", "X-RateLimit-Reset": "40"}, None),
    "a reset in words": ({"X-RateLimit-Reset": "soon"}, None),
    "what comes first": ({"Retry-After": "3", "RateLimit": '"a";r=0;t=20', "X-RateLimit-Reset": "40"}, 3),
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("headers", "seconds"), WAITS.values(), ids=WAITS.keys())
def test_an_origin_may_say_when_to_come_back(
    origin: Origin, headers: dict[str, str], seconds: float | None
) -> None:
    url = origin.add("/x", noise(KIB))
    date = formatdate(time.time() + 3600, usegmt=True)
    headers = {name: value.replace(AN_HOUR_FROM_NOW, date) for name, value in headers.items()}
    headers = {n: value.replace(IN_A_MINUTE, str(int(time.time()) + 60)) for n, value in headers.items()}
    for status in (429, 503):
        origin.fault("/x", Status(status, headers), times=1)
        error = refused(lambda: fetch(http(), url, KIB), "rate_limited" if status == 429 else "origin_failed")
        assert isinstance(error, Unavailable)
        inexact = 30 if seconds == 60 else 1e-6  # a machine may take its time
        assert error.retry_after == (pytest.approx(seconds, abs=inexact) if seconds else seconds)


def test_a_small_file_is_read_whole_or_refused(origin: Origin) -> None:
    url = origin.add("/x", noise(100))
    assert http().read(url, CancelToken(), at_most=100) == noise(100)
    refused(lambda: http().read(url, CancelToken(), at_most=99), "document_too_large")
    origin.fault("/x", Chunked())
    assert http().read(url, CancelToken(), at_most=100) == noise(100)
    refused(lambda: http().read(url, CancelToken(), at_most=99), "document_too_large")


NO_ANSWERS = {
    "nothing": b"",
    "noise": noise(KIB) + b"\r\n",
    "no status": b"HTTP/1.1 ok\r\n\r\n",
    "a header too long": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70 * KIB + b"\r\n\r\n",
    "a header without a colon": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX\r\n\r\nok",
    "a header name with a space": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX : x\r\n\r\nok",
    "too many headers": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n",
    "a chunk that is none": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nno\r\n",
    "a length too long": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\nok",
    "a range too long": b"HTTP/1.1 206 OK\r\nContent-Range: bytes 0-0/" + b"9" * 5000 + b"\r\n\r\nok",
}


@pytest.mark.parametrize("answer", NO_ANSWERS.values(), ids=NO_ANSWERS.keys())
def test_an_answer_that_is_no_http_is_the_origins_failure(answer: bytes) -> None:
    with Scripted(saying(answer)) as server, pytest.raises((Unavailable, Changed)):
        fetch(http(), f"{server.url}/x", 2)


def test_a_header_may_go_on_in_the_next_line() -> None:
    answer = b"HTTP/1.1 200 OK\r\nX: x\r\n  Content-Length: 9\r\nContent-Length:\r\n\t2\r\n\r\nok"
    with Scripted(saying(answer)) as server:
        assert fetch(http(), f"{server.url}/x", 2) == b"ok"
