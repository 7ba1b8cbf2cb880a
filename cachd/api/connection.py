"""The connections of the API: how many there may be, how much a client may send, and how long it may take.

uvicorn's protocol for httptools bounds none of these (only its h11 protocol bounds a head, and is slower).
This one counts what arrives before it is parsed:

    head     32 KiB and 100 lines, within 10 s of the connection's first byte or the last answer
    body     1 MiB with its framing, within 30 s of its head
    answer   taken by the client: a buffer that is never empty for 60 s ends the connection
    tls      its handshake ends within 10 s; it counts as a connection from its first byte
    peers    3/4 of all connections for one peer; when all are taken, the idlest gives way

A peer is an IPv4 address, the /64 of an IPv6 address, or a user at a unix socket. Pods of one node may share
one, so its limit leaves most of the room to it. The idlest is the one that has sent no request for the
longest, else the slowest to send one. All listeners share one count.
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
_FRAMING_BYTES = 64 << 10  # sizes of chunks and trailers beside a body
_MOST_PIPELINED = 16
_MOST_DROPPED_BYTES = 4 << 20
_STEP_BYTES = 4 << 10  # fed to the parser at once
_SWEEPS = 4  # in the shortest deadline
_SHORTEST_SWEEP_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one client may do."""

    head_bytes: int = 32 << 10
    head_lines: int = 100
    handshake_seconds: float = 10.0
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    unread_seconds: float = 60.0
    refused_seconds: float = 2.0

    @property
    def sweep_seconds(self) -> float:
        every = (self.head_seconds, self.body_seconds, self.unread_seconds, self.refused_seconds)
        return max(min(every) / _SWEEPS, _SHORTEST_SWEEP_SECONDS)


class Stage(Enum):
    """What a connection does: it waits for the end of its handshake, for a head, or for the rest of a
    body, has its request answered, or was refused and stays a moment so that the client can read why."""

    HANDSHAKE = "handshake"
    HEAD = "head"
    BODY = "body"
    ANSWER = "answer"
    REFUSED = "refused"


_IDLEST = 64  # are found at once
# Stages in which a connection waits for its client, and seconds for which it is not the idler for that: who
# is between two requests loses nothing with it.
_AWAITS_CLIENT = {Stage.HEAD: 0.0, Stage.HANDSHAKE: 1.0, Stage.BODY: 1.0, Stage.REFUSED: 1.0}


class Counted(Protocol):
    """What `Connections` counts. `since`: when its stage began, by the monotonic clock."""

    peer: str
    stage: Stage
    since: float
    loop: asyncio.AbstractEventLoop

    def check_deadlines(self, now: float) -> None:
        """End when the client takes too long."""

    def end(self) -> None:
        """Close at once."""


