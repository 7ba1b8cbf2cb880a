"""The byte path: ranged GETs over blocking connections, each hop and address checked.

Every request says `Accept-Encoding: identity`; every answer must be the very bytes that were asked for:

    200  the whole file, at its size           206  Content-Range: bytes start-last/size, all three exact
    412  the validator moved: Changed          416  the file got shorter: Changed
    3xx  followed by hand, ten at most; secrets stay with the origin they were meant for

A file that redirects (a Hub's large files do) is asked at its signed address again until that expires, so
that a model of a thousand parts costs the origin one request a file.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit

from cachd import __version__
from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.foreign import too_large
from cachd.model import Extent
from cachd.policy.address_policy import AddressPolicy, Anywhere
from cachd.policy.proxy import Proxies
from cachd.sources.answers import (
    BROKEN,
    announced,
    bare,
    broken,
    check_encoding,
    check_status,
    check_validator,
    number,
    validator_of,
)
from cachd.sources.connection import Connection, Origin, Response, origin_of
from cachd.sources.exchange import Answer, Headers
from cachd.sources.names import Names
from cachd.sources.routes import Routes
from cachd.sources.secrets import Secret
from cachd.sources.source import CancelToken
from cachd.sources.trust import Authorities
from cachd.sources.tunnel import Tunnels

MOST_REDIRECTS = 10
MOST_MOVED = 10_000
_SHORT_BYTES = 64 << 10
_ALWAYS_TOLD = {"User-Agent": f"cachd/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAYBE_EXPIRED = (400, 401, 403, 404, 410)
_NO_PROXIES, _NO_CREDENTIALS = Proxies(), Secret(None)
_ODD = re.compile(r"[^!-\[\]-~]")  # space, backslash, control characters, all beyond ASCII
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Target:
    """What to ask for: a URL, headers that are no secret, and secrets, sent to this URL's origin only.

    `validator` is an ETag or a Last-Modified date as the origin gave it.
    """

    url: str
    size: int
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    validator: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What an origin says of a URL: bytes (None when it does not say), strong ETag, date, and headers."""

    size: int | None
    validator: str | None
    headers: Headers


@dataclass(frozen=True, slots=True)
class Told:
    """A short answer, read to its end."""

    status: int
    headers: Headers
    content: bytes


