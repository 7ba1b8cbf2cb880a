"""A connection to whichever address of a host answers first (RFC 8305, "Happy Eyeballs", section 5).

An address is tried when the one before it failed or has not answered for a quarter of a second: a host that
has IPv6 in its name only, a black hole, costs that and not the whole patience. All tries together get
`connect_seconds`, however many addresses there are.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from cachd.sources.source import CancelToken

AHEAD_SECONDS = 0.25
# family, kind, protocol, canonical name, address: as socket.getaddrinfo gives them
Address = tuple[int, int, int, str, tuple[str | int, ...] | tuple[int, bytes]]


def dial(addresses: Sequence[Address], connect_seconds: float, cancel_token: CancelToken) -> socket.socket:
    """A blocking socket to the first of `addresses` that answers.

    Raises OSError, TimeoutError among them, or Cancelled.
    """
    waiting = _in_turn(addresses)
    ends = time.monotonic() + connect_seconds
    refusal = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    with ExitStack() as tried, selectors.DefaultSelector() as pending:
        while waiting or pending.get_map():
            if waiting:
                try:
                    pending.register(_begun(waiting.pop(0), tried, cancel_token), selectors.EVENT_WRITE)
                except OSError as error:
                    refusal = error
                    continue
            left = ends - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no address answered within {connect_seconds:g} s")
            for key, _ in pending.select(min(left, AHEAD_SECONDS) if waiting else left):
                cancel_token.check()  # it makes what is on its way look as if it had arrived
                answered: socket.socket = key.fileobj  # type: ignore[assignment] # as it was registered
                pending.unregister(answered)
                code = answered.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return _kept(answered)
                refusal = OSError(code, os.strerror(code))
    raise refusal


class _OnItsWay:
    """A socket that is being connected: a shutdown wakes who waits for that."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def abort(self) -> None:
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def _begun(address: Address, tried: ExitStack, cancel_token: CancelToken) -> socket.socket:
    """A socket on its way to an address, closed by `tried`. Raises OSError or Cancelled."""
    family, kind, protocol, _, place = address
    sock = tried.enter_context(socket.socket(family, kind, protocol))
    sock.setblocking(False)
    code = sock.connect_ex(place)
    tried.enter_context(cancel_token.reaches(_OnItsWay(sock)))  # not before: an unconnected one wakes nobody
    if code not in (0, errno.EINPROGRESS):
        raise OSError(code, os.strerror(code))
    return sock


def _in_turn(addresses: Sequence[Address]) -> list[Address]:
    """Families take turns, in the resolver's order otherwise: one that is cut off comes first only once."""
    first = [each for each in addresses if each[0] == addresses[0][0]]
    others = [each for each in addresses if each[0] != addresses[0][0]]
    turns = [each for pair in zip(first, others, strict=False) for each in pair]
    return turns + first[len(others) :] + others[len(first) :]


def _kept(answered: socket.socket) -> socket.socket:
    """The same connection, blocking, in a socket that outlasts the others that were tried."""
    kept = socket.socket(fileno=answered.detach())
    kept.setblocking(True)
    return kept
