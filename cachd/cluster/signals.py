"""Keeps this node's object in Kubernetes up to date with its models.

One thread reads the states of the models every few seconds. If something changed, or a check is due, it reads
the node's object and writes what differs:

    up to date ──(models changed, check due)──> due ──(settled, permitted)──> read ──> written ──> up to date
                                                 ^                              │         │
                                                 └──────(backoff)──────(a call failed)────┘

There is no queue: each write says what is true then. While the API server is away or slow, only this thread
waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

import structlog

from cachd.cluster.api_server import CODE, ApiServer, Patch
from cachd.cluster.labels import labels
from cachd.cluster.node import Observed, Wanted, condition, writes
from cachd.cluster.node_events import NAMESPACE, NodeEvents, Series
from cachd.cluster.pace import Bucket, Pace
from cachd.errors import CachdError, Unavailable
from cachd.kernel.periodic import Periodic
from cachd.metrics import Metrics, Signal
from cachd.policy import backoff
from cachd.report.events import EventLog
from cachd.report.values import ModelState
from cachd.store.catalog import iso

log = structlog.get_logger(__name__)

_GONE, _EXISTS = (404, 410), 409
_REASONS = {401: "forbidden", 403: "forbidden", 409: "conflict", 422: "conflict", 429: "limited"}


@dataclass(frozen=True, slots=True)
class Switches:
    """Which signals are on, and for which node. `taint`: the key of the taint to remove; None: leave all."""

    node: str
    labels: bool = False
    max_labels: int = 0
    condition: bool = False
    events: bool = False
    taint: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """The models of this node: the state of each, and the names of the required ones.

    `is_configuration_right`: whether the configuration file was valid when it was last read.
    """

    states: Mapping[str, ModelState]
    required: frozenset[str]
    is_configuration_right: bool


@dataclass(frozen=True, slots=True)
class Watched:
    """The sources of the signals. `current` returns the present states of the models."""

    current: Callable[[], Seen]
    events: EventLog


class NodeSignals:
    """The thread that writes the signals. Any thread may ask `are_written`, and `close` it.

    `monotonic` and `now`: seconds of a clock that is never set, and since the epoch.
    """

    def __init__(
        self,
        switches: Switches,
        server: ApiServer,
        watched: Watched,
        metrics: Metrics,
        *,
        pace: Pace | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._switches, self._server, self._watched = switches, server, watched
        self._metrics, self._pace, self._monotonic, self._now = metrics, pace or Pace(), monotonic, now
        self._path = f"/api/v1/nodes/{quote(switches.node, safe='')}"
        began, burst = monotonic(), self._pace.burst
        self._writes = Bucket(self._pace.each, burst, began)
        self._event_writes = Bucket(self._pace.each, 2 * burst, began)
        self._node_events = NodeEvents(self._pace.series)
        self._last_event: int | None = None
        self._labels: Mapping[str, str] = {}
        self._written: Wanted | None = None  # what the node's object said when all of it was last written
        self._uid = ""
        self._due_at: float | None = None  # when to read and write; None: nothing changed
        self._check_at = self._not_before = began
        self._failures, self._failure = 0, ""
        self._thread = Periodic("node-signals", self._tick)

    @property
    def are_written(self) -> bool:
        """Whether the last comparison found nothing left to write, and the last call succeeded."""
        return self._due_at is None and self._written is not None and not self._failures

    def start(self) -> None:
        """Start the thread. Raises Unavailable."""
        self._thread.start()

    def close(self) -> None:
        """End the thread and the call that it makes. The node's object stays as it is."""
        self._thread.stop()
        self._server.close()
        self._thread.close()

    def _tick(self) -> float:
        wanted, now = self._wanted(), self._monotonic()
        if self._due_at is None and wanted != self._written:
            self._due_at = now + self._pace.chance() * self._pace.settle
        elif self._due_at is None and now >= self._check_at:
            self._due_at = now
        if self._switches.events:
            self._note_events()
        if now >= self._not_before:
            try:
                if self._due_at is not None and now >= self._due_at and self._writes.has(now):
                    self._write(wanted, now)
                self._write_events(now)
            except CachdError as error:
                if not self._thread.is_stopping:  # a stop ends the call that runs
                    self._failed(error)
        return self._pace.interval

    def _wanted(self) -> Wanted:
        switches, seen = self._switches, self._watched.current()
        if switches.labels:
            most = switches.max_labels
            self._labels = labels(seen.states, seen.required, at_most=most, before=self._labels)
        ready = {name: seen.states.get(name) is ModelState.ready for name in seen.required}
        found = condition(ready, is_configuration_right=seen.is_configuration_right)
        return Wanted(
            labels=self._labels if switches.labels else None,
            condition=found if switches.condition else None,
            taint=switches.taint if found.status == "True" else None,
        )

    def _write(self, wanted: Wanted, now: float) -> None:
        """Write what differs. If a call fails, the others are made all the same. Raises Unavailable."""
        try:
            node = Observed.parse(self._server.get(self._path))
        except ValueError as error:
            raise Unavailable(f"the Kubernetes API: {error}", code=CODE) from error
        self._uid = node.uid
        failures = []
        changes = list(writes(node, wanted, iso(int(self._now()))))
        for each in changes:
            try:
                self._server.patch(self._path + each.path, each.kind, each.body)
                self._metrics.signal_writes.labels(each.signal.value).inc()
                log.info("node signal written", signal=each.signal.value)
            except CachdError as error:
                failures.append(error)
        if changes:
            self._writes.take(now)
        if failures:
            raise failures[0]
        self._written, self._due_at = wanted, None
        self._check_at = now + self._pace.check * (1 - self._pace.chance() / 3)
        self._succeeded()

    def _note_events(self) -> None:
        page = self._watched.events.after(self._last_event)
        self._last_event = page.last
        for each in page.events:
            self._node_events.note(each, self._now())

    def _write_events(self, now: float) -> None:
        """Write the events that wait and are permitted. Raises Unavailable."""
        while self._uid and (event := self._node_events.next()) and self._event_writes.has(now):
            self._event_writes.take(now)
            self._write_event(event)
            self._metrics.signal_writes.labels(Signal.event.value).inc()
            self._succeeded()

    def _write_event(self, event: Series) -> None:
        node, path = self._switches.node, f"/api/v1/namespaces/{NAMESPACE}/events"
        try:
            if event.is_written:
                self._server.patch(f"{path}/{event.name_for(node)}", Patch.strategic, event.as_counted())
            else:
                self._server.create(path, event.as_created(node, self._uid))
        except CachdError as error:
            if event.is_written and error.origin_status in _GONE:
                self._node_events.vanished(event)
                return
            if event.is_written or error.origin_status != _EXISTS:  # else an earlier try has made it
                raise
        self._node_events.written(event)

    def _succeeded(self) -> None:
        if self._failures:
            log.info("the Kubernetes API takes the node's signals again")
        self._failures, self._failure = 0, ""

    def _failed(self, error: CachdError) -> None:
        self._failures += 1
        reason, chance = _reason(error), self._pace.chance()
        self._metrics.signal_failures.labels(reason).inc()
        if error.detail != self._failure:
            log.warning(
                "node signals not written", reason=error.detail, hint=error.hint, **dict(error.withheld)
            )
        self._failure = error.detail
        if reason == "forbidden":  # only an operator can change that
            seconds = backoff.before_retry(self._failures, chance=chance)
        else:
            asked = error.retry_after if isinstance(error, Unavailable) else None
            seconds = backoff.delay(self._failures, requested=asked, chance=chance)
        self._not_before = self._monotonic() + seconds


def _reason(error: CachdError) -> str:
    """The label `reason` of the metric."""
    if error.origin_status is None:
        return "unreachable"
    return _REASONS.get(error.origin_status, "refused")
