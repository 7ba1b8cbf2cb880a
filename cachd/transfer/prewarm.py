"""Models that nobody waits for yet: what the operator lists is pulled, again and again after failures."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from cachd.errors import CachdError
from cachd.model import Wish
from cachd.policy import backoff
from cachd.store.snapshots import Snapshots
from cachd.transfer import threads
from cachd.transfer.pulls import Pull, Pulls
from cachd.transfer.warms import Warms

log = structlog.get_logger(__name__)

_LOOK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Desired:
    """A model the operator lists."""

    wish: Wish
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
            self._desired = {d.wish.name: d for d in desired}
            self._tried = {}
            log.info("desired models read", count=len(self._desired))
        for each in list(self._desired.values()):
            tries = self._tried.setdefault(each.wish.name, _Tries())
            if tries.are_due():
                self._ask(each, tries)

    def _ask(self, desired: Desired, tries: _Tries) -> None:
        try:
            if desired.pin and not self._snapshots.is_pinned(desired.wish.name):
                self._snapshots.pin(desired.wish.name)
            ready = self._snapshots.get(desired.wish.name)
            given_up = self._snapshots.previous.given_up(desired.wish.name)
            if ready is None or desired.wish not in (ready.wish, given_up):
                tries.began(self._pulls.start(desired.wish, priority=desired.priority))
            elif desired.warm and self._warmed.get(ready.name) != ready.manifest:
                self._warmed[ready.name] = ready.manifest
                self._warms.warm(ready.name)
        except CachdError as error:
            log.warning("desired model not asked for", name=desired.wish.name, reason=error.detail)
            tries.failed()


class _Tries:
    """When to ask for one model again."""

    def __init__(self) -> None:
        self._failures = 0
        self._turns_to_wait = 0
        self._pull: Pull | None = None

    def are_due(self) -> bool:
        if self._pull is not None and self._pull.done.done():
            if self._pull.error is not None:
                self.failed()
            else:
                self._failures = 0
            self._pull = None
        self._turns_to_wait = max(0, self._turns_to_wait - 1)
        return self._pull is None and not self._turns_to_wait

    def began(self, pull: Pull | None) -> None:
        self._pull = pull

    def failed(self) -> None:
        self._failures += 1
        seconds = backoff.delay(self._failures, told=None, chance=random.random())  # noqa: S311
        self._turns_to_wait = 1 + round(seconds / _LOOK_SECONDS)
