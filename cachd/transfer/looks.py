"""Published models looked at: those where something changed, within a second; all of them every few minutes.

A look asks whether every file is where pods look for it, as cachd published it. It reads no model's bytes.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

import structlog

from cachd.errors import CachdError, Cancelled
from cachd.metrics import Metrics
from cachd.model import Digest, File
from cachd.store.scrub import quick_check
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.store.watch import ViewChanges
from cachd.transfer import threads
from cachd.transfer.repairs import Repairs
from cachd.transfer.streams import NICENESS

log = structlog.get_logger(__name__)

_START_SECONDS = 1.0
_TURN_SECONDS = 0.25
_REST = 2.0  # a turn is followed by a rest of so many times the processor's time that it took
_ALL_SECONDS = 300.0
_AGAIN_SECONDS = 10.0  # after a look that failed, as when no file can be opened


class Looks:
    """A thread that looks at models and lets the damaged ones be repaired."""

    def __init__(self, store: Store, repairs: Repairs, scrub_log: ScrubLog, metrics: Metrics) -> None:
        self._store, self._repairs = store, repairs
        self._scrub_log, self._metrics = scrub_log, metrics
        self.files: dict[Digest, File] = {}  # a file of each blob that there was at the last look at all
        self._all_at = 0.0
        self._told_unwatched = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="look", daemon=True)

    def start(self) -> None:
        threads.start([self._thread])

    def close(self) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def look_again(self) -> None:
        """Let the thread look at everything at its next turn."""
        self._all_at = 0.0

    def _run(self) -> None:
        os.nice(NICENESS)
        rest = _START_SECONDS  # not before the daemon answers
        while not self._stop.wait(rest):
            began = time.thread_time()
            try:
                self._turn()
            except Cancelled:
                return
            except Exception:
                log.exception("a look failed in a way it should not")
            rest = max(_TURN_SECONDS, _REST * (time.thread_time() - began))

    def _turn(self) -> None:
        changes = self._store.watch.changes()
        if changes:
            self._repair_written(changes)
        if changes.everything:
            self._all_at = 0.0
        if time.monotonic() >= self._all_at:
            self._all_at = time.monotonic() + _ALL_SECONDS
            with threads.in_brief_turns():
                self._look_at_all()
        elif changes:
            with threads.in_brief_turns():
                self._look_at_changed(changes)
        if changes:
            self._metrics.view_changes.inc()
        self._repairs.retry()
        self._tell_unwatched()

    def _look_at_changed(self, changes: ViewChanges) -> None:
        self._look(
            s.name
            for s in self._store.snapshots.all()
            if s.name in changes.names or s.manifest in changes.manifests or s.hub_folder in changes.folders
        )

    def _look_at_all(self) -> None:
        """Is everything watched and there, at its size?"""
        snapshots, content = self._store.snapshots, self._store.content
        self.files = snapshots.watch_all()
        self._scrub_log.know(self.files)
        for file in self.files.values():
            self._check_stop()
            inode = content.inode(file.blob)
            if wrong := quick_check(content.path(file.blob), file):
                self._damaged(file, wrong, inode)
        self._look(s.name for s in snapshots.all())

    def _look(self, names: Iterable[str]) -> None:
        for name in names:
            self._check_stop()
            try:
                self._repairs.look(name)
            except CachdError as error:
                self._failed(name, error)

    def _repair_written(self, changes: ViewChanges) -> None:
        """Let the blobs be repaired into which somebody wrote: what is still good of them is found then."""
        content = self._store.content
        for file in self._store.snapshots.written(changes):
            self._damaged(file, "somebody wrote into it", content.inode(file.blob))

    def _damaged(self, file: File, wrong: str, inode: int) -> None:
        try:
            self._repairs.damaged(file, wrong, inode)
        except CachdError as error:
            self._failed(file.path, error)

    def _failed(self, what: str, error: CachdError) -> None:
        log.warning("not looked at", what=what, reason=error.detail)
        self._all_at = min(self._all_at, time.monotonic() + _AGAIN_SECONDS)

    def _tell_unwatched(self) -> None:
        found = self._store.watch.watched()
        if found.unwatched and not self._told_unwatched:
            log.warning(
                "not all of the views is watched",
                directories=found.directories,
                unwatched=found.unwatched,
                reason=found.reason,
                context="what somebody deletes there shows minutes later, and what a pod opens, too",
            )
        self._told_unwatched = bool(found.unwatched)

    def _check_stop(self) -> None:
        """Raises Cancelled when the daemon stops."""
        if self._stop.is_set():
            raise Cancelled("the daemon stops")
