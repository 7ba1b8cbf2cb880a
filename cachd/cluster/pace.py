"""Decides how often cachd may write to the Kubernetes API."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pace:
    """How often cachd compares, writes and checks again; all in seconds.

    `interval`: between two comparisons of the models with what was written. `settle`: a change is written
    within this time, at random, so that many nodes do not write at once. `each`: one write per this time in
    the long run, after `burst` writes at once. `check`: what the API server has is read again after this
    time; a third of it is random. `series`: the same event within this time of the last one is counted and
    makes no new object. `chance` is uniform in [0, 1).
    """

    interval: float = 2.0
    settle: float = 5.0
    each: float = 60.0
    burst: int = 5
    check: float = 900.0
    series: float = 600.0
    chance: Callable[[], float] = random.random


class Bucket:
    """Permits a burst, and then one write per `seconds` (a token bucket)."""

    def __init__(self, seconds: float, burst: int, now: float) -> None:
        self._seconds, self._burst = seconds, burst
        self._full_at = now

    def has(self, now: float) -> bool:
        """Whether a write is permitted now."""
        return self._full_at - now <= self._seconds * (self._burst - 1)

    def take(self, now: float) -> None:
        """Count one write."""
        self._full_at = max(self._full_at, now) + self._seconds
