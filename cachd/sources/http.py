"""Requests byte ranges of files over HTTP/1.1 and checks every redirect, address and answer.

Every request sends `Accept-Encoding: identity`, so a body is the file's own bytes (RFC 9110, 12.5.3). The
validator of a file, if it has one, goes into If-Match or If-Unmodified-Since (RFC 9110, 13.1). Every answer
must fit its request (RFC 9110, 15):

    200  the complete file, of the listed size   206  Content-Range: bytes start-last/size, all three exact
    412  the validator does not match: Changed   416  the file got shorter: Changed
    3xx  followed here, ten at most; secrets go to the origin they were meant for and to no other

A large file of the Hub redirects to a signed URL of another origin. Later parts are requested there directly
until that URL expires, so the Hub answers one request a file, not one a part.
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
_MOST_SIGNED_URLS = 10_000
_SHORT_BYTES = 64 << 10
_DEFAULT_HEADERS = {"User-Agent": f"cachd/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}
_REDIRECTS = (301, 302, 303, 307, 308)
_MAYBE_EXPIRED = (400, 401, 403, 404, 410)  # what servers answer for an expired signed URL
_NO_PROXIES, _NO_CREDENTIALS = Proxies(), Secret(None)
_ODD = re.compile(r"[^!-\[\]-~]")  # a space, a backslash, a control character or anything beyond ASCII
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")


@dataclass(frozen=True, slots=True)
class Target:
    """A file to request: its URL, its size in bytes, and the headers for the origin of this URL alone.

    `validator` is the file's ETag or Last-Modified date, as the origin sent it.
    """

    url: str
    size: int
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    validator: str | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """The answer to HEAD: size in bytes and validator (each None when the origin sends none), and headers."""

    size: int | None
    validator: str | None
    headers: Headers


@dataclass(frozen=True, slots=True)
class ShortAnswer:
    """An answer and its complete body; `Http.ask` leaves the body of a failure (400 or more) empty."""

    status: int
    headers: Headers
    content: bytes


class Http:
    """Sends HTTP/1.1 requests. Each thread keeps idle connections, one for each origin. Thread-safe."""

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
        self._address_policy = address_policy
        self._proxies, self._proxy_credentials = proxies, proxy_credentials
        self._stall_seconds, self._connect_seconds = stall_seconds, connect_seconds
        self._authorities = authorities
        patience = {"connect_seconds": connect_seconds, "stall_seconds": stall_seconds}
        names = Names(connect_seconds)
        tunnels = Tunnels(proxy_credentials, authorities.context, names, **patience)
        self._routes = Routes(address_policy, proxies, tunnels, names, **patience)
        self._kept = threading.local()
        self._age = 0  # connections of an earlier age are not used again
        self._signed_urls: dict[str, str] = {}  # URL of a file -> the signed URL it redirected to

    def anywhere(self) -> Http:
        """The same without an address policy, for URLs from the operator's own configuration only."""
        return Http(
            Anywhere(),
            stall_seconds=self._stall_seconds,
            connect_seconds=self._connect_seconds,
            authorities=self._authorities,
            proxies=self._proxies,
            proxy_credentials=self._proxy_credentials,
        )

    def head(self, url: str, cancel_token: CancelToken, *, secrets: Mapping[str, str] | None = None) -> Head:
        """Request the headers of a URL.

        Raises NotFound, Forbidden, Changed, Invalid, Unavailable or Cancelled.
        """
        _, response, connection = self._follow("HEAD", url, {}, secrets or {}, cancel_token)
        with Response(response, connection, url, stall_seconds=self._stall_seconds):
            if response.status in (405, 501):
                return self._head_by_range(url, secrets or {}, cancel_token)
            check_status(response, url)
            check_encoding(response, url)
            length = response.getheader("Content-Length")
            return Head(number(length), validator_of(response), response.headers)

    def _head_by_range(self, url: str, secrets: Mapping[str, str], cancel_token: CancelToken) -> Head:
        """As `head`, from a GET of the first byte, for an origin that does not support HEAD."""
        _, response, connection = self._follow("GET", url, {"Range": "bytes=0-0"}, secrets, cancel_token)
        with Response(response, connection, url, stall_seconds=self._stall_seconds):
            check_status(response, url)
            check_encoding(response, url)
            parsed = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
            size = int(parsed[3]) if parsed else number(response.getheader("Content-Length"))
            return Head(size, validator_of(response), response.headers)

    def read(
        self, url: str, cancel_token: CancelToken, *, at_most: int, secrets: Mapping[str, str] | None = None
    ) -> bytes:
        """The content of a small file. Raises Invalid over `at_most` bytes, else as `head`."""
        return self._ask(url, cancel_token, at_most, secrets or {}, check_status).content

    def ask(
        self, url: str, cancel_token: CancelToken, *, at_most: int, secrets: Mapping[str, str] | None = None
    ) -> ShortAnswer:
        """The answer for a URL, whatever its status. The body of a failure (400 or more) is not read.

        Raises Invalid when the body is longer than `at_most` bytes.
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
    ) -> ShortAnswer:
        """Send a request of another HTTP client, such as botocore. Redirects are left to that client.

        Raises Invalid when the answer's body is longer than `at_most` bytes.
        """
        parts = _checked(url)
        self._address_policy.check_url(parts)
        response, connection = self._send(method, parts, headers, cancel_token, body)
        with Response(response, connection, url, stall_seconds=self._stall_seconds) as answered:
            return ShortAnswer(
                response.status, response.headers, _read_all(answered, url, at_most, cancel_token)
            )

    def _ask(
        self,
        url: str,
        cancel_token: CancelToken,
        at_most: int,
        secrets: Mapping[str, str],
        check: Callable[[Answer, str], None],
    ) -> ShortAnswer:
        _, response, connection = self._follow("GET", url, {}, secrets, cancel_token)
        with Response(response, connection, url, stall_seconds=self._stall_seconds) as body:
            check(response, url)
            if response.status >= 400:
                return ShortAnswer(response.status, response.headers, b"")
            check_encoding(response, url)
            return ShortAnswer(response.status, response.headers, _read_all(body, url, at_most, cancel_token))

    def open(self, target: Target, extent: Extent, cancel_token: CancelToken) -> Response:
        """Request an extent of a file. `cancel_token` ends the request, not the body.

        Raises NoRanges, Changed, NotFound, Forbidden, Invalid, Unavailable or Cancelled.
        """
        signed_url = self._signed_urls.get(target.url)
        if signed_url is not None:
            try:
                return self._open_at(signed_url, {}, target, extent, cancel_token)
            except (Forbidden, NotFound, Unavailable) as error:
                if error.origin_status not in _MAYBE_EXPIRED:
                    raise
                self._signed_urls.pop(target.url, None)
        return self._open_at(target.url, target.secrets, target, extent, cancel_token)

    def anew(self) -> None:
        """Forget all signed URLs, and do not reuse a connection that is idle now."""
        self._age += 1
        self._signed_urls.clear()

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
            if len(self._signed_urls) >= _MOST_SIGNED_URLS:
                self._signed_urls.clear()
            self._signed_urls[target.url] = arrived
        return body

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        secrets: Mapping[str, str],
        cancel_token: CancelToken,
    ) -> tuple[str, Answer, Connection]:
        """Send a request and follow redirects. Returns the final URL, its answer and its connection."""
        parts = _checked(url)
        first = origin_of(parts)
        for _ in range(MOST_REDIRECTS + 1):
            self._address_policy.check_url(parts)
            if origin_of(parts) != first:
                secrets = {}  # they stay dropped, even if a later redirect leads back
            response, connection = self._send(method, parts, {**headers, **secrets}, cancel_token)
            location = response.getheader("Location")
            if response.status not in _REDIRECTS or not location:
                return url, response, connection
            with Response(response, connection, url, stall_seconds=self._stall_seconds):
                target = _joined(url, location)
            scheme = urlsplit(target).scheme
            if parts.scheme == "https" and scheme != "https":
                raise Forbidden(
                    f"{bare(url)} redirects from https to {scheme or 'no scheme'}",
                    code="downgrade_refused",
                    hint="the origin is misconfigured, or something intercepts the connection",
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
        """Send one request on the idle connection, or on a new one if the origin has closed the idle one."""
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        pool = self._pool()
        kept = None if body else pool.pop(origin_of(url), None)  # a body is never sent twice
        if kept:
            # Perhaps the policy allowed this connection only for another path of the host.
            self._address_policy.check_addresses(url, kept.addresses)
        tls = self._authorities.context if url.scheme == "https" else None
        new = Connection(origin_of(url), tls, stall_seconds=self._stall_seconds)
        asked = {**_DEFAULT_HEADERS, **headers}
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
                    f"a header for {url.netloc} has a character that cannot be sent",
                    code="bad_header",
                    hint="check the token",
                ) from error
        raise AssertionError("a new connection answers or raises")

    def _pool(self) -> dict[Origin, Connection]:
        """The idle connections of this thread, one for each origin."""
        if getattr(self._kept, "age", None) != self._age:
            for connection in getattr(self._kept, "pool", {}).values():
                connection.close()
            self._kept.pool, self._kept.age = {}, self._age
        pool: dict[Origin, Connection] = self._kept.pool
        return pool


def _read_all(body: Response, url: str, at_most: int, cancel_token: CancelToken) -> bytes:
    """The complete body. Raises Invalid over `at_most` bytes, before reading if its length is announced."""
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
        raise Unavailable(
            f"{bare(url)} redirects to something that is not a URL", code="origin_protocol"
        ) from error


def _checked(url: str) -> SplitResult:
    """Parse a URL once, so that the parts that are checked are the parts that are used. Raises Invalid."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise Invalid(f"{bare(url)} is not a URL", code="bad_ref") from error
    if _ODD.search(url) or "@" in parts.netloc or not parts.hostname:
        raise Invalid(
            f"{bare(url)} has no host, names a user, or holds a space, a backslash or a non-ASCII character",
            code="bad_ref",
        )
    return parts
