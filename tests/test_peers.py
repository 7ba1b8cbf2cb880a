"""A peer is an IPv4 address or the /64 of an IPv6 address, however a socket writes it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from cachd.policy.peers import address_of, peer_of


@pytest.mark.parametrize(
    ("host", "address", "peer"),
    [
        ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("fe80::1%eth0", "fe80::1", "fe80000000000000/64"),
        ("2001:db8:0:5::1", "2001:db8:0:5::1", "20010db800000005/64"),
        ("2001:db8:0:5:1:2:3:4", "2001:db8:0:5:1:2:3:4", "20010db800000005/64"),
        ("::1", "::1", "0/64"),
    ],
)
def test_an_address_has_a_peer(host: str, address: str, peer: str) -> None:
    assert address_of(host) == ip_address(address)
    assert peer_of(host) == peer


def test_what_is_no_address_is_a_peer_of_its_own() -> None:
    assert peer_of("pod.example") == "pod.example"
    with pytest.raises(ValueError, match="pod"):
        address_of("pod.example")
