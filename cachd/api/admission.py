"""Counts the connections of the API, and closes the idlest one when no more fit.

    handshake   TLS handshakes end within 10 s, and count as connections from their start
    peers       one peer may hold 3/4 of all connections

When no connection is left, for a peer or at all, the idlest one is closed to admit the new one. The idlest is
the one that has waited longest for its client: between two requests, or for the rest of a request.

A peer is an IPv4 address, the /64 of an IPv6 address, or a user id at a unix socket. All pods of a node may
share one address, so one peer may hold most of the connections. All listeners share one count.
"""

from __future__ import annotations

import asyncio
import heapq
import resource
import socket
import struct
import time
from asyncio.trsock import TransportSocket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cachd.policy import peers

MAX_CONNECTIONS = 2048
_SWEEPS = 4  # deadline checks within the shortest deadline
_SHORTEST_SWEEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Bounds:
    """The limits of one connection. `refused_seconds`: how long a refused client may read its answer."""

    head_bytes: int = 32 << 10
    head_lines: int = 100
    handshake_seconds: float = 10.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    unread_seconds: float = 60.0
    refused_seconds: float = 2.0

    @property
    def sweep_seconds(self) -> float:
        """The time between two checks of the deadlines."""
        deadlines = (self.head_seconds, self.body_seconds, self.unread_seconds, self.refused_seconds)
        return max(min(deadlines) / _SWEEPS, _SHORTEST_SWEEP_SECONDS)


class Stage(Enum):
    """What a connection does now.

    It waits for the end of its TLS handshake, for a request head or for the rest of a body; or its request is
    being answered; or it was refused and stays open briefly so that the client can read why.
    """

    HANDSHAKE = "handshake"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    REFUSED = "refused"


_IDLEST = 64  # connections found by one search
# The stages in which a connection waits for its client. The seconds are added to the start of the stage when
# connections are compared. So a connection that waits for a head is closed before one that has waited up to a
# second longer for something else: between two requests, a client loses nothing.
_AWAITS_CLIENT = {Stage.HEAD: 0.0, Stage.HANDSHAKE: 1.0, Stage.BODY: 1.0, Stage.REFUSED: 1.0}


class Counted(Protocol):
    """A connection or handshake that `Connections` counts. `since`: monotonic time when its stage began."""

    peer: str
    stage: Stage
    since: float
    loop: asyncio.AbstractEventLoop

    def check_deadlines(self, now: float) -> None:
        """Close the connection if its client takes too long."""

    def end(self) -> None:
        """Close at once."""


def most_connections() -> int:
    """The maximum number of connections: a quarter of the process's descriptors, and at most 2048."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(MAX_CONNECTIONS, descriptors // 4))


class Connections:
    """Counts and bounds the connections of one server. Used only on the event loop."""

    def __init__(
        self,
        *,
        most: int | None = None,
        bounds: Bounds = Bounds(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bounds, self.clock = bounds, clock
        self._most = most or most_connections()
        self._most_of_peer = max(1, self._most * 3 // 4)
        self._all: dict[Counted, None] = {}  # in order of arrival
        self._peers: Counter[str] = Counter()
        self._sweeping = False
        self._idle: list[tuple[Counted, float]] = []  # from the last search, the idlest last
        self._idle_of: str | None = None  # the peer of that search; None: of all peers

    def admit(self, connection: Counted) -> bool:
        """Count an accepted connection, closing the idlest one if needed; False when none can be closed."""
        peer = connection.peer
        is_full_of_peer = self._peers[peer] >= self._most_of_peer
        if is_full_of_peer or len(self._all) >= self._most:
            idlest = self._idlest(peer if is_full_of_peer else None)
            if idlest is None:
                return False
            self.leave(idlest)
            idlest.end()
        self._all[connection] = None
        self._peers[peer] += 1
        if not self._sweeping:
            self._sweeping = True
            connection.loop.call_later(self.bounds.sweep_seconds, self._sweep, connection.loop)
        return True

    def leave(self, connection: Counted) -> None:
        """Stop counting a connection. Does nothing when it is not counted."""
        if connection in self._all:
            del self._all[connection]
            self._peers[connection.peer] -= 1
            if not self._peers[connection.peer]:
                del self._peers[connection.peer]

    def end_handshakes(self) -> None:
        """Close the connections that are still in their TLS handshake."""
        for connection in [each for each in self._all if each.stage is Stage.HANDSHAKE]:
            connection.end()

    def _idlest(self, peer: str | None) -> Counted | None:
        """The connection that has waited longest for its client, of one peer or of all (None)."""
        if peer != self._idle_of:
            self._idle_of, self._idle = peer, []
        for fresh in (False, True):
            if fresh:
                self._idle = self._some_idlest(peer)
            while self._idle:
                found, since = self._idle.pop()
                if found in self._all and found.since == since:
                    return found
        return None

    def _some_idlest(self, peer: str | None) -> list[tuple[Counted, float]]:
        """Up to 64 idle connections, the idlest last. One search for many is cheaper than one for each."""
        waiting = (c for c in self._all if c.stage in _AWAITS_CLIENT and peer in (None, c.peer))
        some = heapq.nsmallest(_IDLEST, waiting, key=lambda c: c.since + _AWAITS_CLIENT[c.stage])
        return [(c, c.since) for c in reversed(some)]

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the connections past their deadline. One timer for all is cheaper than one timer for each."""
        now = self.clock()
        for connection in list(self._all):
            connection.check_deadlines(now)
        self._sweeping = bool(self._all)
        if self._sweeping:
            loop.call_later(self.bounds.sweep_seconds, self._sweep, loop)


def peer_of(sock: TransportSocket | socket.socket, address: object) -> str:
    """The peer that a connection counts for. For SO_PEERCRED see unix(7)."""
    if sock.family == socket.AF_UNIX:
        _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return f"uid {uid}"
    return peers.peer_of(str(address[0])) if isinstance(address, tuple) else ""
