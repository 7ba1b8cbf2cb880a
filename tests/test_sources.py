"""Sources against real servers and directories: what is believed, what is refused, and what is never sent."""

from __future__ import annotations

import base64
import concurrent.futures
import gc
import hashlib
import os
import selectors
import socket
import ssl
import struct
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Cancelled, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Digest, Extent, File, Manifest, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources import checksums
from cachd.sources.answers import bare
from cachd.sources.http import MOST_REDIRECTS, Http, Target
from cachd.sources.schemes import Sources
from cachd.sources.secrets import Secret
from cachd.sources.shared_volume import SharedVolumeSource
from cachd.sources.source import Body, CancelToken, NoRanges, Source
from cachd.sources.table import Table
from cachd.sources.trust import Authorities
from cachd.sources.web import WebSource
from cachd.sources.wire import TlsWire, Wire
from tests.ground.models import digests, noise, safetensors_model, write_sha256sums
from tests.ground.origin import (
    ChangeETag,
    Chunked,
    Fault,
    Gzip,
    IgnoreRange,
    Origin,
    Redirect,
    Reply,
    Reset,
    Seen,
    Short,
    Stall,
    Status,
    Tls,
    TooLong,
    Trickle,
    WrongRange,
)
from tests.ground.scripted import OK, Scripted, heard, saying

KIB, MIB = 1 << 10, 1 << 20
SOON_SECONDS = 0.3
PATIENCE_SECONDS = 120.0
EITHER = ("GET", "HEAD")


def http(*allow: str, stall_seconds: float = PATIENCE_SECONDS, ca_file: Path | None = None) -> Http:
    return Http(
        AddressPolicy(allow or ["127.0.0.0/8"]),
        stall_seconds=stall_seconds,
        connect_seconds=PATIENCE_SECONDS,
        authorities=Authorities(str(ca_file) if ca_file else None),
    )


def read(body: Body, size: int, step: int = 64 * KIB) -> bytes:
    """The next `size` bytes of a body, `step` at a time; it is closed then."""
    content = bytearray(size)
    view = memoryview(content)
    with body:
        for start in range(0, size, step):
            part = view[start : start + step]
            while part:
                count = body.readinto(part)
                assert count, "the end, too early"
                part = part[count:]
    return bytes(content)


def fetch(over: Http, url: str, size: int, *, validator: str | None = None) -> bytes:
    return read(over.open(Target(url, size, validator=validator), Extent(0, size), CancelToken()), size)


def refused(call: Callable[[], object], code: str) -> CachdError:
    """The error with this code that `call` ends in."""
    with pytest.raises(CachdError) as refusal:
        call()
    assert refusal.value.code == code, refusal.value
    return refusal.value


# --- SHA256SUMS ---

HEX = hashlib.sha256(b"x").hexdigest()


@pytest.mark.parametrize(
    ("content", "paths"),
    [
        (f"{HEX}  a\n", ["a"]),
        (f"{HEX} *a.bin\r\n{HEX}  dir/b c\r\n", ["a.bin", "dir/b c"]),
        (f"{HEX.upper()}  ./a", ["a"]),
        (f"# made by hand\n\n{HEX}  é\n   \n", ["é"]),
        ("", []),
    ],
)
def test_sums_are_read_as_sha256sum_writes_them(content: str, paths: list[str]) -> None:
    assert checksums.parse(content.encode(), "SHA256SUMS") == dict.fromkeys(paths, Digest("sha256", HEX))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (f"{HEX}  a\n{HEX}  a\n".encode(), "line 2"),
        (f"{HEX}\n".encode(), "line 1"),
        (f"{HEX}  \n".encode(), "line 1"),
        (f"{HEX} a\n".encode(), "line 1"),
        (f"{HEX[:-1]}  a\n".encode(), "line 1"),
        (f"{'g' * 64}  a\n".encode(), "line 1"),
        (f"d41d8cd98f00b204e9800998ecf8427e  a\n{HEX}  b\n".encode(), "line 1"),
        (f"\\{HEX}  a\\nb\n".encode(), "line 1"),
        (b"<!doctype html>\n", "line 1"),
        (f"{HEX}  \xff\n".encode("latin-1"), "not text"),
    ],
    ids=ascii,
)
def test_sums_of_any_other_form_are_refused_with_the_line(content: bytes, told: str) -> None:
    assert told in refused(lambda: checksums.parse(content, "SHA256SUMS"), "bad_checksums").detail


# --- secrets ---


