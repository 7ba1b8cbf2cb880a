"""Keeps the models ready that the configuration lists.

The list is applied at the start and whenever its file changes. A model that is new in the list, or whose ref
or patterns changed, takes its name even if the name is pinned or belongs to another model. Between such
changes, a model that somebody forcibly removed, or replaced through the API, is left alone.

A model that the list pins stays pinned while the list says so. The pin is on the disk (store/pins.py), so it
also ends if the list changed while no daemon ran. A pin through the API stays.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog
from structlog.contextvars import bound_contextvars

from cachd.errors import CachdError, DaemonDied
from cachd.kernel.periodic import Periodic
from cachd.model import ModelSpec, Snapshot
from cachd.policy import backoff
from cachd.store.pins import PinnedBy
from cachd.store.store import Store
from cachd.transfer.progress import State
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull
from cachd.upkeep.retries import Retries
from cachd.upkeep.warms import Warms

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Desired:
    """A model that the operator lists."""

    spec: ModelSpec
    required: bool = False
    pin: bool = False
    warm: bool = False
    priority: int = 0


class Prewarm:
    """A thread that keeps every desired model ready, and asks again for other pulls that failed.

    `read_list` returns the desired models; None if they are unchanged.
    """

    def __init__(
        self,
        pulls: Pulls,
        store: Store,
        warms: Warms,
        read_list: Callable[[], Iterable[Desired] | None],
        *,
        chance: Callable[[], float] = random.random,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._pulls, self._store, self._warms = pulls, store, warms
        self._read_list, self._chance, self._now = read_list, chance, now
        self._retries = Retries(store, pulls, self._is_tried, chance=chance, now=now)
        self._warmed: dict[str, str] = {}  # the manifest last warmed, by name: each is warmed once
        self._desired: dict[str, Desired] = {}
        self._may_pin_too_many = False  # the list was read, and pins that it no longer asks for may be left
        self._tried: dict[str, _Tries] = {}
        self._thread = Periodic("prewarm", self._tick)

    def required(self) -> list[str]:
        """Names of the desired models that are marked required."""
        return [name for name, desired in self._desired.items() if desired.required]

    def start(self) -> None:
        """Start all pulls before returning, then keep checking from the thread."""
        self._thread.start(after=self._tick())

    def close(self) -> None:
        """Join the thread. The pulls continue."""
        self._thread.close()

    def _tick(self) -> float:
        desired = self._read_list()
        if desired is not None:
            self._apply({d.spec.name: d for d in desired})
            log.info("desired models read", count=len(self._desired))
        with bound_contextvars(who="cachd:configuration"):
            if self._may_pin_too_many:
                self._unpin()
            for each in list(self._desired.values()):
                tries = self._tried[each.spec.name]
                if tries.are_due():
                    self._ensure_ready(each, tries)
        self._retries.tick()
        return _TICK_SECONDS

    def _is_tried(self, name: str) -> bool:
        """Whether this thread itself tries the pull of a name again."""
        return name in self._tried and not self._tried[name].are_over

    def _apply(self, desired: dict[str, Desired]) -> None:
        before, tried = self._desired, self._tried
        self._tried = {}
        for name, each in desired.items():
            is_new = name not in before or before[name].spec != each.spec
            self._tried[name] = _Tries(self._chance, self._now, replace=is_new or tried[name].may_replace())
        self._desired, self._may_pin_too_many = desired, True

    def _ensure_ready(self, desired: Desired, tries: _Tries) -> None:
        spec, store = desired.spec, self._store
        ready = store.names.get(spec.name)
        try:
            if ready is not None and spec in (ready.spec, store.history.rolled_back_from(spec.name)):
                tries.succeeded()
                self._keep(desired, ready)
            elif not tries.are_over:
                self._pin(desired)
                pulls, replace = self._pulls, tries.replace
                tries.began(pulls.start_by_itself(spec, priority=desired.priority, replace=replace))
        except CachdError as error:
            log.warning("desired model not pulled", name=spec.name, reason=error.detail)
            tries.failed(error)

    def _keep(self, desired: Desired, ready: Snapshot) -> None:
        self._pin(desired)
        if desired.warm and self._warmed.get(ready.name) != ready.manifest:
            self._warmed[ready.name] = ready.manifest
            self._warms.warm(ready.name)

    def _pin(self, desired: Desired) -> None:
        name, pins = desired.spec.name, self._store.pins
        if desired.pin and PinnedBy.configuration not in pins.by(name):
            pins.add(name, PinnedBy.configuration)

    def _unpin(self) -> None:
        """End the pins that the list no longer asks for. One that cannot be removed is tried again."""
        pinned = {name for name, desired in self._desired.items() if desired.pin}
        try:
            for name in set(self._store.pins.configured()) - pinned:
                self._store.pins.release(name, PinnedBy.configuration)
            self._may_pin_too_many = False
        except CachdError as error:
            log.warning("models no longer listed are still pinned", reason=error.detail)


class _Tries:
    """When to try the pull of one model again.

    due ──began──> pulling ──(it ended)──> failed: waiting for a backoff ──are_due──> due
                                      └──> succeeded, cancelled: over

    `are_over`: no more tries, because the model became ready once, or somebody cancelled or replaced it.
    `replace`: until the model is ready once, its pull may take a name that is pinned or another model's.
    """

    def __init__(self, chance: Callable[[], float], now: Callable[[], float], *, replace: bool) -> None:
        self._chance, self._now = chance, now
        self.replace, self.are_over = replace, False
        self._failures = 0
        self._ticks_to_wait = 0
        self._pull: Pull | None = None

    def are_due(self) -> bool:
        self._note_end()
        self._ticks_to_wait = max(0, self._ticks_to_wait - 1)
        return self._pull is None and not self._ticks_to_wait

    def may_replace(self) -> bool:
        self._note_end()
        return self.replace

    def began(self, pull: Pull | None) -> None:
        self._pull = pull

    def succeeded(self) -> None:
        self.replace, self.are_over, self._failures = False, True, 0

    def failed(self, error: CachdError) -> None:
        self.are_over = isinstance(error, DaemonDied) or error.code == "name_taken"
        self._failures += 1
        seconds = backoff.delay(self._failures, requested=None, chance=self._chance())
        self._ticks_to_wait = 1 + round(seconds / _TICK_SECONDS)

    def _note_end(self) -> None:
        if self._pull is None or not self._pull.done.done():
            return
        ended, self._pull = self._pull, None
        if ended.error is None:
            self.succeeded()
        elif ended.progress.state is State.cancelled:
            self.replace, self.are_over = False, True
        else:
            self.failed(ended.error)
            ended.retry_at = None if self.are_over else self._now() + self._ticks_to_wait * _TICK_SECONDS
