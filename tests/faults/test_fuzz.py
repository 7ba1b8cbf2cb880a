"""Generated nonsense where bytes from outside are read: nothing but errors of ours comes out, and in time."""

from __future__ import annotations

import copy
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from cachd.config import load
from cachd.errors import CachdError, Invalid
from cachd.model import Extent, Manifest, Ref, check_path
from cachd.model.leftovers import is_left_out
from cachd.sources import checksums
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.failures import BROKEN, retry_after
from cachd.sources.http import Target
from cachd.sources.http1 import FramedBody, ReceiveBuffer, receive_head
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.source import NoRanges, Source
from cachd.sources.wire import Wire
from cachd.store.catalog import ready_document
from cachd.store.disk_store import DiskStore
from cachd.store.layout import Layout
from tests.fetching import http
from tests.ground.chance import examples
from tests.ground.models import noise
from tests.ground.origin import Reply, Seen, Server
from tests.ground.scripted import Scripted, heard
from tests.ground.stored import CONTENT, FILE, PARTS, left_by_an_earlier_life, publish
from tests.ground.values import COMMIT, SHA256, hostile
from tests.test_manifest import good_paths

DEEP = "[" * 20_000

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**65), 2**65),
    st.floats(),
    hostile,
    st.just([]),
    st.just({}),
    st.sampled_from(["", "0", "-1", "nan", "a" * 5000, "../x", "/x", SHA256, COMMIT, COMMIT[:7], "main"]),
)


def places(told: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document but the whole."""
    if isinstance(told, dict | list):
        for key, value in told.items() if isinstance(told, dict) else enumerate(told):
            yield (*at, key)
            yield from places(value, (*at, key))


@st.composite
def spoiled(draw: st.DrawFn, good: Any) -> str:
    """`good` as JSON after a few of its values were replaced, doubled or taken away."""
    told = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 3))):
        way = draw(st.sampled_from(sorted(places(told), key=repr)))
        within = told
        for step in way[:-1]:
            within = within[step]
        change = draw(st.sampled_from(["replace", "remove", "double"]))
        if change == "replace":
            within[way[-1]] = draw(junk)
        elif change == "remove":
            del within[way[-1]]
        elif isinstance(within, list):
            within.append(copy.deepcopy(within[way[-1]]))
        if not told:
            break
    return json.dumps(told)


@st.composite
def cut_up(draw: st.DrawFn, good: bytes, pieces: tuple[bytes, ...]) -> bytes:
    """`good` with a stretch of it cut out, repeated, or replaced by a piece or by noise."""
    start = draw(st.integers(0, len(good)))
    stop = draw(st.integers(start, min(len(good), start + 40)))
    put = draw(st.sampled_from([b"", good[start:stop] * 2, *pieces]) | st.binary(max_size=20))
    return good[:start] + put + good[stop:]


class Spoken(Server):
    """A server that says what `say` makes of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.say: Callable[[Seen], Reply] = lambda _: Reply.of(404, {})

    def find(self, seen: Seen) -> Reply:
        return self.say(seen)


@pytest.fixture(scope="module")
def spoken() -> Iterator[Spoken]:
    with Spoken() as server:
        yield server


def resolved(source: Source, ref: str) -> Manifest | CachdError:
    """What became of it. Anything but a manifest and an error of ours is raised."""
    try:
        manifest = source.resolve(Ref.parse(ref), CancelToken())
    except CachdError as error:
        json.dumps(error.as_document())
        return error
    assert not any(set(f.path.split("/")) & {"", ".."} for f in manifest.files)
    assert Manifest.from_document(json.loads(json.dumps(manifest.as_document()))) == manifest
    return manifest


# --- listings ---

LISTED = {
    "id": "org/model",
    "modelId": "org/model",
    "sha": COMMIT,
    "private": False,
    "gated": False,
    "tags": [],
    "lastModified": "2026-01-02T03:04:05.000Z",
    "siblings": [
        {"rfilename": "config.json", "size": 12, "blobId": COMMIT},
        {
            "rfilename": "model.safetensors",
            "size": 1000,
            "blobId": COMMIT,
            "lfs": {"sha256": SHA256, "size": 1000, "pointerSize": 130},
        },
    ],
}


@examples(20)
@given(spoiled(LISTED) | st.text(max_size=20))
@example(DEEP)
@example("null")
@example(json.dumps(LISTED).replace("safetensors", "\\ud800"))
def test_a_spoiled_listing_of_a_hub_is_a_manifest_or_an_error_of_ours(spoken: Spoken, told: str) -> None:
    spoken.say = lambda _: Reply.of(200, {"Content-Type": "application/json"}, told.encode(errors="replace"))
    resolved(HubSource(http(stall_seconds=5.0), endpoint=spoken.url, token=Secret(None)), "hf://org/model")


@pytest.mark.parametrize("status", [200, 204, 301, 307, 400, 404, 418, 500])
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Encoding": "gzip"},
        {"Location": "http://["},
        {"Location": "/api/models/org/model"},
        {"X-Error-Code": "\x7f"},
        {"Retry-After": "Thu, 01 Jan 2026 00:00:00 +99999999999999"},
    ],
    ids=str,
)
def test_a_hub_that_answers_oddly_is_an_error_of_ours(
    spoken: Spoken, status: int, headers: dict[str, str]
) -> None:
    spoken.say = lambda _: Reply.of(status, headers, b"\x1f\x8bnot gzip")
    source = HubSource(http(stall_seconds=5.0), endpoint=spoken.url, token=Secret(None))
    assert isinstance(resolved(source, "hf://org/model"), CachdError)


