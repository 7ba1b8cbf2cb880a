"""Decides when a source takes too long to resolve a ref: in all, or by too few answers in a time window.

A slow directory of many files passes, because every answer counts. An origin that sends its answers byte by
byte does not.
"""

from __future__ import annotations

LEAST_A_SECOND = 0.5
WINDOW_SECONDS = 60.0


class Patience:
    """The time limits of one resolve, which began at `now` and may take `seconds`.

    A window is at least twice `stall_seconds`, the time that an origin may take for a single answer.
    """

    def __init__(self, seconds: float, *, stall_seconds: float, now: float) -> None:
        self._seconds, self._began = seconds, now
        self._window = max(WINDOW_SECONDS, 2 * stall_seconds)
        self._window_began, self._answered_before = now, 0

    def why_not(self, answered: int, now: float) -> str:
        """Why the resolve is too slow, given the answers received until `now`; empty if it is not."""
        if now - self._began >= self._seconds:
            return f"not done after {self._seconds:.0f} s, with {answered} answers"
        elapsed = now - self._window_began
        if elapsed < self._window:
            return ""
        count = answered - self._answered_before
        if count < LEAST_A_SECOND * elapsed:
            return f"{count} answers in {elapsed:.0f} s"
        self._window_began, self._answered_before = now, answered
        return ""
