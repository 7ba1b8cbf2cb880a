"""Decides whether a Host header names this daemon.

In DNS rebinding, a page has its own name lead to this node. Its browser then sends that name as Host.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from functools import lru_cache
from ipaddress import ip_address

_LONGEST_HOST = 300  # a DNS name has at most 253 characters (RFC 1035, section 2.3.4); its port follows
# uri-host [":" port] (RFC 9110, section 7.2); an IPv6 address stands in brackets (RFC 3986, section 3.2.2).
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[^\s\[\]:/?#@\\]+))(?::\d*)?", re.ASCII)
_KNOWN_HOSTS = 256  # Host headers whose check is remembered, because probes repeat the same ones


class OwnNames:
    """The names of this daemon: localhost, and `allowed`. An address is safe, because pages have names."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self.allowed = {host.lower() for host in allowed} | {"localhost"}
        self._is_known = lru_cache(_KNOWN_HOSTS)(self._is_own)

    def has(self, host: str) -> bool:
        """Whether a Host header has one of these names, or an IP address."""
        return len(host) <= _LONGEST_HOST and self._is_known(host)

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        name = (found["address"] or found["name"]).lower() if found else ""
        if name in self.allowed:
            return True
        with suppress(ValueError):
            ip_address(name)
            return True
        return False
