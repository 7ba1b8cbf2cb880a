"""Decides which addresses, URLs and paths a source may reach."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Self
from urllib.parse import SplitResult, unquote, urlsplit

from cachd.errors import Forbidden, Invalid
from cachd.policy.addresses import destination, is_public
from cachd.policy.verdicts import NO_VERDICTS, Verdicts

_MAX_REACHABLE = 1024
_REMEMBERED = 1024  # hosts of URLs, and addresses in them
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class AddressPolicy:
    """The policy of the option `allow`: what sources may reach besides public addresses by https.

    Private, loopback, link-local and other special addresses, plain http and local paths may be reached only
    where an entry of `allow` covers them. An entry is a network (`10.0.0.0/8`) or a URL prefix
    (`http://minio.storage:9000/models/`, `file:///mnt/share/`). `verdicts` can refuse a URL that an entry
    covers.
    """

    def __init__(self, allow: Iterable[str], *, verdicts: Verdicts = NO_VERDICTS) -> None:
        self._verdicts = verdicts
        self._networks = []
        self._prefixes: list[SplitResult] = []
        # The answers of `check_address` for any path: each request on a kept connection asks again.
        self._reachable: set[tuple[str, str]] = set()
        for entry in allow:
            if "://" in entry:
                self._prefixes.append(_prefix(entry))
                continue
            try:
                self._networks.append(ip_network(entry, strict=False))
            except ValueError as error:
                shown = entry.rpartition("@")[2]  # the text before the @ may be a password
                raise Invalid(
                    f"allow entry {shown!r:.80} is neither a network nor a URL prefix",
                    code="bad_option",
                    hint="write 10.0.0.0/8, http://host:port/path/ or file:///mnt/share/",
                ) from error

    def also(self, entries: Iterable[str]) -> Self:
        """A copy of the policy with more entries, such as an endpoint that another option sets."""
        more = type(self)(entries, verdicts=self._verdicts)
        more._networks += self._networks
        more._prefixes += self._prefixes
        return more

    def covers(self, url: SplitResult) -> bool:
        """Whether a URL prefix covers `url`."""
        return bool(self._prefixes) and any(_covers(prefix, url) for prefix in self._prefixes)

    def check_url(self, url: SplitResult) -> None:
        """Raises Forbidden when `url` may not be reached.

        Plain http passes if any network is allowed: `check_address` decides once its host is resolved.
        """
        self._verdicts.check_request(url)
        if url.scheme == "https" or self.covers(url):
            return
        if url.scheme == "http" and self._networks:
            return
        if url.scheme == "http":
            raise _plaintext(url)
        raise Forbidden(
            f"{url.scheme}://{url.netloc}{url.path} is not under any prefix of allow",
            code="path_refused",
            hint=f'add a prefix that covers it to allow, such as "{url.scheme}://{url.netloc}{url.path}"',
        )

    def check_addresses(self, url: SplitResult, addresses: Collection[str]) -> None:
        """Raises Forbidden unless all `addresses` of the host of `url` may be reached.

        There are none when only a proxy can resolve the host. The proxy then decides about https and names.
        Plain http is refused, and so is a host whose last label is a number: no public name ends in a number
        (RFC 3696, section 2), and resolvers read such a host as an address in different ways.
        """
        for address in addresses:
            self.check_address(url, address)
        if addresses or self.covers(url):
            return
        if url.scheme != "https":
            raise _plaintext(url)
        if _NUMBER.fullmatch((url.hostname or "").rstrip(".").rpartition(".")[2]):
            raise Forbidden(
                f"{url.hostname} is neither a name nor an address",
                code="private_address",
                hint=f"add {url.scheme}://{url.netloc}/ to allow if it is meant",
            )

    def check_address(self, url: SplitResult, address: str) -> None:
        """Raises Forbidden unless `address`, an IP literal of the host of `url`, may be reached."""
        if not self._prefixes and (url.scheme, address) in self._reachable:
            return
        ip = destination(_literal(address.partition("%")[0]))
        if self.covers(url):
            return
        is_allowed = any(ip in network for network in self._networks)
        if not is_allowed and is_public(ip):
            if url.scheme != "https":
                raise _plaintext(url)
            is_allowed = True
        if is_allowed:
            if len(self._reachable) < _MAX_REACHABLE:
                self._reachable.add((url.scheme, address))
            return
        raise Forbidden(
            f"{url.hostname} is not at a public address",
            code="private_address",
            hint=f"add {url.scheme}://{url.netloc}/ or its network to allow if it is meant;"
            " the daemon's log has the address",
        ).withhold(address=str(ip))


class Anywhere(AddressPolicy):
    """The policy for URLs of the operator's own configuration: everything may be reached."""

    def __init__(self) -> None:
        super().__init__([])

    def check_url(self, url: SplitResult) -> None:
        """Allow any URL."""

    def check_addresses(self, url: SplitResult, addresses: Collection[str]) -> None:
        """Allow any address."""


def _prefix(entry: str) -> SplitResult:
    try:
        url = urlsplit(entry)
        _ = url.port
    except ValueError:  # its text may contain a part of a password
        shown = entry.rpartition("@")[2]
        raise Invalid(f"allow entry {shown!r:.80} is not a URL", code="bad_option") from None
    if "@" in url.netloc or url.query or url.fragment or (not url.netloc and url.scheme != "file"):
        raise Invalid(
            f"allow entry for {url.hostname or 'a URL'} is not a plain URL prefix",
            code="bad_option",
            hint="write scheme://host:port/path/ with no user, query or fragment",
        )
    return url


def _covers(prefix: SplitResult, url: SplitResult) -> bool:
    """Whether `url` is below `prefix`. Raises Forbidden when servers could read its path differently.

    Servers differ on '.' and '..' segments that are encoded or have parameters (`..;a`). An encoded '/' is
    allowed in a segment below the prefix. In a segment that the prefix names, it does not match.
    """
    if _host(prefix.scheme, prefix.netloc) != _host(url.scheme, url.netloc):
        return False
    wanted = unquote(prefix.path).rstrip("/").split("/")
    if wanted == [""]:
        return True
    segments = [unquote(segment) for segment in url.path.split("/")]
    steps = re.split(r"[/\\\0]", unquote(url.path))
    if any(step.partition(";")[0] in (".", "..") for step in steps):
        raise Forbidden(
            f"{url.scheme}://{url.netloc}{url.path:.200} has a '.' or '..' segment,"
            f" and allow covers only a part of that host",
            code="ambiguous_path",
            hint="servers read such a path in different ways: write it without these segments",
        )
    return segments[: len(wanted)] == wanted


@lru_cache(maxsize=_REMEMBERED)
def _host(scheme: str, netloc: str) -> tuple[str, str, int | None]:
    url = SplitResult(scheme, netloc, "", "", "")
    return scheme, url.hostname or "", url.port or _DEFAULT_PORTS.get(scheme)


def _plaintext(url: SplitResult) -> Forbidden:
    return Forbidden(
        f"http://{url.netloc}{url.path} would be fetched without encryption",
        code="plaintext_refused",
        hint=f'use https, or add "http://{url.netloc}/" to allow',
    )


_literal = lru_cache(maxsize=_REMEMBERED)(ip_address)
