"""Sends and receives the bytes of one connection, plain or over TLS, in as few calls as possible.

A plain wire fills a large buffer with one system call (MSG_WAITALL, recv(2)). The kernel ends a wait that
takes too long (SO_RCVTIMEO, socket(7)), so no poll is needed before a receive. On a TLS wire OpenSSL receives
and decrypts record by record into the caller's buffer, all without the interpreter's lock. Python code that
copied records between buffers would take that lock for every copy.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Self, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from _typeshed import ReadableBuffer

LARGE_BYTES = 64 << 10
T = TypeVar("T")


class Wire:
    """Owns a connected socket, which one thread reads. After `stall_seconds` without a byte, TimeoutError.

    `answer_by`, while it is set, is a deadline (by `clock`) for every receive. The socket's own timeout is no
    deadline, because it starts again with every byte.
    """

    def __init__(
        self,
        connected: socket.socket,
        stall_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.sock = connected
        connected.settimeout(None)
        self.stall_seconds, self.clock = stall_seconds, clock
        self.answer_by: float | None = None
        self._allowed_seconds = stall_seconds
        self._let_wait(stall_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def secured(self, context: ssl.SSLContext, host: str) -> TlsWire:
        """A TLS wire that takes over this one's socket. Call its `handshake` next. Raises OSError."""
        wrapped = context.wrap_socket(
            self.sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        wire = TlsWire(wrapped, self.stall_seconds, self.clock)
        wire.answer_by = self.answer_by
        return wire

    def handshake(self) -> None:
        """Prepare the wire for its first request; a plain wire needs nothing. Raises OSError."""

    def answered(self) -> None:
        """Clear `answer_by`: the head is here, and the body has no deadline as long as bytes arrive."""
        self.answer_by = None
        self._be_patient(self.stall_seconds)

    def recv_into(self, view: memoryview) -> int:
        """Receive bytes and return their number, 0 at the end. Raises OSError.

        A view of LARGE_BYTES or more is filled completely; a smaller one gets the bytes that have arrived.
        """
        self._hurry()
        try:
            return self.sock.recv_into(view, 0, socket.MSG_WAITALL if len(view) >= LARGE_BYTES else 0)
        except BlockingIOError as error:
            raise TimeoutError("no byte arrived for too long") from error

    def sendall(self, data: ReadableBuffer) -> None:
        """Send all of `data`. Raises OSError."""
        try:
            self.sock.sendall(data)
        except BlockingIOError as error:
            raise TimeoutError("the peer accepted no byte for too long") from error

    def abort(self) -> None:
        """Make a thread that sends or receives here return or raise at once."""
        with suppress(OSError):  # the connection has ended already
            # Not SSLSocket.shutdown: that would also drop the TLS state, which the other thread is using.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket. No thread may be sending or receiving on it: see `abort`."""
        self.sock.close()

    def _hurry(self) -> None:
        """Let the next receive wait until `answer_by` at most. Raises TimeoutError when that is past."""
        if self.answer_by is not None:
            left = self.answer_by - self.clock()
            if left <= 0:
                raise TimeoutError("no answer in time")
            self._be_patient(left)

    def _be_patient(self, seconds: float) -> None:
        """Set the socket's timeout. A change of a hundredth or less is skipped, to save a system call."""
        if abs(self._allowed_seconds - seconds) > 0.01 * seconds:
            self._let_wait(seconds)
            self._allowed_seconds = seconds

    def _let_wait(self, seconds: float) -> None:
        micros = max(int(seconds * 1e6), 1)  # zero would mean no timeout (socket(7))
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self.sock.setsockopt(
                socket.SOL_SOCKET, option, struct.pack("@ll", micros // 10**6, micros % 10**6)
            )


class TlsWire(Wire):
    """A wire over TLS."""

    sock: ssl.SSLSocket

    def __init__(self, wrapped: ssl.SSLSocket, stall_seconds: float, clock: Callable[[], float]) -> None:
        super().__init__(wrapped, stall_seconds, clock)
        # SSLSocket.recv_into would add a Python call for every record (16 KiB). With a buffer, `read` returns
        # the number of bytes.
        self._read = cast("Callable[[int, memoryview], int]", wrapped.read)
        self._failure: OSError | None = None

    def secured(self, context: ssl.SSLContext, host: str) -> TlsWire:
        """TLS inside this TLS. See `Wire.secured`."""
        wire = NestedTlsWire(self.sock, self.stall_seconds, self.clock, context, host)
        wire.answer_by = self.answer_by
        return wire

    def handshake(self) -> None:
        """Agree on keys and verify the certificate. Raises OSError, such as ssl.SSLError."""
        self._hurry()
        self.sock.do_handshake()

    def recv_into(self, view: memoryview) -> int:
        """See `Wire.recv_into`."""
        if self._failure:
            failure, self._failure = self._failure, None
            raise failure
        self._hurry()
        wanted = len(view) if len(view) >= LARGE_BYTES else 1
        got = 0
        while got < wanted:
            try:
                count = self._read(len(view), view[got:])
            except OSError as error:
                if not got:
                    raise
                self._failure = error  # the next call raises it: these bytes came before it
                break
            if not count:
                break
            got += count
        return got

    def close(self) -> None:
        """See `Wire.close`."""
        self._failure = None  # its traceback refers to this object: a reference cycle
        super().close()

    def _let_wait(self, seconds: float) -> None:
        self.sock.settimeout(seconds)


class NestedTlsWire(TlsWire):
    """TLS inside the TLS connection to a proxy. Slower: Python copies the records between the two."""

    def __init__(
        self,
        outer: ssl.SSLSocket,
        stall_seconds: float,
        clock: Callable[[], float],
        context: ssl.SSLContext,
        host: str,
    ) -> None:
        super().__init__(outer, stall_seconds, clock)
        self._inner = _Inner(outer, context, host, clock)
        self._read = self._inner.read

    def handshake(self) -> None:
        """See `TlsWire.handshake`."""
        self._hurry()
        self._inner.handshake()

    def sendall(self, data: ReadableBuffer) -> None:
        """See `Wire.sendall`."""
        self._inner.write(data)


class _Inner:
    """The inner of two TLS connections. Each call may take as long as the outer socket's timeout, in all.

    It holds no reference to its wire, so the wire is freed, and its socket closed, when it is used no more.
    """

    def __init__(
        self, outer: ssl.SSLSocket, context: ssl.SSLContext, host: str, clock: Callable[[], float]
    ) -> None:
        self._outer, self._clock = outer, clock
        self._records, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._records, self._to_send, server_hostname=host)

    def handshake(self) -> None:
        self._run(self._tls.do_handshake)

    def read(self, size: int, view: memoryview) -> int:
        return self._run(lambda: cast("int", self._tls.read(size, view)))

    def write(self, data: ReadableBuffer) -> None:
        self._run(lambda: self._tls.write(data))

    def _run(self, step: Callable[[], T]) -> T:
        """Send and receive records until `step` succeeds, and return its result. Raises OSError."""
        timeout = self._outer.gettimeout() or 0.0
        ends = self._clock() + timeout
        try:
            while True:
                try:
                    result = step()
                except ssl.SSLWantReadError:
                    self._send()
                    self._receive(ends - self._clock())
                else:
                    self._send()
                    return result
        finally:
            self._outer.settimeout(timeout)

    def _send(self) -> None:
        if self._to_send.pending:
            self._outer.sendall(self._to_send.read())

    def _receive(self, seconds: float) -> None:
        if seconds <= 0:
            raise TimeoutError("no byte arrived for too long")
        self._outer.settimeout(seconds)
        received = self._outer.recv(LARGE_BYTES)
        if received:
            self._records.write(received)
        else:
            self._records.write_eof()
