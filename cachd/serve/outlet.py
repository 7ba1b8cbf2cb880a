"""Sends the bytes of answers to one client.

The client takes something every 60 s, or every 5 s while other requests wait for a thread. Files go from the
page cache to the socket by sendfile(2).
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

_UNREAD_SECONDS, _UNREAD_WANTED_SECONDS = 60.0, 5.0
_CHECK_SECONDS = 0.5  # how often a wait checks whether it must end
_STEP_BYTES = 64 << 20  # of a file in one call


class Left(ConnectionError):
    """The client has left, was too slow, or is sent away because the daemon stops."""


@dataclass(frozen=True, slots=True)
class Ending:
    """Why an answer may have to end early.

    `is_stopping`: the daemon stops. `is_wanted`: others wait for the thread. `without_slot` is the context of
    each call that only waits for the kernel. In it, the thread gives up its slot.
    """

    is_stopping: Callable[[], bool]
    is_wanted: Callable[[], bool] = lambda: False
    without_slot: Callable[[], AbstractContextManager[None]] = nullcontext


class Outlet:
    """The client as the receiver of bytes. `sent`: called with the number of sent bytes of a file."""

    def __init__(
        self, sock: socket.socket, ending: Ending, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sock, self._ending, self._clock = sock, ending, clock
        self.sent: Callable[[int], object] = lambda _: None

    def send(self, content: bytes) -> None:
        """Send bytes. Raises Left."""
        self._sock.setblocking(False)  # noqa: FBT003 - the interface of sockets
        left = memoryview(content)
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                with self._ending.without_slot():
                    self._wait_until_writable()
            except OSError as error:
                raise Left(str(error)) from error

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """See `Sink`."""
        with self._ending.without_slot():
            self._send_file(fd, offset, count)

    def _send_file(self, fd: int, offset: int, count: int) -> None:
        self._sock.setblocking(False)  # noqa: FBT003
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
            self.sent(sent)

    def check(self) -> None:
        """See `Sink`."""
        poll = select.poll()
        poll.register(self._sock, select.POLLRDHUP)
        if self._ending.is_stopping() or poll.poll(0):
            raise Left("the client left, or the daemon stops")

    def _wait_until_writable(self) -> None:
        """Raises Left when the client takes nothing for too long."""
        began = self._clock()
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        while not poll.poll(_CHECK_SECONDS * 1000):
            waited = self._clock() - began
            is_wanted = waited > _UNREAD_WANTED_SECONDS and self._ending.is_wanted()
            if is_wanted or waited > _UNREAD_SECONDS or self._ending.is_stopping():
                raise Left("the client takes no bytes, or the daemon stops")
