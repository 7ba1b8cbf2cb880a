"""How long a source may take to say what a ref is: a time for all of it, and so many answers in every window.

A slow directory of many files passes, as each of its answers counts. An origin that drips does not.
"""

from __future__ import annotations

LEAST_A_SECOND = 0.5
WINDOW_SECONDS = 60.0


class Patience:
    """With one resolve, which began at `now` and may take `seconds`.

    An origin may take `stall_seconds` for a single answer: a window is twice as long at least.
    """

    def __init__(self, seconds: float, *, stall_seconds: float, now: float) -> None:
        self._seconds, self._began = seconds, now
        self._window = max(WINDOW_SECONDS, 2 * stall_seconds)
        self._window_began, self._answered_before = now, 0

    def why_not(self, answered: int, now: float) -> str:
        """Why it is too slow, when it has been answered so often by `now`; empty when it is not."""
        if now - self._began >= self._seconds:
            return f"not done after {self._seconds:.0f} s, with {answered} answers"
        elapsed = now - self._window_began
        if elapsed < self._window:
            return ""
        came = answered - self._answered_before
        if came < LEAST_A_SECOND * elapsed:
            return f"{came} answers in {elapsed:.0f} s"
        self._window_began, self._answered_before = now, answered
        return ""