@pytest.mark.parametrize(
    ("content", "token"),
    [("hf_abc", "hf_abc"), ("hf_abc\n", "hf_abc"), ("  hf_abc \r\n", "hf_abc"), ("", None), (" \n", None)],
)
def test_a_token_is_what_its_file_holds_without_space_around(
    tmp_path: Path, content: str, token: str | None
) -> None:
    (tmp_path / "token").write_bytes(content.encode())
    assert Secret(tmp_path / "token").read() == token


@pytest.mark.parametrize(
    "content",
    [b"canary\r\nX-Evil: 1", b"canary\nb", b"can ary", b"can\0ary", b"can\x7fary", "canäry".encode()],
)
def test_a_token_no_header_can_carry_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    refusal = refused(Secret(tmp_path / "token").read, "bad_secret")
    assert "can" not in str(refusal).replace("cannot", "").replace(str(tmp_path), "")


def test_a_secret_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "absent", tmp_path, tmp_path / "binary"):
        error = refused(Secret(path).read, "bad_secret")
        assert error.withheld["secret"] == str(path)
        assert str(path) not in str(error.as_document())


def test_a_token_is_read_again_at_every_use(tmp_path: Path) -> None:
    file = tmp_path / "token"
    secret = Secret(file)
    refused(secret.read, "bad_secret")
    for token in ("first", "second"):
        file.write_text(token)
        assert secret.read() == token


def test_the_environment_holds_the_token_where_no_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_OF_A_TEST", " from-environment\n")
    (tmp_path / "token").write_text("from-file")
    assert Secret(None, "TOKEN_OF_A_TEST").read() == "from-environment"
    assert Secret(tmp_path / "token", "TOKEN_OF_A_TEST").read() == "from-file"
    monkeypatch.delenv("TOKEN_OF_A_TEST")
    assert Secret(None, "TOKEN_OF_A_TEST").read() is None
    assert Secret(None).read() is None


def test_nothing_shows_a_secret_by_accident(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("canary")
    secret = Secret(tmp_path / "token")
    secret.read()
    target = Target("https://host/x", 1, {"Authorization": "Bearer canary"})
    assert "canary" not in repr(secret) + str(vars(secret)) + repr(target)
    assert bare("https://user:canary@host/x?sig=canary#canary") == "https://host/x"


# --- what an origin says of a file ---


def test_a_strong_etag_marks_a_file(origin: Origin) -> None:
    head = http().head(origin.add("/x", noise(100), etag="tag"), CancelToken())
    assert (head.size, head.validator) == (100, '"tag"')


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
        assert http().head(url, CancelToken()).size == 100
    assert [seen.method for seen in origin.requests] == ["HEAD", "GET"] * 2
    assert origin.bytes_sent() <= 2


# --- bytes, and the headers that must agree with them ---

EXTENTS = [(0, 1), (0, 100_000), (1, 99_999), (65_535, 65_537), (99_999, 100_000), (50_000, 50_001)]


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
    "coded": (Gzip(), "origin_protocol"),
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
    "nothing": ({}, None),
}


@pytest.mark.parametrize(("headers", "seconds"), WAITS.values(), ids=WAITS.keys())
def test_an_origin_may_say_when_to_come_back(
    origin: Origin, headers: dict[str, str], seconds: float | None
) -> None:
    url = origin.add("/x", noise(KIB))
    date = formatdate(time.time() + 3600, usegmt=True)
    headers = {name: value.replace(AN_HOUR_FROM_NOW, date) for name, value in headers.items()}
    for status in (429, 503):
        origin.fault("/x", Status(status, headers), times=1)
        error = refused(lambda: fetch(http(), url, KIB), "rate_limited" if status == 429 else "origin_failed")
        assert isinstance(error, Unavailable)
        assert error.retry_after == pytest.approx(seconds) if seconds else error.retry_after == seconds


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


# --- slow and silent origins ---


def test_a_connection_without_a_byte_for_too_long_is_stalled(origin: Origin) -> None:
    url = origin.add("/x", noise(100 * KIB))
    origin.fault("/x", Stall(at=5000))
    refused(lambda: fetch(http(stall_seconds=SOON_SECONDS), url, 100 * KIB), "stalled")


def test_an_origin_that_does_not_answer_is_stalled() -> None:
    def silent(connection: socket.socket, _: int) -> None:
        while heard(connection):
            pass

    with Scripted(silent) as server:
        refused(lambda: http(stall_seconds=SOON_SECONDS).head(f"{server.url}/x", CancelToken()), "stalled")


def test_a_trickle_is_too_slow(origin: Origin) -> None:
    url = origin.add("/x", noise(4 * KIB))
    origin.fault("/x", Trickle(500))
    refused(lambda: fetch(http(stall_seconds=SOON_SECONDS), url, 4 * KIB), "too_slow")