BUCKET_PAGE = b"""<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>bucket</Name><Prefix>m/</Prefix>
<KeyCount>2</KeyCount><MaxKeys>1000</MaxKeys><EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>
<Contents><Key>m/config.json</Key><ETag>&quot;a1&quot;</ETag><Size>12</Size></Contents>
<Contents><Key>m/model.safetensors</Key><ETag>&quot;b2&quot;</ETag><Size>1000</Size></Contents>
</ListBucketResult>"""
HEAD_OF_OBJECT = {"Content-Length": "12", "ETag": '"a1"', "x-amz-checksum-sha256": "AP8A/wD/AP8A/wD/AP8A/wD/"}
XML_PIECES = (b"<", b"&", b"<Key>m/../../etc</Key>", b"<Key>m//x</Key>", b"%2e%2e/", b"%", b"<Key/>", b"\xff")
object_headers = st.fixed_dictionaries(
    {},
    optional={
        "Content-Length": st.sampled_from(["12", "0", "9" * 18, "9" * 30, "-1", "x", "1.5"]),
        "ETag": st.sampled_from(['"a1"', "", 'W/"a1"', "x" * 300]),
        "x-amz-checksum-sha256": st.sampled_from(["AP8=", "!", "a", "A" * 44, "=" * 44, ""]),
        "x-amz-checksum-crc64nvme": st.sampled_from(["AAAAAAAAAAA=", "AAAA", "AAAAAAAAAAA=-2"]),
        "x-amz-checksum-type": st.sampled_from(["FULL_OBJECT", "COMPOSITE", "?"]),
        "Last-Modified": st.sampled_from(["yesterday", "Thu, 99 Jan 2026 00:00:00 GMT"]),
    },
)


@pytest.fixture
def bucket(spoken: Spoken, monkeypatch: pytest.MonkeyPatch) -> BucketSource:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    return BucketSource(http(stall_seconds=5.0), Service(spoken.url, "us-east-1"))


@examples(10)
@given(cut_up(BUCKET_PAGE, XML_PIECES), object_headers)
@example(BUCKET_PAGE, {**HEAD_OF_OBJECT, "x-amz-checksum-sha256": "!"})
@example(BUCKET_PAGE, {"Content-Length": "12"})
@example(BUCKET_PAGE.replace(b"<ETag>&quot;a1&quot;</ETag>", b""), HEAD_OF_OBJECT)
@example(b"not XML", HEAD_OF_OBJECT)
def test_a_spoiled_listing_of_a_bucket_is_a_manifest_or_an_error_of_ours(
    spoken: Spoken, bucket: BucketSource, page: bytes, headers: dict[str, str]
) -> None:
    def say(seen: Seen) -> Reply:
        if seen.method == "HEAD":
            size = headers.get("Content-Length")
            told = {name: value for name, value in headers.items() if name != "Content-Length"}
            length = int(size) if size and size.isdecimal() and len(size) < 19 else 0
            return Reply(200, told, length=length)
        return Reply.of(200, {"Content-Type": "application/xml"}, page)

    spoken.say = say
    resolved(bucket, "s3://bucket/m/")


