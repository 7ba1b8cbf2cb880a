"""Decides which prefixes cover a ref or a URL, by comparing complete steps in a normal form.

    hf://org/model              steps: org, model
    s3://bucket/a/b             steps: bucket, a, b
    https://host/a/b            steps: host:443, a, b
    file:///a/b                 steps: a, b

So `hf://org` does not cover `hf://orgother`, and `https://host` does not cover `https://host.evil`.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

from cachd.errors import Forbidden, Invalid
from cachd.model import SCHEMES, shown

T = TypeVar("T")
Steps = tuple[str, ...]

_PORTS = {"http": 80, "https": 443}
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?")
_IPV4 = re.compile(r"[0-9a-fx.]*[0-9][0-9a-fx.]*")
_TWO_NAMES = frozenset("ßς\u200c\u200d")  # characters that IDNA 2003 and 2008 encode differently (UTS #46)
_ODD_TEXT = re.compile(r"[^ -~]|[ \\*?]")
_PLAIN = "!$&'()*+,=:@~"
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Prefix:
    """A scheme and the steps that must follow it; no steps for everything of the scheme.

    `text` is the prefix in its normal form, for people.
    """

    scheme: str
    steps: Steps
    text: str = field(compare=False)

    @classmethod
    def parse(cls, typed: str) -> Self:
        """Read a prefix that an operator wrote. Raises Invalid with the right form."""
        scheme, separator, rest = typed.partition("://")
        scheme = scheme.lower()
        if not separator or scheme not in SCHEMES:
            raise _no_prefix(typed, f"begin it with {', '.join(f'{each}://' for each in SCHEMES)}")
        if len(typed) > _LONGEST or (scheme not in _PORTS and _ODD_TEXT.search(typed)):
            raise _no_prefix(typed, "write plain characters, no patterns, 1024 at most")
        if not rest or rest == "/":
            return cls(scheme, (), f"{scheme}:///" if scheme == "file" else f"{scheme}://")
        if scheme in ("hf", "s3"):
            return cls._of_names(typed, scheme, rest)
        return cls._of_url(typed, scheme, rest)

    @classmethod
    def _of_names(cls, typed: str, scheme: str, rest: str) -> Self:
        parts = rest.removesuffix("/").split("/")
        if scheme == "hf":
            is_one = len(parts) <= 2 and all(_NAME.fullmatch(p) and ".." not in p for p in parts)
            if not is_one:
                raise _no_prefix(typed, "write hf://org/ or hf://org/model, without a revision")
            # The Hub accepts a name in any case, and redirects to the right one.
            return cls(
                scheme, tuple(p.lower() for p in parts), f"hf://{'/'.join(parts)}{'/' * (len(parts) < 2)}"
            )
        if not _BUCKET.fullmatch(parts[0]) or any(p in ("", ".", "..") for p in parts):
            raise _no_prefix(typed, "write s3://bucket/ or s3://bucket/x/, without '..' or '//'")
        return cls(scheme, tuple(parts), f"s3://{'/'.join(parts)}/")

    @classmethod
    def _of_url(cls, typed: str, scheme: str, rest: str) -> Self:
        form = "file:///path/" if scheme == "file" else f"{scheme}://host/ or {scheme}://host:port/path/"
        try:
            url = urlsplit(f"{scheme}://{rest}")
            _ = url.port
        except ValueError:  # its text may contain a part of a password
            raise _no_prefix(typed, f"write {form}") from None
        if "@" in url.netloc or url.query or url.fragment or "?" in rest or "#" in rest:
            raise _no_prefix(typed, f"write {form}, with no user, password, query or fragment")
        if (scheme == "file") == bool(url.netloc) or not url.path.isascii() or _ODD_TEXT.search(url.path):
            raise _no_prefix(typed, f"write {form}, percent-encoded")
        try:
            _check_path(url)
            authority: Steps = () if scheme == "file" else (_authority(url),)
        except (Forbidden, Invalid) as error:
            raise _no_prefix(typed, error.detail) from None
        parts = _parts(scheme, url.path)
        host = authority[0].removesuffix(f":{_PORTS[scheme]}") if authority else ""
        path = "".join(f"/{quote(part, safe=_PLAIN, errors='surrogateescape')}" for part in parts)
        return cls(scheme, (*authority, *parts), f"{scheme}://{host}{path}/")

    def __str__(self) -> str:
        return self.text


class Prefixes(Generic[T]):
    """Values by prefix, looked up for a ref or a URL."""

    def __init__(self, values: Mapping[Prefix, T]) -> None:
        self._values = {(prefix.scheme, prefix.steps): (prefix, value) for prefix, value in values.items()}
        self._authorities = {
            (prefix.scheme, *prefix.steps[:1]) for prefix in values if _has_path(prefix.scheme, prefix.steps)
        }

    def covering(self, url: str) -> list[tuple[Prefix, T]]:
        """The prefixes that cover `url`, with their values, the longest first.

        `url` is a ref's base, a file's origin or a URL. Raises Forbidden for a path that servers read in
        different ways, if any prefix names a path of that host.
        """
        if not self._values:
            return []
        scheme, steps = steps_of(url, strict=self._is_strict)
        found = (self._values.get((scheme, steps[:n])) for n in range(len(steps), -1, -1))
        return [each for each in found if each is not None]

    def are_below(self, url: str) -> bool:
        """Whether a prefix is below `url`, so that it covers a part of what is there and not all."""
        scheme, steps = steps_of(url, strict=self._is_strict)
        return any(
            key[0] == scheme and len(key[1]) > len(steps) and key[1][: len(steps)] == steps
            for key in self._values
        )

    def _is_strict(self, scheme: str, authority: Steps) -> bool:
        return (scheme, *authority) in self._authorities


def steps_of(url: str, *, strict: object = True) -> tuple[str, Steps]:
    """The scheme and the steps of a ref's base, a file's origin or a URL.

    `strict`: whether to refuse a path that servers read in different ways, or a function of the scheme and
    the host that decides this. Raises Forbidden for such a path, and Invalid when `url` is not a URL.
    """
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        return scheme, tuple(part for part in re.split(r"[/@]", rest.lower())[:2] if part)
    if scheme == "s3":
        return scheme, tuple(part for part in rest.split("/") if part)
    try:
        parts = urlsplit(url)
        authority: Steps = () if scheme == "file" else (_authority(parts),)
    except ValueError as error:
        raise Invalid("not a URL", code="bad_ref") from error
    if strict(scheme, authority) if callable(strict) else strict:
        _check_path(parts)
    return scheme, (*authority, *_parts(scheme, parts.path))


def _has_path(scheme: str, steps: Steps) -> bool:
    return scheme in _PORTS and len(steps) > 1


def _authority(url: SplitResult) -> str:
    """`host:port` of a URL in a normal form: lower case, the default port filled in, no dot at the end.

    Raises Invalid when the URL has no valid host.
    """
    host = (url.hostname or "").rstrip(".").lower()
    try:
        if ":" in host:
            host = f"[{ipaddress.IPv6Address(host)}]"
        elif set(host) & _TWO_NAMES:
            raise Invalid("two standards read the host differently: write it as xn--…", code="bad_ref")
        elif not host.isascii():
            host = host.encode("idna").decode("ascii").lower().rstrip(".")
        if _IPV4.fullmatch(host):  # IDNA has turned digits of other scripts into ASCII by now
            host = _dotted(host)
    except ValueError as error:  # UnicodeError among them
        raise Invalid("the host is no name and no address", code="bad_ref") from error
    if not host.startswith("[") and not _HOST.fullmatch(host):
        raise Invalid("the host is no name and no address", code="bad_ref")
    return f"{host}:{url.port or _PORTS[url.scheme]}"


def _dotted(host: str) -> str:
    """The normal form of an IPv4 address such as 127.1 or 0x7f.0.0.1, which inet_aton(3) accepts."""
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


def _parts(scheme: str, path: str) -> Steps:
    """The decoded parts of a path. For file://, an encoded '/' separates, too: the decoded path is opened."""
    if scheme == "file":
        return tuple(part for part in unquote(path, errors="surrogateescape").split("/") if part)
    return tuple(unquote(part, errors="surrogateescape") for part in path.split("/") if part)


def _check_path(url: SplitResult) -> None:
    """Raises Forbidden for a path that servers read in different ways.

    Such a path has a segment that is empty, '.' or '..', a parameter (`;`), or an encoded separator or
    percent sign.
    """
    plain = unquote(url.path, errors="surrogateescape")
    parts = url.path.removeprefix("/").removesuffix("/").split("/") if url.path.strip("/") else []
    decoded = [unquote(part, errors="surrogateescape") for part in parts]
    if any(part in ("", ".", "..") or re.search(r"[/\\\0;%]", part) for part in decoded) or "//" in plain:
        raise Forbidden(
            f"{url.scheme}://{url.netloc}{url.path:.200} has a segment that servers read in different ways,"
            f" and sources has an entry for a part of that host",
            code="ambiguous_path",
            hint="write the path without '.', '..', '//', ';' and without encoded '/', '\\' or '%'",
        )


def _no_prefix(typed: str, hint: str) -> Invalid:
    plain = typed.partition("?")[0].partition("#")[0].rpartition("@")[2]
    return Invalid(f"{shown(plain)} is not a prefix of refs: {hint}", code="bad_option")
