"""Keeps a hold file for each snapshot, `models/.holds/<id>`: a pod that has it open keeps the snapshot.

An engine closes a model's files after loading, but its pod still needs them. Blobs cannot serve for this:
several snapshots may share one, and the kernel counts opens by inode.

    make    before the snapshot is declared ready. An existing file is never replaced: a pod may have it open
    take    when the snapshot is removed, right after its ready files are hidden. The file is unlinked under
            a write lease (man 2 fcntl, "Leases"). The kernel refuses the lease while anybody has the file
            open. A pod that opens it meanwhile waits for the unlink, and then has a file that is no longer
            at the path

So a pod holds the snapshot if it has opened the file and then finds the same inode at the path.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

import structlog

from cachd.kernel import durable
from cachd.kernel.leases import is_open, unlinked_unless_open
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


class Holds:
    """The hold files of one root. Whoever changes one holds `Names.changing`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def make(self, manifest: str) -> None:
        """Make the hold file of a snapshot, durably, if there is none. Raises OSError."""
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
        """Whether a process on this node has the hold file open. False where the kernel cannot say."""
        return is_open([self._layout.hold_at(manifest)])

    def take(self, manifest: str) -> bool:
        """Unlink the hold file, so that nobody can hold the snapshot; False if somebody holds it now."""
        return unlinked_unless_open(self._layout.hold(manifest))

    def remove(self, manifest: str) -> None:
        """Unlink the hold file, even if somebody holds the snapshot."""
        durable.unlink(str(self._layout.hold(manifest)))

    def settle(self, recorded: Collection[str]) -> None:
        """At start, give exactly these snapshots a hold file. On a full disk, some may lack one."""
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
            log.warning("disk full: hold files not made", root=str(self._layout.root))