@examples(20)
@given(st.binary(max_size=200) | cut_up(f"{SHA256}  a/b\n{SHA256} *c\n".encode(), (b"  ", b"\r", b"../")))
@example(f"{SHA256}  ../b\n".encode())
def test_spoiled_sums_are_refused_or_read_as_safe_paths(content: bytes) -> None:
    with suppress(Invalid):
        for path in checksums.parse(content, "sums"):
            assert path
            assert ".." not in path.split("/")


@examples(20)
@given(st.dictionaries(good_paths, st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=5))
@example({"a ": SHA256, " b": SHA256})
def test_sums_survive_their_text(told: dict[str, str]) -> None:
    kept = {path: digits for path, digits in told.items() if is_safe(path) and not is_left_out(path)}
    text = "".join(f"{digits}  {path}\n" for path, digits in kept.items())
    assert {path: digest.hex for path, digest in checksums.parse(text.encode(), "sums").items()} == kept


def is_safe(path: str) -> bool:
    try:
        return bool(check_path(path))
    except Invalid:
        return False


# --- answers of origins ---

VALUES = (
    *("0", "2", "-2", "2, 2", "+2", "0x2", "9" * 30, "", "nan", "bytes 0-1/2", "bytes 0-0/*", "bytes 1-0/2"),
    *('"x"', 'W/"x"', "*", "chunked", "gzip, chunked", "close", "keep-alive", "\xff\xfe", "x" * 70_000),
    *("Thu, 01 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 10000 00:00:00 GMT", "Mon, 1 Jan 1 0:0:0 -0000"),
)
NAMES = (
    *("Content-Length", "Content-Range", "Content-Encoding", "Transfer-Encoding", "ETag", "Last-Modified"),
    *("Connection", "Keep-Alive", "Retry-After", "RateLimit", "Location", "Repr-Digest", "X", "", " X", "X "),
)
STATUS_LINES = (
    *("HTTP/1.1 200 OK", "HTTP/1.1 206 Partial", "HTTP/1.0 200 OK", "HTTP/1.1 100 Continue", "HTTP/1.1 103 "),
    *("HTTP/1.1 204 No", "HTTP/1.1 302 Found", "HTTP/1.1 412 No", "HTTP/1.1 429 Later", "HTTP/1.1 2e2 OK"),
    *("HTTP/1.1 -200 OK", "HTTP/1.1 99999 OK", "HTTP/2 200", "HTTP/ 200", "ICY 200 OK", "", "HTTP/1.1"),
)
BODIES = (
    b"",
    b"ok",
    b"okok",
    b"2\r\nok\r\n0\r\n\r\n",
    b"-5\r\nok" + noise(9000),
    b"0x2\r\nok\r\n0\r\n\r\n",
    b"zz\r\n",
)
heads = st.builds(
    lambda status, lines, body: (
        "\r\n".join([status, *(f"{n}: {v}" for n, v in lines)]).encode("latin-1") + b"\r\n\r\n" + body
    ),
    st.sampled_from(STATUS_LINES),
    st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=5),
    st.sampled_from(BODIES),
)
answers = heads | st.binary(max_size=300) | st.builds(lambda first, then: first + then, heads, heads)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@examples(125)
@given(answers)
@example(b"HTTP/1.1 100 Continue\r\n\r\n" * 500)
@example(b"HTTP/1.1 200 OK\r\n folded before any\r\n\r\n")
def test_the_head_of_an_answer_is_read_or_is_none(told: bytes) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Wire(ours, stall_seconds=5.0) as wire:
        sending = threading.Thread(target=send, args=(theirs, told))
        sending.start()
        try:
            with suppress(*BROKEN):
                head = receive_head(received := ReceiveBuffer(wire))
                body = FramedBody(received, head, "GET")
                assert 200 <= head.status < 1000
                assert body.length is None or body.length >= 0
                assert not any("\n" in str(head.headers.get(name)) for name in NAMES)
        finally:
            wire.abort()
            sending.join()


def send(to: socket.socket, told: bytes) -> None:
    with suppress(OSError):  # nobody reads a head to its end that is none
        to.sendall(told)
        to.shutdown(socket.SHUT_WR)


