"""The usage log: how models were used and how fast their sources sent, for the choice of what to evict.

Access times are of no use here, because read-only mounts and `noatime` do not record them. A use is what
cachd itself notices: a model is published, requested, leased, or opened by a process. If the log is lost,
only the next choice is worse. So it is written now and then, and not after every use.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

import structlog

from cachd import files
from cachd.errors import CachdError
from cachd.kernel import durable
from cachd.policy.eviction import Use
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)

_MAX_NAMES = 10_000  # entries of each kind; the oldest are dropped first
_MAX_BYTES = 16 << 20  # of the file
_LONGEST_BASE = 1000
_OPENED_SECONDS = 3600.0  # how long the time of an open is kept
_LEAST_MEASURED_BYTES = 4 << 20
GATED, GONE = "gated", "gone"


class UsageLog:
    """What is known of names, snapshots and sources, kept across restarts. Safe from any thread.

    The log has the uses and the priority of each name, also of removed models; when each snapshot was last
    opened; the bytes per second of each scheme of sources; and the bases of refs that their source refuses or
    no longer has. All times are seconds since the epoch.
    """

    def __init__(self, layout: Layout, now: Callable[[], float] = time.time) -> None:
        self._path, self._now = layout.usage_log, now
        self._lock = threading.Lock()
        self._by_name: dict[str, Use] = {}  # the one used last stands last
        self._opened: dict[str, float] = {}
        self._newly_opened: dict[str, float] = {}
        self._asked_at = 0.0
        self._priorities: dict[str, int] = {}
        self._rates: dict[str, float] = {}
        self._lost: dict[str, str] = {}
        self._changed = False
        self._read()

    def used(self, name: str, now: float) -> None:
        """Record that the model was published, requested or leased at `now`."""
        self._asked_at = max(self._asked_at, now)
        self.seen(name, now)

    def seen(self, name: str, now: float) -> None:
        """Record that a process had a file of the model open at `now`."""
        with self._lock:
            before = self._by_name.pop(name, None)
            self._by_name[name] = before.again(now) if before else Use(now)
            if len(self._by_name) > _MAX_NAMES:
                oldest = next(iter(self._by_name))
                del self._by_name[oldest]
                self._priorities.pop(oldest, None)
            self._changed = True

    @property
    def asked_at(self) -> float:
        """When any model was last published, requested or leased, so that a process may open it soon."""
        return self._asked_at

    def opened(self, manifest: str, now: float) -> None:
        """Record that somebody opened a file of a snapshot at `now`."""
        with self._lock:
            self._opened.pop(manifest, None)
            self._opened[manifest] = self._newly_opened[manifest] = now
            _shorten(self._opened)
            self._changed = True

    def opened_at(self, manifest: str) -> float | None:
        """When somebody last opened a file of a snapshot; None when that is long ago or unknown."""
        return self._opened.get(manifest)

    def newly_opened(self) -> Mapping[str, float]:
        """The snapshots that were opened since the last call, and when."""
        with self._lock:
            found, self._newly_opened = self._newly_opened, {}
        return found

    def of(self, name: str) -> Use | None:
        """How a name was used; None when no use is known."""
        return self._by_name.get(name)

    def set_priority(self, name: str, priority: int) -> None:
        """Record the priority that the latest request for a name gave it."""
        with self._lock:
            if self._priorities.pop(name, 0) != priority:
                self._changed = True
            if priority:  # 0 is the default, and is not stored
                self._priorities[name] = priority
                _shorten(self._priorities)

    def priority(self, name: str) -> int:
        """The priority of a name; 0 when none was set."""
        return self._priorities.get(name, 0)

    def brought(self, scheme: str, size: int, seconds: float) -> None:
        """Record that a source sent `size` bytes in `seconds`. Ignored if too small to measure a rate."""
        if size < _LEAST_MEASURED_BYTES or seconds <= 0:
            return
        with self._lock:
            rate = size / seconds
            self._rates[scheme] = (self._rates.get(scheme, rate) + rate) / 2
            self._changed = True

    def rate(self, scheme: str) -> float | None:
        """Bytes a second of recent pulls from sources of this scheme; None when none was measured."""
        return self._rates.get(scheme)

    def lost(self, base: str, why: str | None) -> None:
        """Record that a source refuses a ref (GATED), no longer has it (GONE), or serves it (None)."""
        with self._lock:
            if why is None:
                self._changed |= self._lost.pop(base, None) is not None
            elif self._lost.get(base) != why and len(base) <= _LONGEST_BASE:
                self._lost.pop(base, None)
                self._lost[base] = why
                _shorten(self._lost)
                self._changed = True

    def why_lost(self, base: str) -> str | None:
        """GATED, GONE, or None when nothing is known against the source."""
        return self._lost.get(base)

    def save(self) -> None:
        """Write the log if it has changed. A failure is only logged; the next call tries again."""
        with self._lock:
            if not self._changed:
                return
            now = self._now()
            self._opened = {m: at for m, at in self._opened.items() if now - at < _OPENED_SECONDS}
            document = {
                "opened": self._opened,
                "names": {name: [use.last, use.weight] for name, use in self._by_name.items()},
                "priorities": dict(self._priorities),
                "rates": dict(self._rates),
                "lost": dict(self._lost),
            }
            self._changed = False
        try:
            with durable.disk_errors(self._path):
                durable.write_file(self._path, json.dumps(document).encode(), mode=0o600)
        except CachdError as error:
            self._changed = True
            log.info("usage log not written", reason=error.detail)

    def _read(self) -> None:
        try:
            saved: Mapping[str, Any] = durable.read_document(self._path, at_most=_MAX_BYTES)
            self._by_name = {str(n): Use(float(last), float(w)) for n, (last, w) in saved["names"].items()}
            self._opened = {str(m): float(at) for m, at in saved.get("opened", {}).items()}
            self._priorities = {str(n): int(p) for n, p in saved["priorities"].items()}
            self._rates = {str(s): float(r) for s, r in saved["rates"].items() if float(r) > 0}
            self._lost = {str(base): str(why) for base, why in saved["lost"].items()}
            for kept in (self._by_name, self._opened, self._priorities, self._lost):
                _shorten(kept)
        except FileNotFoundError:
            pass
        except files.UNREADABLE as error:
            log.warning("usage log not read: all models count as equally used", reason=repr(error))


def _shorten(kept: dict[str, Any]) -> None:
    """Drop the oldest entries if there are more than allowed."""
    for oldest in list(islice(kept, max(len(kept) - _MAX_NAMES, 0))):
        del kept[oldest]
