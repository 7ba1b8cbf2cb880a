"""Sends requests over kept connections: each thread keeps one idle connection for each origin."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from cachd.errors import CachdError, Invalid
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.at_once import BUSY
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection, Origin, origin_of
from cachd.sources.failures import BROKEN, broken
from cachd.sources.http1 import Request
from cachd.sources.response import Response
from cachd.sources.routes import Routes
from cachd.sources.trust import Authorities

_FEW_SECONDS = 600.0  # from the last refusal
_MAX_FEW = 1000


class ConnectionPool:
    """Sends requests to origins that the address policy allows. Thread-safe."""

    def __init__(
        self,
        routes: Routes,
        address_policy: AddressPolicy,
        authorities: Authorities,
        *,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routes, self._address_policy, self._authorities = routes, address_policy, authorities
        self._stall_seconds, self._clock = stall_seconds, clock
        self._kept = threading.local()
        self._age = 0  # connections of an earlier age are not used again
        self._lock = threading.Lock()
        self._all_kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._shared = _Kept()  # the idle connections to origins that take few of them, for all threads
        self._few: dict[Origin, float] = {}  # such an origin -> until when it counts as one

    def anew(self) -> None:
        """Do not reuse a connection that is idle now."""
        self._age += 1
        while self._shared:
            with suppress(KeyError):  # another thread took it
                self._shared.popitem()[1].close()

    def send(self, request: Request, cancel_token: CancelToken) -> Response:
        """Send a request on the idle connection, or on a new one if the origin has closed the idle one.

        The caller closes the response. Raises Invalid for a header that cannot be sent, Unavailable,
        Forbidden or Cancelled.
        """
        url = request.url
        pool = self._shared if self._takes_few(origin_of(url)) else self._idle()
        kept = None if request.body else pool.pop(origin_of(url), None)  # a body is never sent twice
        if kept:
            # Perhaps the policy allowed this connection only for another path of the host.
            self._address_policy.check_addresses(url, kept.addresses)
            try:
                return self._noted(self._exchange(kept, request, pool, cancel_token), request)
            except BROKEN:
                cancel_token.check()
        tls = self._authorities.context if url.scheme == "https" else None
        new = Connection(origin_of(url), tls, stall_seconds=self._stall_seconds, clock=self._clock)
        try:
            return self._noted(self._exchange(new, request, pool, cancel_token), request)
        except BROKEN as error:
            cancel_token.check()
            raise broken(url, error, new.proxy) from error

    def _takes_few(self, origin: Origin) -> bool:
        return bool(self._few) and self._few.get(origin, 0.0) > self._clock()

    def _noted(self, response: Response, request: Request) -> Response:
        """The response. After a refusal (429, 503), the threads share their idle connections to the origin.

        An origin may take only one connection, and an idle one of another thread would be it.
        """
        if response.status not in BUSY:
            return response
        origin = origin_of(request.url)
        with self._lock:
            if len(self._few) >= _MAX_FEW:
                self._few.clear()
            self._few[origin] = self._clock() + _FEW_SECONDS
            pools = list(self._all_kept)
        for pool in pools:
            if idle := pool.pop(origin, None):  # no other thread can use it any more
                idle.close()
        return response

    def _exchange(
        self, connection: Connection, request: Request, pool: dict[Origin, Connection], token: CancelToken
    ) -> Response:
        """The response that `connection` brings; for any error it is closed. Raises one of BROKEN, too."""
        connection.take(pool)
        try:
            with token.reaches(connection):
                head, body = connection.exchange(request, lambda: self._routes.dial(request.url, token))
                token.count()
        except (CachdError, *BROKEN):
            connection.close()
            raise
        except ValueError as error:  # such as a token with a line feed
            connection.close()
            raise Invalid(
                f"a header for {request.url.netloc} has a character that cannot be sent",
                code="bad_header",
                hint="check the token",
            ) from error
        return Response(
            head, body, connection, request.url, stall_seconds=self._stall_seconds, clock=self._clock
        )

    def _idle(self) -> dict[Origin, Connection]:
        """The idle connections of this thread, one for each origin."""
        if getattr(self._kept, "age", None) != self._age:
            for connection in getattr(self._kept, "pool", {}).values():
                connection.close()
            self._kept.pool, self._kept.age = _Kept(), self._age
            with self._lock:
                self._all_kept.add(self._kept.pool)
        pool: dict[Origin, Connection] = self._kept.pool
        return pool


class _Kept(dict[Origin, Connection]):
    """The idle connections of one thread, by origin."""

    __slots__ = ("__weakref__",)
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
