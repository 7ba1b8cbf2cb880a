"""Queues pulls until each gets a slot.

    add, add_later ──> waits ──next──> has a slot ──lend──> lends it ──take, take_when_free──> has a slot
                         │                 │                   │
                         └──────leave──────┴────────end────────┴──> gone

A pull has a thread from `next` to `end`. While its origin keeps it waiting, it lends its slot to another pull
and keeps its thread, so there are more threads than slots. The pulls of one host never have more threads than
there are slots, so that pulls of other hosts find a thread.
"""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from cachd.sources.cancel import CancelToken

_MAX_LENT = 64


class Queued(Hashable, Protocol):
    """What the queue needs to know of a pull."""

    @property
    def scheme(self) -> str:
        """The kind of its source."""

    @property
    def host(self) -> str:
        """Its origin."""

    @property
    def priority(self) -> int:
        """Pulls with a higher priority are served first."""


T = TypeVar("T", bound=Queued)


class SlotQueue(Generic[T]):
    """A queue with `at_once` slots. `changed` is called with its length. Safe from any thread.

    Next is the pull with the highest priority; then of the scheme with the fewest slots in use; then of the
    host with the fewest, so that a slow host holds up no other; then the one that came first. While pulls of
    several hosts wait, no host gets all slots.
    """

    def __init__(
        self, at_once: int, changed: Callable[[int], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._at_once, self._report, self._clock = at_once, changed, clock
        self.threads = at_once + min(2 * at_once, _MAX_LENT)
        self._changed = threading.Condition()
        self._waiting: dict[str, list[tuple[int, int, T]]] = {}  # by host
        self._later: list[tuple[float, int, T]] = []
        self._sequence = itertools.count()
        self._working: set[T] = set()
        self._lending: set[T] = set()
        self.returning = 0  # pulls that lent their slot and now wait for one
        self._closed = False

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._later)

    # --- for the owner of the pulls ---

    def add(self, pull: T) -> None:
        """Queue a pull."""
        with self._changed:
            self._add(pull)
            self._notify()

    def add_later(self, pull: T, seconds: float) -> None:
        """Queue a pull in `seconds` from now. It counts as queued meanwhile."""
        with self._changed:
            heapq.heappush(self._later, (self._clock() + seconds, next(self._sequence), pull))
            self._notify()

    def leave(self, pull: T) -> bool:
        """Remove a pull from the queue. Returns whether it was queued."""
        with self._changed:
            before = len(self)
            self._later = [entry for entry in self._later if entry[2] is not pull]
            heapq.heapify(self._later)
            stay = [entry for entry in self._waiting.pop(pull.host, []) if entry[2] is not pull]
            heapq.heapify(stay)
            if stay:
                self._waiting[pull.host] = stay
            self._notify()
            return len(self) < before

    def next(self) -> T | None:
        """Wait until a pull can have a slot, and return it. After `close`, returns the queued pulls at once,
        one per call, and then None."""
        with self._changed:
            while True:
                now = self._clock()
                while self._later and (self._closed or self._later[0][0] <= now):
                    self._add(heapq.heappop(self._later)[2])
                if found := self._chosen():
                    self._working.add(found)
                    self._notify()
                    return found
                if self._closed:
                    return None
                self._changed.wait(self._later[0][0] - now if self._later else None)

    def end(self, pull: T) -> None:
        """Take back the slot of a pull whose thread is done with it."""
        with self._changed:
            self._working.discard(pull)
            self._lending.discard(pull)
            self._notify()

    def at_work(self) -> list[T]:
        """The pulls that have a thread."""
        with self._changed:
            return [*self._working, *self._lending]

    def close(self) -> None:
        """Give out no more slots: `next` returns the queued pulls so that they end."""
        with self._changed:
            self._closed = True
            self._notify()

    # --- for a pull that has a thread ---

    def lend(self, pull: T) -> None:
        """Let the next pull use the slot, because this one waits for its origin."""
        with self._changed:
            if pull in self._working:
                self._working.remove(pull)
                self._lending.add(pull)
                self._notify()

    def take(self, pull: T) -> None:
        """Take the slot back at once, even if one pull too many runs then: this one receives bytes again."""
        with self._changed:
            if pull in self._lending:
                self._lending.remove(pull)
                self._working.add(pull)

    def take_when_free(self, pull: T, cancel_token: CancelToken) -> None:
        """If the pull lent its slot, wait for a free one, ahead of every queued pull. Raises Cancelled."""
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

    # --- called with the lock ---

    def _add(self, pull: T) -> None:
        entry = (-pull.priority, next(self._sequence), pull)
        heapq.heappush(self._waiting.setdefault(pull.host, []), entry)

    def _notify(self) -> None:
        self._report(len(self))
        self._changed.notify_all()

    def _chosen(self) -> T | None:
        """Remove and return the next pull; None when none waits or none may have a slot now."""
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
    """One pull's view of `SlotQueue`: what it may do with its own slot."""

    def __init__(self, queue: SlotQueue[T], pull: T, cancel_token: CancelToken) -> None:
        self._queue, self._pull, self._cancel_token = queue, pull, cancel_token

    def lend(self) -> None:
        """See `SlotQueue.lend`."""
        self._queue.lend(self._pull)

    def take(self) -> None:
        """See `SlotQueue.take`."""
        self._queue.take(self._pull)

    def take_when_free(self) -> None:
        """See `SlotQueue.take_when_free`."""
        self._queue.take_when_free(self._pull, self._cancel_token)


class _Waker:
    """Wakes a pull that waits for a slot when its cancel token is cancelled."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed

    def abort(self) -> None:
        with self._changed:
            self._changed.notify_all()