@dataclass(frozen=True)
class ChunkedTrickle(Fault):
    """The whole file without Content-Length, this slowly."""

    bytes_per_second: float

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply.whole(), length=None, rate=self.bytes_per_second)


def test_a_trickle_in_chunks_is_too_slow(origin: Origin) -> None:
    url = origin.add("/x", noise(2 * KIB))
    origin.fault("/x", ChunkedTrickle(500))
    refused(lambda: fetch(http(stall_seconds=SOON_SECONDS), url, 2 * KIB), "too_slow")
    assert origin.bytes_sent() < KIB, "long before its end"


def test_a_trickle_of_headers_is_too_slow() -> None:
    def drip(connection: socket.socket, _: int) -> None:
        if heard(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: ")
            for _ in range(20):
                server.stopped.wait(0.05)
                connection.sendall(b"x")
            connection.sendall(b"\r\n\r\nok")

    with Scripted(drip) as server, pytest.raises(Unavailable):
        fetch(http(stall_seconds=SOON_SECONDS), f"{server.url}/x", 2)


def test_a_slow_origin_that_is_not_too_slow_is_waited_for(origin: Origin) -> None:
    url = origin.add("/x", noise(20 * KIB))
    origin.fault("/x", Trickle(20 * KIB))
    assert fetch(http(stall_seconds=SOON_SECONDS), url, 20 * KIB) == noise(20 * KIB)


ABORTED = {"plain": {}, "that closes": {"Connection": "close"}}


@pytest.mark.parametrize("headers", ABORTED.values(), ids=ABORTED.keys())
@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_an_abort_ends_a_read_that_waits_in_another_thread(tls: bool, headers: dict[str, str]) -> None:
    with Origin(tls=tls) as origin, concurrent.futures.ThreadPoolExecutor(1) as other:
        url = origin.add("/x", noise(10 * KIB), headers=headers)
        hold = origin.hold("/x", after=5 * KIB)
        body = http(ca_file=origin.ca_file).open(Target(url, 10 * KIB), Extent(0, 10 * KIB), CancelToken())
        reading = other.submit(read, body, 10 * KIB)
        assert hold.reached.wait(PATIENCE_SECONDS)
        try:
            body.abort()
            with pytest.raises(Unavailable):
                reading.result(PATIENCE_SECONDS / 4)
        finally:
            hold.release()


def test_a_cut_ends_the_wait_for_an_answer_and_forbids_the_next_question() -> None:
    asked = threading.Event()

    def silent(connection: socket.socket, _: int) -> None:
        if heard(connection):
            asked.set()
            heard(connection)

    with Scripted(silent) as server, concurrent.futures.ThreadPoolExecutor(1) as other:
        over, token, target = http(), CancelToken(), Target(f"{server.url}/x", 2)
        asking = other.submit(over.open, target, Extent(0, 2), token)
        assert asked.wait(PATIENCE_SECONDS)
        token.cancel()
        with pytest.raises((Unavailable, Cancelled)):
            asking.result(PATIENCE_SECONDS / 4)
        with pytest.raises(Cancelled):
            over.open(target, Extent(0, 2), token)
        assert server.accepted == 1


def test_a_cut_ends_a_handshake_that_nobody_answers() -> None:
    greeted = threading.Event()

    def silent(connection: socket.socket, _: int) -> None:
        connection.recv(64 * KIB)
        greeted.set()
        connection.recv(64 * KIB)

    with Scripted(silent) as server, concurrent.futures.ThreadPoolExecutor(1) as other:
        token, target = CancelToken(), Target(server.url.replace("http:", "https:") + "/x", 2)
        asking = other.submit(http().open, target, Extent(0, 2), token)
        assert greeted.wait(PATIENCE_SECONDS)
        token.cancel()
        with pytest.raises((Unavailable, Cancelled)):
            asking.result(PATIENCE_SECONDS / 4)


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
        assert over.relay("GET", f"{server.url}/x", {}, b"", CancelToken(), at_most=2).content == b"ok"
        asked = {"Content-Length": "4"}
        refused(
            lambda: over.relay("POST", f"{server.url}/x", asked, b"\r\n\r\n", CancelToken(), at_most=2),
            "connection_failed",
        )
        over.anew()
        over._pool()
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
        ready.register(outer, selectors.EVENT_READ, origin)
        ready.register(origin, selectors.EVENT_READ, outer)
        while True:
            for key, _ in ready.select():
                data = key.fileobj.recv(16 * KIB)  # type: ignore[union-attr]
                if not data:
                    return
                key.data.sendall(data)


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
def test_a_tls_wire_that_broke_is_let_go_at_once(tmp_path: Path, nested: bool) -> None:
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


# --- redirects ---


def chain(origin: Origin, hops: int) -> str:
    """A URL from which it is so many redirects to a file of two bytes."""
    for number in range(hops):
        origin.fault(f"/{number}", Redirect(to=f"/{number + 1}"), methods=EITHER)
    origin.add(f"/{hops}", b"ok")
    return f"{origin.url}/0"


def test_ten_redirects_are_followed_and_eleven_are_not() -> None:
    for hops in (1, MOST_REDIRECTS):
        with Origin() as origin:
            assert fetch(http(), chain(origin, hops), 2) == b"ok"
    with Origin() as origin:
        refused(lambda: fetch(http(), chain(origin, MOST_REDIRECTS + 1), 2), "redirect_loop")
        assert len(origin.requests) == MOST_REDIRECTS + 1 == 11


def test_a_redirect_to_itself_ends(origin: Origin) -> None:
    origin.fault("/x", Redirect(to="/x"), methods=EITHER)
    refused(lambda: http().head(f"{origin.url}/x", CancelToken()), "redirect_loop")


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_every_kind_of_redirect_keeps_the_method_and_the_range(origin: Origin, code: int) -> None:
    origin.add("/y", noise(KIB))
    origin.fault("/x", Redirect(to="y", code=code), methods=EITHER)
    body = http().open(Target(f"{origin.url}/x", KIB), Extent(5, 10), CancelToken())
    assert read(body, 5) == noise(KIB)[5:10]
    assert http().head(f"{origin.url}/x", CancelToken()).size == KIB
    assert [seen.method for seen in origin.requests] == ["GET", "GET", "HEAD", "HEAD"]


def test_a_redirect_from_https_to_http_is_refused(origin: Origin) -> None:
    with Origin(tls=True) as secure:
        secure.fault("/x", Redirect(to=f"{origin.url}/x"), methods=EITHER)
        over = http("127.0.0.0/8", f"{origin.url}/", ca_file=secure.ca_file)
        refused(lambda: over.head(f"{secure.url}/x", CancelToken()), "downgrade_refused")
        assert origin.requests == []


BAD_LOCATIONS = [
    ("file:///etc/passwd", Invalid),
    ("gopher://127.0.0.1/x", Forbidden),
    ("http://user:hunter2@127.0.0.1/x", Invalid),
    ("http://169.254.169.254/latest/meta-data", Forbidden),
    ("http://127.0.0.1:99999/x", Invalid),
    ("/a b", Invalid),
    ("/\\evil", Invalid),
    ("http://[::1", (Invalid, Unavailable)),
]


@pytest.mark.parametrize(("location", "kind"), BAD_LOCATIONS)
def test_a_redirect_to_where_nothing_may_be_asked_is_refused(
    origin: Origin, location: str, kind: type[CachdError]
) -> None:
    origin.fault("/x", Redirect(to=location), methods=EITHER)
    with pytest.raises(kind) as refusal:
        http().head(f"{origin.url}/x", CancelToken())
    assert "hunter2" not in str(refusal.value)


SECRET = {"Authorization": "Bearer canary", "X-Token": "canary"}


def secrets_of(seen: Seen) -> set[str]:
    return {name for name, value in seen.headers.items() if "canary" in value}


def test_secrets_follow_a_redirect_within_their_origin(origin: Origin) -> None:
    origin.add("/y", b"ok")
    origin.fault("/x", Redirect(to="/y"), methods=EITHER)
    http().head(f"{origin.url}/x", CancelToken(), secrets=SECRET)
    assert [secrets_of(seen) for seen in origin.requests] == [{"authorization", "x-token"}] * 2


def test_secrets_stay_behind_at_another_port_and_do_not_come_back(origin: Origin) -> None:
    with Origin() as other:
        origin.add("/z", b"ok")
        origin.fault("/x", Redirect(to=f"{other.url}/y"))
        other.fault("/y", Redirect(to=f"{origin.url}/z"))
        over = http()
        for _ in range(2):
            target = Target(f"{origin.url}/x", 2, SECRET)
            assert read(over.open(target, Extent(0, 2), CancelToken()), 2) == b"ok"
        assert [secrets_of(seen) for seen in other.requests] == [set()] * len(other.requests)
        told = {seen.path: secrets_of(seen) for seen in origin.requests}
        assert told == {"/x": {"authorization", "x-token"}, "/z": set()}


def test_secrets_stay_behind_at_another_host(origin: Origin) -> None:
    port = origin.url.rpartition(":")[2]
    origin.add("/y", b"ok")
    origin.fault("/x", Redirect(to=f"http://localhost:{port}/y"), methods=EITHER)
    http().head(f"{origin.url}/x", CancelToken(), secrets=SECRET)
    assert [secrets_of(seen) for seen in origin.requests] == [{"authorization", "x-token"}, set()]


def test_a_signed_address_is_asked_again_until_it_expires(origin: Origin) -> None:
    with Origin() as cdn:
        cdn.add("/signed", noise(KIB))
        origin.fault("/x", Redirect(to=f"{cdn.url}/signed?sig=1"))
        over, target = http(), Target(f"{origin.url}/x", KIB, SECRET)
        for start in (0, 100, 200):
            read(over.open(target, Extent(start, start + 100), CancelToken()), 100)
        assert len(origin.requests) == 1
        cdn.fault("/signed", Status(403), times=1)
        read(over.open(target, Extent(300, 400), CancelToken()), 100)
        assert len(origin.requests) == 2
        assert not any(map(secrets_of, cdn.requests))


def test_a_header_that_cannot_be_sent_is_not_sent(origin: Origin) -> None:
    url = origin.add("/x", b"ok")
    evil = {"Authorization": "Bearer canary\r\nX-Evil: 1"}
    assert "canary" not in str(refused(lambda: http().head(url, CancelToken(), secrets=evil), "bad_header"))
    assert origin.requests == []


# --- reach ---


def test_an_address_within_no_allowance_is_refused_before_it_is_connected_to(origin: Origin) -> None:
    origin.add("/x", b"ok")
    port = origin.url.rpartition(":")[2]
    for url in (f"http://127.0.0.1:{port}/x", f"http://0x7f.1:{port}/x", f"http://localhost:{port}/x"):
        refused(lambda url=url: http("10.0.0.0/8").head(url, CancelToken()), "private_address")
        refused(lambda url=url: http("http://elsewhere/").head(url, CancelToken()), "plaintext_refused")
        refused(
            lambda url=url: http("http://elsewhere/").head(url.replace("http:", "https:"), CancelToken()),
            "private_address",
        )
    assert origin.requests == []


def test_a_kept_connection_widens_no_allowance() -> None:
    with Origin(tls=True) as origin:
        allowed, other = origin.add("/models/x", b"ok"), origin.add("/admin", b"no")
        over = http(f"{origin.url}/models/", ca_file=origin.ca_file)
        refused(lambda: over.head(other, CancelToken()), "private_address")
        over.head(allowed, CancelToken())
        refused(lambda: over.head(other, CancelToken()), "private_address")
        assert {seen.path for seen in origin.requests} == {"/models/x"}


def test_a_redirect_out_of_an_allowed_prefix_is_refused(origin: Origin) -> None:
    origin.add("/admin", b"no")
    origin.fault("/models/x", Redirect(to="/models/../admin"), methods=EITHER)
    with pytest.raises(Forbidden):
        http(f"{origin.url}/models/").head(f"{origin.url}/models/x", CancelToken())
    assert {seen.path for seen in origin.requests} == {"/models/x"}


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1/x",
        "http://hunter2@127.0.0.1/x",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/é",
        "http://good\\@127.0.0.1/x",
        "http://127.0.0.1/x\r\nX: y",
        "http:///x",
        "http://[::1/x",
    ],
    ids=ascii,
)
def test_a_url_that_two_readers_may_read_differently_is_refused(url: str) -> None:
    assert "hunter2" not in str(refused(lambda: http().head(url, CancelToken()), "bad_ref"))


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


