"""One connection to an origin, and the body of one answer on it."""

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
MISDIRECTED = 421
MOST_KEPT = 4  # by a thread: a Hub and its store, and another pair; each costs a descriptor

Origin = tuple[str, str, int]


def origin_of(url: SplitResult) -> Origin:
    return _origin(url.scheme, url.netloc)


@lru_cache(maxsize=1024)
def _host(origin: Origin) -> str:
    """The Host header for an origin."""
    scheme, host, port = origin
    shown = f"[{host}]" if ":" in host else host
    return shown if port == (443 if scheme == "https" else 80) else f"{shown}:{port}"


@lru_cache(maxsize=1024)
def _origin(scheme: str, netloc: str) -> Origin:
    url = SplitResult(scheme, netloc, "", "", "")
    return scheme, url.hostname or "", url.port or (443 if scheme == "https" else 80)


class Connection:
    """One connection to an origin, dialled when first asked, given back to its thread's pool after use.

    While it is kept it knows neither its pool nor who dials: these know it, and so it closes with them.
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
        if self._aborted:  # while it was dialled
            self.abort()
        wire.handshake()
        self._incoming = Incoming(wire)
        return self._incoming

    def abort(self) -> None:
        """Make whoever waits for an answer on it return or raise at once."""
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
        """Send a request and read the head of its answer, which gets `stall_seconds` in all.

        Raises OSError, HTTPException, or ValueError for a header that cannot be sent.
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
        """Leave the connection to the thread's next request to this origin; the one kept longest may go."""
        pool, self._pool = self._pool, {}
        pool[self._origin] = self
        if len(pool) > MOST_KEPT:
            pool.pop(next(iter(pool))).close()

    def take(self, pool: dict[Origin, Connection]) -> None:
        """Use it, and give it back to this pool."""
        self._pool = pool

    def close(self) -> None:
        if self.wire is not None:
            self.wire.close()


class Response:
    """The body of one answer. Read and closed by one thread; `abort` may come from another."""

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
        self._left = self._window_began = time.monotonic()
        self._window_got = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def size(self) -> int | None:
        """Its bytes, as far as the origin says."""
        return self._size

    def expect(self, size: int) -> None:
        """The body has exactly `size` bytes, whatever the origin said or left unsaid."""
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
            self._failure = error  # later: what came before it counts
            return self._got - before

    def _fill(self, view: memoryview) -> int:
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
                f"{bare(self._url)}: the connection ended after {self._got} of {self._size} bytes",
                code="ended_early",
            )
        if self._got == self._size:
            self._check_end()
        self._left = time.monotonic()
        return filled

    def abort(self) -> None:
        """See `Body.abort`."""
        self._connection.abort()

    def close(self) -> None:
        """Keep the connection if its answer was read to the end, else drop it.

        One that is told it came to the wrong server (421, RFC 9110 15.5.20) asks nothing there again.
        """
        self._failure = None  # its traceback leads back here: all of it would stay until a collection
        whole = self._got == self._size
        if whole and self._response.is_over and self._response.status != MISDIRECTED:
            self._connection.keep()
        else:
            self._connection.close()

    def _receive(self, view: memoryview) -> int:
        try:
            return self._response.readinto(view)
        except BROKEN as error:
            raise broken(urlsplit(self._url), error, self._connection.proxy) from error

    def _check_rate(self) -> None:
        elapsed = time.monotonic() - self._window_began
        if elapsed < self._stall_seconds:
            return
        rate = (self._got - self._window_got) / elapsed
        if rate < SLOWEST_BYTES_PER_SECOND:
            raise Unavailable(
                f"{bare(self._url)}: {rate:.0f} bytes a second for {elapsed:.0f} s", code="too_slow"
            )
        self._window_began, self._window_got = time.monotonic(), self._got

    def _check_end(self) -> None:
        """An answer without a length must end where the manifest says the file ends."""
        told = self._response.getheader("Content-Length")
        if told is None and self._receive(memoryview(bytearray(1))):
            raise protocol_error(self._url, f"more than the {self._size} bytes it was asked for")
