"""Removes blobs and ingests that no view, pull or name needs."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from cachd.kernel import durable
from cachd.model import Digest, Manifest
from cachd.store.content.blobs import Blobs, blocks_of, freed_by
from cachd.store.content.claims import Claims
from cachd.store.content.damaged import DamagedBlobs
from cachd.store.content.owners import Owners
from cachd.store.content.trash import Trash
from cachd.store.ingest.offer import end_attempt
from cachd.store.ingest.part_lines import parts_of


class Removal:
    """Removes what belongs to the blobs of one root. Methods raise Unavailable or DiskFailed.

        here --discard--> in the trash --Trash.empty--> gone

    `free`, `drop` and `drop_ingest` do both steps.
    """

    def __init__(
        self, blobs: Blobs, claims: Claims, owners: Owners, damaged: DamagedBlobs, trash: Trash
    ) -> None:
        self._blobs, self._claims, self._owners, self._damaged = blobs, claims, owners, damaged
        self._trash = trash

    def free(self, manifest: Manifest, names: Collection[str] = ()) -> int:
        """Remove the manifest's blobs with their ingests and damaged copies. Returns the bytes of disk freed.

        A blob stays while a view links to it or a pull claims it. An ingest and a damaged copy stay while a
        pull claims the blob or a name that is not in `names` owns the ingest.
        """
        return self._trash.empty(self.discard(manifest, names))

    def discard(self, manifest: Manifest, names: Collection[str] = ()) -> dict[Path, int]:
        """Like `free`, but only moves blobs and ingests to the trash, which is quick for any size.

        Returns the bytes of disk of each trash entry; the caller passes them to `Trash.empty`.
        """
        trashed: dict[Path, int] = {}
        for blob, size in {(f.blob, f.size) for f in manifest.files}:
            self._discard_ingest(blob, self._blobs.layout.ingest(blob, size), trashed, names)
            self._discard_blob(blob, trashed)
        return trashed

    def drop(self, blob: Digest) -> int:
        """Remove a blob unless a view links to it or a pull claims it. Returns the bytes of disk freed."""
        trashed: dict[Path, int] = {}
        self._discard_blob(blob, trashed)
        return self._trash.empty(trashed)

    def drop_ingest(self, blob: Digest) -> int:
        """Remove a blob's ingests that no waiting or running pull may resume. Returns the bytes freed."""
        trashed: dict[Path, int] = {}
        for ingest in self._blobs.layout.ingests_of(blob):
            if not self._owners.is_expected(blob, ingest):
                self._discard_ingest(blob, ingest, trashed, self._owners.names(ingest))
        return self._trash.empty(trashed)

    def is_free(self, blob: Digest) -> bool:
        """Whether `drop` would remove the blob: no view links to it and no pull claims it."""
        try:
            return os.lstat(self._blobs.path(blob)).st_nlink == 1 and not self._claims.is_claimed(blob)
        except FileNotFoundError:
            return False

    def _discard_blob(self, blob: Digest, trashed: dict[Path, int]) -> None:
        path, trash = self._blobs.path(blob), self._trash.new_path(blob)
        with durable.disk_errors(path), suppress(FileNotFoundError):
            with self._claims.paused() as claimed:
                if blob in claimed or os.lstat(path).st_nlink > 1:
                    return
                size = blocks_of(path) + blocks_of(parts_of(path))
                durable.remove(parts_of(path))
                durable.take_away(path, trash)  # point of no return
            trashed[trash] = size
            self._blobs.forget(blob)
            durable.sync_directory(path.parent)

    def _discard_ingest(
        self, blob: Digest, directory: Path, trashed: dict[Path, int], names: Collection[str]
    ) -> None:
        """Move an ingest to the trash and delete the damaged copy of its blob, if it was the last ingest.

        Does neither while a pull claims the blob or a name not in `names` owns the ingest.
        """
        trash = self._trash.new_path(blob)
        with durable.disk_errors(directory), self._claims.paused() as claimed:
            has_no_owner = self._owners.remove(directory, names)
            if blob in claimed or not has_no_owner:
                return
            size = freed_by(directory)
            path = self._blobs.path(blob)
            if not path.exists():
                durable.remove(parts_of(path))  # left by a commit that a crash interrupted
            end_attempt(directory)  # first: on a full disk the rest goes file by file
            with suppress(FileNotFoundError):
                durable.take_away(directory, trash)  # point of no return
                trashed[trash] = size
        if self._damaged.has(blob) and not self._blobs.layout.ingests_of(blob):
            self._damaged.forget(blob)
