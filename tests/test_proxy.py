"""Origins that only a proxy reaches: what goes through it, what never does, and what its failures mean."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.config import load
from cachd.errors import CachdError, Forbidden, Invalid, Unavailable
from cachd.model import Extent, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.proxy import Exemption, Proxies
from cachd.policy.proxy import Proxy as Address
from cachd.sources.buckets import Service
from cachd.sources.cancel import CancelToken
from cachd.sources.failures import broken
from cachd.sources.http import Http, Target
from cachd.sources.huggingface import HubSource
from cachd.sources.s3 import BucketSource
from cachd.sources.secrets import Secret
from cachd.sources.source import Body
from cachd.sources.trust import Authorities
from tests.conftest import Engine, spec_of
from tests.ground.bucket import Bucket, Metadata, Sts
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin, Redirect, Tls
from tests.ground.proxy import Listener, Proxy, named
from tests.ground.s3 import S3Server
from tests.ground.scripted import Scripted, black_hole, heard
from tests.ground.site import until

KIB, MIB = 1 << 10, 1 << 20
PATIENCE_SECONDS = 30.0
CREDENTIALS = "node:a password: with/odd+letters"
PUBLIC_BY_NAME = "https://origin.test/x"  # nobody knows the name but the proxy
Nodes = Callable[..., Node]
Engines = Callable[..., Engine]


def over(
    proxy: str | None,
    *allow: str,
    no_proxy: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
    credentials: Path | None = None,
    ca_file: Path | None = None,
    connect_seconds: float = PATIENCE_SECONDS,
    stall_seconds: float = PATIENCE_SECONDS,
) -> Http:
    return Http(
        AddressPolicy(allow),
        stall_seconds=stall_seconds,
        connect_seconds=connect_seconds,
        authorities=Authorities(str(ca_file) if ca_file else None),
        proxies=Proxies.configured(proxy, no_proxy, environ or {}),
        proxy_credentials=Secret(credentials),
    )


def fetched(http: Http, url: str, size: int) -> bytes:
    with http.open(Target(url, size), Extent(0, size), CancelToken()) as body:
        return drained(body, size)


def drained(body: Body, size: int) -> bytes:
    content = bytearray(size)
    view = memoryview(content)
    while view:
        count = body.readinto(view[: 256 * KIB])
        assert count, "the end, too early"
        view = view[count:]
    return bytes(content)


def refusal_of(call: Callable[[], object]) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        call()
    return refusal.value


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    with Proxy() as started:
        yield started


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener() as started:
        yield started


# --- which proxy, and for what ---


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://proxy:3128", "http://proxy:3128"),
        ("https://proxy.corp:3129/", "https://proxy.corp:3129"),
        ("http://proxy", "http://proxy:80"),
        ("https://proxy", "https://proxy:443"),
        ("proxy:3128", "http://proxy:3128"),
        ("http://[::1]:3128", "http://[::1]:3128"),
        ("HTTP://10.0.0.1:3128", "http://10.0.0.1:3128"),
    ],
)
def test_a_proxy_is_a_scheme_a_host_and_a_port(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("socks5://proxy:1080", "http://", "http://proxy:3128/path", "http://proxy:x", "http://proxy:0"),
        *("http://proxy:3128?x=y", "http://a b:3128", "file:///proxy", "http://[::1"),
    ],
)
def test_what_is_no_proxy_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match="http") as refusal:
        Address.parse(text.replace("//", "//user:canary@", 1))
    assert "canary" not in str(refusal.value)
    refused = refusal_of(lambda: load(proxy=text))
    assert (type(refused), refused.code) == (Invalid, "bad_option")


def test_a_password_in_the_option_is_refused_with_a_hint_and_not_shown() -> None:
    refused = refusal_of(lambda: load(proxy="http://user:canary@proxy:3128"))
    assert refused.code == "bad_option"
    assert "proxy_credentials_file" in str(refused)
    assert "canary" not in str(refused)


@pytest.mark.parametrize(
    ("entry", "covered", "not_covered"),
    [
        ("host.corp", ["host.corp", "HOST.corp", "a.host.corp", "host.corp."], ["ahost.corp", "corp"]),
        (".corp", ["host.corp", "a.host.corp"], ["corp", "hostcorp"]),
        ("*.corp", ["host.corp"], ["corp"]),
        ("host", ["host"], ["10.0.0.1"]),
        ("host:8080", ["host:8080", "a.host:8080"], ["host", "host:80"]),
        ("host:443", ["host"], ["host:8080"]),
        ("10.1.2.3", ["10.1.2.3", "10.1.2.3:80"], ["10.1.2.4", "a10.1.2.3"]),
        ("10.1.2.3:80", ["10.1.2.3:80"], ["10.1.2.3"]),
        ("10.0.0.0/8", ["10.1.2.3", "10.9.9.9:80"], ["11.0.0.1", "host"]),
        ("10.1.2.3/8", ["10.9.9.9"], []),
        ("fd00::/8", ["[fd00::1]"], ["[fe80::1]", "10.0.0.1"]),
        ("fd00::1", ["[fd00::1]:8443"], ["[fd00::2]"]),
        ("[fd00::1]:443", ["[fd00::1]"], ["[fd00::1]:80"]),
        ("*", ["host", "10.1.2.3", "[fd00::1]:80"], []),
        ("*:8080", ["host:8080"], ["host"]),
    ],
)
def test_no_proxy_has_the_usual_forms(entry: str, covered: list[str], not_covered: list[str]) -> None:
    proxies = Proxies.configured("http://proxy:3128", [entry], {})
    assert [host for host in covered if proxies.of(urlsplit(f"https://{host}/x"))] == []
    assert [host for host in not_covered if not proxies.of(urlsplit(f"https://{host}/x"))] == []


@pytest.mark.parametrize(
    "entry", ["http://host", "host/path", "", "a b", "10.0.0.0/33", "host:port", "[::1", "::1]", "[host]"]
)
def test_what_no_proxy_cannot_mean_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="write"):
        Exemption.parse(entry)
    assert refusal_of(lambda: load(no_proxy=(entry,))).code == "bad_option"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.9.9.9:80", "[::1]:8080"])
def test_the_loopback_of_this_node_is_never_asked_of_a_proxy(host: str) -> None:
    proxies = Proxies.configured("http://proxy:3128", [], {})
    assert proxies.of(urlsplit(f"http://{host}/x")) is None


ENVIRON = {
    "HTTPS_PROXY": "http://upper:1",
    "https_proxy": "http://user:pass%20word@lower:2",
    "ALL_PROXY": "all:3",
    "NO_PROXY": "direct.corp, 10.0.0.0/8  *,,odd/entry",
}


def test_the_environment_decides_only_when_it_is_asked_to() -> None:
    of = Proxies.configured(
        "env", ["also.corp"], {**ENVIRON, "NO_PROXY": "direct.corp, 10.0.0.0/8,,odd/x"}
    ).of
    secure, plain = of(urlsplit("https://host/")), of(urlsplit("http://host/"))
    assert (str(secure), str(plain)) == ("http://lower:2", "http://all:3")
    assert secure is not None
    assert secure.credentials == "user:pass word"
    assert "pass" not in f"{secure} {secure!r}"
    for host in ("direct.corp", "a.direct.corp", "10.1.2.3", "also.corp", "127.0.0.1"):
        assert of(urlsplit(f"https://{host}/")) is None
    assert Proxies.configured("env", [], ENVIRON).of(urlsplit("https://host/")) is None  # NO_PROXY has a *
    assert Proxies.configured("env", [], {}).of(urlsplit("https://host/")) is None
    assert Proxies.configured(None, [], ENVIRON).of(urlsplit("https://host/")) is None
    assert (
        str(Proxies.configured("http://one:1", [], ENVIRON).of(urlsplit("https://host/"))) == "http://one:1"
    )


def test_a_variable_that_names_no_proxy_is_told_without_its_password() -> None:
    environ = {"ALL_PROXY": "socks5://user:canary@proxy:1080"}
    refused = refusal_of(lambda: Proxies.configured("env", [], environ))
    assert refused.code == "bad_option"
    assert "ALL_PROXY" in str(refused)
    assert "canary" not in str(refused)


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


# --- what its failures mean ---


def test_wrong_credentials_are_final_and_new_ones_are_taken_over(origin: Origin, tmp_path: Path) -> None:
    named(origin, "origin.test")
    url = origin.add("/it", noise(KIB))
    file = tmp_path / "credentials"
    file.write_text("node:canary")
    with Proxy(credentials=CREDENTIALS) as proxy:
        http = over(proxy.url, f"{origin.url}/", credentials=file)
        error = refusal_of(lambda: http.head(url, CancelToken()))
        assert (type(error), error.code, error.facts["proxy_status"]) == (Forbidden, "proxy_auth", 407)
        assert error.withheld["proxy"] == proxy.url
        assert proxy.url not in str(error.as_document())
        assert "origin.test" in error.detail
        assert "proxy_credentials_file" in error.hint
        assert "canary" not in str(error)
        file.write_text(CREDENTIALS)
        assert http.head(url, CancelToken()).file_size == KIB
    assert len(origin.requests) == 1


@pytest.mark.parametrize("content", ["no colon", "user:two\nlines", "user:\x07bell", None])
def test_credentials_that_are_none_are_told_without_their_text(
    listener: Listener, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "credentials"
    if content is not None:
        file.write_text(content)
    error = refusal_of(lambda: over(listener.url, credentials=file).head(PUBLIC_BY_NAME, CancelToken()))
    assert error.code == "bad_secret"
    assert error.withheld["secret"] == str(file)
    assert str(file) not in str(error.as_document())
    assert not content or content not in str(error)
    assert listener.heads == []


REFUSALS = {
    "407": (b"407 Who\r\nProxy-Authenticate: Basic", Forbidden, "proxy_auth"),
    "407 negotiate": (b"407 Who\r\nProxy-Authenticate: Negotiate", Forbidden, "proxy_auth"),
    "403": (b"403 No canary", Forbidden, "proxy_refused"),
    "404": (b"404 No canary", Forbidden, "proxy_refused"),
    "302": (b"302 Found\r\nLocation: https://login.test/?canary", Forbidden, "proxy_refused"),
    "429": (b"429 Slow\r\nRetry-After: 7", Unavailable, "proxy_failed"),
    "502": (b"502 Bad", Unavailable, "proxy_failed"),
    "503": (b"503 Bad\r\nRetry-After: 7", Unavailable, "proxy_failed"),
    "504": (b"504 Late", Unavailable, "proxy_failed"),
}


@pytest.mark.parametrize(("answer", "kind", "code"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_names_the_origin_and_says_whether_it_may_pass(
    listener: Listener, answer: bytes, kind: type[CachdError], code: str, tmp_path: Path
) -> None:
    (tmp_path / "credentials").write_text("user:canary")
    listener.refusal = lambda head: b"HTTP/1.1 " + answer + b"\r\nContent-Length: 6\r\n\r\ncanary"
    error = refusal_of(
        lambda: over(listener.url, credentials=tmp_path / "credentials").head(PUBLIC_BY_NAME, CancelToken())
    )
    assert (type(error), error.code) == (kind, code)
    assert error.withheld["proxy"] == listener.url
    assert listener.url not in str(error.as_document())
    assert "origin.test:443" in error.detail
    assert answer[:3].decode() in error.detail
    assert "canary" not in str(error)
    assert "canary" not in str(error.as_document())
    if b"Retry-After" in answer:
        assert isinstance(error, Unavailable)
        assert error.retry_after == 7
    if b"Negotiate" in answer:
        assert "Basic" in error.hint


NO_PROXIES = {
    "garbage": b"SSH-2.0-canary\r\n\r\n",
    "huge head": b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20) + b"\r\n\r\n",
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    "cut head": b"HTTP/1.1 200 OK\r\nX:",
    "more than a head": b"HTTP/1.1 200 OK\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\ncanary",
}


@pytest.mark.parametrize("answer", NO_PROXIES.values(), ids=NO_PROXIES.keys())
def test_what_does_not_answer_as_a_proxy_is_told(listener: Listener, answer: bytes) -> None:
    listener.refusal = lambda head: answer
    error = refusal_of(lambda: over(listener.url).head(PUBLIC_BY_NAME, CancelToken()))
    assert (type(error), error.code) == (Unavailable, "proxy_protocol")
    assert error.withheld["proxy"] == listener.url
    assert listener.url not in str(error.as_document())
    assert "origin.test:443" in error.detail
    assert "canary" not in str(error)


def hangs(connection: socket.socket, _: int) -> None:
    heard(connection)
    connection.recv(1)


def trickles(connection: socket.socket, _: int) -> None:
    heard(connection)
    connection.settimeout(0.05)
    while True:
        connection.sendall(b"HTTP/1.1 100 Go on\r\n\r\n")
        with suppress(TimeoutError):
            if not connection.recv(1):
                return


@pytest.mark.parametrize("script", [hangs, trickles])
def test_a_proxy_that_does_not_answer_in_time_is_given_up(
    script: Callable[[socket.socket, int], None],
) -> None:
    with Scripted(script) as proxy:
        error = refusal_of(lambda: over(proxy.url, connect_seconds=0.5).head(PUBLIC_BY_NAME, CancelToken()))
    assert (type(error), error.code) == (Unavailable, "proxy_unreachable")
    assert "within 0.5 s" in error.detail
    assert error.withheld["proxy"] == proxy.url
    assert proxy.url not in str(error.as_document())


@pytest.mark.parametrize(
    ("url", "told"),
    [("http://127.0.0.1:1", "refused"), ("http://no-such-proxy.invalid:3128", "cannot be resolved")],
)
def test_a_proxy_that_is_not_there_is_told(url: str, told: str) -> None:
    error = refusal_of(lambda: over(url).head(PUBLIC_BY_NAME, CancelToken()))
    assert (type(error), error.code) == (Unavailable, "proxy_unreachable")
    assert told in error.detail
    assert error.withheld["proxy"] == url
    assert url not in str(error.as_document())
    assert "origin.test:443" in error.detail


def test_an_exchange_that_breaks_behind_a_proxy_does_not_name_it_to_readers() -> None:
    for error in (TimeoutError(), ConnectionResetError("reset"), HTTPException("cut")):
        found = broken(urlsplit("https://origin.test/it"), error, "http://proxy.corp:3128")
        assert "through the proxy" in found.detail
        assert "proxy.corp" not in str(found.as_document())
        assert found.withheld["proxy"] == "http://proxy.corp:3128"


def test_a_proxy_that_takes_no_connection_is_given_up_in_time() -> None:
    with black_hole() as (host, port):
        error = refusal_of(
            lambda: over(f"http://{host}:{port}", connect_seconds=0.5).head(PUBLIC_BY_NAME, CancelToken())
        )
    assert (type(error), error.code) == (Unavailable, "proxy_unreachable")
    assert "within 0.5 s" in error.detail


def test_a_proxy_that_closes_without_an_answer_is_told(listener: Listener) -> None:
    with Scripted(lambda connection, _: None) as proxy:
        error = refusal_of(lambda: over(proxy.url).head(PUBLIC_BY_NAME, CancelToken()))
    assert (type(error), error.code) == (Unavailable, "proxy_unreachable")


def test_a_proxy_by_tls_must_be_who_it_says_and_speak_tls(listener: Listener, tmp_path: Path) -> None:
    with Proxy(tls=Tls()) as proxy:
        error = refusal_of(lambda: over(proxy.url).head(PUBLIC_BY_NAME, CancelToken()))
        assert (type(error), error.code) == (Forbidden, "proxy_untrusted")
    with Proxy(tls=Tls(hosts=("other.test",))) as proxy:
        error = refusal_of(lambda: over(proxy.url, ca_file=proxy.ca_file).head(PUBLIC_BY_NAME, CancelToken()))
        assert (type(error), error.code) == (Forbidden, "proxy_untrusted")
        error = refusal_of(
            lambda: over(proxy.url.replace("https", "http")).head(PUBLIC_BY_NAME, CancelToken())
        )
        assert error.code in ("proxy_protocol", "proxy_unreachable")
    with Scripted(lambda connection, _: connection.sendall(b"HTTP/1.1 400 Bad\r\n\r\n")) as plain:
        error = refusal_of(
            lambda: over(plain.url.replace("http", "https")).head(PUBLIC_BY_NAME, CancelToken())
        )
        assert (type(error), error.code) == (Unavailable, "proxy_protocol")


def test_an_origin_whose_certificate_is_wrong_is_refused_behind_a_proxy_too(
    listener: Listener, tmp_path: Path
) -> None:
    with Origin(tls=Tls(hosts=("other.test",))) as origin:
        named(origin, "origin.test")
        error = refusal_of(
            lambda: over(listener.url, ca_file=origin.ca_file).head(f"{origin.url}/x", CancelToken())
        )
    assert (type(error), error.code) == (Forbidden, "tls_untrusted")


@pytest.mark.parametrize("secure", [False, True], ids=["in the clear", "tls in tls"])
def test_a_proxy_that_dies_in_mid_file_is_dialled_again_and_the_file_goes_on(
    secure: bool, root: Path, engine: Engines, tmp_path: Path
) -> None:
    with (
        Proxy(tls=Tls() if secure else None) as proxy,
        Origin(tls=Tls(hosts=("origin.test",)) if secure else False) as origin,
    ):
        named(origin, "origin.test")
        url = origin.add("/it", noise(24 * MIB))
        hold = origin.hold("/it", after=MIB)
        options: dict[str, Any] = {"proxy": proxy.url, "allow": (f"{origin.url}/",)}
        if origin.ca_file:
            (tmp_path / "ca.pem").write_text(origin.ca_file.read_text() + proxy.ca_file.read_text())
            options["ca_file"] = tmp_path / "ca.pem"
        pulled = engine(streams=1, retries=8, **options).pulls.start(spec_of(url))
        assert pulled is not None
        assert hold.reached.wait(PATIENCE_SECONDS)
        proxy.kill()
        hold.release()
        proxy.start()
        pulled.done.result(PATIENCE_SECONDS)
        assert (root / "models/it/it").read_bytes() == noise(24 * MIB)
        assert origin.bytes_sent("/it") < 48 * MIB


@pytest.fixture
def within(tmp_path: Path) -> Iterator[tuple[Origin, Callable[..., Http]]]:
    """An origin of TLS behind a proxy of TLS, and the way there. Its file /it stops after a MiB."""
    with Proxy(tls=Tls()) as proxy, Origin(tls=Tls(hosts=("origin.test",))) as origin:
        named(origin, "origin.test")
        assert origin.ca_file is not None
        (tmp_path / "ca.pem").write_text(origin.ca_file.read_text() + proxy.ca_file.read_text())
        origin.add("/it", noise(9 * MIB))
        yield origin, partial(over, proxy.url, ca_file=tmp_path / "ca.pem")


def test_tls_in_tls_without_a_byte_is_given_up(within: tuple[Origin, Callable[..., Http]]) -> None:
    origin, way = within
    hold = origin.hold("/it", after=MIB)
    error = refusal_of(lambda: fetched(way(stall_seconds=0.5), f"{origin.url}/it", 9 * MIB))
    assert error.code == "stalled"
    hold.release()


def test_who_waits_within_tls_in_tls_is_cut(within: tuple[Origin, Callable[..., Http]]) -> None:
    origin, way = within
    hold = origin.hold("/it", after=MIB)
    with way().open(Target(f"{origin.url}/it", 9 * MIB), Extent(0, 9 * MIB), CancelToken()) as body:
        cutting = threading.Thread(target=lambda: hold.reached.wait(PATIENCE_SECONDS) and body.abort())
        cutting.start()
        assert isinstance(refusal_of(lambda: drained(body, 9 * MIB)), Unavailable)
        cutting.join()
    hold.release()


def test_a_tunnel_that_breaks_costs_its_part_alone(
    listener: Listener, origin: Origin, root: Path, engine: Engines
) -> None:
    named(origin, "origin.test")
    url = origin.add("/it", noise(24 * MIB))
    listener.cut_after = 10 * MIB
    engine(streams=1, proxy=listener.url, allow=(f"{origin.url}/",)).pull(url)
    assert (root / "models/it/it").read_bytes() == noise(24 * MIB)
    assert origin.bytes_sent("/it") < 30 * MIB


# --- a proxy that is not used ---


def test_an_unknown_name_says_that_a_proxy_of_the_environment_is_not_used() -> None:
    for variable in ("HTTPS_PROXY", "all_proxy"):
        http = over(None, environ={variable: "http://user:canary@proxy:3128"})
        error = refusal_of(lambda http=http: http.head("https://no-such-host.invalid/x", CancelToken()))
        assert error.code == "dns_failed"
        assert variable.upper() in error.hint
        assert "proxy: env" in error.hint
        assert "canary" not in str(error)
    assert (
        "PROXY"
        not in refusal_of(lambda: over(None).head("https://no-such-host.invalid/x", CancelToken())).hint
    )


def test_the_hint_is_there_for_every_source(node: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HTTPS_PROXY": "http://127.0.0.1:1", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    env |= {"AWS_DEFAULT_REGION": "us-east-1"}
    options: dict[str, Any] = {
        "hf_endpoint": "https://hub.invalid",
        "s3_endpoint_url": "https://s3.invalid",
        "retries": 0,
    }
    running = node(env=env, **options)
    refs = {"web": "https://web.invalid/x", "hub": "hf://org/m", "s3": "s3://models/m/"}
    for name, ref in refs.items():
        running.pull(ref, name=name)
    for name in refs:
        answer = running.ready(name)
        assert answer.document["code"] == "dns_failed", answer.document
        assert "HTTPS_PROXY" in answer.document["hint"]
