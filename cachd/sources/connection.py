"""One connection to an origin, which is kept idle between its requests."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from functools import lru_cache
from urllib.parse import SplitResult

from cachd.sources.http1 import FramedBody, Head, ReceiveBuffer, Request, receive_head
from cachd.sources.routes import Dialled
from cachd.sources.wire import Wire

# The most idle connections of a thread: to a Hub, to its file store, and two others. Each has a descriptor.
MAX_KEPT = 4
_REMEMBERED = 1024  # origins of URLs, and Host headers

Origin = tuple[str, str, int]


def origin_of(url: SplitResult) -> Origin:
    """The scheme, host and port of a URL."""
    return _origin(url.scheme, url.netloc)


@lru_cache(maxsize=_REMEMBERED)
def _host(origin: Origin) -> str:
    """The value of the Host header for an origin (RFC 9110, 7.2)."""
    scheme, host, port = origin
    shown = f"[{host}]" if ":" in host else host
    return shown if port == (443 if scheme == "https" else 80) else f"{shown}:{port}"


@lru_cache(maxsize=_REMEMBERED)
def _origin(scheme: str, netloc: str) -> Origin:
    url = SplitResult(scheme, netloc, "", "", "")
    return scheme, url.hostname or "", url.port or (443 if scheme == "https" else 80)


class Connection:
    """One connection to an origin. Its first request dials it; after use it returns to its thread's pool.

    An idle connection holds no reference to its pool, so it is freed, and its socket closed, with the pool
    when the thread ends. Once it is dialled, `wire` is the socket, `addresses` are the checked addresses of
    the host (see `Dialled`), and `proxy` is the proxy that it goes through, if any.
    """

    def __init__(
        self,
        origin: Origin,
        tls: Callable[[], ssl.SSLContext] | None,
        *,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._origin, self._tls, self._clock = origin, tls, clock
        self._pool: dict[Origin, Connection] = {}
        self._stall_seconds = stall_seconds
        self._answer_by: float | None = None
        self._aborted = False
        self.addresses: tuple[str, ...] = ()
        self.proxy = ""
        self._received: ReceiveBuffer | None = None
        self.wire: Wire | None = None

    def _connect(self, dial: Callable[[], Dialled]) -> ReceiveBuffer:
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
        self._received = ReceiveBuffer(wire)
        return self._received

    def abort(self) -> None:
        """Make a thread that waits for a response on this connection return or raise at once."""
        self._aborted = True
        if self.wire is not None:
            self.wire.abort()

    def exchange(self, request: Request, dial: Callable[[], Dialled]) -> tuple[Head, FramedBody]:
        """Send a request and receive the head of its response, within `stall_seconds` in all.

        Raises OSError, HTTPException, what `dial` raises, or ValueError for a header that cannot be sent.
        """
        sent = request.as_bytes(_host(self._origin))
        self._answer_by = self._clock() + self._stall_seconds
        received = self._received or self._connect(dial)
        received.wire.answer_by = self._answer_by
        received.wire.sendall(sent)
        head = receive_head(received)
        received.wire.answered()
        return head, FramedBody(received, head, request.method)

    def keep(self) -> None:
        """Return the connection to its pool. If the pool has too many, close the one that is idle longest."""
        pool, self._pool = self._pool, {}
        pool[self._origin] = self
        if len(pool) > MAX_KEPT:
            pool.pop(next(iter(pool))).close()

    def take(self, pool: dict[Origin, Connection]) -> None:
        """Use the connection for a request; `keep` returns it to `pool`."""
        self._pool = pool

    def close(self) -> None:
        """Close the socket. A thread that waits on it must have ended its wait: see `abort`."""
        if self.wire is not None:
            self.wire.close()
