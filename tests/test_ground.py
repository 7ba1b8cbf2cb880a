"""The servers of the test ground, proved with real clients."""

import contextlib
import gzip
import hashlib
import http.client
import os
import random
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import huggingface_hub
import pytest
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._http import parse_ratelimit_headers

from cachd.sources.huggingface import ask_over_our_client
from tests.ground import origin as ground
from tests.ground.hub import Hub
from tests.ground.origin import Origin, Server

FILE = random.Random(1).randbytes(300_000)
SIZE = len(FILE)
WEIGHTS = random.Random(2).randbytes(2_500_000)
CONFIG = b'{"architectures": ["Tiny"]}' * 20
FILES = {"config.json": CONFIG, "model.safetensors": WEIGHTS, "unet/tiny.bin": FILE}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        origin.add("/file", FILE)
        yield origin


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    # a list the client would else fetch from the real Hub, whatever `endpoint=` says
    agents = tmp_path / "agents.json"
    agents.write_text('{"standardEnvVars": [], "harnesses": {}}')
    monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(agents))
    # cachd may have been at work in this process: its client asks nobody but for cachd
    huggingface_hub.set_client_factory(lambda: httpx2.Client(follow_redirects=True))
    with Hub() as hub:
        yield hub
    ask_over_our_client.cache_clear()
    ask_over_our_client()  # as it was: other tests of this process have sources that ask over it


@contextlib.contextmanager
def asked(
    server: Server, target: str = "/file", method: str = "GET", **headers: str
) -> Iterator[http.client.HTTPResponse]:
    """The open response to one request; headers as keywords, `If_Match` for If-Match."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    with contextlib.closing(connection):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, target, headers=named)
        yield connection.getresponse()


def answered(
    server: Server, target: str = "/file", **headers: str
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Status, headers and body of one GET."""
    with asked(server, target, **headers) as response:
        return response.status, response.headers, response.read()


# The origin without faults


@pytest.mark.parametrize(
    ("asked_for", "start", "stop"),
    [
        ("bytes=10-19", 10, 20),
        ("bytes=10-", 10, SIZE),
        ("bytes=-10", SIZE - 10, SIZE),
        (f"bytes=10-{SIZE + 5}", 10, SIZE),
    ],
)
def test_a_range_is_206_with_exactly_its_bytes(origin: Origin, asked_for: str, start: int, stop: int) -> None:
    status, headers, body = answered(origin, Range=asked_for)
    assert (status, headers["Content-Range"], body) == (
        206,
        f"bytes {start}-{stop - 1}/{SIZE}",
        FILE[start:stop],
    )
    assert headers["Content-Length"] == str(stop - start)
    (seen,) = origin.requests
    assert (seen.method, seen.path, seen.status, seen.sent) == ("GET", "/file", 206, stop - start)
    assert seen.extent is not None
    assert seen.extent[0] == start


def test_a_range_past_the_end_is_416_with_the_size(origin: Origin) -> None:
    status, headers, body = answered(origin, Range=f"bytes={SIZE}-")
    assert (status, headers["Content-Range"], body) == (416, f"bytes */{SIZE}", b"")


def test_head_announces_what_get_sends(origin: Origin) -> None:
    with asked(origin, method="HEAD") as response:
        head = response.headers
        assert (response.status, response.read()) == (200, b"")
    status, headers, body = answered(origin)
    assert (status, body) == (200, FILE)
    assert dict(head, Date="") == dict(headers, Date="")
    assert head["Accept-Ranges"] == "bytes"
    assert head["Content-Length"] == str(SIZE)
    assert head["Last-Modified"].endswith("GMT")
    assert origin.bytes_sent("/file") == origin.bytes_sent() == SIZE


def test_validators_decide(origin: Origin) -> None:
    etag = answered(origin)[1]["ETag"]
    assert answered(origin, If_Match=etag)[0] == 200
    assert answered(origin, If_Match='"other"')[0] == 412
    assert answered(origin, If_None_Match=f"W/{etag}")[0] == 304
    assert answered(origin, If_Range=etag, Range="bytes=0-4")[0] == 206
    assert answered(origin, If_Range='"other"', Range="bytes=0-4")[::2] == (200, FILE)


def test_a_weak_etag_is_no_proof_for_if_match(origin: Origin) -> None:
    origin.add("/file", FILE, etag='W/"a"')
    assert answered(origin, If_Match='W/"a"')[0] == 412


