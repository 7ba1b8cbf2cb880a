"""Remembers, for all pulls of this node, how many requests each origin takes at once."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from cachd.errors import CachdError
from cachd.policy.origin_limit import OriginLimit
from cachd.sources.failures import BUSY

log = structlog.get_logger(__name__)

_MAX_ORIGINS = 1000
_ORIGIN = re.compile(r"[^:/?#]+://[^/?#]*")  # a tenth of what urlsplit costs


def origin_name(location: str) -> str:
    """The origin of a file or a ref: host and port of a web server, else the scheme and the first name."""
    found = _ORIGIN.match(location)
    return found[0] if found else location


class Origin:
    """One origin, as its requests have shown it. Thread-safe."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name, self._clock = name, clock
        self._lock = threading.Lock()
        self._limit = OriginLimit()

    @property
    def most(self) -> int | None:
        """How many tasks may run for it at once; None for no limit."""
        return self._limit.most

    @property
    def is_serving(self) -> bool:
        """Whether it answers a request now."""
        return self._limit.serving > 0

    @property
    def raised_in(self) -> float:
        """Seconds until it may get more requests."""
        return max(0.0, self._limit.raised_at - self._clock())

    def allows(self) -> bool:
        """Whether one more task may run for it."""
        if self._limit.most is None:
            return True
        with self._lock:
            return self._limit.allows(self._clock())

    def begin(self) -> None:
        """Count a task that runs for it."""
        with self._lock:
            self._limit.running += 1

    def end(self) -> None:
        """Count the end of a task."""
        with self._lock:
            self._limit.running -= 1

    @contextmanager
    def serving(self) -> Iterator[None]:
        """A context in which it answers a request."""
        with self._lock:
            self._limit.answered()
        try:
            yield
        finally:
            with self._lock:
                self._limit.ended()

    def refused(self, error: CachdError) -> bool:
        """Note a failed request. Returns whether the origin merely takes no more requests at once."""
        if error.origin_status not in BUSY:
            return False
        with self._lock:
            before = self._limit.most
            is_advice = self._limit.refused(self._clock())
            most = self._limit.most
        if most != before:
            log.info("origin takes few requests at once", origin=self._name, most=most)
        return is_advice


class Origins:
    """The origins of all pulls. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._origins: dict[str, Origin] = {}

    def of(self, location: str) -> Origin:
        """The origin of a file or a ref."""
        name = origin_name(location)
        with self._lock:
            if name not in self._origins and len(self._origins) >= _MAX_ORIGINS:
                self._origins.pop(next(iter(self._origins)))
            return self._origins.setdefault(name, Origin(name, self._clock))
