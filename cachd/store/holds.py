"""The files that pods keep open for as long as they need a snapshot: `models/.holds/<id>`.

Each snapshot has one, an inode of its own: blobs are shared, and the kernel counts opens by inode. An engine
closes a model's files after loading; what its pod holds stays in use.

    made     before the snapshot is declared ready; never replaced while it is there: a new file is not held
    taken    when the snapshot goes, and before anything else of it does. It is unlinked under a write lease:
             whoever has it open refuses us the lease, whoever opens it meanwhile waits for us and then has
             a file that is at its path no more

So a pod that opens the file, and then finds the very same file at its path, holds the snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

import structlog

from cachd.store import durable
from cachd.store.layout import Layout
from cachd.store.protection import is_open, unlinked_unless_open

log = structlog.get_logger(__name__)


class Holds:
    """The hold files of one root. Changed under the lock of Snapshots."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def make(self, manifest: str) -> None:
        """Let pods hold a snapshot from here on, across crashes. Raises OSError."""
        if os.path.lexists(self._layout.hold(manifest)):
            return
        staged = f"{self._layout.staging}/{manifest}.hold"
        durable.unlink(staged)
        try:
            durable.write_sealed(staged, memoryview(b""))
            durable.move(staged, self._layout.hold(manifest))
        except BaseException:
            durable.unlink(staged)
            raise
        durable.sync_directory(self._layout.holds)

    def is_held(self, manifest: str) -> bool:
        """Whether a process on this node has the file open. False where the kernel does not tell."""
        return is_open([self._layout.hold(manifest)])

    def take(self, manifest: str) -> bool:
        """Let nobody hold the snapshot any more; False, and nothing is changed, when somebody does."""
        return unlinked_unless_open(self._layout.hold(manifest))

    def remove(self, manifest: str) -> None:
        """Let nobody hold the snapshot any more, whoever does now."""
        durable.unlink(str(self._layout.hold(manifest)))

    def settle(self, recorded: Collection[str]) -> None:
        """Let exactly these snapshots have one. A full disk is no reason not to start."""
        found = set(os.listdir(self._layout.holds))
        for foreign in found.difference(recorded):
            with suppress(IsADirectoryError):
                durable.unlink(str(self._layout.holds / foreign))
        try:
            for manifest in sorted(set(recorded) - found):
                self.make(manifest)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room to let pods hold a snapshot", root=str(self._layout.root))