class Saying:
    """What a server says to every request, then it closes."""

    def __init__(self) -> None:
        self.told = b""
        self._server = Scripted(self._say)

    def __enter__(self) -> Self:
        self.url = self._server.__enter__().url + "/x"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.__exit__(*error)

    def _say(self, connection: socket.socket, _: int) -> None:
        if heard(connection):
            connection.sendall(self.told)
            connection.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def saying() -> Iterator[Saying]:
    with Saying() as server:
        yield server


@examples(25)
@given(answers, st.sampled_from([Extent(0, 2), Extent(0, 1), Extent(1, 2)]))
@example(CHUNKED + b"-5\r\n" + noise(9000), Extent(0, 2))
@example(CHUNKED + b"2\r\nok\r\n0\r\n" + b"X: x\r\n" * 200 + b"\r\n", Extent(0, 2))
def test_an_answer_is_the_bytes_asked_for_or_an_error_of_ours(
    saying: Saying, told: bytes, extent: Extent
) -> None:
    saying.told = told
    over, into = http(stall_seconds=5.0), memoryview(bytearray(64))
    with (
        suppress(CachdError),
        suppress(NoRanges),
        over.open(Target(saying.url, 2), extent, CancelToken()) as body,
    ):
        assert body.readinto(into) == extent.size
    with suppress(CachdError):
        head = over.head(saying.url, CancelToken())
        assert head.size is None or head.size >= 0
    with suppress(CachdError):
        assert len(over.read(saying.url, CancelToken(), at_most=16)) <= 16


dates = st.builds(
    "{}, {} {} {} {}:{}:{} {}".format,
    st.sampled_from(["Thu", "", "Someday"]),
    *([st.integers(-1, 99)]),
    st.sampled_from(["Jan", "Dec", "Foo", "1"]),
    st.sampled_from(["1", "69", "2026", "9999", "99999", "-5"]),
    *([st.integers(-1, 70)] * 3),
    st.sampled_from(["GMT", "+0000", "-0000", "+9999", "+99999999999999", "-99999999999999", "EST", ""]),
)


@examples(100)
@given(dates | st.text(max_size=30) | st.sampled_from(VALUES), st.sampled_from(["", "t=5", "t=" + "9" * 30]))
@example("Thu, 01 Jan 2026 00:00:00 +99999999999999", "")
def test_a_wait_that_an_origin_asks_for_is_finite_or_none(told: str, limit: str) -> None:
    seconds = retry_after({"Retry-After": told, "RateLimit": limit})
    assert seconds is None or (math.isfinite(seconds) and seconds >= 0)


# --- what an earlier life left on the disk ---

lines_of_journals = st.builds(
    "{} {} {}".format,
    st.sampled_from(["0", "4096", "-1", "1e3", "9" * 18, "9" * 30, "", "\u0663"]),
    st.sampled_from(["4096", "8192", "10240", "0", "10241", "x"]),
    st.sampled_from(["0" * 32, "f" * 32, "", "x y"]),
)


@examples(20)
@given(
    st.lists(lines_of_journals | st.text(max_size=20), max_size=5).map("\n".join),
    spoiled({"origin": "o", "size": len(CONTENT), "blob": str(FILE.blob), "validator": None}) | st.none(),
)
@example("", DEEP)
def test_a_spoiled_journal_promises_only_bytes_that_are_there(
    tmp_path_factory: pytest.TempPathFactory, journal: str, about: str | None
) -> None:
    with closing(opened(tmp_path_factory)) as store:
        place = left_by_an_earlier_life(store, PARTS[0])
        if about is not None:
            (place / "about.json").write_text(about)
        with (place / "journal").open("a", encoding="utf-8", errors="replace") as added:
            added.write(journal)
        with closing(store.content.begin(FILE)) as ingest:
            assert ingest.gaps() == [Extent(ingest.resumed, len(CONTENT))]
            assert ingest.resumed in (0, PARTS[0].stop)


