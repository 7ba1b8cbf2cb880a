"""Slows down all requests for one service after it said that there are too many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cachd.policy import backoff
from cachd.sources.cancel import CancelToken

_LONGEST_SECONDS = 20.0


class Throttle:
    """A pause that all requests for one service share. Thread-safe.

    If a request is refused that began after the last pause, the next pause is twice as long. After an answer,
    pauses begin short again.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._refusals = 0
        self._until = 0.0

    @property
    def seconds_left(self) -> float:
        """The rest of the pause."""
        return max(0.0, self._until - self._clock())

    def wait(self, cancel_token: CancelToken) -> float:
        """Wait for the end of the pause. Returns when (by the clock) the caller may send its request.

        Raises Cancelled.
        """
        while (seconds := self.seconds_left) > 0:
            cancel_token.wait(seconds)
        cancel_token.check()
        return self._clock()

    def refused(self, began: float) -> None:
        """Note that the service refused a request that was sent at `began`, because it gets too many."""
        with self._lock:
            if began < self._until:
                return  # it was sent before the pause that is going on
            self._refusals += 1
            seconds = backoff.delay(self._refusals, requested=None, chance=0.5)
            self._until = self._clock() + min(seconds, _LONGEST_SECONDS)

    def answered(self) -> None:
        """Note that the service answered a request."""
        if self._refusals:
            with self._lock:
                self._refusals = 0
