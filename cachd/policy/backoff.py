"""Decides how long to wait before a request is repeated."""

from __future__ import annotations

FIRST_SECONDS = 0.5
LONGEST_SECONDS = 60.0
LONGEST_REQUESTED_SECONDS = 600.0
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 30.0, 600.0
_MAX_DOUBLINGS = 16  # far beyond the longest waits, and no overflow


def delay(failures: int, *, requested: float | None, chance: float) -> float:
    """Seconds to wait after `failures` (1 or more) in a row without progress.

    Exponential backoff with equal jitter (AWS Architecture Blog, "Exponential Backoff And Jitter"); `chance`
    is uniform in [0, 1). `requested` is the origin's Retry-After in seconds, capped at ten minutes: the wait
    is never shorter.
    """
    ceiling = min(LONGEST_SECONDS, FIRST_SECONDS * 2.0 ** min(failures - 1, _MAX_DOUBLINGS))
    jittered = ceiling * (0.5 + chance / 2)
    return jittered if requested is None else min(requested, LONGEST_REQUESTED_SECONDS) + jittered * chance


def before_retry(retries: int, *, chance: float) -> float:
    """Seconds between the end of a failed pull and its next one, the `retries`th (from 1) in a row."""
    longest = min(LONGEST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** min(retries - 1, _MAX_DOUBLINGS))
    return longest * (0.5 + chance / 2)
