"""Decides how many streams receive at once, by measuring their throughput."""

from __future__ import annotations

# Factors. A step down is always the finest one: a wide one costs most on a full link.
_STEP, _FINEST_STEP = 1.5, 1.1
_ENOUGH = 0.15  # a step is kept if it gains this fraction of what streams in proportion would gain
_NOISE = 0.03  # changes of the rate below this fraction mean nothing
_FIRST_REST, _LONGEST_REST = 4, 32  # measurements without a step after a change of direction
_LEAST = 4  # with fewer streams, a single one that waits would stop a large part of all bytes
_BUSY = 0.4  # fraction of all cores; with a higher CPU use, the CPU and not the network is the limit


class Concurrency:
    """Hill climbing: more streams while throughput grows, fewer while throughput stays the same.

    Each measurement covers a time in which `count` streams were busy. A step that did not pay is undone; the
    next step goes in the other direction, after a rest that gets longer each time. While the CPU is busy, the
    rate says nothing about the connections, and the number of streams goes down step by step.
    """

    def __init__(self, first: int, most: int) -> None:
        self.most = most
        self.count = min(first, most)
        self._base: tuple[int, float] | None = None  # (count, rate) before the step that is tried now
        self._upwards, self._step = True, _STEP
        self._rest, self._next_rest = 0, _FIRST_REST

    def measured(self, rate: float, busy: float = 0.0) -> int:
        """The new `count`, after the present one received `rate` bytes a second.

        `busy` is the CPU use in that time, as a fraction of all cores.
        """
        if busy > _BUSY:
            self._base, self._rest = None, _FIRST_REST
            self.count = self._fewer()
        elif self._base is None:
            if self._rest:
                self._rest -= 1
            else:
                self._try_from(rate)
        elif self._paid(*self._base, rate):
            self._next_rest = _FIRST_REST
            if self._upwards:
                self._step = _STEP
            self._try_from(rate)
        else:
            self.count = self._base[0]
            self._step = max(1 + (self._step - 1) / 2, _FINEST_STEP)
            self._reverse()
        return self.count

    def _paid(self, count: int, before: float, rate: float) -> bool:
        """Whether the step from `count` streams with the rate `before` is kept."""
        if self.count < count:
            return rate >= before * (1 - min(_NOISE, _ENOUGH * (1 - self.count / count)))
        return rate >= before * (1 + max(_NOISE, _ENOUGH * (self.count / count - 1)))

    def _try_from(self, rate: float) -> None:
        """Take the next step in this direction, or reverse it at the end of the range."""
        step = self._more() if self._upwards else self._fewer()
        if step == self.count:
            self._reverse()
        else:
            self._base, self.count = (self.count, rate), step

    def _more(self) -> int:
        return min(max(round(self.count * self._step), self.count + 1), self.most)

    def _fewer(self) -> int:
        return max(min(round(self.count / _FINEST_STEP), self.count - 1), min(_LEAST, self.count))

    def _reverse(self) -> None:
        self._base, self._upwards = None, not self._upwards
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
