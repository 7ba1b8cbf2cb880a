"""The bytes of one connection, taken in as few calls as there can be, in the clear or behind TLS.

A plain wire fills a large buffer in one system call (MSG_WAITALL) and leaves patience to the kernel
(SO_RCVTIMEO): no poll first. A TLS wire lets the library receive and decipher, record by record: all of that
is done without the interpreter's lock, which what goes through memory of ours would take for every copy.
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
    """A connected socket taken over, for one reader. TimeoutError after `stall_seconds` without a byte.

    While `answer_by` is set, a time of the monotonic clock, nothing is received beyond it: a socket's own
    patience begins anew with every byte.
    """

    def __init__(self, connected: socket.socket, stall_seconds: float) -> None:
        self.sock = connected
        connected.settimeout(None)
        self.stall_seconds = stall_seconds
        self.answer_by: float | None = None
        self._allowed_seconds = stall_seconds
        self._let_wait(stall_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def secured(self, context: ssl.SSLContext, host: str) -> TlsWire:
        """TLS over this wire, which it takes over; `handshake` comes next. Raises OSError."""
        wrapped = context.wrap_socket(
            self.sock, server_hostname=host, do_handshake_on_connect=False, suppress_ragged_eofs=False
        )
        wire = TlsWire(wrapped, self.stall_seconds)
        wire.answer_by = self.answer_by
        return wire

    def handshake(self) -> None:
        """Whatever must be agreed upon before the first request. Raises OSError."""

    def answered(self) -> None:
        """From here on the body may take its time, as long as it comes."""
        self.answer_by = None
        self._be_patient(self.stall_seconds)

    def recv_into(self, view: memoryview) -> int:
        """Fill the view if it is large, else take what comes; 0 at the end. Raises OSError."""
        self._hurry()
        try:
            return self.sock.recv_into(view, 0, socket.MSG_WAITALL if len(view) >= LARGE_BYTES else 0)
        except BlockingIOError as error:
            raise TimeoutError("no byte for too long") from error

    def sendall(self, data: ReadableBuffer) -> None:
        """Raises OSError."""
        try:
            self.sock.sendall(data)
        except BlockingIOError as error:
            raise TimeoutError("nothing more is taken") from error

    def abort(self) -> None:
        """Make whoever sends or receives here return or raise at once."""
        with suppress(OSError):  # it has ended already
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # not a TLS socket's own: it takes TLS away

    def close(self) -> None:
        self.sock.close()

    def _hurry(self) -> None:
        if self.answer_by is not None:
            left = self.answer_by - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            self._be_patient(left)

    def _be_patient(self, seconds: float) -> None:
        """Let a receive wait so long, within a hundredth: what hardly differs costs no system call."""
        if abs(self._allowed_seconds - seconds) > 0.01 * seconds:
            self._let_wait(seconds)
            self._allowed_seconds = seconds

    def _let_wait(self, seconds: float) -> None:
        micros = max(int(seconds * 1e6), 1)  # zero would mean for ever
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            self.sock.setsockopt(
                socket.SOL_SOCKET, option, struct.pack("@ll", micros // 10**6, micros % 10**6)
            )


class TlsWire(Wire):
    """A wire whose bytes are TLS records."""

    sock: ssl.SSLSocket

    def __init__(self, wrapped: ssl.SSLSocket, stall_seconds: float) -> None:
        super().__init__(wrapped, stall_seconds)
        # One call less for every 16 KiB than by way of its `recv_into`; given a buffer, it tells a number.
        self._read = cast("Callable[[int, memoryview], int]", wrapped.read)
        self._failure: OSError | None = None

    def secured(self, context: ssl.SSLContext, host: str) -> TlsWire:
        """See `Wire.secured`."""
        wire = NestedTlsWire(self.sock, self.stall_seconds, context, host)
        wire.answer_by = self.answer_by
        return wire

    def handshake(self) -> None:
        """Agree on keys and check the certificate. Raises OSError, of which ssl.SSLError is one."""
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
                self._failure = error  # later: what came before it counts
                break
            if not count:
                break
            got += count
        return got

    def close(self) -> None:
        self._failure = None  # its traceback leads back here: all of it would stay until a collection
        super().close()

    def _let_wait(self, seconds: float) -> None:
        self.sock.settimeout(seconds)


class NestedTlsWire(TlsWire):
    """TLS within the TLS connection to a proxy. Slower: records go through memory between the two."""

    def __init__(
        self, outer: ssl.SSLSocket, stall_seconds: float, context: ssl.SSLContext, host: str
    ) -> None:
        super().__init__(outer, stall_seconds)
        self._inner = _Inner(outer, context, host)
        self._read = self._inner.read

    def handshake(self) -> None:
        """See `TlsWire.handshake`."""
        self._hurry()
        self._inner.handshake()

    def sendall(self, data: ReadableBuffer) -> None:
        """See `Wire.sendall`."""
        self._inner.write(data)


class _Inner:
    """The inner of two TLS connections. It knows no wire: so that one closes with what keeps it.

    A step gets the outer socket's timeout in all, as a step of that one does.
    """

    def __init__(self, outer: ssl.SSLSocket, context: ssl.SSLContext, host: str) -> None:
        self._outer = outer
        self._records, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._records, self._to_send, server_hostname=host)

    def handshake(self) -> None:
        self._done(self._tls.do_handshake)

    def read(self, size: int, view: memoryview) -> int:
        return self._done(lambda: cast("int", self._tls.read(size, view)))

    def write(self, data: ReadableBuffer) -> None:
        self._done(lambda: self._tls.write(data))

    def _done(self, step: Callable[[], T]) -> T:
        """What `step` gives, once the records that it needs were sent and received. Raises OSError."""
        patience = self._outer.gettimeout() or 0.0
        ends = time.monotonic() + patience
        try:
            while True:
                try:
                    given = step()
                except ssl.SSLWantReadError:
                    self._send()
                    self._receive(ends - time.monotonic())
                else:
                    self._send()
                    return given
        finally:
            self._outer.settimeout(patience)

    def _send(self) -> None:
        if self._to_send.pending:
            self._outer.sendall(self._to_send.read())

    def _receive(self, seconds: float) -> None:
        if seconds <= 0:
            raise TimeoutError("no byte for too long")
        self._outer.settimeout(seconds)
        received = self._outer.recv(LARGE_BYTES)
        if received:
            self._records.write(received)
        else:
            self._records.write_eof()
