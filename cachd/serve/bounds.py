"""Bounds what clients may cause at a time or in a minute, so that no client keeps the others from answers.

A client is a peer: an IPv4 address, or the /64 of an IPv6 address (cachd/policy/peers.py).
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cachd.errors import Unavailable

_RETRY_SECONDS = 5.0
_MINUTE_SECONDS = 60.0
_SLOTS = 2


def most_of_peer(most: int) -> int:
    """How many of `most` one peer may have: three quarters, rounded up."""
    return (most * 3 + 3) // 4


class Places:
    """At most `most` of something at a time, and three quarters of them for one peer. Safe from any thread.

    `full`: the message of the refusal. `changed`: called with the number that are taken.
    """

    def __init__(self, most: int, full: str, changed: Callable[[int], object] = lambda _: None) -> None:
        self._most, self._most_of_peer, self._full = most, most_of_peer(most), full
        self._changed = changed
        self._lock = threading.Lock()
        self._peers: Counter[str] = Counter()

    def take(self, peer: str) -> None:
        """Count one more. Raises Unavailable when there are too many."""
        with self._lock:
            if self._peers.total() >= self._most or self._peers[peer] >= self._most_of_peer:
                raise Unavailable(self._full, retry_after=_RETRY_SECONDS)
            self._peers[peer] += 1
            self._changed(self._peers.total())

    def leave(self, peer: str) -> None:
        """Count one less."""
        with self._lock:
            self._peers[peer] -= 1
            self._peers += Counter()  # drops those at zero
            self._changed(self._peers.total())

    @contextmanager
    def one(self, peer: str) -> Iterator[None]:
        """Count one more during the block. Raises Unavailable when there are too many."""
        self.take(peer)
        try:
            yield
        finally:
            self.leave(peer)


class Slots:
    """At most two threads run code of this package at a time. The others wait for a slot.

    The API's event loop waits for the interpreter behind each thread that runs, and a probe needs it several
    times. So probes would be late while many clients ask. Peers get free slots in turn, so that one with many
    long requests does not delay the others by all of them.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = _SLOTS
        self._waiting: dict[str, deque[threading.Event]] = {}  # by peer; the next peer comes first
        self._thread = threading.local()

    @contextmanager
    def one(self, peer: str) -> Iterator[None]:
        """Have a slot during the block."""
        self._take(peer)
        self._thread.peer = peer
        try:
            yield
        finally:
            self._thread.peer = None
            self._give()

    @contextmanager
    def without_slot(self) -> Iterator[None]:
        """Give the slot of this thread, if it has one, to another during the block, which only waits."""
        peer: str | None = getattr(self._thread, "peer", None)
        if peer is None:
            yield
            return
        self._thread.peer = None
        self._give()
        try:
            yield
        finally:
            self._take(peer)
            self._thread.peer = peer

    def _take(self, peer: str) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            is_given = threading.Event()
            self._waiting.setdefault(peer, deque()).append(is_given)
        is_given.wait()

    def _give(self) -> None:
        """Give a slot to the next thread of the next peer."""
        with self._lock:
            peer = next(iter(self._waiting), None)
            if peer is None:
                self._free += 1
                return
            threads = self._waiting.pop(peer)
            threads.popleft().set()
            if threads:
                self._waiting[peer] = threads  # behind the other peers


class Waits(Places):
    """The requests that wait for a source: half of `threads`. The other half answers from the disk.

    `changed`: as for `Places`. `slots`: a thread gives its slot to others while it waits.
    """

    def __init__(self, threads: int, changed: Callable[[int], object] = lambda _: None) -> None:
        super().__init__(max(1, threads // 2), "too many clients wait for models that are pulled", changed)
        self.slots = Slots()

    @contextmanager
    def one(self, peer: str) -> Iterator[None]:
        """See `Places`."""
        with super().one(peer), self.slots.without_slot():
            yield


class PerMinute:
    """At most `most` of something in a minute for each peer. Safe from any thread.

    `full`: the message of the refusal.
    """

    def __init__(self, most: int, full: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._full, self._clock = most, full, clock
        self._lock = threading.Lock()
        self._peers: Counter[str] = Counter()
        self._ends = 0.0

    def count(self, peer: str) -> None:
        """Count one more. Raises Unavailable when there are too many in this minute."""
        with self._lock:
            now = self._clock()
            if now >= self._ends:
                self._ends = now + _MINUTE_SECONDS
                self._peers.clear()
            if self._peers[peer] >= self._most:
                raise Unavailable(self._full, retry_after=max(1.0, self._ends - now))
            self._peers[peer] += 1
