"""Connects to whichever address of a host answers first ("Happy Eyeballs", RFC 8305, 5).

An address is tried when the one before it failed or has not answered for a quarter of a second. So an address
that never answers, such as an IPv6 address whose network drops packets, costs a quarter of a second and not
the complete timeout. All attempts together get `connect_seconds`, however many addresses there are.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

from cachd.sources.cancel import CancelToken

AHEAD_SECONDS = 0.25  # the "Connection Attempt Delay" (RFC 8305, 8)
# Family, type, protocol, canonical name and socket address, as socket.getaddrinfo returns them.
Address = tuple[int, int, int, str, tuple[str | int, ...] | tuple[int, bytes]]


def dial(
    addresses: Sequence[Address],
    connect_seconds: float,
    cancel_token: CancelToken,
    clock: Callable[[], float] = time.monotonic,
) -> socket.socket:
    """A blocking socket, connected to the first of `addresses` that answers.

    Raises OSError, such as TimeoutError, or Cancelled.
    """
    waiting = _interleaved(addresses)
    ends = clock() + connect_seconds
    refusal = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    with ExitStack() as tried, selectors.DefaultSelector() as pending:
        while waiting or pending.get_map():
            if waiting:
                try:
                    started = _start(waiting.pop(0), tried, cancel_token)
                    pending.register(started, selectors.EVENT_WRITE, started)
                except OSError as error:
                    refusal = error
                    continue
            left = ends - clock()
            if left <= 0:
                raise TimeoutError(f"no address answered within {connect_seconds:g} s")
            for key, _ in pending.select(min(left, AHEAD_SECONDS) if waiting else left):
                cancel_token.check()  # a cancel makes the pending sockets writable, too
                answered: socket.socket = key.data
                pending.unregister(answered)
                code = answered.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return _kept(answered)
                refusal = OSError(code, os.strerror(code))
    raise refusal


class _Connecting:
    """A socket that is connecting. To abort it wakes the thread that waits for it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def abort(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _start(address: Address, tried: ExitStack, cancel_token: CancelToken) -> socket.socket:
    """A socket that is connecting to `address`; `tried` closes it. Raises OSError or Cancelled."""
    family, kind, protocol, _, target = address
    sock = tried.enter_context(socket.socket(family, kind, protocol))
    sock.settimeout(0)
    code = sock.connect_ex(target)
    tried.enter_context(cancel_token.reaches(_Connecting(sock)))  # a shutdown before connect wakes nobody
    if code not in (0, errno.EINPROGRESS):
        raise OSError(code, os.strerror(code))
    return sock


def _interleaved(addresses: Sequence[Address]) -> list[Address]:
    """The addresses in the resolver's order, but with alternating families (RFC 8305, 4).

    So a family that cannot be reached delays only every second attempt.
    """
    first = [each for each in addresses if each[0] == addresses[0][0]]
    others = [each for each in addresses if each[0] != addresses[0][0]]
    alternating = [each for pair in zip(first, others, strict=False) for each in pair]
    return alternating + first[len(others) :] + others[len(first) :]


def _kept(answered: socket.socket) -> socket.socket:
    """The same connection as a new, blocking socket, which stays open when the tried sockets are closed."""
    kept = socket.socket(fileno=answered.detach())
    kept.settimeout(None)
    return kept