# --- web ---


def resolve(source: Source, ref: str) -> Manifest:
    return source.resolve(Ref.parse(ref), CancelToken())


def web() -> WebSource:
    return WebSource(http())


def listed(origin: Origin, **files: bytes) -> str:
    """A directory with SHA256SUMS; its URL."""
    for name, content in files.items():
        origin.add(f"/model/{name}", content)
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    origin.add("/model/SHA256SUMS", "".join(lines).encode())
    return f"{origin.url}/model/"


def test_a_directory_is_what_its_sums_list(origin: Origin) -> None:
    manifest = resolve(web(), listed(origin, **{"a.bin": b"a", "sub/b c.bin": b"bc"}))
    assert {f.path: (f.size, str(f.digest)) for f in manifest.files} == {
        "a.bin": (1, f"sha256:{hashlib.sha256(b'a').hexdigest()}"),
        "sub/b c.bin": (2, f"sha256:{hashlib.sha256(b'bc').hexdigest()}"),
    }
    assert all(read(web().open(f, Extent(0, f.size), CancelToken()), f.size) for f in manifest.files)


def test_the_revision_of_a_directory_is_its_sums(origin: Origin) -> None:
    first = resolve(web(), listed(origin, a=b"a"))
    assert resolve(web(), listed(origin, a=b"a")) == replace(first)
    assert resolve(web(), listed(origin, a=b"A")).revision != first.revision