def test_a_connection_serves_several_requests(origin: Origin) -> None:
    connection = http.client.HTTPConnection(urlsplit(origin.url).netloc, timeout=10)
    with contextlib.closing(connection):
        for status, target in ((200, "/file"), (404, "/none"), (200, "/file")):
            connection.request("GET", target)
            kept = connection.sock
            response = connection.getresponse()
            assert (response.status, response.read() == FILE) == (status, status == 200)
            assert connection.sock is kept


def test_a_file_on_disk_is_served_under_a_name_that_needs_quoting(origin: Origin, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILE)
    url = origin.add("/a b/ü%?", tmp_path / "file", etag=None, headers={"X-Amz-Meta": "1"})
    status, headers, body = answered(origin, url.removeprefix(origin.url))
    assert (status, headers["X-Amz-Meta"], headers["ETag"], body) == (200, "1", None, FILE)
    origin.remove("/a b/ü%?")
    assert answered(origin, url.removeprefix(origin.url))[0] == 404


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_tls_origin_is_trusted_with_its_own_authority_only(host: str) -> None:
    with Origin(tls=True) as origin:
        origin.add("/file", FILE)
        port = urlsplit(origin.url).port
        trusting, wary = ssl.create_default_context(cafile=origin.ca_file), ssl.create_default_context()
        with contextlib.closing(
            http.client.HTTPSConnection(host, port, timeout=10, context=trusting)
        ) as known:
            known.request("GET", "/file")
            assert known.getresponse().read() == FILE
        unknown = http.client.HTTPSConnection(host, port, timeout=10, context=wary)
        with contextlib.closing(unknown), pytest.raises(ssl.SSLCertVerificationError):
            unknown.request("GET", "/file")


def test_rate_paces_every_connection(origin: Origin) -> None:
    origin.rate = 10 * SIZE
    began = time.monotonic()
    assert answered(origin)[2] == FILE
    assert 0.08 < time.monotonic() - began < 1


def test_nothing_is_left_of_a_stopped_origin(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILE)
    threads, descriptors = threading.active_count(), os.listdir("/proc/self/fd")
    with Origin() as origin:
        origin.add("/file", tmp_path / "file")
        with asked(origin) as idle:
            assert idle.read() == FILE
            origin.fault("/file", ground.Stall(5), times=1)
            with asked(origin) as stalled:
                assert stalled.read(5) == FILE[:5]
                hold = origin.hold("/file", after=10)
                with asked(origin) as held:
                    assert hold.reached.wait(10)
                    origin.stop()
                    for response in (stalled, held):
                        with pytest.raises(http.client.IncompleteRead):
                            response.read()
    hold.release()
    assert threading.active_count() == threads
    assert os.listdir("/proc/self/fd") == descriptors


# The origin with faults

PART = FILE[1000:2000]
RANGE = f"bytes 1000-1999/{SIZE}"
PAGE = ground.LoginPage().page


@pytest.mark.parametrize(
    ("fault", "status", "content_range", "length", "body"),
    [
        (ground.Status(503, {"Retry-After": "7"}, b"busy"), 503, None, "4", b"busy"),
        (ground.Redirect("/elsewhere"), 302, None, "5", b"Found"),
        (ground.LoginPage(), 200, None, str(len(PAGE)), PAGE),
        (ground.IgnoreRange(), 200, None, str(SIZE), FILE),
        (ground.Chunked(), 200, None, None, FILE),
        (ground.WrongRange(shift=3), 206, f"bytes 1003-2002/{SIZE}", "1000", FILE[1003:2003]),
        (ground.NoContentRange(), 206, None, "1000", PART),
        (ground.WrongTotal(), 206, f"bytes 1000-1999/{SIZE + 1}", "1000", PART),
        (ground.TooLong(extra=5), 206, RANGE, "1005", FILE[1000:2005]),
        (ground.TooLong(extra=5, length="absent"), 206, RANGE, None, FILE[1000:2005]),
        (ground.Flip(1999), 206, RANGE, "1000", PART[:-1] + bytes([PART[-1] ^ 1])),
        (ground.Flip(2000), 206, RANGE, "1000", PART),
        (ground.Swap(1000, 5000, 500), 206, RANGE, "1000", FILE[5000:5500] + PART[500:]),
        (ground.Trickle(1e6), 206, RANGE, "1000", PART),
        (ground.ChangeETag("new", b"other" * 1000), 206, "bytes 1000-1999/5000", "1000", b"other" * 200),
    ],
    ids=repr,
)
def test_a_fault_does_what_it_says(
    origin: Origin,
    fault: ground.Fault,
    status: int,
    content_range: str | None,
    length: str | None,
    body: bytes,
) -> None:
    origin.fault("/file", fault)
    got_status, headers, got_body = answered(origin, Range="bytes=1000-1999")
    assert (got_status, headers["Content-Range"], headers["Content-Length"]) == (
        status,
        content_range,
        length,
    )
    assert got_body == body
    assert origin.bytes_sent() == len(body)
    origin.clear()
    assert answered(origin, Range="bytes=1000-1999")[::2] == (206, PART)


