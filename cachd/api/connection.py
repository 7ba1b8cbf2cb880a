"""Bounds the connections of the API: their number, the size of requests, and the time a client may take.

uvicorn's httptools protocol bounds none of these. (Its h11 protocol bounds the head, but is slower.) The
protocol in this module counts the bytes that arrive before it parses them:

    head        at most 32 KiB and 100 lines, within 10 s after its first byte
    idle        a connection without a request is closed 10 s after it opened or its last answer ended
    body        at most 1 MiB plus chunk framing, within 30 s after its head
    answer      the connection is closed when its send buffer has not been empty for 60 s
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
import ipaddress
import resource
import socket
import struct
import time
from asyncio.trsock import TransportSocket
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cachd.api.problems import problem
from cachd.errors import CachdError, Invalid, TooBig, Unavailable

MOST_CONNECTIONS = 2048
MOST_BODY_BYTES = 1 << 20
_FRAMING_BYTES = 64 << 10  # chunk sizes and trailers, in addition to the body
_MOST_PIPELINED = 16
_MOST_DROPPED_BYTES = 4 << 20
_STEP_BYTES = 4 << 10  # passed to the parser in one call
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
    return max(16, min(MOST_CONNECTIONS, descriptors // 4))


class Connections:
    """Counts and bounds the connections of one server. Used only on the event loop."""

    def __init__(self, *, most: int | None = None, bounds: Bounds = Bounds()) -> None:
        self.bounds = bounds
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
        now = time.monotonic()
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
    host = str(address[0]) if isinstance(address, tuple) else ""
    try:
        at = ipaddress.ip_address(host)
    except ValueError:
        return host
    return f"{int(at) >> 64:x}/64" if at.version == 6 else host


class Connection(HttpToolsProtocol):
    """One HTTP connection within `Bounds`. `since`: monotonic time when its stage began."""

    def __init__(
        self,
        *args: Any,
        connections: Connections,
        app: ASGIApp | None = None,
        handshake: Counted | None = None,
        **named: Any,
    ) -> None:
        """`handshake` is the TLS handshake that was counted until now; this connection replaces it."""
        super().__init__(*args, **named)
        if app is not None:
            self.app = app
        self._counted, self._bounds, self._handshake = connections, connections.bounds, handshake
        self.peer = ""
        self.stage, self.since = Stage.HEAD, time.monotonic()
        self._received = 0  # bytes of the current head, body, or refused rest
        self._is_head_begun = False
        self._unread_since: float | None = None
        self._unanswered: list[RequestResponseCycle] = []  # the running request and the pipelined ones

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = peer_of(transport.get_extra_info("socket"), transport.get_extra_info("peername"))
        if self._handshake:
            self._counted.leave(self._handshake)
        if not self._counted.admit(self):
            busy = Unavailable("too many connections are open", code="too_many_connections", retry_after=1.0)
            self._write(busy)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._counted.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse `data` in steps, until a bound is exceeded."""
        at = 0
        while at < len(data) and self.stage is not Stage.REFUSED and not self.transport.is_closing():
            piece = data[at : at + _STEP_BYTES]
            at += len(piece)
            self._received += len(piece)
            super().data_received(piece)
            self._check_size()
        if self.stage is Stage.REFUSED:
            self._received += len(data) - at
            if self._received > _MOST_DROPPED_BYTES:
                self.transport.pause_reading()

    def _check_size(self) -> None:
        if self.stage is Stage.HEAD and self._received > self._bounds.head_bytes:
            self._refuse_head()
        elif self.stage is Stage.BODY and self._received > MOST_BODY_BYTES + _FRAMING_BYTES:
            self._refuse(TooBig(f"the body is longer than {MOST_BODY_BYTES} bytes", code="body_too_long"))
        elif len(self.pipeline) > _MOST_PIPELINED:
            self._refuse(Unavailable("too many pipelined requests on one connection", code="pipelined"))

    # --- callbacks of the parser ---

    def on_message_begin(self) -> None:
        if self.stage is Stage.REFUSED:
            return
        super().on_message_begin()
        if self.stage is Stage.HEAD:
            self.since = time.monotonic()  # the bytes of this head that have arrived stay counted
        else:
            self._enter(Stage.HEAD)  # a pipelined request: the bytes before it belong to another one
        self._is_head_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) < self._bounds.head_lines:
            super().on_header(name, value)
        else:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._bounds.head_bytes:  # _check_size does not see a head that ends within its last step
            self._refuse_head()
        elif self.stage is not Stage.REFUSED:
            self._enter(Stage.BODY)
            super().on_headers_complete()
            self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
            if self.cycle is not None:
                self._unanswered.append(self.cycle)

    def on_body(self, body: bytes) -> None:
        if self.stage is not Stage.REFUSED:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.stage is not Stage.REFUSED:
            self._enter(Stage.ANSWER)
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.stage is Stage.ANSWER and not self.pipeline:
            self._enter(Stage.HEAD)
        if self.stage is Stage.BODY and not self.transport.is_closing():
            self._drop_the_rest()  # the answer was sent before the body had arrived
        else:
            super().on_response_complete()

    def _enter(self, stage: Stage) -> None:
        self.stage, self.since, self._received = stage, time.monotonic(), 0
        self._is_head_begun = False

    # --- refusing and closing ---

    def check_deadlines(self, now: float) -> None:
        """Close or refuse the connection if its client takes too long."""
        if not self.transport.get_write_buffer_size():
            self._unread_since = None
        elif self._unread_since is None:
            self._unread_since = now
        elif now - self._unread_since > self._bounds.unread_seconds:
            self.end()
            return
        if self.stage is Stage.REFUSED and now - self.since > self._bounds.refused_seconds:
            self.end()
        elif self.stage is Stage.HEAD and now - self.since > self._bounds.head_seconds:
            self._late("head", self._bounds.head_seconds)
        elif self.stage is Stage.BODY and now - self.since > self._bounds.body_seconds:
            self._late("body", self._bounds.body_seconds)

    def _late(self, what: str, seconds: float) -> None:
        if self.stage is Stage.HEAD and not (self._received or self._is_head_begun):
            self.end()  # no request is in progress, so none is answered
        else:
            self._refuse(
                Invalid(f"the {what} of the request did not arrive within {seconds:g} s", code="too_late"),
                HTTPStatus.REQUEST_TIMEOUT,
            )

    def end(self) -> None:
        """Close at once. Data that was not sent yet is lost."""
        self._hang_up()
        self.transport.abort()

    def _hang_up(self) -> bool:
        """Discard the application's answers to unanswered requests; True if one was already partly sent."""
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        return any(cycle.response_started for cycle in self._unanswered)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Invalid(msg, code="invalid_request"))

    def _refuse_head(self) -> None:
        most, lines = self._bounds.head_bytes, self._bounds.head_lines
        detail = f"the head of the request is longer than {most} bytes or {lines} lines"
        self._refuse(Invalid(detail, code="head_too_long"), HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, error: CachdError, status: int | None = None) -> None:
        """Answer with a problem document and close soon; close at once if an answer was partly sent."""
        if self.stage is Stage.REFUSED:
            return
        self.stage = Stage.REFUSED
        if self._hang_up():
            self.end()
            return
        self._write(error, status)
        self._drop_the_rest()

    def _drop_the_rest(self) -> None:
        """Close our side, and discard what the client still sends for a moment.

        If the socket were closed with unread bytes, the kernel would reset the connection, and the client
        could lose its answer (RFC 9112, section 9.6).
        """
        self._enter(Stage.REFUSED)
        if self.transport.can_write_eof():  # TLS cannot: its client relies on `connection: close`
            self.transport.write_eof()

    def _write(self, error: CachdError, status: int | None = None) -> None:
        answer = problem(error, status=status)
        head = b"".join(b"%s: %s\r\n" % pair for pair in answer.raw_headers)
        line = f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}\r\n".encode()
        self.transport.write(line + head + b"connection: close\r\n\r\n" + bytes(answer.body))
