"""Sends requests over kept connections: each thread keeps one idle connection for each origin."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cachd.errors import CachdError, Invalid
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.cancel import CancelToken
from cachd.sources.connection import Connection, Origin, origin_of
from cachd.sources.failures import BROKEN, broken
from cachd.sources.http1 import Request
from cachd.sources.response import Response
from cachd.sources.routes import Routes
from cachd.sources.trust import Authorities


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

    def anew(self) -> None:
        """Do not reuse a connection that is idle now."""
        self._age += 1

    def send(self, request: Request, cancel_token: CancelToken) -> Response:
        """Send a request on the idle connection, or on a new one if the origin has closed the idle one.

        The caller closes the response. Raises Invalid for a header that cannot be sent, Unavailable,
        Forbidden or Cancelled.
        """
        url, pool = request.url, self._idle()
        kept = None if request.body else pool.pop(origin_of(url), None)  # a body is never sent twice
        if kept:
            # Perhaps the policy allowed this connection only for another path of the host.
            self._address_policy.check_addresses(url, kept.addresses)
            try:
                return self._exchange(kept, request, pool, cancel_token)
            except BROKEN:
                cancel_token.check()
        tls = self._authorities.context if url.scheme == "https" else None
        new = Connection(origin_of(url), tls, stall_seconds=self._stall_seconds, clock=self._clock)
        try:
            return self._exchange(new, request, pool, cancel_token)
        except BROKEN as error:
            cancel_token.check()
            raise broken(url, error, new.proxy) from error

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
            self._kept.pool, self._kept.age = {}, self._age
        pool: dict[Origin, Connection] = self._kept.pool
        return pool
