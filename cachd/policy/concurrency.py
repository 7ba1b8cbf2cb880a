"""How many streams at once bring the most bytes."""

from __future__ import annotations

_STEP, _FINEST_STEP = 1.5, 1.1  # upwards; downwards always the finest: on a full link a wide one costs most
_ENOUGH = 0.15  # of what more streams would bring if each brought as much as those before
_NOISE = 0.03
_FIRST_REST, _LONGEST_REST = 4, 32
_LEAST = 4  # fewer are no kinder to an origin, and one that waits for its turn holds up all
_BUSY = 0.4  # share of the cores from which on these hold up the bytes, and not the connections


class Concurrency:
    """A climb by measurement: more streams while they bring more bytes, fewer while those bring as many.

    Each measurement is of a stretch in which as many streams were at work as `count` says. A step that did
    not pay is taken back, and the next one, the other way, comes after a rest that gets longer. While the
    cores are busy with what comes, rates say more of them than of the streams: there are fewer, step by step.
    """

    def __init__(self, first: int, most: int) -> None:
        self.most = most
        self.count = min(first, most)
        self._base: tuple[int, float] | None = None  # (count, rate) before the step that is tried now
        self._upwards, self._step = True, _STEP
        self._rest, self._next_rest = 0, _FIRST_REST

    def measured(self, rate: float, busy: float = 0.0) -> int:
        """How many from now on, after `rate` bytes a second with `count`; `busy`: share of the cores."""
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
            self._turn()
        return self.count

    def _paid(self, count: int, before: float, rate: float) -> bool:
        if self.count < count:
            return rate >= before * (1 - min(_NOISE, _ENOUGH * (1 - self.count / count)))
        return rate >= before * (1 + max(_NOISE, _ENOUGH * (self.count / count - 1)))

    def _try_from(self, rate: float) -> None:
        """Take the next step in this direction, or turn where there is none."""
        step = self._more() if self._upwards else self._fewer()
        if step == self.count:
            self._turn()
        else:
            self._base, self.count = (self.count, rate), step

    def _more(self) -> int:
        return min(max(round(self.count * self._step), self.count + 1), self.most)

    def _fewer(self) -> int:
        return max(min(round(self.count / _FINEST_STEP), self.count - 1), min(_LEAST, self.count))

    def _turn(self) -> None:
        self._base, self._upwards = None, not self._upwards
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
