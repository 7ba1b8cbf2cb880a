"""Decides which proxy to use for an origin, if any."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from cachd.errors import Invalid

ENVIRONMENT = "env"  # the value of the option `proxy` that stands for the environment's variables
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_ENTRY = re.compile(
    r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>\*|(?:\*?\.)?[a-z0-9_][a-z0-9._-]*))(?::(?P<port>[0-9]{1,5}))?"
)
_VARIABLES = ("https_proxy", "http_proxy", "all_proxy")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy for CONNECT (RFC 9110, section 9.3.6), in plain text (`http`) or over TLS (`https`).

    `credentials` is the user:password of its URL, if any. Neither `str` nor `repr` shows it.
    """

    scheme: str
    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `http://host:port`. Raises ValueError without the text: it may contain a password."""
        try:
            url = urlsplit(text if "://" in text else f"http://{text}")
            port = url.port
        except ValueError:
            raise ValueError("this is not a URL: write http://proxy:3128") from None
        if url.scheme not in _PORTS:
            raise ValueError("cachd supports http:// and https:// proxies only: write http://proxy:3128")
        host = url.hostname or ""
        if url.path.strip("/") or url.query or url.fragment or port == 0 or not _is_host(host):
            raise ValueError("write only scheme, host and port: http://proxy:3128")
        user, at, _ = url.netloc.rpartition("@")
        return cls(url.scheme, host, port or _PORTS[url.scheme], unquote(user) if at else None)

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def _is_host(text: str) -> bool:
    return bool(_HOST.fullmatch(text)) or _address(text) is not None


@dataclass(frozen=True, slots=True)
class Exemption:
    """Origins to reach without the proxy: a name with its subdomains, or a network, at one port or any."""

    name: str = ""
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """Read one entry of NO_PROXY as Go programs do (golang.org/x/net/http/httpproxy). Raises ValueError.

        An entry is `*`, a host, .domain or *.domain (subdomains only), an address or a network. All but the
        network may have a port; an IPv6 address with a port is written [::1]:443.
        """
        text = entry.strip().lower()
        with suppress(ValueError):
            return cls(network=ip_network(text, strict=False))
        found = _ENTRY.fullmatch(text)
        if not found:
            raise ValueError("write host, .domain, host:port, 10.1.2.3, 10.0.0.0/8 or *")
        port = int(found["port"]) if found["port"] else None
        with suppress(ValueError):
            return cls(network=ip_network(found["address"] or found["name"]), port=port)
        if found["address"]:
            raise ValueError("write [::1]:443")
        return cls(found["name"].removeprefix("*") or "*", port=port)

    def covers(self, host: str, port: int) -> bool:
        """Whether the origin at `host` and `port` is reached without the proxy."""
        if self.port not in (None, port):
            return False
        if self.network is not None:
            address = _address(host)
            return address is not None and address in self.network
        name = host.lower().rstrip(".")
        if self.name.startswith("."):
            return name.endswith(self.name)
        return self.name == "*" or name == self.name or name.endswith(f".{self.name}")


@dataclass(frozen=True, slots=True)
class Proxies:
    """The proxies of one daemon: one for https origins, one for http origins, and the exempt origins.

    A loopback address is never proxied: at the proxy it would be the proxy's own loopback.
    """

    https: Proxy | None = None
    http: Proxy | None = None
    exempt: tuple[Exemption, ...] = ()
    unused: str = ""  # an environment variable that names a proxy, while the option `proxy` is not set

    @classmethod
    def configured(cls, proxy: str | None, no_proxy: Iterable[str], environ: Mapping[str, str]) -> Self:
        """The proxies of the options, or of `environ` if `proxy` is "env". Raises Invalid."""
        variables = {name: environ.get(name) or environ.get(name.upper()) for name in _VARIABLES}
        try:
            exempt = tuple(map(Exemption.parse, no_proxy))
            if proxy is None:
                return cls(unused=next((name.upper() for name in _VARIABLES if variables[name]), ""))
            if proxy != ENVIRONMENT:
                one = Proxy.parse(proxy)
                return cls(one, one, exempt)
        except ValueError as error:
            raise Invalid(f"proxy or no_proxy is wrong: {error}", code="bad_option") from error
        exempt += tuple(_exemptions(environ.get("no_proxy") or environ.get("NO_PROXY") or ""))
        return cls(_named(variables, "https_proxy"), _named(variables, "http_proxy"), exempt)

    def of(self, url: SplitResult) -> Proxy | None:
        """The proxy to use for the origin of `url`; None to connect to the origin itself."""
        proxy = self.https if url.scheme == "https" else self.http
        host, port = url.hostname or "", url.port or _PORTS.get(url.scheme, 0)
        if proxy is None or _is_loopback(host) or any(each.covers(host, port) for each in self.exempt):
            return None
        return proxy


def _named(variables: Mapping[str, str | None], variable: str) -> Proxy | None:
    """The proxy that a variable names, or else ALL_PROXY. Raises Invalid."""
    name = variable if variables[variable] else "all_proxy"
    text = variables[name]
    try:
        return Proxy.parse(text) if text else None
    except ValueError as error:
        raise Invalid(
            f"the environment variable {name.upper()} names no proxy: {error}", code="bad_option"
        ) from error


def _exemptions(text: str) -> Iterable[Exemption]:
    """The entries of NO_PROXY. Wrong entries are ignored, as in other programs."""
    for entry in re.split(r"[,\s]+", text.strip()):
        with suppress(ValueError):
            yield Exemption.parse(entry)


def _is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower().rstrip(".") == "localhost" if address is None else address.is_loopback


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None
