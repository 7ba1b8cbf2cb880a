"""Queues the turns of a download's suppliers on the streams, now or after a wait."""

from __future__ import annotations

import enum
import math
import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from cachd.errors import Cancelled, Unavailable
from cachd.policy import backoff
from cachd.sources.pauses import is_pause
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import Busy, GaveWay, Supplier
from cachd.transfer.download.suppliers import Suppliers
from cachd.transfer.download.tally import Tally
from cachd.transfer.engine import Engine
from cachd.transfer.waits import Reason, Waits

if TYPE_CHECKING:
    from cachd.transfer.download.assembly import Assembly

log = structlog.get_logger(__name__)

SPACE_RETRY_SECONDS = 0.5


class Stage(enum.Enum):
    """What a download's turns do. See `Download`."""

    waiting = enum.auto()
    beginning = enum.auto()
    proving = enum.auto()
    fetching = enum.auto()


class Schedule:
    """The turns of one download.

    While a supplier may take a part, it has a turn queued. While all its parts wait, it has a turn that is
    queued when the first of them is due. So a download never stops for lack of a turn. `call` ensures this.
    Whoever changes the parts, the suppliers or the stage must call it.

    `lock` guards the suppliers, the stage and the queue of parts.
    """

    def __init__(
        self,
        engine: Engine,
        tally: Tally,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.lock = threading.Lock()
        self.suppliers = Suppliers()
        self.stage = Stage.waiting
        self.assembly: Assembly | None = None
        self._engine, self._tally = engine, tally
        self._clock, self._now, self._chance = clock, now, chance

    def begins(self, supplier: Supplier) -> Stage:
        """Count a turn that begins. Returns the stage; `waiting` if this turn must begin the download."""
        with self.lock:
            supplier.queued -= 1
            stage = self.stage
            if stage is Stage.waiting:
                may_begin = len(self.suppliers) == 1 or self._may_begin(supplier)
                self.stage = Stage.beginning if may_begin else Stage.waiting
                return stage if may_begin else Stage.beginning
            return stage

    def _may_begin(self, supplier: Supplier) -> bool:
        return self.suppliers.most_turns(supplier, self._clock()) != 0

    def call(self) -> None:
        """Queue a turn for each part that a supplier may take, or one later for those that wait."""
        now = self._clock()
        turns: list[tuple[Supplier, int]] = []
        later: list[tuple[Supplier, float]] = []
        with self.lock:
            if self._tally.is_over or self.stage is Stage.beginning:
                return
            for each in self.suppliers:
                if (count := self._turns_for(each, now)) > 0:
                    each.queued += count
                    turns.append((each, count))
                elif self.assembly and (due := self.assembly.next_due(each, now)) < each.called_at:
                    each.called_at = due
                    later.append((each, due - now))
        for each, count in turns:
            self._engine.streams.submit(each.quota, *[each.turn] * count)
        for each, seconds in later:
            self._engine.streams.submit_later(each.quota, each.turn_later, seconds)

    def call_others(self, supplier: Supplier) -> None:
        """As `call`, for a stream that continues with `supplier` itself, which needs no turn."""
        with self.lock:
            supplier.running += 1
        self.call()
        with self.lock:
            supplier.running -= 1

    def _turns_for(self, supplier: Supplier, now: float) -> int:
        """How many more turns the supplier needs. The caller holds the lock."""
        if self.assembly is not None:
            return self.assembly.turns_for(supplier, now)
        if supplier.queued or supplier.running or supplier.called_at < math.inf or supplier.proving:
            return 0
        return int(self.stage is Stage.proving or self._may_begin(supplier))

    def submit(self, supplier: Supplier) -> None:
        """Queue a turn of the supplier before the other tasks of its pull."""
        with self.lock:
            supplier.queued += 1
        self._engine.streams.submit(supplier.quota, supplier.turn)

    def append(self, supplier: Supplier) -> None:
        """Queue a turn of the supplier after the other tasks of its pull."""
        with self.lock:
            supplier.queued += 1
        self._engine.streams.append(supplier.quota, supplier.turn)

    def call_later(self, supplier: Supplier, seconds: float) -> None:
        """Queue a turn of the supplier in `seconds` from now."""
        supplier.called_at = self._clock() + seconds
        self._engine.streams.submit_later(supplier.quota, supplier.turn_later, seconds)

    def retry(self, supplier: Supplier, part: Part, at: int, error: Unavailable) -> None:
        """Let the supplier take a turn again after its failure. Raises `error` after too many of them."""
        if supplier.is_stopped:
            return
        if isinstance(error, GaveWay):
            self.append(supplier)
        else:
            self.call_later(supplier, self.retry_seconds(supplier, part, at, error))

    def retry_seconds(self, supplier: Supplier, part: Part, at: int, error: Unavailable | Cancelled) -> float:
        """Count a failure at byte `at`. Returns the seconds to wait; raises `error` after too many."""
        is_advice = isinstance(error, Busy) or is_pause(error)
        failures = 1 if is_advice else part.failed(at, supplier)
        if failures > self._engine.retries + is_advice or not isinstance(error, Unavailable):
            raise error
        seconds = backoff.delay(failures, requested=error.retry_after, chance=self._chance())
        supplier.listener.retried(error)
        path = self._tally.file.path
        log.info("part will be retried", file=path, at=at, code=error.code, in_seconds=round(seconds, 1))
        self._tally.waits = Waits(Reason.origin, self._now() + seconds, error.detail)
        with self.lock:
            self.suppliers.failed(supplier, self._clock(), seconds)
        return seconds

    def wait_for_space(self, supplier: Supplier | None = None) -> None:
        """Note that received bytes found no space, because another process fills the disk.

        `supplier`: if given, it takes a turn again soon.
        """
        file, was_waiting = self._tally.file, self._tally.is_waiting_for_space
        self._tally.is_waiting_for_space = True
        if not was_waiting:
            log.warning("paused: the disk is at its reserve", file=file.path, size_bytes=file.size)
        if supplier is not None:
            self.call_later(supplier, SPACE_RETRY_SECONDS)
