"""Remembers the sha256 that cachd computed of blobs whose source states none.

cachd computes it while a small file or one with a git-sha1 arrives, and for other files when it next reads
the blob. On disk, the manifests of the models that have the blob record it.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from cachd.model import Digest, File


class Hashes:
    """The computed sha256 of each blob, in memory. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sha256: dict[Digest, Digest] = {}
        self._blobs: dict[Digest, Digest] = {}  # blob by sha256
        self._unrecorded: set[Digest] = set()

    def note(self, blob: Digest, sha256: Digest | None) -> None:
        """Remember the sha256 that was just computed of a blob. Does nothing for None."""
        if sha256 is None:
            return
        with self._lock:
            self._sha256[blob], self._blobs[sha256] = sha256, blob
            self._unrecorded.add(blob)

    def read(self, file: File) -> None:
        """Remember the sha256 that a manifest on disk records of a file, if it records one."""
        if file.sha256 and file.digest:
            with self._lock:
                self._sha256[file.blob], self._blobs[file.sha256] = file.sha256, file.blob

    def forget(self, blob: Digest) -> None:
        """Forget a blob, because it is damaged or removed."""
        with self._lock:
            self._unrecorded.discard(blob)
            if (sha256 := self._sha256.pop(blob, None)) and self._blobs.get(sha256) == blob:
                del self._blobs[sha256]

    def of(self, file: File) -> Digest | None:
        """The sha256 of a file's content, if it is known and the source does not state it.

        None for a file without a digest, because its source may change the content unnoticed.
        """
        if file.digest is None or file.is_named_by_content:
            return None
        return self._sha256.get(file.blob, file.sha256)

    def blob_of(self, sha256: Digest) -> Digest | None:
        """A blob with this content; None when none is known."""
        return self._blobs.get(sha256)

    def unrecorded(self) -> frozenset[Digest]:
        """The blobs whose sha256 was noted and is not on disk yet: no manifest records it."""
        with self._lock:
            return frozenset(self._unrecorded)

    def recorded(self, blobs: Collection[Digest]) -> None:
        """Note that the manifests on disk record the sha256 of these blobs now, or are about to."""
        with self._lock:
            self._unrecorded.difference_update(blobs)
