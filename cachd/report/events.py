"""Keeps the newest events of the daemon, and wakes those who wait for the next one.

What happens is reported by the log, and nothing else: `EventLog` is a processor of structlog that keeps the
log events of `HEARD` as values. So no module below knows of it.

The ids of events are consecutive numbers. The first one of a process is the time of its start in
milliseconds, so the ids of a later process are higher, unless the clock was set back. Events are kept in
memory only: whoever asks for what follows an id of an earlier process hears that there may be a gap.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Annotated, Any, Literal

from cachd.errors import printable
from cachd.report.define import report
from cachd.report.values import LEFT_OUT, Count, Text, When
from cachd.store.catalog import iso

MAX_EVENTS = 1000
_LONGEST_TEXT, _MAX_ITEMS = 1000, 100
EndReason = Literal["slow", "deadline", "stopping"]


class EventKind(StrEnum):
    """What happened.

    `pull_interrupted`: the daemon stops, and its next start resumes the pull. `preflight_found`: what engines
    would find wrong with a model that is ready now. `damaged`: a file on the disk was found wrong or missing.
    `quarantined`: a model that has this file, and is not ready until it is repaired. `refused`: the operator
    refuses a digest of the model. `config_last_good`: the daemon started with the last good configuration, as
    its file is wrong.
    """

    pull_asked = "pull_asked"
    pull_began = "pull_began"
    pull_ready = "pull_ready"
    pull_failed = "pull_failed"
    pull_cancelled = "pull_cancelled"
    pull_interrupted = "pull_interrupted"
    preflight_found = "preflight_found"
    evicted = "evicted"
    damaged = "damaged"
    quarantined = "quarantined"
    repaired = "repaired"
    refused = "refused"
    pinned = "pinned"
    unpinned = "unpinned"
    deleted = "deleted"
    rolled_back = "rolled_back"
    config_in_force = "config_in_force"
    config_refused = "config_refused"
    config_waiting = "config_waiting"
    config_last_good = "config_last_good"


@report
class Event:
    """Something that happened on this node. `model` is null if it concerns no model. A field that does not
    apply is absent.

    `who`: the name of the token that asked for it, `anonymous`, or a part of cachd: `cachd:configuration`
    (the model is listed), `cachd:repair`, `cachd:restart`, `cachd:retry` (an earlier pull failed),
    `cachd:direct`. `revision`: that of the snapshot. `before`: the damaged revision, if a repair had to take
    another one because the source changed. Of `preflight_found`, `code`, `file` and `detail` are those of the
    worst finding, and `reason` is its level. `reason`: why a snapshot was evicted, as in the label of
    cachd_evictions_total. `options`: keys of the configuration file.
    """

    id: int
    time: When
    kind: EventKind
    model: str | None
    who: Text = None
    ref: Text = None
    manifest: Text = None
    revision: Text = None
    before: Text = None
    file: Text = None
    reason: Text = None
    code: Text = None
    detail: Text = None
    size_bytes: Count = None
    fetched_bytes: Count = None
    freed_bytes: Count = None
    seconds: Annotated[float | None, LEFT_OUT] = None
    options: Annotated[Sequence[str] | None, LEFT_OUT] = None


@report
class EventPage:
    """Events in the order of their ids.

    `last`: the id to ask for what follows. `gap`: whether events before the first one may be missing, because
    the daemon restarted or keeps newer ones.
    """

    events: Sequence[Event]
    last: int
    gap: bool


@report
class StreamGap:
    """The `gap` of a stream of events: those after the id `after` and before the next one may be missing."""

    after: int


@report
class StreamEnd:
    """The `end` of a stream of events: the client read too slowly, or listened for the longest time that is
    allowed, or the daemon stops."""

    reason: EndReason


@dataclass(frozen=True, slots=True)
class _Heard:
    """How a log event becomes an event: its kind, and the key of the log for each field.

    `{state}` in the kind is the state that the log event has. `names`: the key of one name or several.
    """

    kind: str
    names: str
    fields: Mapping[str, str]


def _heard(kind: str, *same: str, names: str = "name", **other: str) -> _Heard:
    return _Heard(kind, names, {key: key for key in same} | other)


HEARD: Mapping[str, _Heard] = {
    "pull asked": _heard("pull_asked", "who", "ref"),
    "pull began": _heard("pull_began", "who", "ref"),
    "pull ended": _heard(
        *(
            "pull_{state}",
            "who",
            "ref",
            "revision",
            "code",
            "detail",
            "size_bytes",
            "fetched_bytes",
            "seconds",
        )
    ),
    "pull not resumed": _heard("pull_failed", "code", detail="reason"),
    "preflight found": _heard("preflight_found", "revision", "code", "file", "detail", reason="level"),
    "evicted": _heard("evicted", "who", "manifest", "reason", "freed_bytes", names="names", detail="why"),
    "blob damaged": _heard("damaged", names="models", file="path", detail="wrong"),
    "readiness withdrawn": _heard("quarantined", "manifest", "revision", "file", detail="reason"),
    "repaired": _heard("repaired", "manifest", "revision", "before"),
    "model refused": _heard("refused", "manifest", detail="reason"),
    "pinned": _heard("pinned", "who"),
    "unpinned": _heard("unpinned", "who"),
    "deleted": _heard("deleted", "who", "freed_bytes"),
    "rolled back": _heard("rolled_back", "who", "manifest"),
    # The reason stays in the log: it may quote paths and addresses, which only the operator may know.
    "configuration file taken over": _heard("config_in_force", "options"),
    "configuration file not taken over": _heard("config_refused", "code", "options"),
    "options of the file wait for a restart": _heard("config_waiting", "options"),
    "last good configuration in force": _heard("config_last_good", "code"),
}


class EventLog:
    """The newest `most` events. A processor of structlog. Safe from any thread; it never logs, nor raises.

    open ──close──> closed: it keeps what happens, and whoever waits shall wait no more
    """

    def __init__(self, *, most: int = MAX_EVENTS, now: Callable[[], float] = time.time) -> None:
        self._now, self._lock = now, threading.Lock()
        self._kept: deque[Event] = deque(maxlen=most)
        self._last = round(now() * 1000)
        self._waiting: dict[object, Callable[[], None]] = {}
        self.is_closed = False

    def __call__(
        self, _logger: object, _method: str, entry: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        """Keep a log event of `HEARD`, and pass on any."""
        if heard := HEARD.get(str(entry.get("event"))):
            kind = EventKind(heard.kind.format(state=entry.get("state")))
            about = {field: _plain(entry.get(key)) for field, key in heard.fields.items()}
            with self._lock:
                for name in _names(entry.get(heard.names)):
                    self._last += 1
                    event = Event(id=self._last, time=iso(self._now()), kind=kind, model=name, **about)
                    self._kept.append(event)
            self._wake()
        return entry

    def after(self, last: int | None, model: str | None = None) -> EventPage:
        """The kept events that follow the id `last`, of one model or of all (None).

        None as `last` asks for all that are kept; so does an id that this process has not given yet.
        """
        with self._lock:
            newest, first = self._last, self._last - len(self._kept) + 1
            is_known = last is None or first - 1 <= last <= newest
            skipped = 0 if last is None or not is_known else last + 1 - first
            events = list(islice(self._kept, skipped, None))
        of_model = [each for each in events if model is None or each.model == model]
        return EventPage(events=of_model, last=newest, gap=not is_known)

    @contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """In the block, `wake` is called at each event and at `close`, by any thread. It must not raise."""
        key = object()
        with self._lock:
            self._waiting[key] = wake
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[key]

    def close(self) -> None:
        """Say that the daemon stops. Nobody should wait for more events."""
        self.is_closed = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiting = list(self._waiting.values())
        for wake in waiting:
            wake()


def _names(value: object) -> list[str | None]:
    """The names of models that a log event has; one None if it has none."""
    several = value if isinstance(value, list | tuple) else [value] if value else []
    return [str(name) for name in several[:_MAX_ITEMS]] or [None]


def _plain(value: object) -> Any:
    """A value of a log event for JSON: numbers as they are, texts without control characters and bounded."""
    if isinstance(value, list | tuple):
        return [_plain(str(each)) for each in value[:_MAX_ITEMS]]
    if value is None or value == "" or isinstance(value, int | float):
        return None if value == "" else value
    return printable(str(value)[:_LONGEST_TEXT])
