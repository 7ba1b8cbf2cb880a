"""Keeps the specs of running pulls on disk, so that the next start of the daemon resumes them."""

from __future__ import annotations

import threading
from contextlib import suppress

from cachd.errors import CachdError, DaemonDied, error_of
from cachd.store.pending import FailedPull, PendingPull
from cachd.store.store import Store
from cachd.transfer.progress import State
from cachd.transfer.request import Pull
from cachd.transfer.running import RunningPulls

_MAX_DEATHS = 3  # after so many daemon deaths in a row during a pull, a restart no longer resumes it


class PendingSpecs:
    """The specs in pending/, one for each name. Safe from any thread.

    record ──> pending ──note_begin──> begun ──note_clean_stop──> pending
                  │                      │
                  ├────────delete────────┼──> gone
                  └─────────fail─────────┴──> failed ──record──> pending, or ──delete──> gone

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

    def fail(self, pull: Pull, state: State, error: CachdError) -> None:
        """Like `delete`, and record how the pull ended. Raises NoSpace or DiskFailed."""
        with self._lock:
            if self._running.of(pull.spec.name) is None:
                self._store.pending.fail(_failed(pull, state, error))

    def failed(self) -> list[Pull]:
        """The pulls that failed or were cancelled when the daemon last ran, the oldest first."""
        return [_restored(each) for each in self._store.pending.failed()]

    def delete(self, name: str) -> None:
        """Delete the spec of a name, unless a pull of it runs. Raises DiskFailed."""
        with self._lock:
            if self._running.of(name) is None:
                self._store.pending.forget(name)

    def delete_failure(self, name: str) -> None:
        """Delete what is recorded of a failed pull, unless a pull of its name runs. Raises DiskFailed."""
        with self._lock:
            if self._running.of(name) is None:
                self._store.pending.forget_failure(name)


def crash_loop(found: PendingPull) -> CachdError | None:
    """The error of a pull during which the daemon died too often to resume it; None if it may be resumed."""
    if found.began < _MAX_DEATHS:
        return None
    return DaemonDied(
        f"{found.spec.name}: the daemon died {found.began} times in a row during this pull",
        hint="see the daemon's log and memory limit, then ask for it again (cachd pull)",
        deaths=found.began,
    )


def _failed(pull: Pull, state: State, error: CachdError) -> FailedPull:
    """How a pull ended, as it is recorded."""
    ended = {
        "state": state.value,
        "error": error.as_document(),
        "done": pull.progress.done,
        "total": pull.progress.total,
        "began_at": pull.began_at,
        "ended_at": pull.ended_at,
        "priority": pull.priority,
        "retries": pull.retries,
    }
    return FailedPull(pull.spec, replace=pull.permit.replace, pins=pull.permit.pins, ended=ended)


def _restored(failed: FailedPull) -> Pull:
    """The pull of a record, as it ended. A figure that cannot be read is 0."""
    ended, error = failed.ended, failed.ended.get("error")
    pull = Pull(
        failed.spec,
        priority=_number(ended.get("priority")),
        replace=failed.replace,
        pins=failed.pins,
    )
    pull.retries = _number(ended.get("retries"))
    state = State.cancelled if ended.get("state") == State.cancelled else State.failed
    known = error_of(error if isinstance(error, dict) else {})
    pull.progress.restore(_number(ended.get("done")), _number(ended.get("total")))
    pull.end(state, known)
    pull.wake(known)
    pull.began_at, pull.ended_at = _time(ended.get("began_at")), _time(ended.get("ended_at"))
    return pull


def _number(value: object) -> int:
    return value if type(value) is int else 0


def _time(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
