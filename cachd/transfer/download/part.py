"""The parts of a file: an extent that is being fetched, and the queue of those that no stream fetches now."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cachd.model import Extent
from cachd.store.digests import PartHash

if TYPE_CHECKING:
    from cachd.transfer.download.supplier import Supplier

_PROGRESS_BYTES = 64 << 10


class Part:
    """An extent that is being fetched.

    Bytes before `reached` have arrived, those before `kept` survive a death of the process, and those before
    `allocated` have disk blocks. `hash` covers the bytes that have arrived; `sender` is the supplier that
    sent them. `lacking`: bytes that had arrived, found no disk space, and were dropped.

    `taken`: how often another connection took it over, because its own was far slower than the others.

    Before `due` (monotonic seconds), `refused` may not take it; if that is None, nobody may.
    """

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.reached = self.kept = self.allocated = extent.start
        self.hash: PartHash | None = None  # created with the first byte, since many parts are only queued
        self.sender: Supplier | None = None
        self.lacking = self.taken = 0
        self.due = 0.0
        self.refused: Supplier | None = None
        self._failures: dict[Supplier, int] = {}
        self._failed_at = extent.start

    @property
    def rest(self) -> Extent:
        """The bytes still to be fetched."""
        return Extent(self.reached, self.extent.stop)

    @property
    def is_complete(self) -> bool:
        """Whether every byte has arrived."""
        return self.reached == self.extent.stop

    def wait(self, due: float, refused: Supplier | None = None) -> None:
        """Let `refused` (None: anybody) take the part no earlier than `due`."""
        self.due, self.refused = due, refused

    def is_due(self, supplier: Supplier, now: float) -> bool:
        """Whether the supplier may take the part now."""
        return now >= self.due or self.refused not in (None, supplier)

    def failed(self, at: int, supplier: Supplier) -> int:
        """Count a failure of a supplier at byte `at`. Returns its failures since the last progress."""
        if at - self._failed_at >= _PROGRESS_BYTES:
            self._failures, self._failed_at = {}, at
        self._failures[supplier] = self._failures.get(supplier, 0) + 1
        return self._failures[supplier]

    def rest_for(self, supplier: Supplier) -> Part:
        """The part that `supplier` continues: its rest, if the bytes so far came from another one."""
        if self.sender is None or self.sender.origin == supplier.origin or self.reached == self.extent.start:
            return self
        rest = Part(self.rest)
        rest.allocated, rest.lacking = max(self.allocated, self.reached), self.lacking
        return rest


class Parts:
    """The queue of the parts that no stream fetches now. The caller holds the download's lock."""

    def __init__(self) -> None:
        self._ready: deque[Part] = deque()
        self._waiting: list[Part] = []

    def __bool__(self) -> bool:
        return bool(self._ready or self._waiting)

    def add(self, parts: Iterable[Part]) -> None:
        """Queue parts after all others."""
        self._ready.extend(parts)

    def put_back(self, part: Part) -> None:
        """Queue a part that was taken, before all others."""
        if part.due:
            self._waiting.append(part)
        else:
            self._ready.appendleft(part)

    def count(self, supplier: Supplier, now: float) -> int:
        """How many parts the supplier may take now."""
        return len(self._ready) + sum(part.is_due(supplier, now) for part in self._waiting)

    def next_due(self, supplier: Supplier, now: float) -> float:
        """When the supplier may take the first of the parts that wait; infinity when none waits for it."""
        return min((p.due for p in self._waiting if not p.is_due(supplier, now)), default=math.inf)

    def take(self, supplier: Supplier, now: float, *, at_least: int = 0) -> Part | None:
        """Take the next part that the supplier may fetch, which starts at `at_least` or later, or None."""
        if at_least or not supplier.has_ranges:
            return self._take_first(supplier, now, at_least)
        for part in self._waiting:
            if part.is_due(supplier, now):
                self._waiting.remove(part)
                part.wait(0.0)
                return part
        return self._ready.popleft() if self._ready else None

    def _take_first(self, supplier: Supplier, now: float, at_least: int) -> Part | None:
        """Take the part that is first in the file: for a source that sends the file in order only."""
        due = [part for part in self._waiting if part.is_due(supplier, now)]
        later = [part for part in (*self._ready, *due) if part.reached >= at_least]
        part = min(later, key=lambda part: part.reached, default=None)
        if part is not None:
            (self._ready if part in self._ready else self._waiting).remove(part)
            part.wait(0.0)
        return part
