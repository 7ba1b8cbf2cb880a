"""Decides who may use the endpoint: by the address of the client, and perhaps by its token of the Hub."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Callers:
    """The clients that the endpoint answers: this node itself, and the networks of `hub_allow`."""

    def __init__(self, networks: Iterable[str]) -> None:
        """Raises ValueError for a text that is no network."""
        self._networks: list[Network] = [ipaddress.ip_network(each) for each in networks]

    def may_connect(self, peer: str) -> bool:
        """Whether a client with this address may ask at all."""
        address = ipaddress.ip_address(peer.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
            address = address.ipv4_mapped
        if address.is_loopback or any(address in network for network in self._networks):
            return True
        return _is_own(address)

    def check(self, repo: str, authorization: str | None) -> None:
        """Raises NotFound if this caller may not know of a repository."""


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether it is an address of this node: only such a one can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True
