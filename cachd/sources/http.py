"""Requests byte ranges of files over HTTP/1.1 and checks every redirect, address and response.

Every request sends `Accept-Encoding: identity`, so a body is the file's own bytes (RFC 9110, 12.5.3). The
validator of a file, if it has one, goes into If-Match or If-Unmodified-Since (RFC 9110, 13.1). Every response
must fit its request (RFC 9110, 15):

    200  the complete file, of the listed size   206  Content-Range: bytes start-last/size; see `announced`
         (or what a 206 has: `Response.is_partial`)
    412  the validator does not match: Changed   416  the file got shorter: Changed
    3xx  followed here, ten at most; secrets go to the origin they were meant for and to no other

A large file of the Hub redirects to a signed URL of another origin. Later parts are requested there directly
until that URL expires, so the Hub gets one request a file, not one a part.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from cachd import __version__
from cachd.bounded import Bounded
from cachd.errors import Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Extent
from cachd.policy.address_policy import AddressPolicy, Anywhere
from cachd.policy.proxy import Proxies
from cachd.sources.cancel import CancelToken
from cachd.sources.checks import UnknownRange, announced, check_encoding, check_status, check_validator
from cachd.sources.connection import Origin, origin_of
from cachd.sources.failures import bare, protocol_error
from cachd.sources.http1 import Request
from cachd.sources.names import Names
from cachd.sources.pauses import Pauses
from cachd.sources.pool import ConnectionPool
from cachd.sources.response import Response
from cachd.sources.routes import Routes
from cachd.sources.secrets import Secret, Secrets
from cachd.sources.source import NoRanges
from cachd.sources.timeouts import Timeouts
from cachd.sources.trust import Authorities
from cachd.sources.tunnel import Tunnels
from cachd.sources.validators import precondition

MAX_REDIRECTS = 10
_MAX_SIGNED_URLS = 10_000
_DEFAULT_HEADERS = {"User-Agent": f"cachd/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}
_FIRST_BYTE = {"Range": "bytes=0-0"}
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE, _MAX_MIRRORS = (404, 410), 3
_MAYBE_EXPIRED = (400, 401, 403, 404, 410)  # what servers answer for an expired signed URL
_NO_PROXIES, _NO_CREDENTIALS, _TIMEOUTS = Proxies(), Secret(None), Timeouts()
_NO_SECRETS = Secrets()
_ODD = re.compile(r"[^!-\[\]-~]")  # a space, a backslash, a control character or anything beyond ASCII
# Most URLs: without a user, an IPv6 address or an odd character. `urlsplit` takes ten times as long for them.
_PLAIN = re.compile(
    r"""(https?)://([!"$-.0->A-Z^-~]+)(/[!"$->@-\[\]-~]*)?(?:\?([!"$-\[\]-~]*))?(?:#([!-\[\]-~]*))?"""
)


@dataclass(frozen=True, slots=True)
class Target:
    """A file to request: its URL, its size in bytes, and what the origin of this URL alone gets.

    `validator` is the file's ETag or Last-Modified date, as the origin sent it.
    """

    url: str
    size: int
    secrets: Secrets = _NO_SECRETS
    validator: str | None = None


