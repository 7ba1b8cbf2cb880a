"""What goes through a proxy, and what never does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cachd.errors import Forbidden, Unavailable
from cachd.model import Extent, Ref
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from tests.ground.bucket import Bucket, Metadata, Sts
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Redirect, Tls
from tests.ground.proxied import CREDENTIALS, KIB, MIB, Engines, Nodes, fetched, over, refusal_of
from tests.ground.proxy import Listener, Proxy, named
from tests.ground.s3 import S3Server
from tests.ground.site import until

# --- what goes through it ---


@pytest.mark.parametrize("behind_tls", [False, True], ids=["http proxy", "https proxy"])
@pytest.mark.parametrize("secure", [False, True], ids=["http origin", "https origin"])
def test_every_origin_is_reached_through_every_proxy(behind_tls: bool, secure: bool, tmp_path: Path) -> None:
    content = noise(9 * MIB)
    (tmp_path / "credentials").write_text(f"{CREDENTIALS}\n")
    with (
        Proxy(credentials=CREDENTIALS, tls=Tls() if behind_tls else None) as proxy,
        Origin(tls=Tls(hosts=("origin.test",)) if secure else False) as origin,
    ):
        named(origin, "origin.test")
        url = origin.add("/x", content)
        authorities = tmp_path / "ca.pem"
        files = [proxy.ca_file if behind_tls else None, origin.ca_file]
        authorities.write_text("".join(file.read_text() for file in files if file))
        http = over(
            proxy.url,
            f"{origin.url}/",
            credentials=tmp_path / "credentials",
            ca_file=authorities if behind_tls or secure else None,
        )
        assert http.head(url, CancelToken()).file_size == len(content)
        assert fetched(http, url, len(content)) == content
        http.anew()
        assert http.head(url, CancelToken()).file_size == len(
            content
        )  # closes the kept connection, so that it is logged
        (line,) = until(lambda: proxy.log)
        assert (line.method, line.host) == ("CONNECT", "origin.test")
        assert line.received_bytes > len(content)
        assert not [seen for seen in origin.requests if "proxy-authorization" in seen.headers]


@pytest.fixture
def roles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[Bucket, Sts]]:
    """A bucket, whose keys are given out for a token by another server: both known to the proxy alone."""
    (tmp_path / "token").write_text("of a pod")
    with Bucket() as bucket, Sts(bucket) as sts:
        named(bucket, "s3.test")
        named(sts, "sts.test")
        monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield bucket, sts


def test_all_sources_go_through_the_proxy_and_nothing_beside_it(
    roles: tuple[Bucket, Sts], hub: Hub, node: Nodes, tmp_path: Path
) -> None:
    bucket, sts = roles
    (tmp_path / "credentials").write_text(CREDENTIALS)
    with (
        Proxy(credentials=CREDENTIALS) as proxy,
        Origin() as plain,
        Origin(tls=Tls(hosts=("safe.test",))) as safe,
    ):
        for name, server in {"plain": plain, "safe": safe, "hub": hub, "cdn": hub.cdn}.items():
            named(server, f"{name}.test")
        hub.add("org/m", {"config.json": b"{}", "it.bin": noise(6 * MIB)}, private=True)
        (tmp_path / "hub-token").write_text(hub.token)
        bucket.put("m/it", noise(6 * MIB, 2))
        refs = {
            "plain": plain.add("/plain", noise(6 * MIB, 3)),
            "safe": safe.add("/safe", noise(6 * MIB, 4)),
            "hub": "hf://org/m",
            "bucket": "s3://models/m/",
        }
        running = node(
            proxy=proxy.url,
            proxy_credentials_file=str(tmp_path / "credentials"),
            allow=[f"{plain.url}/", f"{hub.cdn.url}/"],
            ca_file=str(safe.ca_file),
            hf_endpoint=hub.url,
            hf_token_file=str(tmp_path / "hub-token"),
            s3_endpoint_url=bucket.url,
            retries=0,
            streams=4,
        )
        for name, ref in refs.items():
            running.pull(ref, name=name)
            answer = running.ready(name)
            assert answer.status == 200, answer.document
        running.stop()
        names = {"plain.test", "safe.test", "hub.test", "cdn.test", "s3.test", "sts.test"}
        until(lambda: {each.host for each in proxy.log} == names)
        assert {each.method for each in proxy.log} == {"CONNECT"}
        assert sts.tokens == ["of a pod"]
        everywhere = (plain, safe, hub, hub.cdn, bucket, sts)
        seen = [request for server in everywhere for request in server.requests]
        assert not [request for request in seen if "proxy-authorization" in request.headers]
        assert not hub.leaked


def test_a_real_s3_server_believes_what_was_signed_before_the_proxy(
    s3: S3Server, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.reader_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.reader_secret)
    s3.put("models", "behind/it.bin", noise(MIB), checksum="SHA256")
    endpoint = s3.url.replace("127.0.0.1", "s3.test")
    source = BucketSource(over(proxy.url, f"{endpoint}/"), Service(endpoint, s3.region))
    (file,) = source.resolve(Ref.parse("s3://models/behind/"), CancelToken()).files
    with source.open(file, Extent(0, MIB), CancelToken()) as body:
        assert body.readinto(memoryview(bytearray(MIB))) == MIB


def test_the_metadata_service_of_a_machine_is_asked_by_no_proxy(
    listener: Listener, node: Nodes, tmp_path: Path
) -> None:
    with Bucket() as bucket, Metadata() as metadata:
        bucket.put("m/it", noise(KIB))
        env = {"HTTP_PROXY": listener.url, "http_proxy": listener.url, "NO_PROXY": "", "no_proxy": ""}
        env |= {"AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url, "HOME": str(tmp_path)}
        for number, proxy in enumerate(({}, {"proxy": "env"})):
            role = {"sources": [{"prefix": "s3://", "instance_role": True}]}
            running = node(f"node{number}", env=env, s3_endpoint_url=bucket.url, retries=0, **role, **proxy)
            running.pull("s3://models/m/")
            answer = running.ready("m")
            assert answer.status == 200, answer.document
        assert {seen.method for seen in metadata.requests} == {"PUT", "GET"}
    assert listener.heads == []


def test_one_tunnel_serves_all_parts_of_a_stream(origin: Origin, engine: Engines) -> None:
    named(origin, "origin.test")
    url = origin.add("/it", noise(40 * MIB))
    with Listener() as listener:
        engine(streams=2, proxy=listener.url, allow=(f"{origin.url}/",)).pull(url)
        asked = [seen for seen in origin.requests if seen.method == "GET"]
        assert len(asked) >= 8
        assert len(listener.heads) <= 3, "one to ask about it, and one a stream"


def test_a_pull_without_a_daemon_goes_through_the_proxy(proxy: Proxy, origin: Origin, tmp_path: Path) -> None:
    named(origin, "origin.test")
    url = origin.add("/it", noise(MIB))
    node = Node(tmp_path / "root")
    node.root.mkdir(mode=0o755)
    env = {
        "CACHD_PROXY": "env",
        "https_proxy": "http://127.0.0.1:1",
        "HTTP_PROXY": proxy.url,
        "http_proxy": "",
    }
    env |= {"CACHD_ALLOW": f"{origin.url}/", "CACHD_RESERVE_FREE": "0", "NO_PROXY": "", "no_proxy": ""}
    ended = node.cli("pull", url, "--direct", "--root", str(node.root), **env)
    assert ended.returncode == 0, ended.stderr
    assert {each.host for each in until(lambda: proxy.log)} == {"origin.test"}


# --- what never does ---


def test_an_origin_of_no_proxy_is_asked_itself(proxy: Proxy, origin: Origin) -> None:
    named(origin, "127.1")  # this node and the proxy both take it for 127.0.0.1
    url = origin.add("/it", noise(KIB))
    assert over(proxy.url, "127.0.0.0/8", no_proxy=("127.1",)).head(url, CancelToken()).file_size == KIB
    assert over(None, "127.0.0.0/8").head(url, CancelToken()).file_size == KIB
    through = over(proxy.url, "127.0.0.0/8")
    assert through.head(url, CancelToken()).file_size == KIB
    through.anew()
    through.head(url, CancelToken())
    assert [(each.method, each.host) for each in until(lambda: proxy.log)] == [("CONNECT", "127.1")]


def test_names_of_no_proxy_are_not_told_to_the_proxy(listener: Listener, origin: Origin) -> None:
    named(origin, "origin.test")
    url = origin.add("/it", noise(KIB))
    error = refusal_of(
        lambda: over(listener.url, f"{origin.url}/", no_proxy=(".test",)).head(url, CancelToken())
    )
    assert (type(error), error.code) == (Unavailable, "dns_failed")
    assert listener.heads == []


@pytest.mark.parametrize(
    "url",
    [
        *("https://10.0.0.1/x", "https://10.1/x", "https://169.254.169.254/x", "https://2852039166/x"),
        *("https://[fd00::1]/x", "https://[::ffff:10.0.0.1]/x", "https://0x7f.1/x"),
        *("https://10.0.0.1./x", "https://10.0.0.1.2/x", "https://a.0x7f/x", "https://127.0.0.1./x"),
    ],
)
def test_a_private_address_is_refused_though_a_proxy_would_reach_it(listener: Listener, url: str) -> None:
    error = refusal_of(lambda: over(listener.url).head(url, CancelToken()))
    assert (type(error), error.code) == (Forbidden, "private_address")
    assert listener.heads == []


def test_a_redirect_to_a_private_address_is_refused_behind_a_proxy_too(
    listener: Listener, origin: Origin
) -> None:
    named(origin, "origin.test")
    origin.fault("/x", Redirect("https://10.1/latest"), methods=("GET", "HEAD"))
    http = over(listener.url, f"{origin.url}/")
    assert refusal_of(lambda: http.head(f"{origin.url}/x", CancelToken())).code == "private_address"
    assert [head.split()[1] for head in listener.heads] == [urlsplit(origin.url).netloc]


@pytest.mark.parametrize("allow", [(), ("127.0.0.0/8",)])
def test_plain_http_to_a_name_that_only_the_proxy_knows_needs_a_prefix(
    listener: Listener, origin: Origin, allow: tuple[str, ...]
) -> None:
    named(origin, "origin.test")
    url = origin.add("/it", noise(KIB))
    assert refusal_of(lambda: over(listener.url, *allow).head(url, CancelToken())).code == "plaintext_refused"
    assert listener.heads == []
    assert over(listener.url, f"{origin.url}/").head(url, CancelToken()).file_size == KIB


def test_a_kept_tunnel_does_not_lead_to_what_its_prefix_does_not_cover(
    listener: Listener, origin: Origin
) -> None:
    named(origin, "origin.test")
    http = over(listener.url, f"{origin.url}/open/", "10.0.0.0/8")
    assert http.head(origin.add("/open/it", noise(KIB)), CancelToken()).file_size == KIB
    assert refusal_of(lambda: http.head(f"{origin.url}/else", CancelToken())).code == "plaintext_refused"


def test_a_name_that_this_node_cannot_resolve_is_not_looked_up_for_every_tunnel(
    listener: Listener, origin: Origin
) -> None:
    named(origin, "once.test")
    asked: list[object] = []  # of the resolver, which tells the interpreter's audit
    sys.addaudithook(lambda event, args: asked.append(args[0]) if event == "socket.getaddrinfo" else None)
    http = over(listener.url, f"{origin.url}/")
    url = origin.add("/it", noise(KIB), headers={"Connection": "close"})
    for _ in range(3):
        http.head(url, CancelToken())
    assert len(listener.heads) == 3
    assert asked.count("once.test") == 1


def test_the_proxy_learns_nothing_that_is_meant_for_the_origin(listener: Listener, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(CREDENTIALS)
    with Hub(tls=Tls(hosts=("hub.test",))) as hub:
        named(hub, "hub.test")
        hub.add("org/m", {"config.json": b"{}"}, private=True)
        (tmp_path / "token").write_text(hub.token)
        http = over(listener.url, credentials=tmp_path / "credentials", ca_file=hub.ca_file)
        source = HubSource(http, endpoint=hub.url, token=Secret(tmp_path / "token"))
        (file,) = source.resolve(Ref.parse("hf://org/m"), CancelToken()).files
        with source.open(file, Extent(0, 2), CancelToken()) as body:
            assert body.readinto(memoryview(bytearray(2))) == 2
        seen = "\n".join([str(each.headers) for each in hub.requests])
        assert hub.token in seen
        assert "proxy-auth" not in seen.lower()
    told = "\n".join(listener.heads) + listener.passed.decode("latin-1")
    assert hub.token not in told
    assert {head.splitlines()[0] for head in listener.heads} == {
        f"CONNECT {urlsplit(hub.url).netloc} HTTP/1.1"
    }
    assert {line.partition(":")[0] for head in listener.heads for line in head.splitlines()[1:-1]} == {
        "Host",
        "User-Agent",
        "Proxy-Authorization",
    }
