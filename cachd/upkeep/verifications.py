"""Verifies models on request, by reading and hashing all their files at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import structlog

from cachd.errors import CachdError, NotFound, Unavailable
from cachd.kernel import threads
from cachd.store.catalog import iso
from cachd.store.store import Store
from cachd.transfer.streams import NICENESS
from cachd.upkeep.blob_checks import BlobChecks
from cachd.upkeep.jobs import Job, Jobs, JobState
from cachd.upkeep.repairs import Repairs

log = structlog.get_logger(__name__)

_AT_ONCE = 2  # models verified at the same time


class Verification(Job):
    """One requested verification of a model. It ends intact or damaged."""

    unexpected = "a verification failed in a way it should not"

    def __init__(self, name: str, total: int, *, now: Callable[[], float] = time.time) -> None:
        super().__init__(name, total)
        self._now = now
        self.damaged: list[tuple[str, str]] = []  # (path, what is wrong)
        self.began_at, self.ended_at = now(), 0.0

    def took(self, count: int) -> None:
        """Count bytes as read."""
        with self._lock:
            self.done = min(self.done + count, self.total)  # copies in the views are read, too

    def found(self, path: str, wrong: str) -> None:
        """Note what is wrong with a file; the path is empty for the model as a whole."""
        with self._lock:
            self.damaged.append((path, wrong))

    def end(self, state: JobState, error: CachdError | None = None) -> None:
        """Set the final state and the time."""
        self.ended_at = self._now()
        super().end(state, error)

    def as_document(self) -> dict[str, object]:
        """The verification as the API shows it."""
        return super().as_document() | {
            "damaged": [{"path": path, "wrong": wrong} for path, wrong in sorted(self.damaged)],
            "began_at": iso(self.began_at),
            "ended_at": iso(self.ended_at) if self.ended_at else None,
        }


class Verifications:
    """Verifies two models at a time. `rest` raises Cancelled when the daemon is stopping."""

    def __init__(self, store: Store, repairs: Repairs, blobs: BlobChecks, rest: Callable[[], None]) -> None:
        self._store, self._repairs, self._blobs, self._rest = store, repairs, blobs, rest
        self._jobs = Jobs[Verification](threads.pool(_AT_ONCE, "verify", lambda: os.nice(NICENESS)))

    def start(self, name: str) -> Verification:
        """Start or join the verification of a ready model. Raises NotFound; Unavailable during a repair."""
        names = self._store.names
        if names.get(name) is None and (damage := names.quarantine_of(name)):
            detail = f"{name} is damaged ({damage.reason}) and is being repaired"
            raise Unavailable(detail, code="damaged", retry_after=5.0)
        snapshot = names.ready(name)
        return self._jobs.start(Verification(name, snapshot.size), self._verify)

    def last(self, name: str) -> Verification | None:
        """The last verification of a name since the daemon started."""
        return self._jobs.last(name)

    def close(self) -> None:
        """Drop the queued ones and wait for the running ones, after `rest` has begun to raise."""
        self._jobs.close()

    def _verify(self, running: Verification) -> None:
        running.run(lambda: self._check_model(running))
        log.info("verified", name=running.name, state=running.state, size_bytes=running.done)

    def _check_model(self, running: Verification) -> JobState:
        if wrong := self._repairs.check(running.name):
            running.found("", wrong)
        else:
            self._check_files(running)
        return JobState.damaged if running.damaged else JobState.intact

    def _check_files(self, running: Verification) -> None:
        snapshot = self._store.names.get(running.name)
        if snapshot is None:
            raise NotFound(f"{running.name} is no longer here")
        files = {f.blob: f for f in self._store.manifests.of(snapshot).files}.values()

        def took(count: int) -> None:
            running.took(count)
            self._rest()

        for file in files:
            if wrong := self._blobs.check(file, took):
                running.found(file.path, wrong)
        self._blobs.record_hashes()
