"""Decides when bytes may be received, so that a limit in bytes a second holds."""

from __future__ import annotations

SLOT_SECONDS = 0.02
BURST_SECONDS = 0.05


class RateLimiter:
    """A limit in bytes a second. Callers keep it by waiting as long as `reserve` says.

    The generic cell rate algorithm as virtual scheduling (ITU-T I.371, annex A): bytes queue in one line that
    moves at the rate. In any time span, the bytes of the rate, one burst and one slot pass at most. Idle time
    gives no more credit than one burst, which makes up for callers that are late.
    """

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self._end = now  # when the last reserved byte will have passed

    @property
    def slot_bytes(self) -> int:
        """Most bytes to reserve at once: a small number, so that all connections get a slot often."""
        return max(1, int(self.rate * SLOT_SECONDS))

    def reserve(self, count: int, now: float) -> float:
        """Reserve `count` bytes, at most `slot_bytes`. Returns the seconds to wait before receiving them."""
        start = max(self._end, now - BURST_SECONDS)
        self._end = start + count / self.rate
        return max(0.0, start - now)

    def restart(self, rate: int, now: float) -> None:
        """Continue at another rate, and drop the reservations of callers that still wait.

        At most one slot stays reserved, for a caller that receives just now.
        """
        self._end = min(self._end, now + self.slot_bytes / self.rate)
        self.rate = rate