def test_a_directory_without_sums_is_refused_with_the_way_to_make_them(origin: Origin) -> None:
    origin.add("/model/a.bin", b"a")
    error = refused(lambda: resolve(web(), f"{origin.url}/model/"), "no_checksums")
    assert "sha256sum" in error.hint


def test_a_file_that_only_the_sums_know_is_not_found(origin: Origin) -> None:
    url = listed(origin, a=b"a", b=b"b")
    origin.remove("/model/b")
    refused(lambda: resolve(web(), url), "file_not_found")


@pytest.mark.parametrize("number", [1, 8, 9, 50])
def test_every_file_of_a_directory_is_asked_about_once(origin: Origin, number: int) -> None:
    files = {f"{n:02}.bin": noise(n + 1) for n in range(number)}
    manifest = resolve(web(), listed(origin, **files))
    assert {f.path: f.size for f in manifest.files} == {name: len(files[name]) for name in files}
    asked = [seen.path for seen in origin.requests if seen.method == "HEAD"]
    assert sorted(asked) == [f"/model/{name}" for name in files]


def test_a_directory_is_not_asked_about_any_further_when_one_of_its_files_is_refused(origin: Origin) -> None:
    url = listed(origin, **{f"{n:03}.bin": b"x" for n in range(400)})
    origin.remove("/model/000.bin")
    refused(lambda: resolve(web(), url), "file_not_found")
    assert len([seen for seen in origin.requests if seen.method == "HEAD"]) < 200


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "..\\x", "C:\\x", "a//b", "x\u202ey"], ids=ascii)
def test_a_listed_path_that_leaves_the_model_is_refused_before_it_is_asked_for(
    origin: Origin, path: str
) -> None:
    url = listed(origin, good=b"good")
    origin.add("/model/SHA256SUMS", f"{HEX}  {path}\n{HEX}  good\n".encode())
    refused(lambda: resolve(web(), url), "unsafe_path")
    assert not {seen.path for seen in origin.requests} - {"/model/SHA256SUMS", "/model/good"}


