"""The byte path: ranged GETs over blocking connections, each hop and address checked.

Every request says `Accept-Encoding: identity`; every answer must be the very bytes that were asked for:

    200  the whole file, at its size           206  Content-Range: bytes start-last/size, all three exact
    412  the validator moved: Changed          416  the file got shorter: Changed
    3xx  followed by hand, ten at most; secrets stay with the origin they were meant for

A file that redirects (a Hub's large files do) is asked at its signed address again until that expires, so
that a model of a thousand parts costs the origin one request a file.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, Self
from urllib.parse import SplitResult, urljoin, urlsplit

from cachd import __version__
from cachd.errors import CachdError, Changed, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Extent
from cachd.policy.reach import Reach
from cachd.sources.source import NoRanges

MOST_REDIRECTS = 10
MOST_MOVED = 10_000
SLOWEST_BYTES_PER_SECOND = 1024
_REDIRECTS = (301, 302, 303, 307, 308)
_MAYBE_EXPIRED = (400, 401, 403, 404, 410)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_RATE_LIMIT_WAIT = re.compile(r"\bt=(\d+)")
_BROKEN = (OSError, http.client.HTTPException)


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
    headers: http.client.HTTPMessage


class Http:
    """Plain HTTP/1.1 with connections kept a thread and an origin. Safe to share between threads."""

    def __init__(
        self,
        reach: Reach,
        *,
        stall_seconds: float = 30.0,
        connect_seconds: float = 10.0,
        ca_file: str | None = None,
    ) -> None:
        self._reach = reach
        self._stall_seconds, self._connect_seconds = stall_seconds, connect_seconds
        self._tls = ssl.create_default_context(cafile=ca_file)
        self._kept = threading.local()
        self._moved: dict[str, str] = {}  # first URL -> the signed one it redirected to

    def head(self, url: str, *, secrets: Mapping[str, str] | None = None) -> Head:
        """Ask about a URL without its bytes. Raises as `open` does."""
        _, response, connection = self._follow("HEAD", url, {}, secrets or {})
        with Response(response, connection, url, stall_seconds=self._stall_seconds):
            if response.status in (405, 501):
                return self._head_by_range(url, secrets or {})
            _check_status(response, url)
            length = response.getheader("Content-Length")
            return Head(_number(length), _validator(response), response.headers)

    def _head_by_range(self, url: str, secrets: Mapping[str, str]) -> Head:
        """For an origin that knows no HEAD: the first byte's answer says as much."""
        _, response, connection = self._follow("GET", url, {"Range": "bytes=0-0"}, secrets)
        with Response(response, connection, url, stall_seconds=self._stall_seconds):
            _check_status(response, url)
            told = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
            size = int(told[3]) if told else _number(response.getheader("Content-Length"))
            return Head(size, _validator(response), response.headers)

    def read(self, url: str, *, at_most: int, secrets: Mapping[str, str] | None = None) -> bytes:
        """The whole of a small file. Raises Invalid when it is longer than `at_most` bytes."""
        _, response, connection = self._follow("GET", url, {}, secrets or {})
        with Response(response, connection, url, stall_seconds=self._stall_seconds) as body:
            _check_status(response, url)
            _check_encoding(response, url)
            buffer = bytearray(at_most + 1)
            got = body.readinto(memoryview(buffer))
            if got > at_most:
                raise Invalid(f"{_bare(url)} is longer than {at_most} bytes", code="too_long")
            return bytes(buffer[:got])

    def open(self, target: Target, extent: Extent) -> Response:
        """Ask for the bytes of an extent. Raises NoRanges, Changed, NotFound, Forbidden or Unavailable."""
        moved = self._moved.get(target.url)
        if moved is not None:
            try:
                return self._open_at(moved, {}, target, extent)
            except (Forbidden, NotFound, Unavailable) as error:
                if error.facts.get("status") not in _MAYBE_EXPIRED:
                    raise
                self._moved.pop(target.url, None)
        return self._open_at(target.url, target.secrets, target, extent)

    def _open_at(self, url: str, secrets: Mapping[str, str], target: Target, extent: Extent) -> Response:
        headers = {}
        if extent.size != target.size:
            headers["Range"] = f"bytes={extent.start}-{extent.stop - 1}"
        if target.validator:
            by_tag = target.validator.startswith('"')
            headers["If-Match" if by_tag else "If-Unmodified-Since"] = target.validator
        arrived, response, connection = self._follow("GET", url, headers, secrets)
        body = Response(response, connection, arrived, stall_seconds=self._stall_seconds)
        try:
            _check_status(response, arrived)
            _check_encoding(response, arrived)
            _check_validator(response, target)
            body.expect(_announced(response, arrived, target.size, extent))
        except BaseException:
            body.close()
            raise
        if _origin(urlsplit(arrived)) != _origin(urlsplit(target.url)):
            if len(self._moved) >= MOST_MOVED:
                self._moved.clear()
            self._moved[target.url] = arrived
        return body

    def _follow(
        self, method: str, url: str, headers: Mapping[str, str], secrets: Mapping[str, str]
    ) -> tuple[str, http.client.HTTPResponse, Connection]:
        """Send a request and follow redirects; the URL that answered, its answer and its connection."""
        first = _origin(urlsplit(url))
        for _ in range(MOST_REDIRECTS + 1):
            parts = _checked(url)
            self._reach.check_url(parts)
            if _origin(parts) != first:
                secrets = {}  # for good: a redirect back does not bring them back
            response, connection = self._send(method, parts, {**headers, **secrets})
            location = response.getheader("Location")
            if response.status not in _REDIRECTS or not location:
                return url, response, connection
            with Response(response, connection, url, stall_seconds=self._stall_seconds):
                target = urljoin(url, location)
            if parts.scheme == "https" and urlsplit(target).scheme != "https":
                raise Forbidden(
                    f"{_bare(url)} redirects from https to {urlsplit(target).scheme or 'nothing'}",
                    code="downgrade_refused",
                    mend="the origin is misconfigured, or somebody stands between",
                )
            url = target
        raise Unavailable(f"{_bare(url)}: more than {MOST_REDIRECTS} redirects", code="redirect_loop")

    def _send(
        self, method: str, url: SplitResult, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, Connection]:
        """One request on a kept connection, or on a new one when the kept one was closed meanwhile."""
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        told = {"User-Agent": f"cachd/{__version__}", "Accept-Encoding": "identity", "Accept": "*/*"}
        pool = self._pool()
        kept = pool.pop(_origin(url), None)
        tls = self._tls if url.scheme == "https" else None
        for connection in filter(None, (kept, Connection(_origin(url), lambda: self._dial(url), tls, pool))):
            try:
                connection.request(method, path, headers={**told, **headers})
                return connection.getresponse(), connection
            except CachdError:
                connection.close()
                raise
            except _BROKEN as error:
                connection.close()
                if connection is not kept:
                    raise _broken(url, error) from error
            except ValueError as error:  # such as a token with a line feed
                connection.close()
                raise Invalid(
                    f"a header for {url.netloc} cannot be sent", code="bad_header", mend="check the token"
                ) from error
        raise AssertionError("a new connection answers or raises")

    def _pool(self) -> dict[Origin, Connection]:
        """The connections this thread keeps, one an origin."""
        if not hasattr(self._kept, "pool"):
            self._kept.pool = {}
        pool: dict[Origin, Connection] = self._kept.pool
        return pool

    def _dial(self, url: SplitResult) -> socket.socket:
        """Connect to an address that was resolved and then vetted: no second look-up can change it."""
        host, port = url.hostname or "", _origin(url)[2]
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, address in infos:
            self._reach.check_address(url, str(address[0]))
        refusal: OSError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in infos:
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self._connect_seconds)
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.settimeout(self._stall_seconds)
                return sock
            except OSError as error:
                sock.close()
                refusal = error
        raise refusal


