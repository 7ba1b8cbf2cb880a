"""One connection to an origin, and the body of one answer on it."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from io import BufferedReader
from typing import Self
from urllib.parse import SplitResult, urlsplit

from cachd.errors import Unavailable
from cachd.sources.answers import BROKEN, bare, broken, number, protocol_error
from cachd.sources.wire import TlsWire, Wire

SLOWEST_BYTES_PER_SECOND = 1024
_LONGEST_LINE = 65536
_MOST_HEADERS = 100
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2

Origin = tuple[str, str, int]


def origin_of(url: SplitResult) -> Origin:
    return _origin(url.scheme, url.netloc)


@lru_cache(maxsize=1024)
def _origin(scheme: str, netloc: str) -> Origin:
    url = SplitResult(scheme, netloc, "", "", "")
    return scheme, url.hostname or "", url.port or (443 if scheme == "https" else 80)


class Answer(http.client.HTTPResponse):
    """The base's answer, but for its head: read as lines of `name: value`, not by the parser of e-mail."""

    def begin(self) -> None:
        if self.headers is not None:
            return
        while True:
            version, status, reason = self._read_status()
            if status != http.client.CONTINUE:
                break
            _read_head(self.fp)
        self.code = self.status = status
        self.reason = reason.strip()
        self.version = 10 if version in ("HTTP/1.0", "HTTP/0.9") else 11
        self.headers = self.msg = _read_head(self.fp)
        self.chunked = (self.headers.get("Transfer-Encoding") or "").lower() == "chunked"
        self.chunk_left = None
        self.will_close = self._check_close()
        bodiless = status in (204, 304) or self._method == "HEAD"
        length = None if self.chunked else number(self.headers.get("Content-Length"))
        self.length = 0 if bodiless else length
        if not self.will_close and not self.chunked and self.length is None:
            self.will_close = True


def _read_head(lines: BufferedReader) -> http.client.HTTPMessage:
    """The header lines up to the empty one. Raises http.client.HTTPException for what is none."""
    headers, name = http.client.HTTPMessage(), ""
    for _ in range(_MOST_HEADERS + 1):
        line = lines.readline(_LONGEST_LINE + 1)
        if len(line) > _LONGEST_LINE:
            raise http.client.LineTooLong("header line")
        if line in (b"\r\n", b"\n", b""):
            return headers
        if name and line[:1] in (b" ", b"\t"):  # the one before goes on (RFC 9112 5.2)
            headers.replace_header(name, f"{headers[name]} {line.decode('iso-8859-1')}".strip())
            continue
        name, colon, value = line.decode("iso-8859-1").partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise http.client.HTTPException(f"a header line is {line[:40]!r}")
        headers[name] = value.strip()
    raise http.client.HTTPException(f"more than {_MOST_HEADERS} header lines")


class Connection(http.client.HTTPConnection):
    """One connection to an origin through a dial of ours, given back to its thread's pool after use."""

    response_class = Answer

    def __init__(
        self,
        origin: Origin,
        dial: Callable[[], socket.socket],
        tls: ssl.SSLContext | None,
        pool: dict[Origin, Connection],
        *,
        stall_seconds: float,
    ) -> None:
        _, host, port = origin
        super().__init__(host, port)
        self.default_port = 443 if tls else 80  # decides whether the Host header names the port
        self._origin, self._dial, self._tls, self._pool = origin, dial, tls, pool
        self._stall_seconds = stall_seconds
        self._answer_by: float | None = None
        self._aborted = False
        self.address = ""
        self.wire: Wire | None = None  # outlasts `sock`, which an answer that closes takes away

    def connect(self) -> None:
        connected = self._dial()
        self.address = str(connected.getpeername()[0])
        wire = (
            TlsWire(connected, self._stall_seconds, self._tls, self.host)
            if self._tls
            else Wire(connected, self._stall_seconds)
        )
        wire.answer_by = self._answer_by
        self.sock = self.wire = wire
        if self._aborted:  # while it was dialled
            self.abort()
        wire.handshake()

    def abort(self) -> None:
        """Make whoever waits for an answer on it return or raise at once."""
        self._aborted = True
        if self.wire is not None:
            with suppress(OSError):
                self.wire.shutdown(socket.SHUT_RDWR)

    def ask(self, method: str, path: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """Send a request and read the head of its answer, which gets `stall_seconds` in all."""
        self._answer_by = time.monotonic() + self._stall_seconds
        if self.wire is not None:
            self.wire.answer_by = self._answer_by
        self.request(method, path, headers=headers)
        response = self.getresponse()
        if self.wire is not None:
            self.wire.answered()
        return response

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
        self._response, self._connection, self._shown = response, connection, bare(url)
        self._stall_seconds = stall_seconds
        self._size: int | None = response.length
        self._got = 0
        self._left = self._window_began = time.monotonic()
        self._window_got = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def expect(self, size: int) -> None:
        """The body has exactly `size` bytes, whatever the origin said or left unsaid."""
        self._size = size

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        self._window_began += time.monotonic() - self._left  # what the caller took is not the origin's
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
        self._left = time.monotonic()
        return filled

    def abort(self) -> None:
        """See `Body.abort`."""
        self._connection.abort()

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
                got = self._response.read1(len(view))
                view[: len(got)] = got
                return len(got)
            # One receive at a time, straight into `view` (wire.py), so that a trickle is noticed.
            return self._response.fp.readinto1(view)
        except BROKEN as error:
            raise broken(urlsplit(self._shown), error) from error

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
            raise protocol_error(self._shown, f"more than the {self._size} bytes it was asked for")