def test_one_file_has_the_digest_of_its_ref_or_of_its_origin_or_none(origin: Origin) -> None:
    true = hashlib.sha256(b"x").digest()
    told = {"Repr-Digest": f"sha-512=:AAAA:, sha-256=:{base64.b64encode(true).decode()}:"}
    url = origin.add("/x", b"x", headers=told)
    assert resolve(web(), url).files[0].digest == Digest("sha256", true.hex())
    of_ref = Digest("sha256", "0" * 64)
    assert resolve(web(), f"{url}#sha256={of_ref.hex}").files[0].digest == of_ref
    for wrong in ("sha-256=:AAAA:", "sha-256=:A:", "sha-256=AAAA", "md5=:AAAA:"):
        origin.add("/x", b"x", headers={"Repr-Digest": wrong})
        assert resolve(web(), url).files[0].digest is None


def test_the_revision_of_one_file_moves_with_its_validator(origin: Origin) -> None:
    url = origin.add("/x", b"x", etag="1")
    first = resolve(web(), url)
    assert resolve(web(), url).revision == first.revision
    origin.add("/x", b"x", etag="2")
    assert resolve(web(), url).revision != first.revision


def test_a_file_without_a_validator_is_itself_only_once(origin: Origin) -> None:
    url = origin.add("/x", b"x", etag=None, last_modified=False)
    first, second = resolve(web(), url), resolve(web(), url)
    assert first.files[0].blob != second.files[0].blob
    assert read(web().open(first.files[0], Extent(0, 1), CancelToken()), 1) == b"x"
    assert not {"if-match", "if-unmodified-since"} & origin.requests[-1].headers.keys()


def test_a_file_that_does_not_say_its_length_is_refused(origin: Origin) -> None:
    url = origin.add("/x", b"x")
    origin.fault("/x", Chunked(), methods=EITHER)
    refused(lambda: resolve(web(), url), "size_unknown")


def test_a_percent_encoded_path_is_decoded_once(origin: Origin) -> None:
    origin.add("/a%20b c", b"x")
    manifest = resolve(web(), f"{origin.url}/a%2520b%20c")
    assert manifest.files[0].path == "a%20b c"
    assert read(web().open(manifest.files[0], Extent(0, 1), CancelToken()), 1) == b"x"


def test_a_file_that_changes_after_it_was_resolved_is_changed(origin: Origin) -> None:
    url = origin.add("/x", b"old")
    file = resolve(web(), url).files[0]
    origin.fault("/x", ChangeETag("new", b"new"))
    with pytest.raises(Changed):
        web().open(file, Extent(0, 3), CancelToken())


