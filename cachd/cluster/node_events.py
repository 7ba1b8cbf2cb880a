"""Makes a Kubernetes Event on this node's object when a model is pulled, evicted, damaged or repaired.

    happened ──note──> waiting ──next, written──> written
                          ^                          │
                          └──(again within the series: counted, the same Event is patched)

At most `_MAX_WAITING` events wait; the oldest is dropped first. An event that happens again while it waits is
counted. Messages hold the names of models, numbers and error codes, and neither refs nor addresses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from cachd.report.events import Event, EventKind
from cachd.store.catalog import iso

NAMESPACE = "default"  # where Kubernetes keeps events of objects that have no namespace
_MAX_WAITING, _MAX_WRITTEN = 50, 200
_LONGEST_NODE = 200  # characters of the node's name in that of an event, which has 253 at most


class Kind(StrEnum):
    """The type of an Event."""

    Normal = "Normal"
    Warning = "Warning"


@dataclass(frozen=True, slots=True)
class _Text:
    """How an event of cachd is written: the reason of the Event, its type, and the message."""

    reason: str
    kind: Kind
    message: Callable[[Event], str]


_TEXTS = {
    EventKind.pull_ready: _Text(
        "ModelPulled",
        Kind.Normal,
        lambda event: (
            f"{event.model} is ready: {event.size_bytes or 0} bytes, of which {event.fetched_bytes or 0} were"
            f" fetched in {event.seconds or 0:.0f} s"
        ),
    ),
    EventKind.pull_failed: _Text(
        "ModelPullFailed",
        Kind.Warning,
        lambda event: (
            f"the pull of {event.model} failed: {event.code or 'unknown'};"
            f" cachd show {event.model} has the reason"
        ),
    ),
    EventKind.evicted: _Text(
        "ModelEvicted",
        Kind.Normal,
        lambda event: (
            f"{event.model} was evicted ({event.reason}), which freed {event.freed_bytes or 0} bytes"
        ),
    ),
    EventKind.damaged: _Text(
        "ModelCorrupt", Kind.Warning, lambda event: f"a file of {event.model} is damaged on the disk"
    ),
    EventKind.quarantined: _Text(
        "ModelQuarantined", Kind.Warning, lambda event: f"{event.model} is not ready until it is repaired"
    ),
    EventKind.repaired: _Text(
        "ModelRepaired", Kind.Normal, lambda event: f"{event.model} is repaired, and ready again"
    ),
    EventKind.refused: _Text(
        "ModelRefused", Kind.Warning, lambda event: f"{event.model} has a digest that the operator refuses"
    ),
}
REASONS = {kind.value: text.reason for kind, text in _TEXTS.items()}


@dataclass(frozen=True, slots=True)
class Series:
    """One Event object: the same reason for the same model, `count` times between `first` and `last`."""

    reason: str
    kind: Kind
    model: str
    message: str
    first: float
    last: float
    count: int = 1
    is_written: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Events with the same key belong to one series."""
        return self.reason, self.model

    def name_for(self, node: str) -> str:
        """The name of the Event. A write that is tried again has the same one."""
        digits = hashlib.sha256(f"{node}/{self.reason}/{self.model}/{self.first}".encode()).hexdigest()
        return f"{node[:_LONGEST_NODE]}.{digits[:16]}"

    def as_created(self, node: str, uid: str) -> dict[str, object]:
        """The Event, to be created."""
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": self.name_for(node), "namespace": NAMESPACE},
            "involvedObject": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": uid},
            "type": self.kind.value,
            "reason": self.reason,
            "source": {"component": "cachd", "host": node},
            "reportingComponent": "cachd",
            "reportingInstance": node,
            "firstTimestamp": iso(int(self.first)),
        } | self.as_counted()

    def as_counted(self) -> dict[str, object]:
        """The fields of the Event that change with each repetition."""
        return {"message": self.message, "count": self.count, "lastTimestamp": iso(int(self.last))}


class NodeEvents:
    """The events to write, and those that were written lately. For one thread; times are Unix seconds."""

    def __init__(self, series_seconds: float) -> None:
        self._series_seconds = series_seconds
        self._waiting: dict[tuple[str, str], Series] = {}
        self._written: dict[tuple[str, str], Series] = {}

    def note(self, event: Event, now: float) -> None:
        """Queue an event to be written. Events of other kinds are ignored."""
        text = _TEXTS.get(event.kind)
        if text is None or event.model is None:
            return
        new = Series(text.reason, text.kind, event.model, text.message(event), now, now)
        before = self._waiting.pop(new.key, None) or self._written.get(new.key)
        if before and now - before.last <= self._series_seconds:
            new = replace(before, message=new.message, last=now, count=before.count + 1)
        self._waiting[new.key] = new
        _drop_oldest(self._waiting, _MAX_WAITING)

    def next(self) -> Series | None:
        """The event that has waited the longest."""
        return next(iter(self._waiting.values()), None)

    def written(self, series: Series) -> None:
        """An event was written: a further one of its series patches it."""
        self._waiting.pop(series.key, None)
        self._written.pop(series.key, None)
        self._written[series.key] = replace(series, is_written=True)
        _drop_oldest(self._written, _MAX_WRITTEN)

    def vanished(self, series: Series) -> None:
        """The server no longer has the event, so it begins a new series."""
        self._written.pop(series.key, None)
        self._waiting[series.key] = replace(series, first=series.last, count=1, is_written=False)


def _drop_oldest(kept: dict[tuple[str, str], Series], most: int) -> None:
    while len(kept) > most:
        del kept[next(iter(kept))]
