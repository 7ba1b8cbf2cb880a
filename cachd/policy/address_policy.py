"""Which addresses, URLs and paths a source may reach."""

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

_DEFAULT_PORTS = {"http": 80, "https": 443}
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


class AddressPolicy:
    """What `allow` opens beyond the public internet by TLS.

    Public addresses may be reached by https. Private, loopback, link-local and other special addresses,
    plain http and local paths only where an entry covers them. An entry is a network (`10.0.0.0/8`) or a
    URL prefix (`http://minio.storage:9000/models/`, `file:///mnt/share/`). `verdicts` may refuse
    a URL all the same.
    """

    def __init__(self, allow: Iterable[str], *, verdicts: Verdicts = NO_VERDICTS) -> None:
        self._verdicts = verdicts
        self._networks = []
        self._prefixes: list[SplitResult] = []
        for entry in allow:
            if "://" in entry:
                self._prefixes.append(_prefix(entry))
                continue
            try:
                self._networks.append(ip_network(entry, strict=False))
            except ValueError as error:
                shown = entry.rpartition("@")[2]  # what stands before it may be a password
                raise Invalid(
                    f"allow entry {shown!r:.80} is neither a network nor a URL prefix",
                    code="bad_option",
                    hint="write 10.0.0.0/8, http://host:port/path/ or file:///mnt/share/",
                ) from error

    def also(self, entries: Iterable[str]) -> Self:
        """The same reach with more entries: what the operator configured elsewhere, such as an endpoint."""
        more = type(self)(entries, verdicts=self._verdicts)
        more._networks += self._networks
        more._prefixes += self._prefixes
        return more

    def covers(self, url: SplitResult) -> bool:
        """Whether a URL prefix covers `url`."""
        return any(_covers(prefix, url) for prefix in self._prefixes)

    def check_url(self, url: SplitResult) -> None:
        """Raises Forbidden for what is refused, and for no https unless a prefix covers it."""
        self._verdicts.check_request(url)
        if url.scheme == "https" or self.covers(url):
            return
        if url.scheme == "http" and self._networks:
            return  # a network may cover the address it resolves to
        if url.scheme == "http":
            raise _plaintext(url)
        raise Forbidden(
            f"{url.scheme}://{url.netloc}{url.path} is not under any prefix of allow",
            code="path_refused",
            hint=f'add a prefix that covers it to allow, such as "{url.scheme}://{url.netloc}{url.path}"',
        )

    def check_addresses(self, url: SplitResult, addresses: Collection[str]) -> None:
        """Raises Forbidden unless all `addresses` of the host may be reached.

        There are none where a proxy alone can resolve the host. Then the proxy decides, but not on plain
        text, nor on a number: no name ends in one, and what takes it for an address may be anywhere.
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
        """Raises Forbidden unless `address` (an IP literal the host of `url` resolved to) may be reached."""
        ip = destination(_literal(address.partition("%")[0]))
        if self.covers(url) or any(ip in network for network in self._networks):
            return
        if is_public(ip):
            if url.scheme == "https":
                return
            raise _plaintext(url)
        raise Forbidden(
            f"{url.hostname} is not at a public address",
            code="private_address",
            hint=f"add {url.scheme}://{url.netloc}/ or its network to allow if it is meant;"
            " the daemon's log has the address",
        ).withhold(address=str(ip))


class Anywhere(AddressPolicy):
    """No bounds: what the operator's own configuration leads to is within reach by that alone."""

    def __init__(self) -> None:
        super().__init__([])

    def check_url(self, url: SplitResult) -> None:
        """Let it pass."""

    def check_addresses(self, url: SplitResult, addresses: Collection[str]) -> None:
        """Let them pass."""


def _prefix(entry: str) -> SplitResult:
    try:
        url = urlsplit(entry)
        _ = url.port
    except ValueError:  # which may name a part of a password
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
    """Whether `url` is below `prefix`, however a server reads its path. Raises Forbidden when that differs.

    Servers differ on '.' and '..' segments that are encoded or carry parameters (`..;a`), and on encoded
    separators: these may stand below the prefix, and not in a segment that the prefix names.
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
            hint="servers read such a path in different ways: write it without",
        )
    return segments[: len(wanted)] == wanted


@lru_cache(maxsize=1024)
def _host(scheme: str, netloc: str) -> tuple[str, str, int | None]:
    url = SplitResult(scheme, netloc, "", "", "")
    return scheme, url.hostname or "", url.port or _DEFAULT_PORTS.get(scheme)


def _plaintext(url: SplitResult) -> Forbidden:
    return Forbidden(
        f"http://{url.netloc}{url.path} would come in plain text",
        code="plaintext_refused",
        hint=f'use https, or add "http://{url.netloc}/" to allow',
    )


_literal = lru_cache(maxsize=1024)(ip_address)
