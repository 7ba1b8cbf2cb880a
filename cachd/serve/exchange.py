"""Reads requests from one connection of the Hub endpoint and writes the answers, within bounds.

    head     at most 32 KiB, within 10 s after the connection is free for it
    body     at most 1 MiB, within 30 s after its head
    answer   the client takes something of it every 60 s

h11 knows HTTP. A body that is a file goes from the page cache to the socket by sendfile(2).
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import h11

from cachd.serve.answer import Aborted, Answer, Body, refusal

MAX_BODY_BYTES = 1 << 20
_HEAD_BYTES, _HEAD_SECONDS = 32 << 10, 10.0
_BODY_SECONDS, _UNREAD_SECONDS = 30.0, 60.0
_RECEIVE_BYTES = 64 << 10
_LINGER_SECONDS = 1.0
_STEP_BYTES = 64 << 20  # between two looks at whether the daemon stops


class Left(ConnectionError):
    """The client has left, was too slow, or is sent away because the daemon stops."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `headers` have names in lower case. `peer`: the address of the client."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    peer: str


class Exchange:
    """The requests of one connection, one after another. `is_stopping`: whether the daemon stops.

    `peer`, `own`: the addresses of its ends.
    """

    def __init__(
        self,
        sock: socket.socket,
        is_stopping: Callable[[], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sock, self._is_stopping, self._clock = sock, is_stopping, clock
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD_BYTES)
        self._is_head = False
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer, self.own = sock.getpeername()[0], sock.getsockname()[0]

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
        self._sock.close()

    def request(self) -> Request | None:
        """The next request; None when the client wants no more. Raises Left."""
        self._is_head = False  # a request that cannot be read is answered with a body
        try:
            deadline = self._clock() + _HEAD_SECONDS
            head = self._event(deadline)
            if not isinstance(head, h11.Request):
                return None
            self._is_head = head.method == b"HEAD"
            deadline = self._clock() + _BODY_SECONDS
            body = bytearray()
            while not isinstance(event := self._event(deadline), h11.EndOfMessage):
                if not isinstance(event, h11.Data) or len(body) + len(event.data) > MAX_BODY_BYTES:
                    self.refuse(refusal(413, f"the body is longer than {MAX_BODY_BYTES} bytes"))
                    return None
                body += event.data
        except h11.RemoteProtocolError as error:
            self.refuse(refusal(error.error_status_hint, str(error)))
            return None
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
        method, target = head.method.decode("latin-1"), head.target.decode("latin-1")
        return Request(method, target, headers, bytes(body), self.peer)

    def _event(self, deadline: float) -> object:
        """The next event of the client's side. Raises Left."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                self._send(self._http.send(h11.InformationalResponse(status_code=100, headers=[])))
            if (left := deadline - self._clock()) <= 0:
                raise Left("the request did not arrive in time")
            self._sock.settimeout(left)
            try:
                self._http.receive_data(self._sock.recv(_RECEIVE_BYTES))
            except OSError as error:
                raise Left(str(error)) from error
        return event

    def answer(self, answer: Answer) -> bool:
        """Send an answer. Returns whether the connection can take another request. Raises Left."""
        headers = {"Content-Length": str(answer.size), **answer.headers}
        phrase = HTTPStatus(answer.status).phrase
        response = h11.Response(status_code=answer.status, headers=list(headers.items()), reason=phrase)
        self._send(self._http.send(response))
        if not self._is_head:
            self._send_body(answer.body, answer.size)
        self._send(self._http.send(h11.EndOfMessage()))
        if self._http.our_state is h11.MUST_CLOSE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def _send_body(self, body: bytes | Body, size: int) -> None:
        if isinstance(body, bytes):
            self._send(self._http.send(h11.Data(data=body)))
            return
        # h11 counts the bytes of any object that has a length, and passes it through.
        self._http.send_with_data_passthrough(h11.Data(data=range(size)))  # type: ignore[arg-type]
        try:
            body.send(self)
        except Aborted as error:
            raise Left(str(error)) from error

    def refuse(self, answer: Answer) -> None:
        """Answer what is no request, and let the client read it before the connection is closed."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.answer(Answer(answer.status, {**answer.headers, "Connection": "close"}, answer.body))
            with_end = self._clock() + _LINGER_SECONDS
            self._sock.shutdown(socket.SHUT_WR)
            while (left := with_end - self._clock()) > 0:
                self._sock.settimeout(left)
                try:
                    if not self._sock.recv(_RECEIVE_BYTES):
                        return
                except OSError:
                    return

    # --- the sink of a body ---

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """See `Sink`."""
        self._sock.setblocking(False)  # noqa: FBT003 - the interface of sockets
        stop = offset + count
        while offset < stop:
            try:
                sent = os.sendfile(self._sock.fileno(), fd, offset, min(stop - offset, _STEP_BYTES))
            except BlockingIOError:
                self._wait_until_writable()
                continue
            except OSError as error:
                raise Left(str(error)) from error
            if not sent:
                raise Left(f"the file ended at byte {offset} of {stop}")
            offset += sent

    def _wait_until_writable(self) -> None:
        """Raises Left when the client takes nothing for 60 s."""
        deadline = self._clock() + _UNREAD_SECONDS
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while not poll.poll(500):
            if self._is_stopping() or self._clock() > deadline:
                raise Left("the client takes no bytes, or the daemon stops")

    def check(self) -> None:
        """See `Sink`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        if self._is_stopping() or poll.poll(0):
            raise Left("the client left, or the daemon stops")

    def _send(self, content: bytes | None) -> None:
        if content:
            self._sock.settimeout(_UNREAD_SECONDS)
            try:
                self._sock.sendall(content)
            except OSError as error:
                raise Left(str(error)) from error
