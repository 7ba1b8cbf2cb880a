"""The pulls that wait for a slot: who is next, and who lends its slot meanwhile.

    add ──> waits ──next──> has a slot ──lend──> lends it ──take, take_in_turn──> has a slot
              ^                  │                   │
          add_later              └───────ended───────┴──> gone

A pull has a thread from `next` to `ended`. It lends its slot while its origin keeps it waiting; the thread
stays, so there are more threads than slots. No host has more threads than there are slots: the others are
left for the pulls of other hosts.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from cachd.sources.source import CancelToken

_MOST_LENT = 64


class Queued(Hashable, Protocol):
    """What may stand in the line. `host` is the origin's, `scheme` its kind."""

    @property
    def scheme(self) -> str: ...
    @property
    def host(self) -> str: ...
    @property
    def priority(self) -> int: ...


T = TypeVar("T", bound=Queued)


class Line(Generic[T]):
    """Who is next: the highest priority; then the scheme that has the fewest at work, then the host that has
    the fewest, so that a slow one keeps no other waiting; then who came first.

    While others wait, one host never has all slots. `at_once` slots. Safe from any thread.
    """

    def __init__(self, at_once: int, changed: Callable[[int], None]) -> None:
        self._at_once, self._tell = at_once, changed
        self.threads = at_once + min(2 * at_once, _MOST_LENT)
        self._changed = threading.Condition()
        self._waiting: dict[str, list[tuple[int, int, T]]] = {}  # by host
        self._later: list[tuple[float, int, T]] = []
        self._sequence = itertools.count()
        self._working: set[T] = set()
        self._lending: set[T] = set()
        self.returning = 0  # those that lent their slot and wait for one
        self._closed = False

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._later)

    # --- for whoever runs the pulls ---

    def add(self, pull: T) -> None:
        with self._changed:
            self._add(pull)
            self._told()

    def add_later(self, pull: T, seconds: float) -> None:
        """Let the pull wait for a slot, but not before so many seconds have passed."""
        with self._changed:
            heapq.heappush(self._later, (time.monotonic() + seconds, next(self._sequence), pull))
            self._told()

    def leave(self, pull: T) -> bool:
        """Take a pull out of the line; whether it was in it."""
        with self._changed:
            before = len(self)
            self._later = [entry for entry in self._later if entry[2] is not pull]
            heapq.heapify(self._later)
            stay = [entry for entry in self._waiting.pop(pull.host, []) if entry[2] is not pull]
            heapq.heapify(stay)
            if stay:
                self._waiting[pull.host] = stay
            self._told()
            return len(self) < before

    def next(self) -> T | None:
        """Wait for the pull whose turn it is, and give it a slot. Once closed, the others of the line come,
        too, and then None."""
        with self._changed:
            while True:
                now = time.monotonic()
                while self._later and (self._closed or self._later[0][0] <= now):
                    self._add(heapq.heappop(self._later)[2])
                if found := self._chosen():
                    self._working.add(found)
                    self._told()
                    return found
                if self._closed:
                    return None
                self._changed.wait(self._later[0][0] - now if self._later else None)

    def ended(self, pull: T) -> None:
        with self._changed:
            self._working.discard(pull)
            self._lending.discard(pull)
            self._told()

    def at_work(self) -> list[T]:
        """Those that have a thread."""
        with self._changed:
            return [*self._working, *self._lending]

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._told()

    # --- for a pull that has a thread ---

    def lend(self, pull: T) -> None:
        """Let the next pull have the slot: this one waits for its origin."""
        with self._changed:
            if pull in self._working:
                self._working.remove(pull)
                self._lending.add(pull)
                self._told()

    def take(self, pull: T) -> None:
        """Count the pull as at work again, though there may be one too many then: its bytes come already."""
        with self._changed:
            if pull in self._lending:
                self._lending.remove(pull)
                self._working.add(pull)

    def take_in_turn(self, pull: T, cancel_token: CancelToken) -> None:
        """Wait for a slot, before any that is new in the line, unless it has one. Raises Cancelled."""
        with cancel_token.reaches(_Waker(self._changed)), self._changed:
            self.returning += 1
            try:
                while (
                    pull in self._lending
                    and len(self._working) >= self._at_once
                    and not cancel_token.is_cancelled
                ):
                    self._changed.wait()
                self.take(pull)
            finally:
                self.returning -= 1
                self._changed.notify_all()
        cancel_token.check()

    # --- inside, with the lock ---

    def _add(self, pull: T) -> None:
        entry = (-pull.priority, next(self._sequence), pull)
        heapq.heappush(self._waiting.setdefault(pull.host, []), entry)

    def _told(self) -> None:
        self._tell(len(self))
        self._changed.notify_all()

    def _chosen(self) -> T | None:
        """The pull whose turn it is, taken out of the line; None while there is none."""
        if not self._closed and len(self._working) + self.returning >= self._at_once:
            return None
        schemes = Counter(pull.scheme for pull in self._working)
        slots = Counter(pull.host for pull in self._working)
        held = slots + Counter(pull.host for pull in self._lending)
        most = max(1, self._at_once - 1) if len(self._waiting) > 1 else self._at_once

        def order(host: str) -> tuple[int, int, int, int]:
            priority, sequence, pull = self._waiting[host][0]
            return priority, schemes[pull.scheme], slots[host], sequence

        may = [h for h in self._waiting if self._closed or (held[h] < self._at_once and slots[h] < most)]
        if not may:
            return None
        host = min(may, key=order)
        _, _, pull = heapq.heappop(self._waiting[host])
        if not self._waiting[host]:
            del self._waiting[host]
        return pull


class Slot(Generic[T]):
    """What a pull itself may do with its slot."""

    def __init__(self, line: Line[T], pull: T, cancel_token: CancelToken) -> None:
        self._line, self._pull, self._cancel_token = line, pull, cancel_token

    def lend(self) -> None:
        """See `Line.lend`."""
        self._line.lend(self._pull)

    def take(self) -> None:
        """See `Line.take`."""
        self._line.take(self._pull)

    def take_in_turn(self) -> None:
        """See `Line.take_in_turn`."""
        self._line.take_in_turn(self._pull, self._cancel_token)


class _Waker:
    """Wakes who waits for a slot when its pull is cut."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed

    def abort(self) -> None:
        with self._changed:
            self._changed.notify_all()
