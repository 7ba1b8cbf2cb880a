"""Buckets where they are: regions, hosts, access points, anonymous ones, and those that are asked too often.

Where no real server knows an oddity, the server is by script: regions, styles of addresses, requester pays,
access points, S3 Express.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from cachd.errors import Cancelled
from cachd.model.bucket import region_of_directory_bucket
from cachd.sources.aws import Keys, endpoint_in
from cachd.sources.buckets import Buckets, Service
from cachd.sources.cancel import CancelToken
from cachd.sources.entries import Entry
from cachd.sources.s3 import BucketSource
from cachd.sources.table import Table
from cachd.sources.throttle import Throttle
from tests.conftest import Engine
from tests.fetching import KIB, PATIENCE_SECONDS, http, refused, resolve
from tests.ground.bucket import Bucket, Refused
from tests.ground.models import noise
from tests.ground.origin import File, Reply, Seen
from tests.ground.proxy import Proxy, named
from tests.ground.s3 import S3Server

Engines = Callable[..., Engine]

MODEL = {"config.json": b"{}", "model.bin": noise(3 * KIB)}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDSCRIPTED")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "said to nobody")
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    with Bucket() as started:
        hold(started)
        yield started


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """It finds every name below .test on loopback, as virtual hosts need."""
    with Proxy() as started:
        yield started


def hold(bucket: Bucket) -> None:
    for path, content in MODEL.items():
        bucket.put(f"m/{path}", content)


def pulled(engine: Engine, root: Path, ref: str = "s3://models/m/") -> dict[str, bytes]:
    engine.pull(ref, name="it")
    view = root / "models/it"
    return {str(p.relative_to(view)): p.read_bytes() for p in view.rglob("*") if p.is_file()}


def regions_of(seen: list[Seen]) -> list[str]:
    """The region that each request was signed for."""
    signed = [f"{each.headers.get('authorization', '')} {each.query.replace('%2F', '/')}" for each in seen]
    return [text.partition("/s3/aws4_request")[0].rpartition("/")[2] for text in signed]


# --- regions ---


@pytest.mark.parametrize("configured", [{}, {"s3_region": "ap-south-1"}], ids=["no region", "another region"])
@pytest.mark.parametrize(
    ("names_region", "slash"), [(True, "/"), (False, "/"), (False, "")], ids=["body", "header", "HEAD"]
)
@pytest.mark.parametrize("moved", [400, 301, 307])
def test_a_bucket_is_followed_to_its_region_and_signed_for_there(
    bucket: Bucket,
    engine: Engines,
    root: Path,
    moved: int,
    names_region: bool,
    configured: dict[str, str],
    slash: str,
) -> None:
    bucket.ways.region, bucket.ways.moved, bucket.ways.names_region = "eu-west-3", moved, names_region
    running = engine(s3_endpoint_url=bucket.url, retries=0, **configured)
    assert pulled(running, root, f"s3://models/m{slash}") == MODEL
    regions = regions_of(bucket.requests)
    assert regions[0] == configured.get("s3_region", "us-east-1")
    assert set(regions[1:]) == {"eu-west-3"}, "one request told the region"


def test_a_bucket_that_moves_between_a_listing_and_a_download_is_followed(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    """As after a restart: the first request in its region is that of a signed URL."""
    bucket.fault(
        "/models/m/model.bin",
        Refused(400, "AuthorizationQueryParametersError", more="<Region>eu-west-3</Region>"),
        when=lambda seen: regions_of([seen]) != ["eu-west-3"],
    )
    assert pulled(engine(s3_endpoint_url=bucket.url, retries=0), root) == MODEL


def test_an_endpoint_that_does_not_serve_the_region_of_a_bucket_is_named(
    bucket: Bucket, engine: Engines
) -> None:
    bucket.fault("*", Refused(301, "PermanentRedirect", more="<Region>eu-west-3</Region>"))
    error = refused(lambda: engine(s3_endpoint_url=bucket.url).pull("s3://models/m/"), "wrong_region")
    assert "eu-west-3" in error.detail
    assert len(bucket.requests) == 2


@pytest.mark.parametrize("region", ["eu west", "x" * 40, "a/b", "eu-west-3@evil"])
def test_a_region_that_is_none_is_not_signed_for(bucket: Bucket, region: str) -> None:
    bucket.fault("*", Refused(400, "AuthorizationHeaderMalformed", more=f"<Region>{region}</Region>"))
    source = BucketSource(http(), Service(bucket.url))
    refused(lambda: resolve(source, "s3://models/m/"), "origin_failed")
    assert regions_of(bucket.requests) == ["us-east-1"]


def test_an_endpoint_of_aws_becomes_that_of_the_region() -> None:
    assert (
        endpoint_in("https://s3.us-east-1.amazonaws.com", "eu-west-3") == "https://s3.eu-west-3.amazonaws.com"
    )
    assert endpoint_in("https://s3.amazonaws.com/", "eu-west-3") == "https://s3.eu-west-3.amazonaws.com"
    assert endpoint_in("https://s3.dualstack.us-east-1.amazonaws.com", "eu-west-3") == (
        "https://s3.dualstack.eu-west-3.amazonaws.com"
    )
    assert endpoint_in("https://s3.cn-north-1.amazonaws.com.cn", "cn-northwest-1") == (
        "https://s3.cn-northwest-1.amazonaws.com.cn"
    )
    for other in ("https://s3.example.com", "https://s3.us-east-1.amazonaws.com.evil.example", None):
        assert endpoint_in(other, "eu-west-3") == other


# --- the bucket in the path or in the host ---


@pytest.mark.parametrize(
    "code",
    [
        "SecondLevelDomainForbidden",
        "PathStyleDomainForbidden",
        "VirtualHostDomainRequired",
        "InvalidPathAccess",
    ],
)
def test_a_server_that_wants_the_bucket_in_the_host_gets_it_there(
    bucket: Bucket, engine: Engines, root: Path, proxy: Proxy, code: str
) -> None:
    named(bucket, "s3.test")
    bucket.ways.forbids_path = code
    running = engine(s3_endpoint_url=bucket.url, proxy=proxy.url, allow=(), retries=0)
    assert pulled(running, root) == MODEL
    hosts = [seen.headers["host"].partition(":")[0] for seen in bucket.requests]
    assert hosts[0] == "s3.test"
    assert set(hosts[1:]) == {"models.s3.test"}


def test_the_style_of_addresses_can_be_set_for_the_node_and_for_a_prefix(
    bucket: Bucket, engine: Engines, root: Path, proxy: Proxy
) -> None:
    named(bucket, "s3.test")
    bucket.ways.forbids_path = "SecondLevelDomainForbidden"
    common: dict[str, Any] = {"s3_endpoint_url": bucket.url, "proxy": proxy.url, "retries": 0}
    entries = [{"prefix": "s3://models/m/", "addressing": "path"}]
    running = engine(**common, s3_addressing="virtual", sources=entries)
    error = refused(lambda: running.pull("s3://models/m/", name="other"), "wrong_addressing")
    assert "addressing" in error.hint
    bucket.forget()
    assert pulled(running, root, "s3://models/") == {f"m/{path}": content for path, content in MODEL.items()}
    assert {seen.headers["host"].partition(":")[0] for seen in bucket.requests} == {"models.s3.test"}


# --- access points and S3 Express ---

ARN = "arn:aws:s3:eu-west-1:123456789012:accesspoint/models"


@pytest.mark.parametrize(
    ("arn", "host", "region"),
    [
        (ARN, "models-123456789012.s3.test", "eu-west-1"),
        (ARN.replace("point/", "point:"), "models-123456789012.s3.test", "eu-west-1"),
    ],
)
def test_an_access_point_stands_for_its_bucket(
    engine: Engines, root: Path, proxy: Proxy, bucket: Bucket, arn: str, host: str, region: str
) -> None:
    bucket.name = host.removesuffix(".s3.test")
    named(bucket, "s3.test")
    running = engine(s3_endpoint_url=bucket.url, proxy=proxy.url, retries=0)
    assert pulled(running, root, f"s3://{arn}/m/") == MODEL
    assert {seen.headers["host"].partition(":")[0] for seen in bucket.requests} == {host}
    assert set(regions_of(bucket.requests)) == {region}


ZONE = "models--usw2-az1--x-s3"
SESSION = """<CreateSessionResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Credentials>
<SessionToken>of the session</SessionToken><SecretAccessKey>x</SecretAccessKey>
<AccessKeyId>AKIDSESSION</AccessKeyId><Expiration>2099-01-01T00:00:00Z</Expiration>
</Credentials></CreateSessionResult>"""


class Express(Bucket):
    """A bucket of S3 Express One Zone: it answers only to the keys of a session."""

    def find(self, seen: Seen) -> File | Reply:
        if seen.query == "session":
            return Reply.of(200, {"Content-Type": "application/xml"}, SESSION.encode())
        told = (
            seen.headers.get("x-amz-s3session-token")
            or parse_qs(seen.query).get("X-Amz-S3session-Token", [""])[0]
        )
        self.access_keys = {"AKIDSESSION"} if told == "of the session" else set()
        return super().find(seen)


def test_a_bucket_of_s3_express_is_asked_for_a_session_in_the_region_of_its_zone(
    engine: Engines, root: Path, proxy: Proxy, bucket: Bucket
) -> None:
    with Express(ZONE) as express:
        hold(express)
        named(express, "s3express.test")
        running = engine(s3_endpoint_url=express.url, proxy=proxy.url, retries=0)
        assert pulled(running, root, f"s3://{ZONE}/m/") == MODEL
        signed = [seen for seen in express.requests if seen.query == "session"]
        assert "/us-west-2/s3express/" in signed[0].headers["authorization"]


@pytest.mark.parametrize(
    ("zone", "region"),
    [("use1-az4", "us-east-1"), ("apne1-az4", "ap-northeast-1"), ("eun1-az3", "eu-north-1"), ("x-az1", None)],
)
def test_the_zone_of_a_directory_bucket_names_its_region(zone: str, region: str | None) -> None:
    assert region_of_directory_bucket(f"models--{zone}--x-s3") == region


def test_requests_for_a_multi_region_access_point_are_signed_for_all_regions(bucket: Bucket) -> None:
    """No server by script can stand in for its host, which is AWS's own."""
    source = Buckets(http(), Service(), Keys())
    url = source.link("arn:aws:s3::123456789012:accesspoint/abc.mrap", "m/x", None, CancelToken())
    assert url.startswith("https://abc.mrap.accesspoint.s3-global.amazonaws.com/m/x?")
    assert "X-Amz-Algorithm=AWS4-ECDSA-P256-SHA256" in url
    assert "X-Amz-Region-Set=%2A" in url