def opened(factory: pytest.TempPathFactory) -> DiskStore:
    root = factory.mktemp("fuzz") / "root"
    root.mkdir(mode=0o755)
    return DiskStore(root)


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two published models, closed."""
    store = opened(tmp_path_factory)
    publish(store, {"config.json": b"{}\n", "model.bin": noise(5000)})
    publish(store, {"other.bin": noise(6000, 2)}, "hf://org/other", revision="c" * 40)
    store.close()
    return store.layout.root


READY = {
    "ref": "hf://org/model",
    "name": "org--model",
    "include": [],
    "exclude": [],
    "revision": "a" * 40,
    "manifest": "b" * 32,
    "bytes": 5003,
    "files": 2,
    "verified": True,
    "published_at": "2026-01-02T03:04:05+00:00",
    "path": "models/org--model",
    "file": "models/org--model/model.bin",
    "hub": {"repo": "org/model", "commit": "a" * 40, "revision": "main"},
    "cachd": "0",
}
MANIFEST = {
    "base": "hf://org/model",
    "revision": COMMIT,
    "files": [{"path": "a", "size": 1, "origin": "o", "digest": f"sha256:{SHA256}", "validator": None}],
    "shown": ["hub/models--org--model"],
}


@examples(15)
@given(
    spoiled(READY) | st.text(max_size=10),
    spoiled({"ref": "hf://org/w", "name": "w", "include": [], "exclude": []}) | st.text(max_size=10),
    spoiled(MANIFEST) | st.text(max_size=10),
)
@example(DEEP, DEEP, DEEP)
@example(json.dumps({**READY, "published_at": "0001-01-01T00:00:00+23:59"}), "", "")
@example(json.dumps({**READY, "hub": {"repo": "../../..", "commit": "../..", "revision": "main"}}), "", "")
def test_spoiled_files_of_the_cache_are_passed_over_and_touch_nothing_else(
    ready: Path, told: str, spec: str, manifest: str
) -> None:
    layout = Layout(ready)
    good = json.loads(layout.ready_file("org--other").read_bytes())
    link = layout.model("org--model")
    if link.is_symlink():  # so that the file is believed as far as it goes
        told = told.replace("b" * 32, link.readlink().name)
    outside = {str(path) for path in ready.parent.rglob("*") if ready not in (path, *path.parents)}
    layout.ready_file("org--model").write_text(told, encoding="utf-8", errors="replace")
    layout.pending_file("w").write_text(spec, encoding="utf-8", errors="replace")
    layout.manifest("f" * 32).write_text(manifest, encoding="utf-8", errors="replace")
    with closing(DiskStore(ready)) as store:
        for snapshot in store.names.all():
            json.dumps(ready_document(snapshot))
        list(store.pending.all())
        store.sweep_snapshots()
        names = {snapshot.name for snapshot in store.names.all()}
        assert "org--other" in names
        assert names <= {"org--model", "org--other"}
    assert json.loads(layout.ready_file("org--other").read_bytes()) == good
    assert (layout.model("org--other") / "other.bin").read_bytes() == noise(6000, 2)
    assert {str(path) for path in ready.parent.rglob("*") if ready not in (path, *path.parents)} == outside


# --- the configuration file ---

OPTIONS = {
    "streams": 4,
    "listen": "127.0.0.1:8470",
    "allow": ["10.0.0.0/8"],
    "limit_bytes_per_second": "500MB",
    "source_limits": {"hf": "1MB"},
    "models": [{"ref": "hf://org/model", "name": "m", "include": ["*.json"], "priority": 1}],
}


@examples(10)
@given(
    spoiled(OPTIONS)
    | cut_up(yaml.safe_dump(OPTIONS).encode(), (b"&a *a", b"!!int x", b"? [", b"<<: 1", b"2026-13-99")).map(
        lambda b: b.decode(errors="replace")
    )
)
@example(DEEP[:2000])
@example("streams: 2026-13-99")
@example("1: 2")
@example("allow: '" + DEEP[:2000] + "'")
@example("source_limits: '{" + DEEP[:2000] + "'")
@example("models: [{ref: 'hf://org/model', name: ''}]")
@example('"a\\nb\\e[31m": 1')
@example("".join(f"x{n}:\n" + f"y{n}: 1\n" for n in range(3000)))
@example(f"{'x' * 500_000}: 1")
@example("a: &a [*a]")
def test_a_spoiled_configuration_is_taken_or_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, content: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    file.write_text(content, encoding="utf-8", errors="replace")
    try:
        load(config=file)
    except Invalid as refusal:
        lines = refusal.detail.splitlines()
        assert all(line.startswith((str(file), "and ")) for line in lines), lines
        assert len(lines) <= 51
        assert not any("Input should" in line or "type=" in line for line in lines)
