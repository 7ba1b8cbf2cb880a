"""Lets another connection take over a part of a file whose own connection is far slower than the others.

A server, a load balancer or a path may throttle one connection of many. Its part would hold the pull up for
minutes after everything else is here. The slow request is aborted, and its connection closed. Then the rest
of its part is queued first, and the next free stream requests it anew. So a part has one writer at any time:
nothing that a slow connection sends late can reach the disk. Bytes that it has sent and nobody has read are
lost. This loss is limited to a few percent of all bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog

from cachd.policy.outrun import answers_late, is_far_behind
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import Supplier
from cachd.transfer.streams import Asking, StreamQuota

log = structlog.get_logger(__name__)

_WINDOW_SECONDS = 0.5  # of `usual`
_MARKED_SECONDS = 1.0  # of the pace of one request
_READS_A_SECOND = 8  # of each request, so that its pace can be seen
_LOST_SECONDS = 1.0  # an aborted request loses the bytes of this time at most: they were sent and not read
_MAX_LOST, _ALWAYS_BYTES = 0.03, 64 << 10  # of all bytes received, this fraction may be lost; or these bytes
_MAX_TAKEN = 3  # of one part
_MAX_SLOW = 4  # if more than one request in so many is slow, the source is: another connection helps little
_MIN_READ_BYTES = 64 << 10

Turns = dict[Asking, tuple[Supplier, Part]]


class Hedging:
    """Watches the requests of one pull, whose quota is `quota`. Only the pull's thread uses it."""

    def __init__(self, quota: StreamQuota, clock: Callable[[], float] = time.monotonic) -> None:
        self._quota, self._clock = quota, clock
        self._at, self._sent, self._before = clock(), 0, dict[Asking, int]()  # when `usual` was measured
        self._usual = 0.0  # bytes per second of one request
        self._marks: dict[Asking, tuple[float, int]] = {}  # since when a request's pace is measured
        self._lost = 0.0

    def watch(self, suppliers: Sequence[Supplier]) -> None:
        """Take over the parts that are far behind. To be called regularly, with all suppliers of the pull."""
        now = self._clock()
        turns = {
            asking: (each, part)
            for each in suppliers
            if each.turns and each.has_ranges
            for asking, part in each.turns.copy().items()
        }
        sent = sum(each.sent for each in suppliers)
        self._measure(turns, sent, now)
        paces = {asking: self._pace(asking, now) for asking in turns}
        self._marks = {asking: mark for asking, mark in self._marks.items() if asking in turns}
        behind = [each for each in turns if self._is_behind(each, paces[each], turns[each][1], now)]
        if len(behind) <= max(1, len(turns) // _MAX_SLOW):
            for asking in behind:
                self._take(asking, paces[asking], sent, *turns[asking])

    def _measure(self, turns: Turns, sent: int, now: float) -> None:
        """Measure how many bytes per second a request usually receives, without the slowest request.

        While only one request runs, there is nothing to compare it with, and the earlier value stays.
        """
        elapsed = now - self._at
        if elapsed < _WINDOW_SECONDS:
            return
        received = {asking: asking.received for asking in turns}
        brought = [received[asking] - self._before[asking] for asking in turns if asking in self._before]
        count, total = max(len(turns), len(self._before)), sent - self._sent
        if count > 1:
            if len(brought) == count:
                count, total = count - 1, total - min(brought)
            self._usual = max(total / elapsed / count, self._usual / 2)  # at the end, requests end early
            self._quota.set_pace(max(int(self._usual / _READS_A_SECOND), _MIN_READ_BYTES))
        self._at, self._sent, self._before = now, sent, received

    def _pace(self, asking: Asking, now: float) -> float:
        """An upper bound of the bytes per second that the request received lately.

        The bytes that its stream waits for count as received, because they may be nearly here.
        """
        if not asking.opened:
            return 0.0
        received = asking.received
        since, before = self._marks.setdefault(asking, (asking.opened, 0))
        elapsed = now - since
        if received > before and elapsed >= _MARKED_SECONDS:
            self._marks[asking] = now, received
        return (received - before + asking.wanted) / max(elapsed, 1e-3)

    def _is_behind(self, asking: Asking, pace: float, part: Part, now: float) -> bool:
        if asking.is_taken or part.taken >= _MAX_TAKEN:
            return False
        rest = part.rest.size
        if not asking.opened:
            return answers_late(rest, now - asking.began, self._usual, taken=part.taken)
        return is_far_behind(rest, pace, self._usual, taken=part.taken)

    def _take(self, asking: Asking, pace: float, sent: int, supplier: Supplier, part: Part) -> None:
        lost = pace * _LOST_SECONDS
        if self._lost + lost > max(_MAX_LOST * sent, _ALWAYS_BYTES):
            return
        self._lost += lost
        part.taken += 1
        rest, path = part.rest.size, supplier.file.path
        log.info("slow connection: another takes over", path=path, rest_bytes=rest, pace=int(pace))
        supplier.download.tally.hedge(rest)
        supplier.listener.hedged(rest)
        asking.take()
