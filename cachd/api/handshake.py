"""Accepts TLS connections, and counts and bounds them during their handshake."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from cachd.api.admission import Connections, Counted, Stage, peer_of
from cachd.api.connection import Connection
from cachd.api.tls import Certificate

_RETRY_SECONDS = 0.2
Made = Callable[[Counted], Connection]


async def accept(sock: socket.socket, certificate: Certificate, made: Made, connections: Connections) -> None:
    """Accept connections on a listening socket until cancelled.

    After its handshake, `made` makes the protocol of the connection.
    """
    loop = asyncio.get_running_loop()
    sock.settimeout(0.0)  # it never blocks
    while True:
        try:
            accepted, address = await loop.sock_accept(sock)
        except OSError:  # no descriptor is free, or the client has already gone
            await asyncio.sleep(_RETRY_SECONDS)
            continue
        Handshake(accepted, address, certificate, made, connections)


class Handshake:
    """A TLS handshake in progress. When it fails or is ended, its socket is closed."""

    def __init__(
        self,
        sock: socket.socket,
        address: object,
        certificate: Certificate,
        made: Made,
        connections: Connections,
    ) -> None:
        self._sock, self._certificate, self._made, self._counted = sock, certificate, made, connections
        self.loop = asyncio.get_running_loop()
        self.peer = peer_of(sock, address)
        self.stage, self.since = Stage.HANDSHAKE, connections.clock()
        self._task: asyncio.Task[None] | None = None
        if connections.admit(self):
            self._task = self.loop.create_task(self._shake_hands())
            self._task.add_done_callback(self._ended)
        else:
            sock.close()

    async def _shake_hands(self) -> None:
        try:
            await self.loop.connect_accepted_socket(
                lambda: self._made(self),
                self._sock,
                ssl=self._certificate.context(),
                ssl_handshake_timeout=self._counted.bounds.handshake_seconds,
            )
        except (OSError, ValueError):  # ssl.SSLError and TimeoutError are OSErrors
            self._sock.close()

    def _ended(self, handshake: asyncio.Task[None]) -> None:
        self._counted.leave(self)
        if handshake.cancelled():  # perhaps before it began
            self._sock.close()

    def check_deadlines(self, now: float) -> None:
        """Does nothing: asyncio bounds the time of a handshake."""

    def end(self) -> None:
        """Cancel the handshake."""
        if self._task:
            self._task.cancel()
