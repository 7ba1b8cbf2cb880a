"""The bytes of one connection, taken in as few calls as the kernel allows, in the clear or behind TLS.

A plain wire fills a large buffer in one system call (MSG_WAITALL). A TLS wire receives up to 256 KiB of
records at once and deciphers them from memory, where a blocking TLS socket asks the kernel twice a record
of 16 KiB. Both keep the socket blocking and leave patience to the kernel (SO_RCVTIMEO): no poll first.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

LARGE_BYTES = 64 << 10
RECEIVE_BYTES = 256 << 10


class Wire(socket.socket):
    """A connected socket taken over, for one reader. TimeoutError after `stall_seconds` without a byte.

    While `answer_by` is set, a time of the monotonic clock, nothing is received beyond it: a socket's own
    patience begins anew with every byte.
    """

    def __init__(self, connected: socket.socket, stall_seconds: float) -> None:
        super().__init__(connected.family, connected.type, connected.proto, fileno=connected.detach())
        self.settimeout(None)
        self.stall_seconds = stall_seconds
        self.answer_by: float | None = None
        self._allowed_seconds = stall_seconds
        self._allow(socket.SO_SNDTIMEO, stall_seconds)
        self._allow(socket.SO_RCVTIMEO, stall_seconds)

    def handshake(self) -> None:
        """Whatever must be agreed upon before the first request. Raises OSError."""

    def answered(self) -> None:
        """From here on the body may take its time, as long as it comes."""
        self.answer_by = None
        self._be_patient(self.stall_seconds)

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        view = memoryview(buffer)[: nbytes or None]
        return self._receive(view, flags | socket.MSG_WAITALL if len(view) >= LARGE_BYTES else flags)

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:
        try:
            super().sendall(data, flags)
        except BlockingIOError as error:
            raise TimeoutError("nothing more is taken") from error

    def _receive(self, view: memoryview, flags: int = 0) -> int:
        if self.answer_by is not None:
            left = self.answer_by - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            self._be_patient(left)
        try:
            return super().recv_into(view, 0, flags)
        except BlockingIOError as error:
            raise TimeoutError("no byte for too long") from error

    def _be_patient(self, seconds: float) -> None:
        """Let a receive wait so long, within a hundredth: what hardly differs costs no system call."""
        if abs(self._allowed_seconds - seconds) > 0.01 * seconds:
            self._allow(socket.SO_RCVTIMEO, seconds)
            self._allowed_seconds = seconds

    def _allow(self, option: int, seconds: float) -> None:
        micros = max(int(seconds * 1e6), 1)  # zero would mean for ever
        self.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", micros // 10**6, micros % 10**6))


class TlsWire(Wire):
    """A wire whose bytes are TLS records."""

    def __init__(
        self, connected: socket.socket, stall_seconds: float, context: ssl.SSLContext, host: str
    ) -> None:
        super().__init__(connected, stall_seconds)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self._records = memoryview(bytearray(RECEIVE_BYTES))

    def handshake(self) -> None:
        """Agree on keys and check the certificate. Raises OSError, of which ssl.SSLError is one."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush()
                self._take_in()
            else:
                return self._flush()

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:  # noqa: ARG002 as the base's
        view = memoryview(buffer)[: nbytes or None]
        got: int = 0
        while got < len(view):
            try:
                count: int = self._tls.read(len(view) - got, view[got:])  # type: ignore[assignment] # as there is a buffer
            except ssl.SSLWantReadError:
                if got:
                    break
                self._take_in()
                continue
            if not count:
                break
            got += count
        return got

    def sendall(self, data: ReadableBuffer, flags: int = 0) -> None:  # noqa: ARG002
        self._tls.write(data)
        self._flush()

    def _take_in(self) -> None:
        count = self._receive(self._records)
        if count:
            self._incoming.write(self._records[:count])
        else:
            self._incoming.write_eof()
        self._flush()  # an answer to a key update, perhaps

    def _flush(self) -> None:
        if self._outgoing.pending:
            super().sendall(self._outgoing.read())
