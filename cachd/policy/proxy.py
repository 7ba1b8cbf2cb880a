"""Which proxy leads to which origin."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from cachd.errors import Invalid

ENVIRONMENT = "env"  # the value of the option that lets the environment decide
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[A-Za-z0-9._-]+")
_ENTRY = re.compile(
    r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>\*|(?:\*?\.)?[a-z0-9_][a-z0-9._-]*))(?::(?P<port>[0-9]{1,5}))?"
)
_VARIABLES = ("https_proxy", "http_proxy", "all_proxy")


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy that takes CONNECT, in the clear (`http`) or over TLS (`https`).

    `credentials` are the user:password of its URL, if any. Neither `str` nor `repr` shows them.
    """

    scheme: str
    host: str
    port: int
    credentials: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str) -> Self:
        """The proxy of `http://host:port`.

        Raises ValueError, which does not repeat the text: it may hold a password.
        """
        try:
            url = urlsplit(text if "://" in text else f"http://{text}")
            port = url.port
        except ValueError:
            raise ValueError("this is no URL: write http://proxy:3128") from None
        if url.scheme not in _PORTS:
            raise ValueError("cachd speaks to http:// and https:// proxies only: write http://proxy:3128")
        host = url.hostname or ""
        if url.path.strip("/") or url.query or url.fragment or port == 0 or not _is_host(host):
            raise ValueError("write scheme, host and port alone: http://proxy:3128")
        user, at, _ = url.netloc.rpartition("@")
        return cls(url.scheme, host, port or _PORTS[url.scheme], unquote(user) if at else None)

    def __str__(self) -> str:
        return f"{self.scheme}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def _is_host(text: str) -> bool:
    return bool(_HOST.fullmatch(text)) or _address(text) is not None


@dataclass(frozen=True, slots=True)
class Exemption:
    """Origins that are asked without a proxy: a name with its subdomains, or a network; at a port or any."""

    name: str = ""
    network: IPv4Network | IPv6Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, entry: str) -> Self:
        """One entry of NO_PROXY as Go's programs read it.

        `*`, host, .domain (subdomains only, as *.domain), an address or a network, each but the network
        with a port or without; [::1]:443 where the address holds colons. Raises ValueError.
        """
        told = entry.strip().lower()
        with suppress(ValueError):
            return cls(network=ip_network(told, strict=False))
        found = _ENTRY.fullmatch(told)
        if not found:
            raise ValueError("write host, .domain, host:port, 10.1.2.3, 10.0.0.0/8 or *")
        port = int(found["port"]) if found["port"] else None
        with suppress(ValueError):
            return cls(network=ip_network(found["address"] or found["name"]), port=port)
        if found["address"]:
            raise ValueError("write [::1]:443")
        return cls(found["name"].removeprefix("*") or "*", port=port)

    def covers(self, host: str, port: int) -> bool:
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
    """The proxies of one daemon: for https origins, for http origins, and where there is none.

    This node's loopback is never asked of a proxy: there it would be the proxy's own.
    """

    https: Proxy | None = None
    http: Proxy | None = None
    exempt: tuple[Exemption, ...] = ()
    unused: str = ""  # a variable of the environment that names a proxy, when the option asks for none

    @classmethod
    def configured(cls, proxy: str | None, no_proxy: Iterable[str], environ: Mapping[str, str]) -> Self:
        """As the options say; `environ` is asked only when `proxy` is "env". Raises Invalid."""
        told = {name: environ.get(name) or environ.get(name.upper()) for name in _VARIABLES}
        try:
            exempt = tuple(map(Exemption.parse, no_proxy))
            if proxy is None:
                return cls(unused=next((name.upper() for name in _VARIABLES if told[name]), ""))
            if proxy != ENVIRONMENT:
                one = Proxy.parse(proxy)
                return cls(one, one, exempt)
        except ValueError as error:
            raise Invalid(f"proxy or no_proxy is wrong: {error}", code="bad_option") from error
        exempt += tuple(_exemptions(environ.get("no_proxy") or environ.get("NO_PROXY") or ""))
        return cls(_named(told, "https_proxy"), _named(told, "http_proxy"), exempt)

    def of(self, url: SplitResult) -> Proxy | None:
        """The proxy that leads to the origin of `url`; None: it is asked itself."""
        proxy = self.https if url.scheme == "https" else self.http
        host, port = url.hostname or "", url.port or _PORTS.get(url.scheme, 0)
        if proxy is None or _is_loopback(host) or any(each.covers(host, port) for each in self.exempt):
            return None
        return proxy


def _named(told: Mapping[str, str | None], variable: str) -> Proxy | None:
    """The proxy of a variable, or else of ALL_PROXY. Raises Invalid."""
    name = variable if told[variable] else "all_proxy"
    text = told[name]
    try:
        return Proxy.parse(text) if text else None
    except ValueError as error:
        raise Invalid(f"{name.upper()} of the environment is no proxy: {error}", code="bad_option") from error


def _exemptions(text: str) -> Iterable[Exemption]:
    """The entries of NO_PROXY. What is none is passed over, as everybody does."""
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
