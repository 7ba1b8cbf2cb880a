"""Decides which IP addresses are on the public internet.

cachd has a table of its own, because that of the standard library differs between releases and lacks later
registrations. Sources: the IANA IPv4 and IPv6 Special-Purpose Address Registries (as of 2025-10-09, RFC 6890)
and the IANA IPv4 Multicast and IPv6 Global Unicast registries. Blocks of protocol assignments count as not
public even if a registry calls them globally reachable, because no web server has an address there.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
_REMEMBERED = 4096  # answers for an address

_SPECIAL_V4 = tuple(
    IPv4Network(block)
    for block in (
        "0.0.0.0/8",  # this network, RFC 791
        "10.0.0.0/8",  # private use, RFC 1918
        "100.64.0.0/10",  # shared by carriers, RFC 6598
        "127.0.0.0/8",  # loopback, RFC 1122
        "169.254.0.0/16",  # link local, RFC 3927; metadata services of clouds
        "172.16.0.0/12",  # private use, RFC 1918
        "192.0.0.0/24",  # IETF protocol assignments, RFC 6890
        "192.0.2.0/24",  # documentation, RFC 5737
        "192.88.99.0/24",  # 6to4 relays, deprecated by RFC 7526
        "192.168.0.0/16",  # private use, RFC 1918
        "198.18.0.0/15",  # benchmarks, RFC 2544
        "198.51.100.0/24",  # documentation, RFC 5737
        "203.0.113.0/24",  # documentation, RFC 5737
        "224.0.0.0/4",  # multicast, RFC 5771
        "240.0.0.0/4",  # reserved, RFC 1112; limited broadcast, RFC 8190
    )
)
_UNICAST_V6 = IPv6Network("2000::/3")  # RFC 4291: the only block of global unicast addresses assigned so far
_SPECIAL_V6 = tuple(
    IPv6Network(block)
    for block in (
        "2001::/23",  # IETF protocol assignments, RFC 2928: Teredo, benchmarks, ORCHID
        "2001:db8::/32",  # documentation, RFC 3849
        "2002::/16",  # 6to4, RFC 3056: the embedded IPv4 address decides
        "3fff::/20",  # documentation, RFC 9637
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052: the embedded IPv4 address decides


@lru_cache(maxsize=_REMEMBERED)
def destination(address: Address) -> Address:
    """The address that packets to `address` reach: the IPv4 one inside a mapped, 6to4 or NAT64 address."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFFFFFF)
        return address.ipv4_mapped or address.sixtofour or address
    return address


@lru_cache(maxsize=_REMEMBERED)
def is_public(address: Address) -> bool:
    """Whether `address`, or the IPv4 address embedded in it, is a public one."""
    ends = destination(address)
    if isinstance(ends, IPv4Address):
        return not any(ends in block for block in _SPECIAL_V4)
    return ends in _UNICAST_V6 and not any(ends in block for block in _SPECIAL_V6)