class Http:
    """Plain HTTP/1.1 with connections kept a thread and an origin. Safe to share between threads."""

    def __init__(
        self,
        address_policy: AddressPolicy,
        *,
        stall_seconds: float = 30.0,
        connect_seconds: float = 10.0,
        authorities: Authorities,
        proxies: Proxies = _NO_PROXIES,
        proxy_credentials: Secret = _NO_CREDENTIALS,
    ) -> None:
        self._address_policy, self._proxies, self._proxy_credentials = (
            address_policy,
            proxies,
            proxy_credentials,
        )
        self._stall_seconds, self._connect_seconds = stall_seconds, connect_seconds
        self._authorities = authorities
        patience = {"connect_seconds": connect_seconds, "stall_seconds": stall_seconds}
        names = Names(connect_seconds)
        tunnels = Tunnels(proxy_credentials, authorities.context, names, **patience)
        self._routes = Routes(address_policy, proxies, tunnels, names, **patience)
        self._kept = threading.local()
        self._age = 0  # connections of an earlier one are not used again
        self._moved: dict[str, str] = {}  # first URL -> the signed one it redirected to

    def anywhere(self) -> Http:
        """The same with no bounds: for URLs that come from the operator's own configuration alone."""
        return Http(
            Anywhere(),
            stall_seconds=self._stall_seconds,
            connect_seconds=self._connect_seconds,
            authorities=self._authorities,
            proxies=self._proxies,
            proxy_credentials=self._proxy_credentials,
        )

    def head(self, url: str, cancel_token: CancelToken, *, secrets: Mapping[str, str] | None = None) -> Head:
        """Ask about a URL without its bytes. Raises as `open` does."""
        _, response, connection = self._follow("HEAD", url, {}, secrets or {}, cancel_token)
        with Response(response, connection, url, stall_seconds=self._stall_seconds):
            if response.status in (405, 501):
                return self._head_by_range(url, secrets or {}, cancel_token)
            check_status(response, url)
            check_encoding(response, url)
            length = response.getheader("Content-Length")
            return Head(number(length), validator_of(response), response.headers)

    def _head_by_range(self, url: str, secrets: Mapping[str, str], cancel_token: CancelToken) -> Head:
        """For an origin that knows no HEAD: the first byte's answer says as much."""
        _, response, connection = self._follow("GET", url, {"Range": "bytes=0-0"}, secrets, cancel_token)
        with Response(response, connection, url, stall_seconds=self._stall_seconds):
            check_status(response, url)
            check_encoding(response, url)
            told = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
            size = int(told[3]) if told else number(response.getheader("Content-Length"))
            return Head(size, validator_of(response), response.headers)

    def read(
        self, url: str, cancel_token: CancelToken, *, at_most: int, secrets: Mapping[str, str] | None = None
    ) -> bytes:
        """The whole of a small file. Raises Invalid when it is longer than `at_most` bytes."""
        return self._ask(url, cancel_token, at_most, secrets or {}, check_status).content

    def ask(
        self, url: str, cancel_token: CancelToken, *, at_most: int, secrets: Mapping[str, str] | None = None
    ) -> Told:
        """What an origin says of a URL, whatever its status; of a failure its head alone.

        Raises Invalid when it is longer than `at_most` bytes.
        """
        return self._ask(url, cancel_token, at_most, secrets or {}, lambda _response, _url: None)

    def relay(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        cancel_token: CancelToken,
        *,
        at_most: int,
    ) -> Told:
        """What an origin says to a request of another client, which follows redirects itself."""
        parts = _checked(url)
        self._address_policy.check_url(parts)
        response, connection = self._send(method, parts, headers, cancel_token, body)
        with Response(response, connection, url, stall_seconds=self._stall_seconds) as answered:
            return Told(response.status, response.headers, _whole(answered, url, at_most, cancel_token))

    def _ask(
        self,
        url: str,
        cancel_token: CancelToken,
        at_most: int,
        secrets: Mapping[str, str],
        check: Callable[[Answer, str], None],
    ) -> Told:
        _, response, connection = self._follow("GET", url, {}, secrets, cancel_token)
        with Response(response, connection, url, stall_seconds=self._stall_seconds) as body:
            check(response, url)
            if response.status >= 400:
                return Told(response.status, response.headers, b"")
            check_encoding(response, url)
            return Told(response.status, response.headers, _whole(body, url, at_most, cancel_token))

    def open(self, target: Target, extent: Extent, cancel_token: CancelToken) -> Response:
        """Ask for the bytes of an extent; `cancel_token` ends the asking.

        Raises NoRanges, Changed, NotFound, Forbidden, Unavailable or Cancelled.
        """
        moved = self._moved.get(target.url)
        if moved is not None:
            try:
                return self._open_at(moved, {}, target, extent, cancel_token)
            except (Forbidden, NotFound, Unavailable) as error:
                if error.facts.get("status") not in _MAYBE_EXPIRED:
                    raise
                self._moved.pop(target.url, None)
        return self._open_at(target.url, target.secrets, target, extent, cancel_token)

    def anew(self) -> None:
        """Use no connection and no signed address again that is known now."""
        self._age += 1
        self._moved.clear()

    def _open_at(
        self, url: str, secrets: Mapping[str, str], target: Target, extent: Extent, cancel_token: CancelToken
    ) -> Response:
        headers = {}
        if extent.size != target.size:
            headers["Range"] = f"bytes={extent.start}-{extent.stop - 1}"
        if target.validator:
            by_tag = target.validator.startswith('"')
            headers["If-Match" if by_tag else "If-Unmodified-Since"] = target.validator
        arrived, response, connection = self._follow("GET", url, headers, secrets, cancel_token)
        body = Response(response, connection, arrived, stall_seconds=self._stall_seconds)
        try:
            check_status(response, arrived)
            check_encoding(response, arrived)
            check_validator(response, target.url, target.validator)
            body.expect(announced(response, arrived, target.size, extent))
        except BaseException:
            body.close()
            raise
        if arrived != target.url and origin_of(urlsplit(arrived)) != origin_of(urlsplit(target.url)):
            if len(self._moved) >= MOST_MOVED:
                self._moved.clear()
            self._moved[target.url] = arrived
        return body

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        secrets: Mapping[str, str],
        cancel_token: CancelToken,
    ) -> tuple[str, Answer, Connection]:
        """Send a request and follow redirects; the URL that answered, its answer and its connection."""
        parts = _checked(url)
        first = origin_of(parts)
        for _ in range(MOST_REDIRECTS + 1):
            self._address_policy.check_url(parts)
            if origin_of(parts) != first:
                secrets = {}  # for good: a redirect back does not bring them back
            response, connection = self._send(method, parts, {**headers, **secrets}, cancel_token)
            location = response.getheader("Location")
            if response.status not in _REDIRECTS or not location:
                return url, response, connection
            with Response(response, connection, url, stall_seconds=self._stall_seconds):
                target = _joined(url, location)
            scheme = urlsplit(target).scheme
            if parts.scheme == "https" and scheme != "https":
                raise Forbidden(
                    f"{bare(url)} redirects from https to {scheme or 'nothing'}",
                    code="downgrade_refused",
                    hint="the origin is misconfigured, or somebody stands between",
                )
            url, parts = target, _checked(target)
        raise Unavailable(f"{bare(url)}: more than {MOST_REDIRECTS} redirects", code="redirect_loop")

    def _send(
        self,
        method: str,
        url: SplitResult,
        headers: Mapping[str, str],
        cancel_token: CancelToken,
        body: bytes = b"",
    ) -> tuple[Answer, Connection]:
        """One request on a kept connection, or on a new one when the kept one was closed meanwhile."""
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        pool = self._pool()
        kept = None if body else pool.pop(origin_of(url), None)  # what has a body is never sent twice
        if kept:
            self._address_policy.check_addresses(
                url, kept.addresses
            )  # it was let in for another path, perhaps
        tls = self._authorities.context if url.scheme == "https" else None
        new = Connection(origin_of(url), tls, stall_seconds=self._stall_seconds)
        asked = {**_ALWAYS_TOLD, **headers}
        for connection in filter(None, (kept, new)):
            connection.take(pool)
            try:
                with cancel_token.reaches(connection):
                    answer = connection.ask(
                        method, path, asked, lambda: self._routes.dial(url, cancel_token), body
                    )
                    cancel_token.count()
                    return answer, connection
            except CachdError:
                connection.close()
                raise
            except BROKEN as error:
                connection.close()
                cancel_token.check()
                if connection is not kept:
                    raise broken(url, error, connection.proxy) from error
            except ValueError as error:  # such as a token with a line feed
                connection.close()
                raise Invalid(
                    f"a header for {url.netloc} cannot be sent", code="bad_header", hint="check the token"
                ) from error
        raise AssertionError("a new connection answers or raises")

    def _pool(self) -> dict[Origin, Connection]:
        """The connections this thread keeps, one an origin."""
        if getattr(self._kept, "age", None) != self._age:
            for connection in getattr(self._kept, "pool", {}).values():
                connection.close()
            self._kept.pool, self._kept.age = {}, self._age
        pool: dict[Origin, Connection] = self._kept.pool
        return pool


def _whole(body: Response, url: str, at_most: int, cancel_token: CancelToken) -> bytes:
    """A body to its end. Raises Invalid when it is longer than `at_most` bytes, unread when it says so."""
    if body.size is not None and body.size > at_most:
        raise too_large(bare(url), at_most, body.size)
    content, buffer = bytearray(), memoryview(bytearray(_SHORT_BYTES))
    with cancel_token.reaches(body):
        while count := body.readinto(buffer[: at_most + 1 - len(content)]):
            content += buffer[:count]
            cancel_token.count()
    if len(content) > at_most:
        raise too_large(bare(url), at_most)
    return bytes(content)


def _joined(url: str, location: str) -> str:
    try:
        return urljoin(url, location)
    except ValueError as error:
        raise Unavailable(f"{bare(url)} redirects to what is no URL", code="origin_protocol") from error


def _checked(url: str) -> SplitResult:
    """The one parse of a URL that is acted upon. Raises Invalid."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise Invalid(f"{bare(url)} is not a URL", code="bad_ref") from error
    if _ODD.search(url) or "@" in parts.netloc or not parts.hostname:
        raise Invalid(f"{bare(url)} is not a URL that can be asked safely", code="bad_ref")
    return parts
