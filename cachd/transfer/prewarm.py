"""Models that nobody waits for yet: what the operator lists is pulled, again and again after failures.

The list speaks at the start and whenever the file changes. A model that it adds, or whose ref or patterns it
changes, takes its name, whatever that led to and though it is pinned. In between, what somebody forcibly
removed, or replaced through the API, stays so.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from cachd.errors import CachdError
from cachd.model import ModelSpec, Snapshot
from cachd.policy import backoff
from cachd.store.snapshots import Snapshots
from cachd.transfer import threads
from cachd.transfer.pulls import SET_ASIDE, Pull, Pulls
from cachd.transfer.warms import Warms

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Desired:
    """A model the operator lists."""

    spec: ModelSpec
    required: bool = False
    pin: bool = False
    warm: bool = False
    priority: int = 0


class Prewarm:
    """A thread that keeps every desired model ready. `look` gives what is desired now, None if unchanged."""

    def __init__(
        self,
        pulls: Pulls,
        snapshots: Snapshots,
        warms: Warms,
        look: Callable[[], Iterable[Desired] | None],
    ) -> None:
        self._pulls, self._snapshots, self._warms, self._look = pulls, snapshots, warms, look
        self._warmed: dict[str, str] = {}  # the manifest a name had when it was warmed: once for each
        self._desired: dict[str, Desired] = {}
        self._tried: dict[str, _Tries] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prewarm", daemon=True)

    def required(self) -> list[str]:
        """Names of the desired models that are marked required."""
        return [name for name, desired in self._desired.items() if desired.required]

    def start(self) -> None:
        """Ask for everything once, then keep looking from a thread."""
        self._turn()
        threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            self._turn()

    def _turn(self) -> None:
        desired = self._look()
        if desired is not None:
            self._take_over({d.spec.name: d for d in desired})
            log.info("desired models read", count=len(self._desired))
        for each in list(self._desired.values()):
            tries = self._tried[each.spec.name]
            if tries.are_due():
                self._ask(each, tries)

    def _take_over(self, desired: dict[str, Desired]) -> None:
        before, tried = self._desired, self._tried
        self._tried = {}
        for name, each in desired.items():
            is_new = name not in before or before[name].spec != each.spec
            self._tried[name] = _Tries(replace=is_new or tried[name].may_replace())
        self._desired = desired

    def _ask(self, desired: Desired, tries: _Tries) -> None:
        spec, snapshots = desired.spec, self._snapshots
        ready = snapshots.get(spec.name)
        try:
            if ready is not None and spec in (ready.spec, snapshots.previous.rolled_back_from(spec.name)):
                tries.came_true()
                self._keep(desired, ready)
            elif not tries.are_over:
                self._pin(desired)
                pulls, replace = self._pulls, tries.replace
                tries.began(pulls.start_by_itself(spec, priority=desired.priority, replace=replace))
        except CachdError as error:
            log.warning("desired model not asked for", name=spec.name, reason=error.detail)
            tries.failed(error)

    def _keep(self, desired: Desired, ready: Snapshot) -> None:
        self._pin(desired)
        if desired.warm and self._warmed.get(ready.name) != ready.manifest:
            self._warmed[ready.name] = ready.manifest
            self._warms.warm(ready.name)

    def _pin(self, desired: Desired) -> None:
        if desired.pin and not self._snapshots.is_pinned(desired.spec.name):
            self._snapshots.pin(desired.spec.name)


class _Tries:
    """When to ask for one model again. `are_over`: it was there, or somebody else's word came after.

    `replace`: the name may move to it, whatever it is, until it was there once.
    """

    def __init__(self, *, replace: bool) -> None:
        self.replace, self.are_over = replace, False
        self._failures = 0
        self._turns_to_wait = 0
        self._pull: Pull | None = None

    def are_due(self) -> bool:
        self._see_end()
        self._turns_to_wait = max(0, self._turns_to_wait - 1)
        return self._pull is None and not self._turns_to_wait

    def may_replace(self) -> bool:
        self._see_end()
        return self.replace

    def began(self, pull: Pull | None) -> None:
        self._pull = pull

    def came_true(self) -> None:
        self.replace, self.are_over, self._failures = False, True, 0

    def failed(self, error: CachdError) -> None:
        self.are_over = error.code in ("name_taken", SET_ASIDE)
        self._failures += 1
        seconds = backoff.delay(self._failures, told=None, chance=random.random())  # noqa: S311
        self._turns_to_wait = 1 + round(seconds / _LOOK_SECONDS)

    def _see_end(self) -> None:
        if self._pull is None or not self._pull.done.done():
            return
        ended, self._pull = self._pull, None
        if ended.error is None:
            self.came_true()
        elif ended.progress.state == "cancelled":
            self.replace, self.are_over = False, True
        else:
            self.failed(ended.error)
