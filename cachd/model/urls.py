"""The grammar of refs that are URLs or paths, and the normal form in which their prefixes are compared."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import SplitResult, quote, unquote, urlsplit

from cachd.errors import Forbidden, Invalid
from cachd.model.digest import Digest
from cachd.model.grammar import Located, Steps, not_a_prefix
from cachd.model.hub import folder_revision
from cachd.model.name import is_clean, shown

_HOST = re.compile(r"[a-z0-9_](?:[a-z0-9_.-]{0,251}[a-z0-9_])?")
_IPV4 = re.compile(r"[0-9a-fx.]*[0-9][0-9a-fx.]*")
_TWO_NAMES = frozenset("ßς\u200c\u200d")  # characters that IDNA 2003 and 2008 encode differently (UTS #46)
_ODD_TEXT = re.compile(r"[^ -~]|[ \\*?]")
_PLAIN = "!$&'()*+,=:@~"


@dataclass(frozen=True, slots=True)
class UrlGrammar:
    """`host[:port]/path`, or `/path` for a scheme without a default port. See `Grammar`.

    A ref of one file may end with `#sha256=HEX`. A path that ends with `/` is a directory. The path of a
    repository's folder in a Hub cache may end with `@REVISION`.
    """

    scheme: str
    port: int | None = None
    is_address: bool = True

    @property
    def kinds(self) -> tuple[str, ...]:
        """See `Grammar`."""
        return ()

    @property
    def has_host(self) -> bool:
        """See `Grammar`."""
        return self.port is not None

    @property
    def root(self) -> str:
        """See `Grammar`."""
        return "" if self.has_host else "/"

    def parse(self, text: str, rest: str) -> Located:
        """See `Grammar.parse`."""
        try:
            url = urlsplit(f"{self.scheme}://{rest}")
            port = url.port
        except ValueError as error:
            raise Invalid(f"{shown(text)} is not a URL: {error}", code="bad_ref", hint="check it") from error
        _check_shows_nothing_secret(text, url)
        digest = _digest(text, url) if url.fragment else None
        parts = unquote(url.path).strip("/").split("/")
        if self.has_host != bool(url.netloc) or not parts[0] or not is_clean(parts):
            raise Invalid(
                f"{shown(text)} does not name a file or directory",
                code="bad_ref",
                hint="write https://host/file, https://host/dir/ or file:///path, without '..' or '//'",
            )
        path, revision = (url.path, None) if self.has_host else folder_revision(url.path)
        host = url.hostname or ""
        host = f"[{host}]" if ":" in host else host
        return Located(f"{host}{f':{port}' if port else ''}{path}", revision, digest)

    def prefix(self, typed: str, rest: str) -> tuple[Steps, str]:
        """See `Grammar.prefix`."""
        form = f"{self.scheme}://host/ or {self.scheme}://host:port/path/"
        form = form if self.has_host else f"{self.scheme}:///path/"
        try:
            url = urlsplit(f"{self.scheme}://{rest}")
            _ = url.port
        except ValueError:  # its text may contain a part of a password
            raise not_a_prefix(typed, f"write {form}") from None
        if "@" in url.netloc or url.query or url.fragment or "?" in rest or "#" in rest:
            raise not_a_prefix(typed, f"write {form}, with no user, password, query or fragment")
        if self.has_host != bool(url.netloc) or not url.path.isascii() or _ODD_TEXT.search(url.path):
            raise not_a_prefix(typed, f"write {form}, percent-encoded")
        try:
            _check_path(url)
            host = self._authority(url)
        except (Forbidden, Invalid) as error:
            raise not_a_prefix(typed, error.detail) from None
        parts = self._parts(url.path)
        shown_host = host[0].removesuffix(f":{self.port}") if host else ""
        path = "".join(f"/{quote(part, safe=_PLAIN, errors='surrogateescape')}" for part in parts)
        return (*host, *parts), f"{self.scheme}://{shown_host}{path}/"

    def steps(self, url: str, is_strict: Callable[[Steps], bool]) -> Steps:
        """See `Grammar.steps`."""
        try:
            split = urlsplit(url)
            host = self._authority(split)
        except ValueError as error:
            raise Invalid("not a URL", code="bad_ref") from error
        if is_strict(host):
            _check_path(split)
        return (*host, *self._parts(split.path))

    def _authority(self, url: SplitResult) -> Steps:
        return () if self.port is None else (_authority(url, self.port),)

    def _parts(self, path: str) -> Steps:
        """The decoded parts of a path. In the path of a file, an encoded '/' separates parts, too."""
        if not self.has_host:
            return tuple(part for part in unquote(path, errors="surrogateescape").split("/") if part)
        return tuple(unquote(part, errors="surrogateescape") for part in path.split("/") if part)


def _check_shows_nothing_secret(text: str, url: SplitResult) -> None:
    """Raises Invalid for a URL with a user or a query, as a ref is shown to everybody."""
    if "@" in url.netloc:
        raise Invalid(
            f"{shown(text)} contains a user or password",
            code="url_secrets",
            hint="leave them out: a ref is shown in listings and files",
        )
    if url.query:
        raise Invalid(
            f"{shown(text)} contains a query",
            code="url_query",
            hint="leave it out, as a ref is shown in listings and files; a signature goes into a file that an"
            " entry of sources names as query_file",
        )


def _digest(text: str, url: SplitResult) -> Digest:
    """The digest in the fragment of a URL. Raises Invalid."""
    algorithm, _, digits = url.fragment.partition("=")
    if algorithm != "sha256":
        raise Invalid(
            f"the fragment of {shown(text)} is not a digest", code="bad_ref", hint="write #sha256=HEX"
        )
    digest = Digest(algorithm, digits.lower())
    if url.path.endswith("/"):
        raise Invalid(
            f"{shown(text)} is a directory, but a digest belongs to one file",
            code="bad_ref",
            hint="leave the fragment out: the digests come from SHA256SUMS in the directory",
        )
    return digest


def _authority(url: SplitResult, default_port: int) -> str:
    """`host:port` of a URL in a normal form: lower case, `default_port` filled in, no dot at the end.

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
    return f"{host}:{url.port or default_port}"


def _dotted(host: str) -> str:
    """The normal form of an IPv4 address such as 127.1 or 0x7f.0.0.1, which inet_aton(3) accepts."""
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return host


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
