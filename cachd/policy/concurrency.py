"""How many streams at once bring the most bytes."""

from __future__ import annotations

_STEP, _FINEST_STEP = 1.5, 1.1  # upwards; downwards always the finest: on a full link a wide one costs most
_ENOUGH = 0.15  # of what more streams would bring if each brought as much as those before
_NOISE = 0.03
_FIRST_REST, _LONGEST_REST = 4, 32
_LEAST = 4  # fewer are no kinder to an origin, and one that waits for its turn holds up all


class Concurrency:
    """A climb by measurement: more streams while they bring more bytes, fewer while those bring as many.

    Each measurement is of a stretch in which as many streams were at work as `count` says. A step that did
    not pay is taken back, and the next one, the other way, comes after a rest that gets longer.
    """

    def __init__(self, first: int, most: int) -> None:
        self.most = most
        self.count = min(first, most)
        self._base: tuple[int, float] | None = None  # (count, rate) before the step that is tried now
        self._upwards, self._step = True, _STEP
        self._rest, self._next_rest = 0, _FIRST_REST

    def measured(self, rate: float) -> int:
        """How many streams from now on, after `rate` bytes a second with `count`."""
        if self._base is None:
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
        step = round(self.count * self._step) if self._upwards else round(self.count / _FINEST_STEP)
        if step == self.count:
            step += 1 if self._upwards else -1
        step = max(min(_LEAST, self.count), min(step, self.most))
        if step == self.count:
            self._turn()
        else:
            self._base, self.count = (self.count, rate), step

    def _turn(self) -> None:
        self._base, self._upwards = None, not self._upwards
        self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST)
