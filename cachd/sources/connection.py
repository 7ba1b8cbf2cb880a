"""Keeps one connection to an origin, and reads the body of an answer from it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Self
from urllib.parse import SplitResult, urlsplit

from cachd.errors import Unavailable
from cachd.sources.answers import BROKEN, bare, broken, protocol_error
from cachd.sources.exchange import Answer, Incoming, request
from cachd.sources.routes import Dialled
from cachd.sources.wire import Wire

SLOWEST_BYTES_PER_SECOND = 1024
MISDIRECTED = 421  # RFC 9110, 15.5.20
# Idle connections of a thread: to a Hub, to its file store, and two others. Each holds a descriptor.
MOST_KEPT = 4

Origin = tuple[str, str, int]


def origin_of(url: SplitResult) -> Origin:
    """The scheme, host and port of a URL."""
    return _origin(url.scheme, url.netloc)


@lru_cache(maxsize=1024)
def _host(origin: Origin) -> str:
    """The value of the Host header for an origin (RFC 9110, 7.2)."""
    scheme, host, port = origin
    shown = f"[{host}]" if ":" in host else host
    return shown if port == (443 if scheme == "https" else 80) else f"{shown}:{port}"


@lru_cache(maxsize=1024)
def _origin(scheme: str, netloc: str) -> Origin:
    url = SplitResult(scheme, netloc, "", "", "")
    return scheme, url.hostname or "", url.port or (443 if scheme == "https" else 80)


class Connection:
    """One connection to an origin. Its first request dials it; after use it returns to its thread's pool.

    An idle connection holds no reference to its pool, so it is freed, and its socket closed, with the pool
    when the thread ends.
    """

    def __init__(
        self,
        origin: Origin,
        tls: Callable[[], ssl.SSLContext] | None,
        *,
        stall_seconds: float,
    ) -> None:
        self._origin, self._tls = origin, tls
        self._pool: dict[Origin, Connection] = {}
        self._stall_seconds = stall_seconds
        self._answer_by: float | None = None
        self._aborted = False
        self.addresses: tuple[str, ...] = ()
        self.proxy = ""
        self._incoming: Incoming | None = None
        self.wire: Wire | None = None

    def _connect(self, dial: Callable[[], Dialled]) -> Incoming:
        trusted = self._tls() if self._tls else None
        dialled = dial()
        self.addresses, self.proxy = dialled.addresses, dialled.proxy
        self.wire = wire = dialled.wire
        wire.answer_by = self._answer_by
        if trusted:
            self.wire = wire = wire.secured(trusted, self._origin[1])
        if self._aborted:  # by another thread, before there was a wire
            self.abort()
        wire.handshake()
        self._incoming = Incoming(wire)
        return self._incoming

    def abort(self) -> None:
        """Make a thread that waits for an answer on this connection return or raise at once."""
        self._aborted = True
        if self.wire is not None:
            self.wire.abort()

    def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        dial: Callable[[], Dialled],
        body: bytes = b"",
    ) -> Answer:
        """Send a request and receive the head of its answer, within `stall_seconds` in all.

        Raises OSError, HTTPException, what `dial` raises, or ValueError for a header that cannot be sent.
        """
        asked = request(method, path, _host(self._origin), headers) + body
        self._answer_by = time.monotonic() + self._stall_seconds
        incoming = self._incoming or self._connect(dial)
        incoming.wire.answer_by = self._answer_by
        incoming.wire.sendall(asked)
        answer = Answer(incoming, method)
        incoming.wire.answered()
        return answer

    def keep(self) -> None:
        """Return the connection to its pool. If the pool has too many, close the one that is idle longest."""
        pool, self._pool = self._pool, {}
        pool[self._origin] = self
        if len(pool) > MOST_KEPT:
            pool.pop(next(iter(pool))).close()

    def take(self, pool: dict[Origin, Connection]) -> None:
        """Use the connection for a request; `keep` returns it to `pool`."""
        self._pool = pool

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()


class Response:
    """The body of one answer. One thread reads and closes it; any thread may call `abort`."""

    def __init__(
        self,
        response: Answer,
        connection: Connection,
        url: str,
        *,
        stall_seconds: float,
    ) -> None:
        self._response, self._connection, self._url = response, connection, url
        self._stall_seconds = stall_seconds
        self._size: int | None = response.length
        self._got = 0
        self._failure: Unavailable | None = None
        self._returned_at = self._window_began = time.monotonic()
        self._window_got = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def size(self) -> int | None:
        """The number of bytes in the body; None if it was not stated."""
        return self._size

    def expect(self, size: int) -> None:
        """Set the exact number of bytes in the body; `readinto` raises for any other."""
        self._size = size

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        if self._failure:
            raise self._failure
        before = self._got
        try:
            return self._fill(view)
        except Unavailable as error:
            if self._got in (before, self._size):
                raise
            self._failure = error  # the next call raises it: these bytes came before it
            return self._got - before

    def _fill(self, view: memoryview) -> int:
        self._window_began += time.monotonic() - self._returned_at  # the caller's time does not count
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
                f"{bare(self._url)}: the connection ended after {self._got} of {self._size} bytes",
                code="ended_early",
            )
        if self._got == self._size:
            self._check_end()
        self._returned_at = time.monotonic()
        return filled

    def abort(self) -> None:
        """See `Body.abort`."""
        self._connection.abort()

    def close(self) -> None:
        """Return the connection to its pool if the answer was read to its end, else close it.

        After a 421 it is closed, too: its server does not serve this origin (RFC 9110, 15.5.20).
        """
        self._failure = None  # its traceback refers to this object: a reference cycle
        is_complete = self._got == self._size
        if is_complete and self._response.is_over and self._response.status != MISDIRECTED:
            self._connection.keep()
        else:
            self._connection.close()

    def _receive(self, view: memoryview) -> int:
        try:
            return self._response.readinto(view)
        except BROKEN as error:
            raise broken(urlsplit(self._url), error, self._connection.proxy) from error

    def _check_rate(self) -> None:
        """Raises Unavailable when a window of `stall_seconds` brought too few bytes a second."""
        elapsed = time.monotonic() - self._window_began
        if elapsed < self._stall_seconds:
            return
        rate = (self._got - self._window_got) / elapsed
        if rate < SLOWEST_BYTES_PER_SECOND:
            raise Unavailable(
                f"{bare(self._url)}: only {rate:.0f} bytes a second for {elapsed:.0f} s", code="too_slow"
            )
        self._window_began, self._window_got = time.monotonic(), self._got

    def _check_end(self) -> None:
        """Raises Unavailable when a body without a Content-Length goes on after the expected size."""
        length = self._response.getheader("Content-Length")
        if length is None and self._receive(memoryview(bytearray(1))):
            raise protocol_error(self._url, f"the body goes on after the expected {self._size} bytes")