# --- share ---


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A share that holds a model with its sums."""
    safetensors_model(tmp_path / "share/model", shards=2, shard_bytes=20 * KIB, seed=1)
    write_sha256sums(tmp_path / "share/model")
    return tmp_path / "share"


def share(place: Path) -> SharedVolumeSource:
    return SharedVolumeSource(AddressPolicy([f"file://{place}/"]), stall_seconds=PATIENCE_SECONDS)


def test_a_directory_of_a_share_is_all_its_files_with_their_sums(place: Path) -> None:
    expected = digests(place / "model")
    expected.pop("SHA256SUMS")
    manifest = resolve(share(place), f"file://{place}/model")
    assert {f.path: f.digest and f.digest.hex for f in manifest.files} == expected
    assert resolve(share(place), f"file://{place}/model/").revision == manifest.revision


@pytest.mark.parametrize("step", [1 << 20, 777])
def test_an_extent_of_a_share_is_exactly_its_bytes(place: Path, step: int) -> None:
    content = noise(100_000)
    (place / "x").write_bytes(content)
    file = resolve(share(place), f"file://{place}/x").files[0]
    for start, stop in EXTENTS:
        assert (
            read(share(place).open(file, Extent(start, stop), CancelToken()), stop - start, step)
            == content[start:stop]
        )


def test_one_file_of_a_share_has_the_digest_of_its_ref(place: Path) -> None:
    (place / "x").write_bytes(b"x")
    assert resolve(share(place), f"file://{place}/x").files[0].digest is None
    assert resolve(share(place), f"file://{place}/x#sha256={HEX}").files[0].digest == Digest("sha256", HEX)


def test_a_digest_for_a_directory_of_a_share_is_refused_because_nothing_would_check_it(place: Path) -> None:
    with pytest.raises(Invalid):
        resolve(share(place), f"file://{place}/model#sha256={HEX}")


def test_a_file_that_the_sums_of_a_share_list_must_be_there(place: Path) -> None:
    (place / "model/config.json").unlink()
    assert (
        "config.json"
        in refused(lambda: resolve(share(place), f"file://{place}/model"), "file_not_found").detail
    )


def test_what_a_share_does_not_hold_is_not_found(place: Path) -> None:
    assert (
        "mounted" in refused(lambda: resolve(share(place), f"file://{place}/absent"), "file_not_found").hint
    )
    (place / "empty").mkdir()
    refused(lambda: resolve(share(place), f"file://{place}/empty"), "no_files")


def test_links_within_a_share_are_followed(place: Path) -> None:
    (place / "linked").mkdir()
    (place / "linked/config.json").symlink_to("../model/config.json")
    (place / "latest").symlink_to("model")
    file = resolve(share(place), f"file://{place}/linked").files[0]
    assert (
        read(share(place).open(file, Extent(0, file.size), CancelToken()), file.size)
        == (place / "model/config.json").read_bytes()
    )
    assert len(resolve(share(place), f"file://{place}/latest").files) > 2


def test_a_link_that_leaves_a_share_is_refused(place: Path) -> None:
    (place.parent / "outside").mkdir()
    (place.parent / "outside/secret").write_bytes(b"secret")
    (place / "top").symlink_to("../outside")
    (place / "one").symlink_to("../outside/secret")
    (place / "within").mkdir()
    (place / "within/a").symlink_to(place.parent / "outside/secret")
    for name in ("top", "one", "within", "within/a"):
        refused(lambda name=name: resolve(share(place), f"file://{place}/{name}"), "path_refused")
    (place / "below").mkdir()
    (place / "below/dir").symlink_to("../../outside")
    with pytest.raises((Forbidden, Invalid)):
        resolve(share(place), f"file://{place}/below")


def test_a_file_that_became_a_link_out_of_the_share_is_refused(place: Path) -> None:
    (place / "x").write_bytes(b"x")
    file = resolve(share(place), f"file://{place}/x").files[0]
    (place.parent / "secret").write_bytes(b"x")
    (place / "x").unlink()
    (place / "x").symlink_to("../secret")
    refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "path_refused")


def test_a_path_beside_the_allowed_ones_is_refused(place: Path) -> None:
    (place.parent / "share-2").write_bytes(b"x")
    for path in (place.parent / "share-2", Path("/etc/hostname"), place.parent):
        refused(lambda path=path: resolve(share(place), f"file://{path}"), "path_refused")


def test_neither_file_nor_directory_is_refused(place: Path) -> None:
    os.mkfifo(place / "model/pipe")
    refused(lambda: resolve(share(place), f"file://{place}/model"), "unsafe_path")
    refused(lambda: resolve(share(place), f"file://{place}/model/pipe"), "unsafe_path")


@pytest.mark.parametrize("name", [b"\xff.bin", b"a\nb", b"a\\b", "a\u202eb".encode()], ids=ascii)
def test_a_name_that_no_model_may_hold_is_refused(place: Path, name: bytes) -> None:
    Path(os.fsdecode(os.fsencode(place) + b"/model/" + name)).write_bytes(b"x")
    refused(lambda: resolve(share(place), f"file://{place}/model"), "unsafe_path")


CHANGES: dict[str, Callable[[Path], object]] = {
    "longer": lambda path: path.write_bytes(noise(101)),
    "shorter": lambda path: os.truncate(path, 50),
    "as long, written again": lambda path: (path.write_bytes(noise(100, 2)), os.utime(path, (1e9, 1e9))),
    "another file under its name": lambda path: (
        path.with_name("new").write_bytes(noise(100, 2)),
        path.with_name("new").rename(path),
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_shared_file_that_is_not_what_was_listed_is_changed(
    place: Path, change: Callable[[Path], object]
) -> None:
    (place / "x").write_bytes(noise(100))
    file = resolve(share(place), f"file://{place}/x").files[0]
    change(place / "x")
    with pytest.raises(Changed):
        share(place).open(file, Extent(0, 50), CancelToken())


@pytest.mark.parametrize("change", ["longer", "shorter", "as long, written again"])
def test_a_shared_file_that_changes_while_it_is_read_is_changed(place: Path, change: str) -> None:
    (place / "x").write_bytes(noise(100))
    file = resolve(share(place), f"file://{place}/x").files[0]
    body = share(place).open(file, Extent(0, 100), CancelToken())
    assert body.readinto(memoryview(bytearray(50))) == 50
    CHANGES[change](place / "x")
    with pytest.raises(Changed):
        read(body, 50)


def test_a_shared_file_that_vanished_is_not_found(place: Path) -> None:
    (place / "x").write_bytes(b"x")
    file = resolve(share(place), f"file://{place}/x").files[0]
    (place / "x").unlink()
    refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "file_not_found")


@contextmanager
def as_another_user() -> Iterator[Path]:
    """A directory of a user without rights, who we are meanwhile; as we are where we have none anyway."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        privileged = True
        try:
            os.chown(place, 10001, 10001)
            os.setresuid(10001, 10001, 0)
        except PermissionError:
            privileged = False
        try:
            yield place
        finally:
            if privileged:
                os.setresuid(0, 0, 0)


