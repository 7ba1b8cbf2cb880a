"""Bounds what a client may send on one connection of the API, and the time that it may take.

uvicorn's httptools protocol bounds neither. (Its h11 protocol bounds the head, but is slower.) The protocol
in this module counts the bytes that arrive before it parses them:

    head        at most 32 KiB and 100 lines, within 10 s after its first byte
    idle        a connection without a request is closed 10 s after it opened or its last answer ended
    body        at most 1 MiB plus chunk framing, within 30 s after its head
    answer      the connection is closed when its send buffer has not been empty for 60 s
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from cachd.api.admission import Connections, Counted, Stage, peer_of
from cachd.api.problems import problem
from cachd.errors import Busy, CachdError, Invalid, TooBig

MAX_BODY_BYTES = 1 << 20
_FRAMING_BYTES = 64 << 10  # chunk sizes and trailers, in addition to the body
_MAX_PIPELINED = 16
_MAX_DROPPED_BYTES = 4 << 20
_STEP_BYTES = 4 << 10  # passed to the parser in one call


def body_too_long() -> TooBig:
    """The error for a body that is longer than 1 MiB."""
    return TooBig(f"the body is longer than {MAX_BODY_BYTES} bytes", code="body_too_long")


class Connection(HttpToolsProtocol):
    """One HTTP connection within `Bounds`. `since`: monotonic time when its stage began.

    Its stages, and the callback of the parser or of uvicorn that leads from one to the next:

        HEAD    on_headers_complete -> BODY, on_message_complete -> ANSWER, on_response_complete -> HEAD
        ANSWER  on_message_begin -> HEAD: a pipelined request
        any     _refuse, or on_response_complete while the body still arrives -> REFUSED, then `end`
    """

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
        self.stage, self.since = Stage.HEAD, self._counted.clock()
        self._received = 0  # bytes of the current head, body, or refused rest
        self._is_head_begun = False
        self._unread_since: float | None = None
        self._unanswered: list[RequestResponseCycle] = []  # the running request and the pipelined ones

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Count the connection, or answer 503 and close it when no more fit."""
        super().connection_made(transport)
        self.peer = peer_of(transport.get_extra_info("socket"), transport.get_extra_info("peername"))
        if self._handshake:
            self._counted.leave(self._handshake)
        if not self._counted.admit(self):
            busy = Busy(
                "too many connections are open",
                code="too_many_connections",
                hint="close connections that are idle, or try again later",
                retry_after=1.0,
            )
            self._write(busy)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
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
            if self._received > _MAX_DROPPED_BYTES:
                self.transport.pause_reading()

    def _check_size(self) -> None:
        if self.stage is Stage.HEAD and self._received > self._bounds.head_bytes:
            self._refuse_head()
        elif self.stage is Stage.BODY and self._received > MAX_BODY_BYTES + _FRAMING_BYTES:
            self._refuse(body_too_long())
        elif len(self.pipeline) > _MAX_PIPELINED:
            hint = "wait for an answer before the next request"
            self._refuse(Busy("too many pipelined requests on one connection", code="pipelined", hint=hint))

    # --- callbacks of the parser ---

    def on_message_begin(self) -> None:
        """A head begins: its time starts."""
        if self.stage is Stage.REFUSED:
            return
        super().on_message_begin()
        if self.stage is Stage.HEAD:
            self.since = self._counted.clock()  # the bytes of this head that have arrived stay counted
        else:
            self._enter(Stage.HEAD)  # a pipelined request: the bytes before it belong to another one
        self._is_head_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one line of a head, up to their number."""
        if len(self.headers) < self._bounds.head_lines:
            super().on_header(name, value)
        else:
            self._refuse_head()

    def on_headers_complete(self) -> None:
        """The head is complete: start the application, unless the head is too long."""
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
        """Take a piece of a body."""
        if self.stage is not Stage.REFUSED:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is complete: it has no deadline until it is answered."""
        if self.stage is not Stage.REFUSED:
            self._enter(Stage.ANSWER)
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """The answer was sent: wait for the next head, or drop the rest of the body."""
        if self.stage is Stage.ANSWER and not self.pipeline:
            self._enter(Stage.HEAD)
        if self.stage is Stage.BODY and not self.transport.is_closing():
            self._drop_the_rest()  # the answer was sent before the body had arrived
        else:
            super().on_response_complete()

    def _enter(self, stage: Stage) -> None:
        self.stage, self.since, self._received = stage, self._counted.clock(), 0
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
        elif self._awaits_head and now - self.since > self._bounds.head_seconds:
            self._late("head", self._bounds.head_seconds)
        elif self.stage is Stage.BODY and now - self.since > self._bounds.body_seconds:
            self._late("body", self._bounds.body_seconds)

    @property
    def _awaits_head(self) -> bool:
        """Whether it waits for a head, and its client for nothing: the answer before may still be sent."""
        is_idle = self._unread_since is None or self._has_begun
        return self.stage is Stage.HEAD and is_idle

    @property
    def _has_begun(self) -> bool:
        """Whether a part of the head has arrived."""
        return bool(self._received or self._is_head_begun)

    def _late(self, what: str, seconds: float) -> None:
        if self.stage is Stage.HEAD and not self._has_begun:
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
        """Answer a request that the parser cannot read with a problem document."""
        self._refuse(Invalid(msg, code="invalid_request"))

    def _refuse_head(self) -> None:
        most, lines = self._bounds.head_bytes, self._bounds.head_lines
        detail = f"the head of the request is longer than {most} bytes or {lines} lines"
        self._refuse(Invalid(detail, code="head_too_long"), HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _refuse(self, error: CachdError, status: int | None = None) -> None:
        """Answer with a problem document and close soon; close at once if an answer was partly sent."""
        if self.stage is Stage.REFUSED:
            return
        self.stage = Stage.REFUSED  # point of no return: nothing more is parsed
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
