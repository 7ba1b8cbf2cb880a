"""Checks that the files of published models are in place: at once after a change, and all every 5 minutes.

A check verifies that every file is where pods look for it, as cachd published it. It does not read the
files' bytes; scrubs.py does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

import structlog

from cachd.errors import CachdError
from cachd.kernel import threads
from cachd.kernel.periodic import Periodic
from cachd.metrics import Metrics
from cachd.model import Digest, File
from cachd.store.scrub import quick_check
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.store.watch import ViewChanges
from cachd.transfer.streams import NICENESS
from cachd.upkeep.repairs import Repairs

log = structlog.get_logger(__name__)

_START_SECONDS = 1.0
_TICK_SECONDS = 0.25
_REST = 2.0  # the thread rests for this many times the CPU time that a check took
_ALL_SECONDS = 300.0
_AGAIN_SECONDS = 10.0  # after a check that failed, for example because no file can be opened


class PresenceChecks:
    """A thread that checks models and starts the repair of damaged ones."""

    def __init__(
        self,
        store: Store,
        repairs: Repairs,
        scrub_log: ScrubLog,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._repairs = store, repairs
        self._scrub_log, self._metrics, self._clock = scrub_log, metrics, clock
        self.files: dict[Digest, File] = {}  # one file for each blob that existed at the last check of all
        self._all_at = 0.0
        self._warned_unwatched = False
        self._thread = Periodic("presence", self._run, prepare=lambda: os.nice(NICENESS))

    def start(self) -> None:
        """Start the thread. It lets the daemon answer requests first."""
        self._thread.start(after=_START_SECONDS)

    def close(self) -> None:
        """Join the thread."""
        self._thread.close()

    def check_all_soon(self) -> None:
        """Have the thread check all models next time."""
        self._all_at = 0.0

    def _run(self) -> float:
        began = time.thread_time()
        self._check()
        return max(_TICK_SECONDS, _REST * (time.thread_time() - began))

    def _check(self) -> None:
        changes = self._store.watch.changes()
        if changes:
            self._repair_written(changes)
        if changes.everything:
            self._all_at = 0.0
        if self._clock() >= self._all_at:
            self._all_at = self._clock() + _ALL_SECONDS
            with threads.in_brief_turns():
                self._check_all()
        elif changes:
            with threads.in_brief_turns():
                self._check_changed(changes)
        if changes:
            self._metrics.view_changes.inc()
        self._repairs.retry()
        self._warn_unwatched()

    def _check_changed(self, changes: ViewChanges) -> None:
        self._check_models(
            s.name
            for s in self._store.names.all()
            if s.name in changes.names or s.manifest in changes.manifests or s.hub_folder in changes.folders
        )

    def _check_all(self) -> None:
        """Watch all directories of the views, and check every blob's size and every model."""
        content = self._store.content
        self.files = self._store.watch_all()
        self._scrub_log.know(self.files)
        for file in self.files.values():
            self._thread.rest()
            inode = content.inode(file.blob)
            if wrong := quick_check(content.path(file.blob), file):
                self._damaged(file, wrong, inode)
        self._check_models(s.name for s in self._store.names.all())

    def _check_models(self, names: Iterable[str]) -> None:
        for name in names:
            self._thread.rest()
            try:
                self._repairs.check(name)
            except CachdError as error:
                self._failed(name, error)

    def _repair_written(self, changes: ViewChanges) -> None:
        """Start the repair of blobs into which somebody wrote. It keeps the parts that are still good."""
        content, manifests = self._store.content, self._store.manifests
        among = None if changes.blobs else {manifest for manifest, _, _ in changes.written}
        for file in changes.files_written(manifests.readable(among), self._store.copies.all_places()):
            self._damaged(file, "somebody wrote into it", content.inode(file.blob))

    def _damaged(self, file: File, wrong: str, inode: int) -> None:
        try:
            self._repairs.repair_blob(file, wrong, inode)
        except CachdError as error:
            self._failed(file.path, error)

    def _failed(self, what: str, error: CachdError) -> None:
        log.warning("check failed", what=what, reason=error.detail)
        self._all_at = min(self._all_at, self._clock() + _AGAIN_SECONDS)

    def _warn_unwatched(self) -> None:
        found = self._store.watch.watched()
        if found.unwatched and not self._warned_unwatched:
            log.warning(
                "some directories of the views are not watched",
                directories=found.directories,
                unwatched=found.unwatched,
                reason=found.reason,
                effect="deletions and opens there are noticed only minutes later",
            )
        self._warned_unwatched = bool(found.unwatched)
