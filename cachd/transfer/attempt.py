"""Defines the objects that one attempt at a pull uses."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from cachd.errors import Unavailable
from cachd.model import ModelSpec
from cachd.preflight.codes import Mode
from cachd.sources.source import Source
from cachd.sources.table import Table
from cachd.store.permit import Permit
from cachd.store.store import Store
from cachd.transfer.downloads import Downloads
from cachd.transfer.progress import Progress
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.resolves import Resolves
from cachd.transfer.streams import StreamQuota


@dataclass(frozen=True, slots=True)
class PullContext:
    """What all pulls share. `table` returns the operator's current rules and bandwidth limits.
    `preflight`: what becomes of a model that an engine would refuse.

    `clock`: seconds that only go forward. `now`: seconds since the epoch.
    """

    store: Store
    reclaim: Reclaim
    downloads: Downloads
    resolves: Resolves
    table: Callable[[], Table] = Table
    preflight: Mode = Mode.warn
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time


class Slot(Protocol):
    """The slot of one pull. The number of slots limits how many pulls run at once."""

    def lend(self) -> None:
        """Let another pull use the slot while this one waits for its origin."""

    def take(self) -> None:
        """Take the slot back at once, even if this exceeds the limit by one pull."""

    def take_when_free(self) -> None:
        """Wait for a free slot, then take it. Raises Cancelled."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to make the model of `spec` ready, by a thread that has a slot.

    A pull starts another attempt after its source was unavailable. All attempts share the pull's `progress`,
    stream `quota` and `permit` to publish.
    """

    spec: ModelSpec
    source: Source
    slot: Slot
    progress: Progress
    quota: StreamQuota
    permit: Permit
    context: PullContext


class NotYet(Exception):
    """The source is temporarily unavailable (`reason`). Another attempt may succeed later.

    `pull` raises it, and transfer/runner.py catches it and queues the pull again.
    """

    def __init__(self, reason: Unavailable) -> None:
        super().__init__(reason.detail)
        self.reason = reason