class Http:
    """Requests files for one address policy, and follows redirects. Thread-safe.

    `pauses`: which origins want a pause; all clients of a node share it.
    """

    def __init__(
        self,
        address_policy: AddressPolicy,
        *,
        authorities: Authorities,
        timeouts: Timeouts = _TIMEOUTS,
        proxies: Proxies = _NO_PROXIES,
        proxy_credentials: Secret = _NO_CREDENTIALS,
        pauses: Pauses | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address_policy = address_policy
        self._proxies, self._proxy_credentials = proxies, proxy_credentials
        self._authorities, self._timeouts, self._clock = authorities, timeouts, clock
        self._pauses = pauses or Pauses(clock)
        self._pool = ConnectionPool(
            self._routes(),
            address_policy,
            authorities,
            stall_seconds=timeouts.stall_seconds,
            pauses=self._pauses,
            clock=clock,
        )
        # URL of a file -> the signed URL that it redirected to
        self._signed_urls = Bounded[str, str](_MAX_SIGNED_URLS)
        # origins whose parts did not say where they are
        self._without_ranges = Bounded[Origin, None](_MAX_SIGNED_URLS)

    def _routes(self) -> Routes:
        """How connections are made: directly, or through a proxy."""
        names, tls = Names(self._timeouts.connect_seconds), self._authorities.context
        tunnels = Tunnels(self._proxy_credentials, tls, names, self._timeouts, clock=self._clock)
        return Routes(self._address_policy, self._proxies, tunnels, names, self._timeouts, clock=self._clock)

    def anywhere(self) -> Http:
        """A client without an address policy, for URLs from the operator's own configuration only."""
        return Http(
            Anywhere(),
            authorities=self._authorities,
            timeouts=self._timeouts,
            proxies=self._proxies,
            proxy_credentials=self._proxy_credentials,
            pauses=self._pauses,
            clock=self._clock,
        )

    # The caller closes the response that a method returns. All may raise NotFound, Forbidden, Changed,
    # Invalid, Unavailable or Cancelled. `secrets` are for the origin of the URL alone.

    def head(self, url: str, cancel_token: CancelToken, *, secrets: Secrets = _NO_SECRETS) -> Response:
        """The response to a HEAD request for a file, with its headers and `file_size`. It is closed already.

        A server that does not know HEAD is asked for the first byte instead.
        """
        _, response = self._follow("HEAD", url, {}, secrets, cancel_token)
        if response.status in (405, 501):
            response.close()
            response = self.first_byte(url, cancel_token, secrets=secrets)
        with _checked(response, url):
            return response

    def peek(
        self, url: str, cancel_token: CancelToken, *, secrets: Secrets = _NO_SECRETS, method: str = "HEAD"
    ) -> Response:
        """The headers of a URL by HEAD, or by a GET of its first byte, whatever its status.

        A redirect is not followed.
        """
        parts = parsed(url)
        self._address_policy.check_url(parts)
        headers = {**_DEFAULT_HEADERS, **(_FIRST_BYTE if method == "GET" else {}), **secrets.headers}
        return self._pool.send(Request(method, _signed(parts, secrets), headers), cancel_token)

    def first_byte(self, url: str, cancel_token: CancelToken, *, secrets: Secrets = _NO_SECRETS) -> Response:
        """The response to a GET of a file's first byte, whatever its status."""
        return self._follow("GET", url, _FIRST_BYTE, secrets, cancel_token)[1]

    def touch(self, url: str, cancel_token: CancelToken, *, secrets: Secrets = _NO_SECRETS) -> None:
        """Request a file's first byte and drop it. Uses no signed URL that another request was given."""
        with _checked(self.first_byte(url, cancel_token, secrets=secrets), url):
            pass

    def get(self, url: str, cancel_token: CancelToken, *, secrets: Secrets = _NO_SECRETS) -> Response:
        """The response for a URL, whatever its status."""
        return self._follow("GET", url, {}, secrets, cancel_token)[1]

    def read(
        self, url: str, cancel_token: CancelToken, *, at_most: int, secrets: Secrets = _NO_SECRETS
    ) -> bytes:
        """The content of a small file. Also raises Invalid if it has more than `at_most` bytes."""
        with _checked(self.get(url, cancel_token, secrets=secrets), url) as response:
            return response.content(cancel_token, at_most=at_most)

    def relay(self, request: Request, cancel_token: CancelToken) -> Response:
        """The response to another HTTP client, such as botocore. Redirects are left to that client."""
        self._address_policy.check_url(request.url)
        return self._pool.send(request, cancel_token)

    def open(self, target: Target, extent: Extent, cancel_token: CancelToken) -> Response:
        """The response with an extent of a file. Also raises NoRanges if only complete files are sent.

        `cancel_token` ends the wait for this response. The caller ends a wait for its body by `abort`.
        """
        signed_url = self._signed_urls.get(target.url)
        if signed_url is not None:
            try:
                return self._open_at(signed_url, _NO_SECRETS, target, extent, cancel_token)
            except (Forbidden, NotFound, Unavailable, Changed) as error:
                # An expired URL may also lead to a page that is no file: then the file seems to have changed.
                if error.origin_status not in _MAYBE_EXPIRED and not isinstance(error, Changed):
                    raise
                self._signed_urls.pop(target.url, None)
        return self._open_at(target.url, target.secrets, target, extent, cancel_token)

    def anew(self) -> None:
        """Forget all signed URLs, and do not reuse a connection that is idle now."""
        self._pool.anew()
        self._signed_urls.clear()

    def _open_at(
        self, url: str, secrets: Secrets, target: Target, extent: Extent, cancel_token: CancelToken
    ) -> Response:
        headers = {}
        if extent.size != target.size:
            headers["Range"] = f"bytes={extent.start}-{extent.stop - 1}"
        condition = precondition(target.validator)
        arrived, response = self._follow("GET", url, {**headers, **condition}, secrets, cancel_token)
        if response.status == 412 and condition:
            # Some servers refuse their own validator. If the version differs, its validator says so, too.
            response.close()
            arrived, response = self._follow("GET", url, headers, secrets, cancel_token)
            if response.validator is None:
                response.close()
                raise Changed(f"{bare(target.url)}: the file has changed (412)", origin_status=412)
        try:
            check_status(response, arrived)
            check_encoding(response, arrived)
            check_validator(response, target.url, target.validator)
            response.expect(announced(response, arrived, target.size, extent), asked=extent)
        except UnknownRange:
            response.close()
            raise self._unknown_range(arrived) from None
        except BaseException:
            response.close()
            raise
        if arrived != target.url and origin_of(urlsplit(arrived)) != origin_of(urlsplit(target.url)):
            self._signed_urls[target.url] = arrived
        return response

    def _unknown_range(self, url: str) -> Exception:
        """What to raise for a part that does not say where it is: NoRanges, if its origin did so before."""
        origin = origin_of(urlsplit(url))
        if origin in self._without_ranges:
            return NoRanges(url)
        self._without_ranges[origin] = None
        return protocol_error(url, "206 does not say which bytes it holds")

    def _follow(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        secrets: Secrets,
        cancel_token: CancelToken,
    ) -> tuple[str, Response]:
        """Send a request and follow redirects. Returns the final URL and its response.

        If another origin lacks what it was redirected to, the first one is asked again: it may lead to
        several mirrors, one of which is not complete.
        """
        for _ in range(_MAX_MIRRORS - 1):
            arrived, response = self._follow_once(method, url, headers, secrets, cancel_token)
            if response.status not in _GONE or origin_of(urlsplit(arrived)) == origin_of(urlsplit(url)):
                return arrived, response
            response.close()
        return self._follow_once(method, url, headers, secrets, cancel_token)

    def _follow_once(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        secrets: Secrets,
        cancel_token: CancelToken,
    ) -> tuple[str, Response]:
        parts = parsed(url)
        first, requested, wants_cookie = origin_of(parts), _signed(parts, secrets), False
        for _ in range(MAX_REDIRECTS + 1):
            self._address_policy.check_url(parts)
            if origin_of(parts) != first:
                secrets = _NO_SECRETS  # they stay dropped, even if a later redirect leads back
            request = Request(method, requested, {**_DEFAULT_HEADERS, **headers, **secrets.headers})
            response = self._pool.send(request, cancel_token)
            if response.status not in _REDIRECTS or not (location := response.headers.get("Location")):
                return url, response
            with response:
                target = _joined(url, location, secrets.query)
            wants_cookie = wants_cookie or response.headers.get("Set-Cookie") is not None
            scheme = urlsplit(target).scheme
            if parts.scheme == "https" and scheme != "https":
                raise Forbidden(
                    f"{bare(url)} redirects from https to {scheme or 'no scheme'}",
                    code="downgrade_refused",
                    hint="the origin is misconfigured, or something intercepts the connection",
                )
            url, parts = target, parsed(target)
            requested = parts
        raise Unavailable(
            f"{bare(url)}: more than {MAX_REDIRECTS} redirects",
            code="redirect_loop",
            hint="it sets a cookie and expects it back: put the cookie into headers_file"
            if wants_cookie
            else "",
        )


def _checked(response: Response, url: str) -> Response:
    """The response, if it holds the file at `url`. Otherwise closes it and raises as `check_status`."""
    try:
        check_status(response, url)
        check_encoding(response, url)
    except BaseException:
        response.close()
        raise
    return response


def _signed(url: SplitResult, secrets: Secrets) -> SplitResult:
    """The URL with the query of the secrets. Only what is sent has it: no error and no log shows it."""
    return url._replace(query="&".join(filter(None, (url.query, secrets.query)))) if secrets.query else url


def _joined(url: str, location: str, secret_query: str) -> str:
    """The URL that a redirect leads to. One of another origin loses what it repeats of the secret query."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        if not secret_query or origin_of(parts) == origin_of(urlsplit(url)):
            return target
    except ValueError as error:
        raise Unavailable(
            f"{bare(url)} redirects to something that is not a URL", code="origin_protocol"
        ) from error
    secret = {unquote(parameter) for parameter in secret_query.split("&")}
    left = [each for each in parts.query.split("&") if unquote(each) not in secret]
    return parts._replace(query="&".join(left)).geturl()


def parsed(url: str) -> SplitResult:
    """The parts of a URL. What is checked and what is used come from this one result. Raises Invalid."""
    plain = _PLAIN.fullmatch(url)
    try:
        parts = SplitResult(*plain.groups("")) if plain else urlsplit(url)
        _, host, _ = origin_of(parts)  # checks the port, too
    except ValueError as error:
        raise Invalid(f"{bare(url)} is not a URL", code="bad_ref") from error
    if not host or (not plain and (_ODD.search(url) or "@" in parts.netloc)):
        raise Invalid(
            f"{bare(url)} has no host, names a user, or holds a space, a backslash or a non-ASCII character",
            code="bad_ref",
        )
    return parts
