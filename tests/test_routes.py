"""A route leads to an origin whose addresses are all allowed, directly or through a proxy."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.proxy import Proxies, Proxy
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import Address
from cachd.sources.names import Names
from cachd.sources.routes import Dialled, Routes
from cachd.sources.secrets import Secret
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from cachd.sources.tunnel import Tunnels
from tests.fetching import PATIENCE_SECONDS
from tests.ground.scripted import Scripted

TIMEOUTS = Timeouts(PATIENCE_SECONDS, PATIENCE_SECONDS)
DIRECT = Proxies()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Node:
    """What a node resolves, and the routes from there."""

    def __init__(self, *allow: str, proxies: Proxies = DIRECT, known: Sequence[str] = ("127.0.0.1",)) -> None:
        self.known, self.asked, self.clock = known, list[tuple[str, int]](), Clock()
        names = Names(PATIENCE_SECONDS, self._resolve)
        tunnels = Tunnels(Secret(None), Authorities(None).context, names, TIMEOUTS)
        policy = AddressPolicy(allow)
        self.routes = Routes(policy, proxies, tunnels, names, TIMEOUTS, clock=self.clock)

    def _resolve(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append((host, port))
        if not self.known:
            raise OSError(f"nobody knows {host}")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (each, port)) for each in self.known]

    def dial(self, url: str) -> Dialled:
        return self.routes.dial(urlsplit(url), CancelToken())

    def refusal(self, url: str) -> CachdError:
        with pytest.raises(CachdError) as refused:
            self.dial(url).wire.close()
        return refused.value


def port_of(server: Scripted) -> int:
    return urlsplit(server.url).port or 0


def silent(connection: socket.socket, _: int) -> None:
    while connection.recv(4096):
        pass


def opening(connection: socket.socket, _: int) -> None:
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    silent(connection, 0)


def test_an_origin_is_dialled_at_an_address_that_was_checked() -> None:
    with Scripted(silent) as server:
        node = Node("127.0.0.0/8")
        dialled = node.dial(f"http://host:{port_of(server)}/x")
        with dialled.wire as wire:
            assert (dialled.addresses, dialled.proxy) == (("127.0.0.1",), "")
            assert wire.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
            assert wire.stall_seconds == PATIENCE_SECONDS
        assert node.asked == [("host", port_of(server))]


def test_one_address_that_is_not_allowed_refuses_the_host() -> None:
    for known in (["127.0.0.1"], ["127.0.0.2", "127.0.0.1"]):
        node = Node("127.0.0.2/32", known=known)
        assert node.refusal("https://host/").code == "private_address"


@pytest.mark.parametrize(
    ("url", "port"), [("http://host/", 80), ("https://host/", 443), ("https://host:80/", 80)]
)
def test_the_port_is_that_of_the_url_or_of_its_scheme(url: str, port: int) -> None:
    node = Node(known=["10.0.0.1"])
    assert node.refusal(url).code == "private_address"
    assert node.asked == [("host", port)]


@pytest.mark.parametrize("unused", ["HTTPS_PROXY", ""])
def test_a_name_that_nobody_knows_hints_at_a_proxy_that_is_not_used(unused: str) -> None:
    node = Node(proxies=Proxies(unused=unused), known=[])
    error = node.refusal("https://host/")
    assert error.code == "dns_failed"
    assert ("HTTPS_PROXY is set, but" in error.hint) is bool(unused)


def test_through_a_proxy_the_addresses_of_a_host_are_checked_if_they_are_known() -> None:
    with Scripted(opening) as server:
        proxy = Proxy("http", "127.0.0.1", port_of(server))
        node = Node("10.0.0.0/8", proxies=Proxies(proxy, proxy), known=["10.0.0.1"])
        dialled = node.dial("https://host/")
        dialled.wire.close()
        assert (dialled.addresses, dialled.proxy) == (("10.0.0.1",), str(proxy))
        assert Node(proxies=Proxies(proxy, proxy), known=["10.0.0.1"]).refusal("https://host/").code == (
            "private_address"
        )


def test_a_name_that_only_the_proxy_knows_is_looked_up_again_after_a_minute() -> None:
    with Scripted(opening) as server:
        proxy = Proxy("http", "127.0.0.1", port_of(server))
        node = Node(proxies=Proxies(proxy, proxy), known=[])
        for seconds, lookups in ((0, 1), (59.9, 1), (0.1, 2), (0, 2)):
            node.clock.now += seconds
            dialled = node.dial("https://host/")
            dialled.wire.close()
            assert (dialled.addresses, dialled.proxy) == ((), str(proxy))
            assert len(node.asked) == lookups
        node.dial("https://other/").wire.close()
        assert len(node.asked) == 3
        assert node.refusal("http://host/").code == "plaintext_refused"
