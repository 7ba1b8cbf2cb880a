"""Sends requests over kept connections: each thread keeps one idle connection for each origin."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress

from cachd.bounded import Bounded
from cachd.errors import CachdError, Invalid
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection, Origin, origin_of
from cachd.sources.failures import BROKEN, BUSY, broken, retry_after
from cachd.sources.http1 import Request
from cachd.sources.pauses import RATE_LIMITED, Pauses
from cachd.sources.response import Response
from cachd.sources.routes import Routes
from cachd.sources.trust import Authorities

_VAIN_SECONDS = 10.0
_MAX_VAIN = 1000


class ConnectionPool:
    """Sends requests to origins that the address policy allows. Thread-safe."""

    def __init__(
        self,
        routes: Routes,
        address_policy: AddressPolicy,
        authorities: Authorities,
        *,
        stall_seconds: float,
        pauses: Pauses,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._routes, self._address_policy, self._authorities = routes, address_policy, authorities
        self._pauses = pauses
        self._stall_seconds, self._clock = stall_seconds, clock
        self._kept = threading.local()
        self._age = object()  # connections of another age are not used again
        self._lock = threading.Lock()
        self._pools: weakref.WeakSet[_Kept] = weakref.WeakSet()  # of all threads
        # an origin that refused all the same -> until when to skip it
        self._vain = Bounded[Origin, float](_MAX_VAIN)

    def anew(self) -> None:
        """Do not reuse a connection that is idle now."""
        self._age = object()

    def send(self, request: Request, cancel_token: CancelToken) -> Response:
        """Send a request on the idle connection, or on a new one if the origin has closed the idle one.

        The caller closes the response. Raises Invalid for a header that cannot be sent, Unavailable (also
        while the origin wants a pause), Forbidden or Cancelled.
        """
        url, pool = request.url, self._idle()
        self._pauses.check(url, request.headers)
        kept = None if request.body else pool.pop(origin_of(url), None)  # a body is never sent twice
        if kept:
            with suppress(*BROKEN):  # after a cancel, the new connection raises
                return self._exchange_on_idle(kept, request, pool, cancel_token)
        tls = self._authorities.context if url.scheme == "https" else None
        new = Connection(origin_of(url), tls, stall_seconds=self._stall_seconds, clock=self._clock)
        try:
            response = self._exchange(new, request, pool, cancel_token)
        except BROKEN as error:
            cancel_token.check()
            raise broken(url, error, new.proxy) from error
        return self._of_another_thread(response, request, pool, cancel_token)

    def _of_another_thread(
        self, response: Response, request: Request, pool: dict[Origin, Connection], token: CancelToken
    ) -> Response:
        """The response; if it refuses the request (429, 503), the one over another thread's idle connection.

        An origin may accept a single connection, and then another thread may have it.
        """
        origin = origin_of(request.url)
        is_refusal = response.status in BUSY and not (request.body or retry_after(response.headers))
        if not is_refusal or self._vain.get(origin, 0.0) > self._clock():
            return response
        with self._lock:
            pools = list(self._pools)
        # Once it is removed from its pool, no other thread can use it.
        idle = next((found for each in pools if (found := each.pop(origin, None))), None)
        if idle is None:
            return response
        response.close()
        try:
            response = self._exchange_on_idle(idle, request, pool, token)
        except BROKEN as error:
            token.check()
            raise broken(request.url, error, idle.proxy) from error
        if response.status in BUSY:
            self._vain[origin] = self._clock() + _VAIN_SECONDS
        return response

    def _exchange_on_idle(
        self, idle: Connection, request: Request, pool: dict[Origin, Connection], token: CancelToken
    ) -> Response:
        # Perhaps the policy allowed this connection only for another path of the host.
        self._address_policy.check_addresses(request.url, idle.addresses)
        return self._exchange(idle, request, pool, token)

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
        if head.status == RATE_LIMITED:
            self._pauses.note(request.url, request.headers, head.headers)
        return Response(
            head, body, connection, request.url, stall_seconds=self._stall_seconds, clock=self._clock
        )

    def _idle(self) -> dict[Origin, Connection]:
        """The idle connections of this thread, one for each origin."""
        if getattr(self._kept, "age", None) is not self._age:
            for connection in getattr(self._kept, "pool", {}).values():
                connection.close()
            self._kept.pool, self._kept.age = _Kept(), self._age
            with self._lock:
                self._pools.add(self._kept.pool)
        pool: dict[Origin, Connection] = self._kept.pool
        return pool


class _Kept(dict[Origin, Connection]):
    """The idle connections of one thread, by origin."""

    __slots__ = ("__weakref__",)
    __hash__ = object.__hash__  # type: ignore[assignment]  # a dict has none, and a weak set needs one
    __eq__ = object.__eq__
