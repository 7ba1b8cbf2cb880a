"""A tunnel through a proxy: what is asked of it, and what each of its answers means."""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import CachdError, Forbidden, Unavailable
from cachd.policy.proxy import Proxy
from cachd.sources.cancel import CancelToken
from cachd.sources.names import Names
from cachd.sources.secrets import Secret
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from cachd.sources.tunnel import Tunnels
from tests.fetching import PATIENCE_SECONDS
from tests.ground.scripted import Scripted

OPEN = "HTTP/1.1 200 Connection established\r\n\r\n"


def tunnels(credentials: Path | None = None, *, connect_seconds: float = PATIENCE_SECONDS) -> Tunnels:
    timeouts = Timeouts(connect_seconds, PATIENCE_SECONDS)
    names = Names(PATIENCE_SECONDS)
    return Tunnels(Secret(credentials), Authorities(None).context, names, timeouts)


def asked_and(answer: str, asked: list[str]) -> Callable[[socket.socket, int], None]:
    """A proxy that answers so, notes what it was asked, and then sends back what it receives."""

    def script(connection: socket.socket, _: int) -> None:
        seen = b""
        while not seen.endswith(b"\r\n\r\n"):
            seen += connection.recv(4096)
        asked.append(seen.decode())
        connection.sendall(answer.encode())
        while data := connection.recv(4096):
            connection.sendall(data)

    return script


def opened(
    answer: str,
    *,
    host: str = "host",
    user: str = "",
    credentials: Path | None = None,
    scheme: str = "http",
) -> str:
    """What the proxy was asked; the tunnel is open and passes bytes on."""
    asked: list[str] = []
    with Scripted(asked_and(answer, asked)) as server:
        proxy = Proxy.parse(f"{scheme}://{user}{server.url.partition('//')[2]}")
        with tunnels(credentials).open(proxy, host, 443, CancelToken()) as wire:
            assert wire.answer_by is None
            wire.sendall(b"hello")
            assert wire.recv_into(memoryview(bytearray(9))) == 5
    return asked[0]


def refusal(answer: str, **more: str) -> CachdError:
    with pytest.raises(CachdError) as refused:
        opened(answer, **more)  # type: ignore[arg-type]
    assert str(refused.value.withheld["proxy"]).startswith("http")
    return refused.value


@pytest.mark.parametrize(("host", "shown"), [("host", "host:443"), ("::1", "[::1]:443")])
def test_the_proxy_is_asked_for_the_origin_by_its_name(host: str, shown: str) -> None:
    asked = opened(OPEN, host=host).split("\r\n")
    assert asked[:2] == [f"CONNECT {shown} HTTP/1.1", f"Host: {shown}"]
    assert asked[2].startswith("User-Agent: cachd/")
    assert asked[3:] == ["", ""]


@pytest.mark.parametrize(
    ("user", "in_file", "sent"),
    [
        ("u:p@", "", "u:p"),
        ("u@", "", "u:"),
        ("u:p@", "v:q", "v:q"),
        ("", "v:q", "v:q"),
    ],
)
def test_credentials_come_from_the_file_or_else_from_the_url(
    user: str, in_file: str, sent: str, tmp_path: Path
) -> None:
    (tmp_path / "it").write_text(in_file)
    asked = opened(OPEN, user=user, credentials=tmp_path / "it" if in_file else None)
    assert f"\r\nProxy-Authorization: Basic {base64.b64encode(sent.encode()).decode()}\r\n" in asked


@pytest.mark.parametrize("status", ["200 OK", "204 X", "299 X"])
def test_every_success_opens_the_tunnel(status: str) -> None:
    assert opened(f"HTTP/1.1 {status}\r\n\r\n")


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        ("300 X", Forbidden, "proxy_refused"),
        ("403 X", Forbidden, "proxy_refused"),
        ("407 X", Forbidden, "proxy_auth"),
        ("408 X", Unavailable, "proxy_failed"),
        ("425 X", Unavailable, "proxy_failed"),
        ("429 X", Unavailable, "proxy_failed"),
        ("499 X", Forbidden, "proxy_refused"),
        ("500 X", Unavailable, "proxy_failed"),
        ("503 X", Unavailable, "proxy_failed"),
    ],
)
def test_a_refusal_may_pass_or_not_by_its_status(status: str, kind: type[CachdError], code: str) -> None:
    error = refusal(f"HTTP/1.1 {status}\r\nRetry-After: 7\r\n\r\n")
    assert (type(error), error.code, getattr(error, "proxy_status", 0)) == (kind, code, int(status[:3]))
    assert f"answered {status[:3]}" in error.detail
    assert getattr(error, "retry_after", 7.0) == 7.0


def test_a_known_status_has_its_phrase_and_not_that_of_the_proxy() -> None:
    assert (
        "answered 403 (Forbidden) when asked for host:443" in refusal("HTTP/1.1 403 hunter2\r\n\r\n").detail
    )
    assert "answered 499 when asked" in refusal("HTTP/1.1 499 hunter2\r\n\r\n").detail


@pytest.mark.parametrize(
    ("line", "user", "hint"),
    [
        ("", "", "it wants credentials, and none are set"),
        ("", "u:p@", "check proxy_credentials_file"),
        ("Proxy-Authenticate: BASIC realm=x\r\n", "", "it wants credentials"),
        ("Proxy-Authenticate: Negotiate\r\n", "", "does not accept Basic"),
    ],
)
def test_a_proxy_that_wants_credentials_says_which(line: str, user: str, hint: str) -> None:
    assert hint in refusal(f"HTTP/1.1 407 X\r\n{line}\r\n", user=user).hint


@pytest.mark.parametrize(
    "answer", ["SSH-2.0-OpenSSH\r\n\r\n", f"{OPEN}too early", "HTTP/1.1 200 OK\r\nA : b\r\n\r\n"]
)
def test_what_does_not_answer_as_a_proxy_is_none(answer: str) -> None:
    assert refusal(answer).code == "proxy_protocol"


def test_a_proxy_without_tls_is_none_by_https() -> None:
    def script(connection: socket.socket, _: int) -> None:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with Scripted(script) as server:
        proxy = Proxy.parse(server.url.replace("http:", "https:"))
        with pytest.raises(CachdError) as refused:
            tunnels().open(proxy, "host", 443, CancelToken())
    assert refused.value.code == "proxy_protocol"
    assert refused.value.withheld["proxy"] == str(proxy)


def test_a_proxy_that_is_not_there_hangs_up_or_says_nothing_cannot_be_reached() -> None:
    with Scripted(lambda connection, _: None) as server:
        gone = Proxy.parse(server.url)
        with pytest.raises(Unavailable) as refused:
            tunnels().open(gone, "host", 443, CancelToken())
        assert refused.value.code == "proxy_unreachable"
    for proxy in (gone, Proxy.parse("http://nobody.invalid:3128")):
        with pytest.raises(Unavailable) as refused:
            tunnels().open(proxy, "host", 443, CancelToken())
        assert refused.value.code == "proxy_unreachable"
        assert refused.value.withheld["proxy"] == str(proxy)

    def silent(connection: socket.socket, _: int) -> None:
        while connection.recv(4096):
            pass

    with Scripted(silent) as server, pytest.raises(Unavailable) as refused:
        tunnels(connect_seconds=0.1).open(Proxy.parse(server.url), "host", 443, CancelToken())
    assert "no answer within 0.1 s" in refused.value.detail
