"""One connection to an origin, and the body of one answer on it."""

from __future__ import annotations

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self
from urllib.parse import SplitResult, urlsplit

from cachd.errors import Unavailable
from cachd.sources.answers import BROKEN, bare, broken, protocol_error

SLOWEST_BYTES_PER_SECOND = 1024

Origin = tuple[str, str, int]


def origin_of(url: SplitResult) -> Origin:
    return url.scheme, url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def shut(sock: socket.socket) -> None:
    """End both directions under a thread that reads. Not by a TLS socket's own shutdown: that one drops the
    cipher, and the reader would take what comes for plain text."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Connection(http.client.HTTPConnection):
    """One connection to an origin through a dial of ours, given back to its thread's pool after use."""

    def __init__(
        self,
        origin: Origin,
        dial: Callable[[], socket.socket],
        tls: ssl.SSLContext | None,
        pool: dict[Origin, Connection],
    ) -> None:
        _, host, port = origin
        super().__init__(host, port)
        self.default_port = 443 if tls else 80  # decides whether the Host header names the port
        self._origin, self._dial, self._tls, self._pool = origin, dial, tls, pool
        self.address = ""
        self.live: socket.socket | None = None  # outlasts `sock`, which an answer that closes takes away

    def connect(self) -> None:
        self.sock = self._dial()
        self.address = str(self.sock.getpeername()[0])
        self.live = self.sock
        if self._tls:
            wrapped = self._tls.wrap_socket(
                self.sock, server_hostname=self.host, do_handshake_on_connect=False
            )
            self.sock = self.live = wrapped  # before the handshake, which a cut must reach too
            wrapped.do_handshake()

    def abort(self) -> None:
        """Make whoever waits for an answer on it return or raise at once."""
        if self.live is not None:
            shut(self.live)

    @contextmanager
    def ended_after(self, seconds: float) -> Iterator[None]:
        """Give an answer's head so long in all: a socket's own patience begins anew with every byte."""
        ended = threading.Event()

        def end() -> None:
            ended.set()
            self.abort()

        watch = threading.Timer(seconds, end)
        watch.daemon = True
        watch.start()
        try:
            yield
        except BROKEN as error:
            if ended.is_set():
                raise TimeoutError(f"no answer in {seconds:.0f} s") from error
            raise
        finally:
            watch.cancel()

    def keep(self) -> None:
        """Leave the connection to the thread's next request to this origin."""
        self._pool[self._origin] = self


class Response:
    """The body of one answer. Read and closed by one thread; `abort` may come from another."""

    def __init__(
        self,
        response: http.client.HTTPResponse,
        connection: Connection,
        url: str,
        *,
        stall_seconds: float,
    ) -> None:
        self._response, self._connection, self._shown = response, connection, bare(url)
        self._stall_seconds = stall_seconds
        self._size: int | None = response.length
        self._got = 0
        self._left = self._window_began = time.monotonic()
        self._window_got = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def expect(self, size: int) -> None:
        """The body has exactly `size` bytes, whatever the origin said or left unsaid."""
        self._size = size

    def readinto(self, view: memoryview) -> int:
        """See `Body.readinto`."""
        self._window_began += time.monotonic() - self._left  # what the caller took is not the origin's
        wanted = len(view) if self._size is None else min(len(view), self._size - self._got)
        filled = 0
        while filled < wanted:
            n = self._receive(view[filled:wanted])
            if not n:
                break
            filled += n
            self._got += n
            self._check_rate()
        if self._size is not None and filled < wanted:
            raise Unavailable(
                f"{self._shown}: the connection ended after {self._got} of {self._size} bytes",
                code="cut_short",
            )
        if self._got == self._size:
            self._check_end()
        self._left = time.monotonic()
        return filled

    def abort(self) -> None:
        """See `Body.abort`."""
        self._connection.abort()

    def close(self) -> None:
        """Keep the connection if its answer was read to the end, else drop it."""
        whole = self._got == self._size
        if whole and not self._response.will_close:
            self._response.close()
            self._connection.keep()
        else:
            self._response.close()
            self._connection.close()

    def _receive(self, view: memoryview) -> int:
        try:
            if self._response.chunked or self._response.fp is None:
                got = self._response.read1(len(view))
                view[: len(got)] = got
                return len(got)
            # One receive at a time, straight into `view`, so that a trickle is noticed.
            return self._response.fp.readinto1(view)
        except BROKEN as error:
            raise broken(urlsplit(self._shown), error) from error

    def _check_rate(self) -> None:
        elapsed = time.monotonic() - self._window_began
        if elapsed < self._stall_seconds:
            return
        rate = (self._got - self._window_got) / elapsed
        if rate < SLOWEST_BYTES_PER_SECOND:
            raise Unavailable(
                f"{self._shown}: {rate:.0f} bytes a second for {elapsed:.0f} s", code="too_slow"
            )
        self._window_began, self._window_got = time.monotonic(), self._got

    def _check_end(self) -> None:
        """An answer without a length must end where the manifest says the file ends."""
        told = self._response.getheader("Content-Length")
        if told is None and self._receive(memoryview(bytearray(1))):
            raise protocol_error(self._shown, f"more than the {self._size} bytes it was asked for")