class Connection(http.client.HTTPConnection):
    """One connection to an origin through a dial of ours, given back to its thread's pool after use."""

    def __init__(
        self,
        origin: Origin,
        dial: Callable[[], socket.socket],
        tls: ssl.SSLContext | None,
        pool: dict[Origin, Connection],
    ) -> None:
        _, host, port = origin
        super().__init__(host, port)
        self.default_port = 443 if tls else 80  # decides whether the Host header names the port
        self._origin, self._dial, self._tls, self._pool = origin, dial, tls, pool

    def connect(self) -> None:
        self.sock = self._dial()
        if self._tls:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    def keep(self) -> None:
        """Leave the connection to the thread's next request to this origin."""
        self._pool[self._origin] = self


class Response:
    """The body of one answer. Read and closed by one thread; `abort` may come from another."""

    def __init__(
        self,
        response: http.client.HTTPResponse,
        connection: Connection,
        url: str,
        *,
        stall_seconds: float,
    ) -> None:
        self._response, self._connection, self._shown = response, connection, _bare(url)
        self._sock = connection.sock
        self._stall_seconds = stall_seconds
        self._size: int | None = response.length
        self._got = 0
        self._window_began, self._window_got = time.monotonic(), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def expect(self, size: int) -> None:
        """The body has exactly `size` bytes, whatever the origin said or left unsaid."""
        self._size = size

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        wanted = len(view) if self._size is None else min(len(view), self._size - self._got)
        filled = 0
        while filled < wanted:
            n = self._receive(view[filled:wanted])
            if not n:
                break
            filled += n
            self._got += n
            self._check_rate()
        if self._size is not None and filled < wanted:
            raise Unavailable(
                f"{self._shown}: the connection ended after {self._got} of {self._size} bytes",
                code="cut_short",
            )
        if self._got == self._size:
            self._check_end()
        return filled

    def abort(self) -> None:
        """See `Body.abort`."""
        with suppress(OSError):
            # Not the TLS socket's own shutdown: that one drops the cipher under the reading thread.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Keep the connection if its answer was read to the end, else drop it."""
        whole = self._got == self._size
        if whole and not self._response.will_close:
            self._response.close()
            self._connection.keep()
        else:
            self._response.close()
            self._connection.close()

    def _receive(self, view: memoryview) -> int:
        try:
            if self._response.chunked or self._response.fp is None:
                return self._response.readinto(view)
            # One receive at a time, straight into `view`, so that a trickle is noticed.
            return self._response.fp.readinto1(view)
        except _BROKEN as error:
            raise _broken(urlsplit(self._shown), error) from error

    def _check_rate(self) -> None:
        elapsed = time.monotonic() - self._window_began
        if elapsed < self._stall_seconds:
            return
        rate = (self._got - self._window_got) / elapsed
        if rate < SLOWEST_BYTES_PER_SECOND:
            raise Unavailable(
                f"{self._shown}: {rate:.0f} bytes a second for {elapsed:.0f} s", code="too_slow"
            )
        self._window_began, self._window_got = time.monotonic(), self._got

    def _check_end(self) -> None:
        """An answer without a length must end where the manifest says the file ends."""
        told = self._response.getheader("Content-Length")
        if told is None and self._receive(memoryview(bytearray(1))):
            raise _protocol(self._shown, f"more than the {self._size} bytes it was asked for")