def most_connections() -> int:
    """How many connections the API may have."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(MOST_CONNECTIONS, descriptors // 4))


class Connections:
    """Every connection of one server. Used on the event loop alone."""

    def __init__(self, *, most: int | None = None, bounds: Bounds = Bounds()) -> None:
        self.bounds = bounds
        self._most = most or most_connections()
        self._most_of_peer = max(1, self._most * 3 // 4)
        self._all: dict[Counted, None] = {}  # in the order they came
        self._peers: Counter[str] = Counter()
        self._sweeping = False
        self._idle: list[tuple[Counted, float]] = []  # found lately, of this peer or of any
        self._idle_of: str | None = None

    def admit(self, connection: Counted) -> bool:
        """Count a connection that was accepted; False when there is no room for it."""
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
        """Count it no more. Twice is fine."""
        if connection in self._all:
            del self._all[connection]
            self._peers[connection.peer] -= 1
            if not self._peers[connection.peer]:
                del self._peers[connection.peer]

    def end_handshakes(self) -> None:
        """End the connections that have not begun to speak HTTP."""
        for connection in [each for each in self._all if each.stage is Stage.HANDSHAKE]:
            connection.end()

    def _idlest(self, peer: str | None) -> Counted | None:
        """The connection, of one peer or of any, that has waited for its client for the longest."""
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
        """Some of those, the idlest last: to look at all for each one would be dear."""
        waiting = (c for c in self._all if c.stage in _AWAITS_CLIENT and peer in (None, c.peer))
        some = heapq.nsmallest(_IDLEST, waiting, key=lambda c: c.since + _AWAITS_CLIENT[c.stage])
        return [(c, c.since) for c in reversed(some)]

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """End what has passed its deadline. One timer for all is cheaper than a timer each."""
        now = time.monotonic()
        for connection in list(self._all):
            connection.check_deadlines(now)
        self._sweeping = bool(self._all)
        if self._sweeping:
            loop.call_later(self.bounds.sweep_seconds, self._sweep, loop)


def peer_of(sock: TransportSocket | socket.socket, address: object) -> str:
    """Who is at the other end of a connection, as far as connections are counted."""
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
    """One connection, bounded. `since`: when its stage began, by the monotonic clock."""

    def __init__(
        self,
        *args: Any,
        connections: Connections,
        app: ASGIApp | None = None,
        handshake: Counted | None = None,
        **named: Any,
    ) -> None:
        """`handshake` was counted in its place until now."""
        super().__init__(*args, **named)
        if app is not None:
            self.app = app
        self._counted, self._bounds, self._handshake = connections, connections.bounds, handshake
        self.peer = ""
        self.stage, self.since = Stage.HEAD, time.monotonic()
        self._came = 0  # bytes of this head, or of this body
        self._unread_since: float | None = None
        self._unanswered: list[RequestResponseCycle] = []  # the one that runs, and those sent ahead

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
        """Parse what came, a step at a time, as far as it is within the bounds."""
        at = 0
        while at < len(data) and self.stage is not Stage.REFUSED and not self.transport.is_closing():
            piece = data[at : at + _STEP_BYTES]
            at += len(piece)
            self._came += len(piece)
            super().data_received(piece)
            self._check_size()
        if self.stage is Stage.REFUSED:
            self._came += len(data) - at
            if self._came > _MOST_DROPPED_BYTES:
                self.transport.pause_reading()

    def _check_size(self) -> None:
        if self.stage is Stage.HEAD and self._came > self._bounds.head_bytes:
            self._refuse_head()
        elif self.stage is Stage.BODY and self._came > MOST_BODY_BYTES + _FRAMING_BYTES:
            self._refuse(TooBig(f"the body is longer than {MOST_BODY_BYTES} bytes", code="body_too_long"))
        elif len(self.pipeline) > _MOST_PIPELINED:
            self._refuse(Unavailable("too many requests at once on one connection", code="pipelined"))

    # --- what the parser tells ---

    def on_message_begin(self) -> None:
        if self.stage is not Stage.REFUSED:
            super().on_message_begin()
            self._enter(Stage.HEAD)

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) < self._bounds.head_lines:
            super().on_header(name, value)
        else:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size > self._bounds.head_bytes:  # the last step brought its end and the bound's
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
            self._drop_the_rest()  # answered before its body was here
        else:
            super().on_response_complete()

    def _enter(self, stage: Stage) -> None:
        self.stage, self.since, self._came = stage, time.monotonic(), 0

    # --- ends ---

    def check_deadlines(self, now: float) -> None:
        """End the connection when its client takes too long."""
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
        if self.stage is Stage.HEAD and not self._came:
            self.end()  # it said nothing: nothing is said to it
        else:
            self._refuse(
                Invalid(f"the {what} did not come within {seconds:g} s", code="too_late"),
                HTTPStatus.REQUEST_TIMEOUT,
            )

    def end(self) -> None:
        """Close at once; what was not sent is lost."""
        self._hang_up()
        self.transport.abort()

    def _hang_up(self) -> bool:
        """Let the application's own answers go nowhere; whether one of them has begun."""
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        return any(cycle.response_started for cycle in self._unanswered)

    def send_400_response(self, msg: str) -> None:
        self._refuse(Invalid(msg, code="invalid_request"))

    def _refuse_head(self) -> None:
        most, lines = self._bounds.head_bytes, self._bounds.head_lines
        detail = f"the head is longer than {most} bytes or {lines} lines"
        self._refuse(Invalid(detail, code="head_too_long"), HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, error: CachdError, status: int | None = None) -> None:
        """Answer with a problem document, unless an answer has begun, and end soon."""
        if self.stage is Stage.REFUSED:
            return
        self.stage = Stage.REFUSED
        if self._hang_up():
            self.end()
            return
        self._write(error, status)
        self._drop_the_rest()

    def _drop_the_rest(self) -> None:
        """Say that no answer follows, and drop what comes for a moment.

        Closed with bytes unread, the socket would be reset, and the client would lose its answer
        (RFC 9112, section 9.6).
        """
        self._enter(Stage.REFUSED)
        if self.transport.can_write_eof():  # TLS has no such half: there the client reads `connection: close`
            self.transport.write_eof()

    def _write(self, error: CachdError, status: int | None = None) -> None:
        answer = problem(error, status=status)
        head = b"".join(b"%s: %s\r\n" % pair for pair in answer.raw_headers)
        line = f"HTTP/1.1 {answer.status_code} {HTTPStatus(answer.status_code).phrase}\r\n".encode()
        self.transport.write(line + head + b"connection: close\r\n\r\n" + bytes(answer.body))
