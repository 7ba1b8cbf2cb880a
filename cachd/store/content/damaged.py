"""Keeps damaged blobs for their repair, which reuses their intact parts.

damaged/<algorithm>-<hex>           the blob as it was found
damaged/<algorithm>-<hex>.parts     its part hashes, if it has any
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cachd.kernel import durable
from cachd.model import Digest
from cachd.store.content.blobs import Blobs, blocks_of
from cachd.store.ingest.part_lines import parts_of


class DamagedBlobs:
    """The damaged blobs of one root. Methods raise Unavailable or DiskFailed."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs, self._layout = blobs, blobs.layout
        self._names = {path.name for path in self._layout.damaged_blobs.iterdir()}  # each download asks

    def keep(self, blob: Digest, inode: int) -> None:
        """Move a damaged blob to damaged/. Does nothing if its file has another inode by now."""
        path, damaged = self._blobs.path(blob), self.path(blob)
        with durable.disk_errors(path), suppress(FileNotFoundError):
            if os.lstat(path).st_ino != inode:
                return
            if path.is_dir() and not path.is_symlink():
                durable.remove_tree(path)
                return
            with suppress(FileNotFoundError):
                # Part hashes first: a part-hash file without its blob is removed as a leftover.
                durable.move(parts_of(path), parts_of(damaged))
            self._names.add(damaged.name)
            self._blobs.hashes.forget(blob)
            durable.move(path, damaged)
            durable.sync_directory(path.parent)

    def has(self, blob: Digest) -> bool:
        """Whether a damaged copy of the blob is kept."""
        return f"{blob.algorithm}-{blob.hex}" in self._names

    def path(self, blob: Digest) -> Path:
        """Where a damaged copy of the blob is kept."""
        return self._layout.damaged(blob)

    def forget(self, blob: Digest) -> int:
        """Delete the damaged copy, if there is one. Returns the bytes of disk freed."""
        if not self.has(blob):
            return 0
        damaged = self.path(blob)
        with durable.disk_errors(damaged):
            size = blocks_of(damaged)
            for path in (damaged, parts_of(damaged)):
                durable.remove(path)
        self._names.discard(damaged.name)
        return size
