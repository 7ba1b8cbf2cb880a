"""Decides which supplier of a download may take the next part."""

from __future__ import annotations

import structlog

from cachd.policy.outrun import is_outrun, is_slow, takes_long
from cachd.transfer.download.supplier import Supplier

log = structlog.get_logger(__name__)


class Suppliers(list[Supplier]):
    """The suppliers of one download. The caller holds the download's lock.

    All work at once while none has been found wrong, or much slower than another one. A supplier that was not
    measured yet gets one part at a time when another one was measured.

        serving --watch: much slower--> benched --release--> serving

    `take_turns`: the file had a wrong digest, and parts of several suppliers. From then on only one supplier
    serves at a time, so that the next wrong digest says who was wrong.
    """

    take_turns = False

    def best(self, now: float) -> Supplier:
        """The supplier to ask first.

        One that was never wrong is preferred, then one that does not rest, one that is not benched, one that
        serves ranges, and the one that sent most.
        """
        return min(self, key=lambda each: (_rank(each, now), -each.vouched))

    def most_turns(self, supplier: Supplier, now: float) -> int | None:
        """How many parts the supplier may fetch at once; None for no limit."""
        if len(self) == 1 and supplier.has_ranges:
            return None  # each part waits on its own
        if now < supplier.rests_until:
            return 0
        best = self.best(now)
        if self.take_turns:
            if supplier is not best:
                return 0
        elif _rank(supplier, now) > _rank(best, now):
            return 0
        elif not supplier.was_measured and any(each.was_measured for each in self):
            return 1
        return None if supplier.has_ranges else 1

    def failed(self, supplier: Supplier, now: float, seconds: float) -> None:
        """Let a supplier rest after a failure; the others serve meanwhile, benched or not."""
        supplier.rests_until = now + seconds
        for each in self:
            if each is not supplier:
                each.release(now)

    def watch(self, now: float, *, all_parts_taken: bool) -> None:
        """Measure all, and move parts away from those that are much slower than another one.

        `all_parts_taken`: no part waits for a supplier.
        """
        for each in self:
            each.measure(now)
        serving = [each for each in self if not each.is_benched]
        for each in serving:
            others = [other for other in serving if other.origin != each.origin and not other.is_benched]
            best = max((other.pace for other in others if other.pace is not None), default=None)
            is_new = any(not other.was_measured for other in others)
            if each.pace is not None and is_outrun(each.pace, best, another_is_new=is_new):
                log.info("slow source: its parts move to another", path=each.file.path, pace=int(each.pace))
                each.bench()
            elif all_parts_taken and any(not (o.was_measured or o.running) for o in others):
                _give_one_away(each)
        working = [each for each in serving if each.running and not each.is_benched]
        if working and all(each.pace is not None and is_slow(each.pace) for each in working):
            for each in self:
                each.release(now)


def _rank(supplier: Supplier, now: float) -> tuple[bool, ...]:
    is_resting = now < supplier.rests_until
    return bool(supplier.wrong), is_resting, supplier.is_benched, not supplier.has_ranges


def _give_one_away(supplier: Supplier) -> None:
    """Give the part that would take longest to a supplier that is not measured yet and has none."""
    turns = [(part.rest.size, asking) for asking, part in list(supplier.turns.items())]
    if supplier.pace is not None and turns:
        size, asking = max(turns, key=lambda turn: turn[0])
        if takes_long(size, supplier.pace):
            asking.take()
