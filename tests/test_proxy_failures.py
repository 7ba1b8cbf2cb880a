"""What the failures of a proxy mean, and who is told what."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Forbidden, Unavailable
from cachd.model import Extent
from cachd.sources.cancel import CancelToken
from cachd.sources.failures import broken
from cachd.sources.http import Http, Target
from tests.conftest import spec_of
from tests.ground.models import noise
from tests.ground.origin import Origin, Tls
from tests.ground.proxied import (
    CREDENTIALS,
    KIB,
    MIB,
    PATIENCE_SECONDS,
    PUBLIC_BY_NAME,
    Engines,
    drained,
    fetched,
    over,
    refusal_of,
)
from tests.ground.proxy import Listener, Proxy, named
from tests.ground.scripted import Scripted, black_hole, heard


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