def test_a_refusal_of_an_access_point_holds_however_its_arn_is_written(
    bucket: Bucket, engine: Engines
) -> None:
    running = engine(sources=[{"prefix": f"s3://{ARN.replace('point/', 'point:')}/", "refuse": True}])
    for ref in (f"s3://{ARN}/m/", f"s3://{ARN.replace('point/', 'point:')}/m/"):
        refused(partial(running.pull, ref, name="it"), "source_refused")


# --- buckets that anybody may read, and buckets whose reader pays ---


def without_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "absent"))


@pytest.mark.parametrize("prefix", ["s3://", "s3://models/", "s3://models/m/"])
def test_a_bucket_is_asked_without_credentials_where_the_configuration_says_so(
    bucket: Bucket, engine: Engines, root: Path, prefix: str
) -> None:
    bucket.ways.is_public, bucket.access_keys = True, set()
    entries = [{"prefix": prefix, "anonymous": True}]
    assert pulled(engine(s3_endpoint_url=bucket.url, sources=entries), root) == MODEL
    assert not [seen for seen in bucket.requests if "AKID" in f"{seen.query} {seen.headers}"]


def test_a_pull_without_credentials_is_told_that_the_bucket_wants_none(
    bucket: Bucket, engine: Engines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    without_credentials(monkeypatch, tmp_path)
    running = engine(s3_endpoint_url=bucket.url)
    error = refused(lambda: running.pull("s3://models/m/"), "source_unauthorized")
    assert "anonymous" in error.hint
    assert "answers without" not in error.hint
    bucket.ways.is_public = True
    error = refused(lambda: running.pull("s3://models/m/"), "source_unauthorized")
    assert "the bucket answers without credentials: give s3://models/ `anonymous: true`" in error.hint


def test_anonymous_and_credentials_exclude_each_other_and_the_longer_prefix_wins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="anonymous sends no credentials"):
        Entry.model_validate({"prefix": "s3://any/", "anonymous": True, "profile": "x"})
    entries = [
        {"prefix": "s3://", "anonymous": True},
        {"prefix": "s3://private/", "profile": "mine"},
        {"prefix": "s3://private/public/", "anonymous": True},
    ]
    table = Table(map(Entry.model_validate, entries))
    assert table.held("s3://any/x/").keys() == {"anonymous"}
    assert table.held("s3://private/x/").keys() == {"profile"}
    assert table.held("s3://private/public/x/").keys() == {"anonymous"}


