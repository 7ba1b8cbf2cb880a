"""Decides which clients count as one peer, by their addresses."""

from __future__ import annotations

import ipaddress


def address_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address that a socket names, without its zone; an IPv4 address in IPv6 form as IPv4.

    Raises ValueError for a text that is no address.
    """
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def peer_of(host: str) -> str:
    """The peer of an address: an IPv4 address, or the /64 of an IPv6 address. One machine may have a /64."""
    try:
        address = address_of(host)
    except ValueError:
        return host
    return f"{int(address) >> 64:x}/64" if address.version == 6 else str(address)