Origin = tuple[str, str, int]


def _origin(url: SplitResult) -> Origin:
    return url.scheme, url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _checked(url: str) -> SplitResult:
    """The one parse of a URL that is acted upon. Raises Invalid."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise Invalid(f"{_bare(url)} is not a URL", code="bad_ref") from error
    odd = any(c.isspace() or c == "\\" or not c.isprintable() for c in url)
    if odd or "@" in parts.netloc or not parts.hostname or not url.isascii():
        raise Invalid(f"{_bare(url)} is not a URL that can be asked safely", code="bad_ref")
    return parts


def _bare(url: str) -> str:
    """A URL as it may be shown: signatures live in queries."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _validator(response: http.client.HTTPResponse) -> str | None:
    tag = response.getheader("ETag") or ""
    if tag.startswith('"'):  # a weak one (W/"...") promises less than equal bytes
        return tag
    return response.getheader("Last-Modified")


def _check_status(response: http.client.HTTPResponse, url: str) -> None:
    status, shown = response.status, _bare(url)
    if status in (200, 206):
        return
    reason = f"{shown}: {status} {response.reason}".rstrip()
    if status == 401:
        raise Forbidden(reason, code="source_unauthorized", mend="check the token", status=status)
    if status in (403, 451):
        raise Forbidden(
            reason,
            code="source_forbidden",
            mend="check that the token may read it; some origins say this of what does not exist",
            status=status,
        )
    if status in (404, 410):
        raise NotFound(reason, code="file_not_found", mend="check the name", status=status)
    if status in (412, 416):
        raise Changed(f"{shown}: the file is not what it was ({status})", status=status)
    raise Unavailable(
        reason,
        code="rate_limited" if status == 429 else "origin_failed",
        retry_after=retry_after(response.headers),
        status=status,
    )