def test_a_reader_pays_only_where_the_configuration_says_so(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    bucket.ways.is_requester_pays = True
    running = engine(
        s3_endpoint_url=bucket.url, sources=[{"prefix": "s3://models/m/", "requester_pays": True}]
    )
    assert pulled(running, root) == MODEL
    error = refused(lambda: running.pull("s3://models/"), "source_forbidden")
    assert "requester_pays" in error.hint


def test_a_real_server_takes_requests_without_credentials_and_for_a_payer(
    s3: S3Server, engine: Engines, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret_key)
    for path, content in MODEL.items():
        s3.put("payers", f"m/{path}", content)
    entries = [{"prefix": "s3://payers/", "requester_pays": True}]
    running = engine(s3_endpoint_url=s3.url, sources=entries)
    assert pulled(running, root, "s3://payers/m/") == MODEL


# --- too many requests ---


def test_a_bucket_that_says_slow_down_ends_no_resolve_and_no_download(
    bucket: Bucket, engine: Engines, root: Path
) -> None:
    for methods in (["HEAD"], ["GET"]):
        bucket.fault("/models/m/model.bin", Refused(503, "SlowDown"), times=1, methods=methods)
    bucket.fault("/models", Refused(503, "SlowDown"), times=1)
    assert pulled(engine(s3_endpoint_url=bucket.url, retries=1), root) == MODEL
    listings = [seen for seen in bucket.requests if seen.path == "/models"]
    assert len(listings) == 3, "one was refused; none was repeated for a refused HEAD"


def test_a_pause_is_shared_doubles_once_for_what_was_sent_before_it_and_ends_with_an_answer() -> None:
    now = [100.0]
    throttle = Throttle(lambda: now[0])
    assert throttle.wait(CancelToken()) == 100.0
    throttle.refused(100.0)
    first = throttle.seconds_left
    assert first > 0
    for _ in range(16):
        throttle.refused(100.0)  # other pulls, whose requests were on their way
    assert throttle.seconds_left == first
    now[0] += first
    throttle.refused(now[0])
    assert throttle.seconds_left == 2 * first
    now[0] += 2 * first
    throttle.answered()
    throttle.refused(now[0])
    assert throttle.seconds_left == first


def test_a_cancel_ends_the_wait_for_a_pause() -> None:
    throttle = Throttle(lambda: 0.0)  # whose pause never ends by itself
    throttle.refused(0.0)
    cancel_token, ended = CancelToken(), threading.Event()

    def wait() -> None:
        with pytest.raises(Cancelled):
            throttle.wait(cancel_token)
        ended.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    while not cancel_token.is_awaited:
        assert waiting.is_alive()
    cancel_token.cancel()
    assert ended.wait(PATIENCE_SECONDS)
    waiting.join()