def test_gzip_codes_the_whole_file(origin: Origin) -> None:
    origin.fault("*", ground.Gzip())
    status, headers, body = answered(origin, Range="bytes=0-9", Accept_Encoding="identity")
    assert (status, headers["Content-Encoding"], headers["Content-Length"]) == (200, "gzip", None)
    assert gzip.decompress(body) == FILE


def test_a_changed_etag_fails_if_match(origin: Origin) -> None:
    etag = answered(origin)[1]["ETag"]
    origin.fault("/file", ground.ChangeETag("new"))
    assert answered(origin, If_Match=etag)[0] == 412
    assert answered(origin, If_Match='"new"')[::2] == (200, FILE)


def test_too_long_at_the_end_of_the_file_is_still_too_long(origin: Origin) -> None:
    origin.fault("/file", ground.TooLong(extra=7))
    body = answered(origin, Range="bytes=-5")[2]
    assert (body[:5], len(body)) == (FILE[-5:], 12)


def test_an_endless_body_goes_on_after_the_file(origin: Origin) -> None:
    origin.fault("/file", ground.Endless())
    with asked(origin) as response:
        assert response.read(SIZE) == FILE
        assert len(response.read(3 * SIZE)) == 3 * SIZE


def test_a_short_body_ends_early(origin: Origin) -> None:
    origin.fault("/file", ground.Short(at=1234))
    with asked(origin) as response, pytest.raises(http.client.IncompleteRead) as cut:
        response.read()
    assert (cut.value.partial, response.headers["Content-Length"]) == (FILE[:1234], str(SIZE))


def test_a_reset_comes_after_exactly_its_bytes(origin: Origin) -> None:
    origin.fault("/file", ground.Reset(at=1234))
    with asked(origin) as response:
        assert response.read(1234) == FILE[:1234]
        with pytest.raises(ConnectionResetError):
            response.read(1)
    assert origin.bytes_sent() == 1234


def test_a_stalled_body_stops_without_an_end(origin: Origin) -> None:
    origin.fault("/file", ground.Stall(at=1234))
    with asked(origin) as response:
        assert response.read(1234) == FILE[:1234]
        connection = response.fp.raw._sock  # type: ignore[attr-defined]  # no public name leads to it
        connection.settimeout(0.05)
        with pytest.raises(TimeoutError):
            response.read(1)


def test_faults_queue_and_run_out(origin: Origin) -> None:
    origin.fault("/file", ground.Status(500), times=2)
    origin.fault("*", ground.Status(501), times=1)
    assert [answered(origin)[0] for _ in range(4)] == [500, 500, 501, 200]


def test_a_fault_meets_only_the_requests_it_is_meant_for(origin: Origin) -> None:
    origin.fault("/file", ground.Status(500), when=lambda seen: seen.extent == (5, 10))
    assert answered(origin, Range="bytes=5-9")[0] == 500
    assert answered(origin, Range="bytes=0-9")[0] == 206
    with asked(origin, method="HEAD") as response:
        assert response.status == 200


def test_a_hold_keeps_a_response_at_its_byte(origin: Origin) -> None:
    hold = origin.hold("/file", after=1000)
    with asked(origin) as first, asked(origin, Range="bytes=-500") as too_short:
        assert too_short.read() == FILE[-500:]
        assert hold.reached.wait(10)
        assert [seen.sent for seen in origin.requests] == [1000, 500]
        hold.release()
        assert first.read() == FILE
    assert answered(origin)[2] == FILE


def test_forget_empties_the_log(origin: Origin) -> None:
    answered(origin)
    origin.forget()
    assert (origin.requests, origin.bytes_sent()) == ([], 0)