class Headers(Protocol):
    """The headers of an answer, whichever client brought them."""

    def get(self, name: str, /) -> str | None: ...


def retry_after(headers: Headers) -> float | None:
    """Seconds the origin asks for: Retry-After as seconds or a date (RFC 9110), or RateLimit's t."""
    told = (headers.get("Retry-After") or "").strip()
    if told.isdecimal():
        return float(told)
    with suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(told).timestamp() - time.time())
    limit = _RATE_LIMIT_WAIT.search(headers.get("RateLimit") or "")
    return float(limit[1]) + 1 if limit else None


def _check_encoding(response: http.client.HTTPResponse, url: str) -> None:
    encoding = response.getheader("Content-Encoding") or "identity"
    if encoding != "identity":
        raise _protocol(url, f"Content-Encoding {encoding:.40} though identity was asked for")


def _check_validator(response: http.client.HTTPResponse, target: Target) -> None:
    now = _validator(response)
    if target.validator and now and now != target.validator:
        raise Changed(f"{_bare(target.url)}: the file is now {now:.80}, and was {target.validator:.80}")


def _announced(response: http.client.HTTPResponse, url: str, size: int, extent: Extent) -> int:
    """How many bytes an answer must hold, once its headers were found to say so too."""
    length = _number(response.getheader("Content-Length"))
    if response.status == 206:
        told = response.getheader("Content-Range") or "none"
        exact = f"bytes {extent.start}-{extent.stop - 1}/{size}"
        if told != exact:
            raise _protocol(url, f"Content-Range is {told:.60}, not {exact}")
    elif extent.size != size:
        raise NoRanges(url)
    elif length is not None and length != size:
        kind = response.getheader("Content-Type") or "no type"
        raise Changed(f"{_bare(url)}: {length} bytes of {kind:.60} where {size} were expected")
    if length is not None and length != extent.size:
        raise _protocol(url, f"Content-Length is {length}, not {extent.size}")
    return extent.size


def _protocol(url: str, what: str) -> Unavailable:
    return Unavailable(f"{_bare(url)}: {what}", code="origin_protocol")


def _broken(url: SplitResult, error: Exception) -> CachdError:
    """What a failed connection means."""
    shown = f"{url.scheme}://{url.netloc}{url.path}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return Forbidden(
            f"{shown}: {error.verify_message}",
            code="tls_untrusted",
            mend="set ca_file if the origin has its own authority; check the node's clock",
        )
    if isinstance(error, socket.gaierror):
        return Unavailable(f"{url.hostname} cannot be resolved: {error.strerror}", code="dns_failed")
    if isinstance(error, TimeoutError):
        return Unavailable(f"{shown}: no byte for too long", code="stalled")
    return Unavailable(f"{shown}: {type(error).__name__}: {error}", code="connection_failed")