def test_a_directory_that_may_not_be_listed_ends_the_resolve_and_is_not_left_out() -> None:
    with as_another_user() as place:
        (place / "model/closed").mkdir(parents=True)
        (place / "model/a.bin").write_bytes(b"a")
        (place / "model/closed/b.bin").write_bytes(b"b")
        (place / "model/closed").chmod(0)
        try:
            refused(lambda: resolve(share(place), f"file://{place}/model"), "source_forbidden")
        finally:
            (place / "model/closed").chmod(0o755)


def test_a_file_that_may_not_be_read_is_forbidden() -> None:
    with as_another_user() as place:
        (place / "x").write_bytes(b"x")
        file: File = resolve(share(place), f"file://{place}/x").files[0]
        (place / "x").chmod(0)
        refused(lambda: share(place).open(file, Extent(0, 1), CancelToken()), "source_forbidden")


# --- one source a scheme ---


def sources(hf_endpoint: str = "https://hub.example", s3_endpoint_url: str | None = None) -> Sources:
    return Sources(
        partial(Http, authorities=Authorities()),
        ["127.0.0.0/8"],
        Table(),
        s3_authorities=Authorities(),
        stall_seconds=PATIENCE_SECONDS,
        hf_endpoint=hf_endpoint,
        hf_token=Secret(None),
        s3_endpoint_url=s3_endpoint_url,
        s3_region=None,
    )


REFS = ("hf://org/model", "s3://bucket/x/", "https://host/x", "http://host/x", "file:///share/x")


@pytest.mark.parametrize("ref", REFS)
def test_a_source_is_made_once_however_many_pulls_ask_at_once(ref: str) -> None:
    asked, together = sources(), threading.Barrier(8)

    def ask(_: int) -> Source:
        together.wait(PATIENCE_SECONDS)
        return asked.of(Ref.parse(ref))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1


@pytest.mark.parametrize("endpoints", [{"hf_endpoint": "nowhere://u@h"}, {"s3_endpoint_url": "http://u@h"}])
def test_an_endpoint_that_is_none_is_refused_before_the_first_pull(endpoints: dict[str, str]) -> None:
    refused(lambda: sources(**endpoints), "bad_option")