# The Hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def snapshot(
    hub: Hub, cache: Path, repo: str = "org/tiny", revision: str = "main", token: str | bool = False
) -> Path:
    """The directory the real client makes of a repository."""
    made = huggingface_hub.snapshot_download(
        repo, revision=revision, token=token, cache_dir=cache, endpoint=hub.url
    )
    return Path(made)


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_the_real_client_gets_exact_bytes_and_names(hub: Hub, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(WEIGHTS)
    commit = hub.add("org/tiny", {**FILES, "model.safetensors": tmp_path / "weights"})
    directory = snapshot(hub, cache, token=hub.token)
    assert (directory.name, content(directory)) == (commit, FILES)
    blobs = {path.name for path in (cache / "models--org--tiny/blobs").iterdir()}
    small = hashlib.sha1(b"blob %d\0" % len(CONFIG) + CONFIG).hexdigest()
    assert blobs == {small, hashlib.sha256(WEIGHTS).hexdigest(), hashlib.sha256(FILE).hexdigest()}
    assert hub.cdn.bytes_sent(hub.cdn_path("org/tiny", "model.safetensors")) == len(WEIGHTS)
    assert hub.cdn.bytes_sent() == len(WEIGHTS) + SIZE
    assert {seen.headers.get("authorization") for seen in hub.requests if seen.path.startswith("/org/")} == {
        f"Bearer {hub.token}"
    }
    assert not hub.leaked


def test_the_real_client_reads_metadata(hub: Hub) -> None:
    commit = hub.add("org/tiny", FILES)
    hub.tag("org/tiny", "v1", commit)
    other = hub.add("org/tiny", {"config.json": b"{}"}, revision="refs/pr/1")
    api = huggingface_hub.HfApi(endpoint=hub.url, token=False)
    model = api.model_info("org/tiny", files_metadata=True)
    assert (model.sha, model.private, model.gated) == (commit, False, False)
    siblings = {sibling.rfilename: sibling for sibling in model.siblings or []}
    assert {name: sibling.size for name, sibling in siblings.items()} == {n: len(b) for n, b in FILES.items()}
    weights = siblings["model.safetensors"].lfs
    assert weights is not None
    assert weights.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    refs = api.list_repo_refs("org/tiny", include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.branches] == [("refs/heads/main", commit)]
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", commit)]
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests or []] == [("refs/pr/1", other)]
    paths = api.get_paths_info("org/tiny", ["unet", "config.json", "none"], revision="v1")
    assert [path.path for path in paths] == ["unet", "config.json"]
    assert api.model_info("org/tiny", revision="refs/pr/1").sha == other


def test_a_tree_comes_in_pages(hub: Hub) -> None:
    hub.add("org/tiny", FILES)
    hub.page_size = 2
    api = huggingface_hub.HfApi(endpoint=hub.url, token=False)
    tree = [entry.path for entry in api.list_repo_tree("org/tiny", recursive=True)]
    assert tree == ["config.json", "model.safetensors", "unet", "unet/tiny.bin"]
    assert len([seen for seen in hub.requests if "/tree/" in seen.path]) == 2
    assert [entry.path for entry in api.list_repo_tree("org/tiny", "unet")] == ["unet/tiny.bin"]
    assert [entry.path for entry in api.list_repo_tree("org/tiny")] == [
        "config.json",
        "model.safetensors",
        "unet",
    ]


