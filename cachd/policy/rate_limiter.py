"""When bytes may be asked for, so that no more come than a limit allows."""

from __future__ import annotations

TURN_SECONDS = 0.02
BURST_SECONDS = 0.05


class RateLimiter:
    """A limit in bytes a second, kept by those who wait as long as they are told.

    Generic cell rate algorithm, as virtual scheduling (ITU-T I.371, annex A): bytes stand in one line that
    moves at the rate. Over any time no more than its bytes, a burst and one turn may go. Idle time is
    forgotten but for the burst, which makes up for those who come late.
    """

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._end = now  # when the last byte of the line has gone by

    @property
    def turn_bytes(self) -> int:
        """The most to ask for at once: a connection gets its turn often, however low the limit."""
        return max(1, int(self.rate * TURN_SECONDS))

    def reserve(self, count: int, now: float) -> float:
        """Stand in line with `count` bytes, a turn at most; seconds to wait before they may go."""
        start = max(self._end, now - BURST_SECONDS)
        self._end = start + count / self.rate
        return max(0.0, start - now)

    def restart(self, rate: int, now: float) -> None:
        """Go on at this rate, and forget whoever still waits: at most one turn is going just now."""
        self._end = min(self._end, now + self.turn_bytes / self.rate)
        self.rate = rate
