"""Reads requests from one connection of the Hub endpoint and writes the answers, within bounds.

    head     at most 32 KiB and 100 lines, within 10 s of the last answer or of the start of the connection
    body     at most 1 MiB, with a Content-Length, within 30 s of its head
    refusal  the answer to a malformed request. The connection is closed after 1 s, or after 1 MiB more

No thread waits for the rest of a request: what has arrived is kept here until more arrives. h11 knows HTTP.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import h11

from cachd.errors import Unavailable
from cachd.policy.peers import peer_of
from cachd.serve.answer import Aborted, Answer, Body, refusal, refused
from cachd.serve.bounds import Places
from cachd.serve.outlet import Ending, Left, Outlet

MAX_BODY_BYTES = 1 << 20
_HEAD_BYTES, _HEAD_LINES, _HEAD_SECONDS = 32 << 10, 100, 10.0
_BODY_SECONDS = 30.0
_RECEIVE_BYTES = 16 << 10
_REFUSED_SECONDS, _REFUSED_BYTES = 1.0, 1 << 20


class Malformed(Exception):
    """The client sent something that is not a valid request. `answer` is the refusal."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `headers` have names in lower case; those with one name are joined (RFC 9110, 5.3).

    `peer`: the client that it counts for.
    """

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    peer: str


class Exchange:
    """The requests of one connection, one after another. Only one thread at a time may use it.

    `address`, `own`: the addresses of its ends. `peer`: the client that it counts for. `since`, `deadline`:
    when it became free for the next request, and by when the rest of that must have arrived. `bodies`: counts
    the requests with a body that are in memory.
    """

    def __init__(
        self,
        sock: socket.socket,
        ending: Ending,
        bodies: Places,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sock, self._bodies, self._clock = sock, bodies, clock
        self._outlet = Outlet(sock, ending, clock)
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._is_refused = self._has_body = False
        self._thrown_away = 0
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address, self.own = sock.getpeername()[0], sock.getsockname()[0]
        self.peer = peer_of(self.address)
        self._await_request()

    def _await_request(self) -> None:
        self._forget_body()
        self._head: h11.Request | None = None
        self.since = self._clock()
        self.deadline = self.since + _HEAD_SECONDS

    def _forget_body(self) -> None:
        self._body = bytearray()
        if self._has_body:
            self._has_body = False
            self._bodies.leave(self.peer)

    def fileno(self) -> int:
        """The descriptor of the connection."""
        return self._sock.fileno()

    @property
    def has_more(self) -> bool:
        """Whether bytes of another request have been received already."""
        return bool(self._http.trailing_data[0])

    def hang_up(self) -> None:
        """End the connection. Any thread may call it; the one that answers a request then raises Left."""
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def turn_away(self, answer: bytes) -> None:
        """Close the connection without a wait for its request. `answer`: sent before, as far as it fits."""
        with suppress(OSError):
            self._sock.send(answer, socket.MSG_DONTWAIT)
        self.close()

    def close(self) -> None:
        """Close the connection. No other thread may use it."""
        self._forget_body()
        self._sock.close()

    # --- requests ---

    def request(self) -> Request | None:
        """The next request; None while a part of it has not arrived. Raises Left and Malformed."""
        if self._is_refused:
            self._throw_away()
            return None
        try:
            while not isinstance(event := self._event(), h11.EndOfMessage):
                if event is None:
                    return None
                self._take(event)
        except h11.RemoteProtocolError as error:
            raise Malformed(refusal(error.error_status_hint, str(error))) from error
        assert self._head is not None
        headers: dict[str, str] = {}
        for key, value in self._head.headers:
            name, text = key.decode("latin-1"), value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
        method, target = self._head.method.decode("latin-1"), self._head.target.decode("latin-1")
        return Request(method, target, headers, bytes(self._body), self.peer)

    def _event(self) -> object:
        """The next event of the client's side; None if it has not arrived. Raises Left."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                self._send(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
            if (piece := self._receive()) is None:
                return None
            self._http.receive_data(piece)
        return event

    def _receive(self) -> bytes | None:
        """Bytes that have arrived; None without any. Raises Left."""
        self._sock.setblocking(False)  # noqa: FBT003 - the interface of sockets
        try:
            piece = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise Left(str(error)) from error
        return piece

    def _throw_away(self) -> None:
        """Read and drop what a refused client still sends. Raises Left.

        A close with unread bytes resets the connection, and the client would lose the refusal.
        """
        piece = self._receive()
        self._thrown_away += len(piece or b"")
        if piece == b"" or self._thrown_away > _REFUSED_BYTES:
            raise Left("the client has read the refusal, or sends without end")

    def _take(self, event: object) -> None:
        """Keep a part of a request. Raises Left, and Malformed for what is refused."""
        match event:
            case h11.Request():
                self._head, self.deadline = event, self._clock() + _BODY_SECONDS
                self._check_head(event)
            case h11.Data():
                self._body += event.data
            case _:
                raise Left("the client wants no more")

    def _check_head(self, head: h11.Request) -> None:
        names = dict(head.headers)
        length = int(names.get(b"content-length", b"0"))
        if len(head.headers) > _HEAD_LINES:
            raise Malformed(refusal(431, f"the head has more than {_HEAD_LINES} lines"))
        if b"transfer-encoding" in names:  # a body in chunks of one byte would take seconds of CPU time
            raise Malformed(refusal(411, "the body needs a Content-Length"))
        if length > MAX_BODY_BYTES:
            raise Malformed(refusal(413, f"the body is longer than {MAX_BODY_BYTES} bytes"))
        if length:
            try:
                self._bodies.take(self.peer)
            except Unavailable as error:
                raise Malformed(refused(error, "")) from error
            self._has_body = True

    # --- answers ---

    def answer(self, answer: Answer, sent: Callable[[int], object] = lambda _: None) -> bool:
        """Send an answer. Returns whether the connection can take another request. Raises Left.

        `sent`: called with the number of bytes of a file, whenever some were sent.
        """
        headers = {"Content-Length": str(answer.size), **answer.headers}
        phrase = HTTPStatus(answer.status).phrase
        response = h11.Response(status_code=answer.status, headers=list(headers.items()), reason=phrase)
        self._send(self._http.send(response))
        if self._head is None or self._head.method != b"HEAD":  # a malformed request gets a body
            self._outlet.sent = sent
            self._send_body(answer.body, answer.size)
        self._send(self._http.send(h11.EndOfMessage()))
        if self._http.our_state is h11.MUST_CLOSE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        self._await_request()
        return True

    def refuse(self, answer: Answer) -> bool:
        """Answer a malformed request. Returns whether to wait until the client has read it. Raises Left."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return False
        self._is_refused = True
        self.answer(Answer(answer.status, {**answer.headers, "Connection": "close"}, answer.body))
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self.deadline = self._clock() + _REFUSED_SECONDS
        return True

    def _send_body(self, body: bytes | Body, size: int) -> None:
        if isinstance(body, bytes):
            self._send(self._http.send(h11.Data(data=body)))
            return
        # h11 counts the bytes of any object that has a length, and passes it through.
        self._http.send_with_data_passthrough(h11.Data(data=range(size)))  # type: ignore[arg-type]
        try:
            body.send(self._outlet)
        except Aborted as error:
            raise Left(str(error)) from error

    def _send(self, content: bytes | None) -> None:
        if content:
            self._outlet.send(content)