def test_head_tells_digest_and_size_before_the_redirect(hub: Hub) -> None:
    commit = hub.add("org/tiny", FILES)
    url = huggingface_hub.hf_hub_url("org/tiny", "model.safetensors", endpoint=hub.url)
    metadata = huggingface_hub.get_hf_file_metadata(url, token=False)
    assert (metadata.etag, metadata.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert metadata.commit_hash == commit
    assert metadata.location.startswith(f"{hub.cdn.url}/")
    assert metadata.xet_file_data is None


def test_a_small_file_is_gzip_coded_when_accepted(hub: Hub) -> None:
    hub.add("org/tiny", FILES)
    target = "/org/tiny/resolve/main/config.json"
    status, headers, body = answered(hub, target, Accept_Encoding="gzip, deflate", Range="bytes=0-9")
    assert (status, headers["Content-Encoding"], gzip.decompress(body)) == (200, "gzip", CONFIG)
    assert answered(hub, target, Accept_Encoding="identity", Range="bytes=0-9")[::2] == (206, CONFIG[:10])


def test_a_moved_branch_gives_its_new_commit_and_old_commits_stay(hub: Hub, cache: Path) -> None:
    old = hub.add("org/tiny", FILES)
    assert snapshot(hub, cache).name == old
    new = hub.add("org/tiny", {"config.json": b"{}"})
    assert content(snapshot(hub, cache)) == {"config.json": b"{}"}
    assert snapshot(hub, cache).name == new != old
    assert content(snapshot(hub, cache / "other", revision=old)) == FILES


def test_a_pull_request_is_a_revision(hub: Hub, cache: Path) -> None:
    hub.add("org/tiny", FILES)
    commit = hub.add("org/tiny", {"config.json": b"{}"}, revision="refs/pr/1")
    assert snapshot(hub, cache, revision="refs/pr/1").name == commit
    assert any("refs%2Fpr%2F1" in seen.target for seen in hub.requests)


def test_a_private_repository_is_there_for_its_token_only(hub: Hub, cache: Path) -> None:
    hub.add("org/tiny", FILES, private=True)
    with pytest.raises(RepositoryNotFoundError):
        snapshot(hub, cache)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        snapshot(hub, cache, token="hf_wrong")
    assert refused.value.response.status_code == 401
    assert content(snapshot(hub, cache, token=hub.token)) == FILES


def test_a_gated_repository_is_there_for_those_on_its_list_only(hub: Hub, cache: Path) -> None:
    hub.add("org/tiny", FILES, gated=True)
    with pytest.raises(GatedRepoError) as refused:
        snapshot(hub, cache)
    assert refused.value.response.status_code == 401
    assert content(snapshot(hub, cache, token=hub.token)) == FILES
    hub.revoke("org/tiny")
    with pytest.raises(GatedRepoError) as refused:
        snapshot(hub, cache / "other", token=hub.token)
    assert refused.value.response.status_code == 403


def test_what_is_missing_is_named(hub: Hub, cache: Path) -> None:
    hub.add("org/tiny", FILES)
    with pytest.raises(RepositoryNotFoundError):
        snapshot(hub, cache, "org/none", token=hub.token)
    with pytest.raises(RevisionNotFoundError):
        snapshot(hub, cache, revision="none")
    with pytest.raises(EntryNotFoundError):
        huggingface_hub.hf_hub_download("org/tiny", "none", endpoint=hub.url, cache_dir=cache, token=False)


def link(hub: Hub) -> str:
    """A freshly signed CDN target of the weights."""
    with asked(hub, "/org/tiny/resolve/main/model.safetensors") as response:
        return response.headers["Location"].removeprefix(hub.cdn.url)


def test_an_expired_link_is_403_and_a_new_one_works(hub: Hub) -> None:
    hub.add("org/tiny", FILES)
    expired = link(hub)
    assert answered(hub.cdn, expired, Range="bytes=5-9")[::2] == (206, WEIGHTS[5:10])
    hub.expire_links()
    assert answered(hub.cdn, expired)[0] == 403
    assert answered(hub.cdn, link(hub))[::2] == (200, WEIGHTS)
    assert answered(hub.cdn, link(hub) + "x")[0] == 403


def test_a_link_lives_as_many_requests_as_it_is_given(hub: Hub) -> None:
    hub.add("org/tiny", FILES)
    hub.link_lifetime_requests = 2
    short_lived = link(hub)
    assert [answered(hub.cdn, short_lived)[0] for _ in range(3)] == [200, 200, 403]


def test_a_token_at_the_cdn_is_refused_and_recorded(hub: Hub) -> None:
    hub.add("org/tiny", FILES)
    assert answered(hub.cdn, link(hub), Authorization=f"Bearer {hub.token}")[0] == 400
    assert [seen.headers["authorization"] for seen in hub.leaked] == [f"Bearer {hub.token}"]


def test_a_throttled_hub_says_when_to_come_back(hub: Hub) -> None:
    hub.add("org/tiny", FILES)
    hub.throttle(1, retry_after=7)
    hub.throttle(1, retry_after=9, style="ratelimit")
    status, headers, _ = answered(hub, "/api/models/org/tiny")
    assert (status, headers["Retry-After"]) == (429, "7")
    status, headers, _ = answered(hub, "/api/models/org/tiny")
    limit = parse_ratelimit_headers(dict(headers))
    assert limit is not None
    assert (status, limit.resource_type, limit.remaining, limit.reset_in_seconds) == (429, "api", 0, 9)
    assert answered(hub, "/api/models/org/tiny")[0] == 200


def test_a_failing_hub_recovers(hub: Hub, cache: Path) -> None:
    hub.add("org/tiny", FILES)
    hub.status(503, times=1)
    with pytest.raises(LocalEntryNotFoundError):
        snapshot(hub, cache)
    assert content(snapshot(hub, cache)) == FILES


def test_the_cdn_takes_the_faults_of_an_origin(hub: Hub, cache: Path) -> None:
    hub.add("org/tiny", FILES)
    hub.cdn.fault(hub.cdn_path("org/tiny", "model.safetensors"), ground.Flip(100))
    got = content(snapshot(hub, cache))["model.safetensors"]
    assert [at for at in range(len(WEIGHTS)) if got[at] != WEIGHTS[at]] == [100]
