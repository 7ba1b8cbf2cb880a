"""Keeps the specs of running pulls on disk, so that the next start of the daemon resumes them."""

from __future__ import annotations

import threading
from contextlib import suppress

from cachd.errors import CachdError, DaemonDied
from cachd.store.pending import PendingPull
from cachd.store.store import Store
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls

_MAX_DEATHS = 3  # after so many daemon deaths in a row during a pull, a restart no longer resumes it


class PendingSpecs:
    """The specs in pending/, one for each name. Safe from any thread.

    record ──> pending ──note_begin──> begun ──note_clean_stop──> pending
                  │                      │
                  └────────delete────────┴──> gone

    A spec that is begun when the daemon starts counts one death of the daemon during its pull.
    """

    def __init__(self, store: Store, running: RunningPulls) -> None:
        self._store, self._running = store, running
        self._lock = threading.Lock()  # so that `delete` never deletes a newer spec of the name

    def all(self) -> list[PendingPull]:
        """The pulls that were unfinished when the daemon last ended."""
        return self._store.pending.all()

    def record(self, pull: Pull) -> None:
        """Record a pull. Raises NoSpace or DiskFailed."""
        with self._lock:
            permit = pull.permit
            self._store.pending.remember(pull.spec, replace=permit.replace, pins=permit.pins)

    def note_begin(self, pull: Pull) -> None:
        """Record that this run of the daemon began the pull, unless a newer one has its name."""
        with self._lock, suppress(CachdError):  # on a full disk the pull itself may free space
            if self._running.of(pull.spec.name) is pull:
                self._store.pending.begins(pull.spec.name)

    def note_clean_stop(self, name: str) -> None:
        """Record that the daemon did not die during the pull of this name. Raises DiskFailed."""
        self._store.pending.ends_well(name)

    def delete(self, name: str) -> None:
        """Delete the spec of a name, unless a pull of it runs. Raises DiskFailed."""
        with self._lock:
            if self._running.of(name) is None:
                self._store.pending.forget(name)


def crash_loop(found: PendingPull) -> CachdError | None:
    """The error of a pull during which the daemon died too often to resume it; None if it may be resumed."""
    if found.began < _MAX_DEATHS:
        return None
    return DaemonDied(
        f"{found.spec.name}: the daemon died {found.began} times in a row during this pull",
        hint="see the daemon's log and memory limit, then ask for it again (cachd pull)",
        deaths=found.began,
    )
