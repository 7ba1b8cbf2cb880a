"""What an origin may do wrong, and that a pull gets through it or ends with its reason (rows C)."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.server
import json
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import CachdError, Changed, Corrupt, Forbidden, NotFound, Unavailable
from cachd.model import Extent, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.backoff import LONGEST_REQUESTED_SECONDS, LONGEST_SECONDS, delay
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import AHEAD_SECONDS, dial
from cachd.sources.failures import retry_after
from cachd.sources.http import Http, Target
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.source import Source
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from cachd.sources.web import WebSource
from tests.conftest import Engine, spec_of
from tests.ground.bucket import EVERY_METHOD, Bucket, Refused
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import (
    ContentRange,
    Ending,
    Endless,
    Fault,
    LoginPage,
    Origin,
    Reply,
    Reset,
    Saying,
    Seen,
    Short,
    Stall,
    Status,
)
from tests.ground.s3 import S3Server
from tests.ground.scripted import OK, Scripted, black_hole, heard

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 120.0
SOON_SECONDS = 0.3
EITHER = ("GET", "HEAD")
Engines = Callable[..., Engine]


def over(stall_seconds: float = PATIENCE_SECONDS) -> Http:
    return Http(
        AddressPolicy(["127.0.0.0/8"]),
        authorities=Authorities(),
        timeouts=Timeouts(stall_seconds=stall_seconds),
    )


def fetch(http: Http, url: str, size: int, extent: Extent | None = None) -> bytes:
    extent = extent or Extent(0, size)
    content = memoryview(bytearray(extent.size))
    got = 0
    with http.open(Target(url, size), extent, CancelToken()) as body:
        while got < extent.size:
            got += body.readinto(content[got:])
    return bytes(content)


def code_of(call: Callable[[], object]) -> str:
    """What the error that `call` ends in is called."""
    with pytest.raises(CachdError) as refusal:
        call()
    return refusal.value.code


def gets(origin: Origin | Hub, path: str) -> list[Seen]:
    return [seen for seen in origin.requests if seen.method == "GET" and seen.path == path]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def published(root: Path, name: str, file: str | None = None) -> bytes:
    return (root / "models" / name / (file or name)).read_bytes()


def nothing_is_published(root: Path) -> bool:
    return not list((root / "ready").iterdir())


def hub_source(hub: Hub) -> HubSource:
    return HubSource(over(), endpoint=hub.url, token=Secret(None))


def bucket_source(bucket: Bucket | S3Server, http: Http | None = None) -> BucketSource:
    return BucketSource(http or over(), Service(bucket.url, "us-east-1"))


# --- C2: lies about the range ---

RANGES = {
    "no range": "bytes */{size}",
    "nothing at all": "*/*",
    "another unit": "items {start}-{last}/{size}",
    "another end": "bytes {start}-{start}/{size}",
    "two": "bytes {start}-{last}/{size}, bytes 0-1/{size}",
    "a sign": "bytes +{start}-{last}/{size}",
    "empty": "",
}


@pytest.mark.parametrize("said", RANGES.values(), ids=RANGES.keys())
def test_a_part_is_believed_only_with_the_range_that_was_asked_for(origin: Origin, said: str) -> None:
    url = origin.add("/x", noise(100 * KIB))
    origin.fault("/x", ContentRange(said))
    assert code_of(lambda: fetch(over(), url, 100 * KIB, Extent(10, 20))) == "origin_protocol"


# --- C3, C17: bytes that are too few ---


def test_a_part_that_breaks_off_goes_on_where_it_stopped(origin: Origin, root: Path, engine: Engines) -> None:
    content = noise(8 * MIB)
    ref = origin.add("/it", content) + f"#sha256={sha256(content)}"
    origin.fault("/it", Short(at=MIB + 1), times=2)
    engine(streams=1).pull(ref)
    assert published(root, "it") == content
    assert origin.bytes_sent() == 8 * MIB, "not one byte came twice"
    asked = sorted(seen.extent or (0, 8 * MIB) for seen in gets(origin, "/it"))
    assert len({start for start, _ in asked}) == 4, "two parts of 4 MiB, broken off once each or one twice"


@dataclass(frozen=True)
class Ends(Fault):
    """The connection closes after `at` bytes of an answer that says no length, chunked or not."""

    at: int
    is_chunked: bool

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        cut = replace(reply.whole(), length=None).cut(self.at, Ending.CLOSE)
        return cut if self.is_chunked else cut.tagged(Connection="close")


def test_an_answer_without_a_length_that_ends_early_is_not_whole(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(6 * MIB)
    ref = origin.add("/it", content) + f"#sha256={sha256(content)}"
    origin.fault("/it", Ends(MIB, is_chunked=True), times=2)
    engine(streams=1).pull(ref)
    assert published(root, "it") == content


def test_a_connection_that_closes_before_the_end_of_a_file_is_cut_short() -> None:
    def closes(connection: socket.socket, _: int) -> None:
        if heard(connection):
            connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + noise(KIB))

    with Scripted(closes) as server:
        assert code_of(lambda: fetch(over(), f"{server.url}/x", 2 * KIB)) == "ended_early"


# --- C4: 416 ---


def test_a_416_is_a_file_that_changed_and_is_resolved_again(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(24 * MIB)
    ref = origin.add("/it", content)
    running = engine(streams=2)
    origin.fault("/it", Status(416, {"Content-Range": f"bytes */{len(content)}"}), times=1)
    running.pull(ref)
    assert published(root, "it") == content
    asked = [seen for seen in origin.requests if seen.method == "HEAD" or seen.extent == (0, 1)]
    assert [seen.method for seen in asked] == ["HEAD", "GET"], "its size was wrong: then a GET says it"
    other = origin.add("/other", noise(24 * MIB, 2))
    origin.fault("/other", Status(416))
    with pytest.raises(Changed):
        running.pull(other)


# --- C5: coded bytes ---


@pytest.mark.parametrize("coding", ["br", "gzip, identity", "zstd", "aws-chunked,gzip"])
def test_no_coding_is_taken_for_the_bytes(origin: Origin, coding: str) -> None:
    url = origin.add("/x", noise(KIB))
    origin.fault("/x", Saying({"Content_Encoding": coding}), methods=EITHER)
    for call in (
        lambda: fetch(over(), url, KIB),
        lambda: over().head(url, CancelToken()),
        lambda: over().read(url, CancelToken(), at_most=KIB),
    ):
        assert code_of(call) == "content_encoded"


# --- C6: without end ---


def test_an_endless_file_is_cut_at_its_size(origin: Origin, root: Path, engine: Engines) -> None:
    ref = origin.add("/it", noise(MIB))
    origin.fault("/it", Endless())
    assert code_of(lambda: engine(retries=0).pull(ref)) == "origin_protocol"
    assert origin.bytes_sent() < 64 * MIB, "16 MiB that were counted, and what the kernel took in each time"
    assert nothing_is_published(root)


def test_an_endless_listing_is_cut(origin: Origin, hub: Hub, engine: Engines) -> None:
    origin.add("/model/SHA256SUMS", b"# a comment\n")
    origin.fault("/model/SHA256SUMS", Endless())
    hub.add("org/model", {"config.json": b"{}"})
    hub.fault("/api/models/org/model/revision/main", Endless())
    running = engine(retries=0, hf_endpoint=hub.url)
    assert code_of(lambda: running.pull(f"{origin.url}/model/")) == "document_too_large"
    assert code_of(lambda: running.pull("hf://org/model@main")) == "document_too_large"


# --- C9: an object that is overwritten ---


def test_an_object_that_is_overwritten_in_mid_pull_is_resolved_again_and_never_mixed(
    bucket: Bucket, root: Path, engine: Engines
) -> None:
    old, new = noise(24 * MIB, 1), noise(24 * MIB, 2)
    path = bucket.put("m/it", old, etag="old")
    hold = bucket.hold(path, after=2 * MIB)
    running = engine(streams=2, s3_endpoint_url=bucket.url)
    pulled = running.pulls.start(spec_of("s3://models/m/"))
    assert pulled is not None
    assert hold.reached.wait(PATIENCE_SECONDS)
    bucket.put("m/it", new, etag="new")
    hold.release()
    pulled.done.result(PATIENCE_SECONDS)
    assert published(root, "m", "it") == new


def test_a_real_s3_server_tells_that_an_object_was_overwritten(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    source = bucket_source(s3)
    s3.put("overwritten", "m/it", noise(KIB, 1))
    (file,) = source.resolve(Ref.parse("s3://overwritten/m/"), CancelToken()).files
    with source.open(file, Extent(0, KIB), CancelToken()) as body:
        body.readinto(memoryview(bytearray(KIB)))
    s3.put("overwritten", "m/it", noise(KIB, 2))
    with pytest.raises(Changed):
        source.open(file, Extent(0, KIB), CancelToken())


# --- C10: a digest that lies ---


def test_a_digest_that_lies_publishes_nothing(
    origin: Origin, bucket: Bucket, root: Path, engine: Engines
) -> None:
    other = hashlib.sha256(b"other").digest()
    said = base64.b64encode(other).decode()
    ref = origin.add("/it", noise(MIB), headers={"Repr-Digest": f"sha-256=:{said}:"})
    bucket.put("m/it", noise(MIB), x_amz_checksum_sha256=said)
    running = engine(s3_endpoint_url=bucket.url)
    for lied in (ref, "s3://models/m/"):
        with pytest.raises(Corrupt) as refusal:
            running.pull(lied)
        assert refusal.value.facts["expected"] == f"sha256:{other.hex()}"
        assert "twice" in refusal.value.hint, "it came again, and the same"
    assert nothing_is_published(root)


def test_a_digest_of_the_ref_wins_over_one_of_the_answer_that_lies(
    origin: Origin, root: Path, engine: Engines
) -> None:
    said = base64.b64encode(hashlib.sha256(b"other").digest()).decode()
    ref = origin.add("/it", noise(MIB), headers={"Repr-Digest": f"sha-256=:{said}:"})
    engine().pull(f"{ref}#sha256={sha256(noise(MIB))}")
    assert published(root, "it") == noise(MIB)


# --- C12, C13: busy origins ---


def test_a_pull_that_is_told_to_come_back_in_ten_years_holds_up_no_other(
    origin: Origin, root: Path, engine: Engines
) -> None:
    busy = origin.add("/busy", noise(6 * MIB))
    origin.fault("/busy", Status(429, {"Retry-After": "315360000"}))
    running = engine(streams=1, pulls=2)
    waits = running.pulls.start(spec_of(busy))
    with Origin() as other:  # a pause holds for all pulls from the same origin
        running.pull(other.add("/free", noise(6 * MIB, 2)))
    assert published(root, "free") == noise(6 * MIB, 2)
    assert waits is not None
    assert not waits.done.done()
    running.pulls.delete("busy")


DATE = r"\A[A-Z][a-z]{2}, -?[0-9]{1,25} [A-Z][a-z]{2} [0-9]{1,25} [0-9:]{1,12} [+A-Z0-9-]{1,9}\Z"


@given(
    told=st.one_of(
        st.text(max_size=60),
        st.integers().map(str),
        st.from_regex(
            r"\A[A-Z][a-z]{2}, -?[0-9]{1,25} [A-Z][a-z]{2} [0-9]{1,25} [0-9:]{1,12} [+A-Z0-9-]{1,9}\Z"
        ),
    ),
    limit=st.text(max_size=20),
)
def test_whatever_an_origin_says_of_when_to_come_back_the_wait_is_bounded(told: str, limit: str) -> None:
    seconds = retry_after({"Retry-After": told, "RateLimit": limit})
    assert 0 <= delay(1, requested=seconds, chance=0.99) <= LONGEST_REQUESTED_SECONDS + LONGEST_SECONDS


def test_a_year_that_no_calendar_has_is_no_date() -> None:
    assert retry_after({"Retry-After": f"Mon, 01 Jan {'9' * 30} 00:00:00 GMT"}) is None


def test_an_origin_that_breaks_off_again_and_again_is_got_through_as_long_as_bytes_come(
    origin: Origin, root: Path, engine: Engines
) -> None:
    content = noise(8 * MIB)
    ref = origin.add("/it", content) + f"#sha256={sha256(content)}"
    origin.fault("/it", Reset(at=MIB))
    engine(streams=2, retries=1).pull(ref)
    assert published(root, "it") == content
    assert origin.bytes_sent() == 8 * MIB


def test_an_origin_that_is_busy_for_good_is_asked_no_more_often_than_it_may(
    origin: Origin, engine: Engines
) -> None:
    ref = origin.add("/it", noise(6 * MIB))
    origin.fault("/it", Status(503, {"Retry-After": "0"}))
    assert code_of(lambda: engine(streams=1, retries=2).pull(ref)) == "origin_failed"
    assert len(gets(origin, "/it")) <= 2 * 3, "two parts, three tries each"


def test_a_bucket_that_says_slow_down_is_asked_again(bucket: Bucket, root: Path, engine: Engines) -> None:
    path = bucket.put("m/it", noise(6 * MIB))
    for where in ("/models", path):
        bucket.fault(where, Refused(503, "SlowDown"), times=1)
    engine(s3_endpoint_url=bucket.url).pull("s3://models/m/")
    assert published(root, "m", "it") == noise(6 * MIB)


# --- C14: a no is a no ---

NOES = {
    401: (Forbidden, "source_unauthorized"),
    403: (Forbidden, "source_forbidden"),
    404: (NotFound, "file_not_found"),
    410: (NotFound, "file_not_found"),
    451: (Forbidden, "source_forbidden"),
}


@pytest.mark.parametrize(("status", "meaning"), NOES.items())
def test_a_no_ends_the_pull_and_is_not_asked_for_twice(
    origin: Origin, engine: Engines, status: int, meaning: tuple[type[CachdError], str]
) -> None:
    ref = origin.add("/it", noise(24 * MIB))
    origin.fault("/it", Status(status))
    with pytest.raises(meaning[0]) as refusal:
        engine(streams=2).pull(ref)
    assert refusal.value.code == meaning[1]
    extents = [seen.extent for seen in gets(origin, "/it")]
    assert len(extents) == len(set(extents)), "each part was asked for once at the most"


# --- C15: signed links that expire ---


def test_a_link_that_expires_in_the_middle_of_a_file_costs_no_byte(
    hub: Hub, root: Path, engine: Engines
) -> None:
    content = noise(24 * MIB)
    hub.add("org/m", {"it.bin": content})
    hub.link_lifetime_requests = 2
    engine(hf_endpoint=hub.url, streams=2).pull("hf://org/m")
    assert published(root, "org--m", "it.bin") == content
    assert hub.cdn.bytes_sent(hub.cdn_path("org/m", "it.bin")) >= 24 * MIB
    served = [seen.sent for seen in hub.cdn.requests if seen.status in (200, 206)]
    assert sum(served) == 24 * MIB


def test_a_cdn_that_says_403_to_new_links_too_is_believed(hub: Hub, engine: Engines) -> None:
    hub.add("org/m", {"it.bin": noise(24 * MIB)})
    hub.cdn.fault("*", Status(403))
    assert code_of(lambda: engine(hf_endpoint=hub.url, streams=1).pull("hf://org/m")) == "source_forbidden"
    assert len(hub.cdn.requests) <= 2


def test_a_bucket_with_another_clock_says_so(bucket: Bucket, engine: Engines) -> None:
    bucket.put("m/it", noise(MIB))
    bucket.fault("*", Refused(403, "RequestTimeTooSkewed"))
    assert code_of(lambda: engine(s3_endpoint_url=bucket.url).pull("s3://models/m/")) == "clock_skewed"


# --- C16: slow and silent ---


def test_a_stall_near_the_end_costs_only_the_rest(origin: Origin, root: Path, engine: Engines) -> None:
    content = noise(4 * MIB)
    ref = origin.add("/it", content) + f"#sha256={sha256(content)}"
    origin.fault("/it", Stall(at=3_700_000), times=1)
    engine(streams=1, stall_seconds=SOON_SECONDS).pull(ref)
    assert published(root, "it") == content
    assert origin.bytes_sent() == 4 * MIB


def test_a_few_bytes_at_a_time_are_no_progress(origin: Origin, root: Path, engine: Engines) -> None:
    ref = origin.add("/it", noise(MIB))
    origin.fault("/it", Short(at=10))
    assert code_of(lambda: engine(streams=1, retries=3).pull(ref)) == "ended_early"
    assert len(gets(origin, "/it")) == 4
    assert nothing_is_published(root)


# --- C18: pages where a file should be ---


def test_a_login_page_is_no_file_and_no_listing(origin: Origin, hub: Hub, bucket: Bucket) -> None:
    url = origin.add("/it.safetensors", noise(MIB))
    hub.add("org/m", {"config.json": b"{}"})
    bucket.put("m/it", noise(MIB))
    resolves: dict[str, tuple[Source, str]] = {
        "login_page": (WebSource(over()), url),
        "origin_protocol": (hub_source(hub), "hf://org/m"),
        "origin_failed": (bucket_source(bucket), "s3://models/m/"),
    }
    for server in (origin, hub, bucket):
        server.fault("*", LoginPage(), methods=EVERY_METHOD)
    for code, (source, ref) in resolves.items():
        refusal = code_of(lambda source=source, ref=ref: source.resolve(Ref.parse(ref), CancelToken()))
        assert refusal == code
    for server in (origin, hub, bucket):
        server.clear()
    for source, ref in resolves.values():
        assert source.resolve(Ref.parse(ref), CancelToken()).files
    page = origin.add("/page.html", b"<html>", headers={"Content-Type": "text/html"})
    assert WebSource(over()).resolve(Ref.parse(page), CancelToken()).size == 6


NO_LISTINGS = [
    b"[]",
    b"null",
    b'"x"',
    b"{}",
    b'{"id": 1, "siblings": 5}',
    b'{"id": "org/m", "siblings": [1]}',
    b"\xff",
]


@pytest.mark.parametrize("said", NO_LISTINGS, ids=ascii)
def test_an_answer_of_a_hub_that_is_no_listing_is_the_hubs_failure(hub: Hub, said: bytes) -> None:
    hub.add("org/m", {"config.json": b"{}"})
    hub.fault("*", Status(200, {"Content-Type": "application/json"}, said))
    assert (
        code_of(lambda: hub_source(hub).resolve(Ref.parse("hf://org/m"), CancelToken())) == "origin_protocol"
    )


NO_BUCKETS = [
    b"<ListBucketResult><Contents>",
    b"<ListBucketResult><Contents><Key>m/it</Key><Size>x</Size></Contents></ListBucketResult>",
    b"<ListBucketResult><Contents><Size>1</Size></Contents></ListBucketResult>",
]


@pytest.mark.parametrize("said", NO_BUCKETS, ids=ascii)
def test_an_answer_of_a_bucket_that_is_no_listing_is_the_buckets_failure(bucket: Bucket, said: bytes) -> None:
    bucket.fault("/models", Status(200, {"Content-Type": "application/xml"}, said))
    with pytest.raises(Unavailable):
        bucket_source(bucket).resolve(Ref.parse("s3://models/m/"), CancelToken())


# --- C19: files that a CDN does not give whole ---


def test_a_cdn_that_refuses_large_answers_is_asked_for_parts(hub: Hub, root: Path, engine: Engines) -> None:
    content = noise(48 * MIB)
    hub.add("org/m", {"it.bin": content})
    hub.cdn.fault(
        "*", Status(400), when=lambda seen: not seen.extent or seen.extent[1] - seen.extent[0] > 32 * MIB
    )
    engine(hf_endpoint=hub.url).pull("hf://org/m")
    assert published(root, "org--m", "it.bin") == content


# --- C20: mirrors that lag behind ---


def test_a_mirror_that_answers_another_commit_than_the_one_that_was_pinned_is_refused(hub: Hub) -> None:
    old = hub.add("org/m", {"config.json": b"old"})
    new = hub.add("org/m", {"config.json": b"new"})
    stale = hub.find(Seen("GET", f"/api/models/org/m/revision/{old}", "", "blobs=true", {}))
    body = stale.content.read(0, stale.content.size)
    assert json.loads(body)["sha"] == old
    hub.fault(f"/api/models/org/m/revision/{new}", Status(200, {"Content-Type": "application/json"}, body))
    assert (
        code_of(lambda: hub_source(hub).resolve(Ref.parse(f"hf://org/m@{new}"), CancelToken()))
        == "origin_protocol"
    )


def test_a_ready_branch_is_asked_for_again_only_on_demand(hub: Hub, root: Path, engine: Engines) -> None:
    old = hub.add("org/m", {"config.json": b"old"})
    running = engine(hf_endpoint=hub.url)
    running.pull("hf://org/m@main")
    hub.add("org/m", {"config.json": b"new"})
    hub.forget()
    assert running.pull("hf://org/m@main").revision == old
    assert hub.requests == [], "a mirror that lags behind cannot move what is ready"


# --- C23: names and addresses ---


def address(place: tuple[str, int]) -> tuple[int, int, int, str, tuple[str, int]]:
    return (socket.AF_INET, socket.SOCK_STREAM, 0, "", place)


def test_an_address_that_swallows_connections_costs_a_moment_and_not_the_whole_patience() -> None:
    with black_hole() as hole, socket.create_server(("127.0.0.1", 0)) as good:
        with dial([address(hole), address(good.getsockname())], PATIENCE_SECONDS, CancelToken()) as connected:
            assert connected.getpeername() == good.getsockname()
            assert connected.gettimeout() is None
        with pytest.raises(TimeoutError):
            dial([address(hole)] * 8, AHEAD_SECONDS, CancelToken())


def test_an_address_that_refuses_gives_way_to_the_next_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as good:
        gone = socket.create_server(("127.0.0.1", 0))
        refusing = gone.getsockname()
        gone.close()
        nowhere = address(("255.255.255.255", 1))  # no connection to it can even begin
        for first in (address(refusing), nowhere, (999, socket.SOCK_STREAM, 0, "", ("x", 1))):
            with dial([first, address(good.getsockname())], PATIENCE_SECONDS, CancelToken()) as connected:
                assert connected.getpeername() == good.getsockname()
        with pytest.raises(ConnectionRefusedError):
            dial([address(refusing)], PATIENCE_SECONDS, CancelToken())


# --- C24: other servers ---


def test_a_server_of_http_1_0_without_ranges_is_read_by_one_stream(
    tmp_path: Path, root: Path, engine: Engines
) -> None:
    """The standard library's own server: HTTP/1.0, no ranges, no ETag."""
    (tmp_path / "it").write_bytes(noise(24 * MIB))
    kind = functools.partial(QuietFiles, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}/it"
            engine(streams=4).pull(f"{url}#sha256={sha256(noise(24 * MIB))}")
        finally:
            server.shutdown()
            thread.join()
    assert published(root, "it") == noise(24 * MIB)


class QuietFiles(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 http.server names it so
        pass


def test_a_connection_to_the_wrong_server_is_not_used_again() -> None:
    def misdirected(connection: socket.socket, number: int) -> None:
        while heard(connection):
            connection.sendall(OK if number > 1 else b"HTTP/1.1 421 No\r\nContent-Length: 0\r\n\r\n")

    with Scripted(misdirected) as server:
        asking = over()
        assert code_of(lambda: fetch(asking, f"{server.url}/x", 2)) == "origin_failed"
        assert fetch(asking, f"{server.url}/x", 2) == b"ok"
        assert server.accepted == 2


def test_an_origin_that_names_no_ranges_but_serves_them_is_asked_for_them(
    origin: Origin, root: Path, engine: Engines
) -> None:
    ref = origin.add("/it", noise(24 * MIB))
    origin.fault("/it", Saying({"Accept_Ranges": None}), methods=EITHER)
    engine(streams=2).pull(ref)
    assert published(root, "it") == noise(24 * MIB)
    assert all(seen.extent for seen in gets(origin, "/it"))
