"""The sha256 of blobs whose sources state another digest, or none, as far as cachd has computed it.

They are computed as small files arrive, and else when a blob is read again; they are kept in the recorded
manifests of the models that have the blobs.
"""

from __future__ import annotations

import threading
from collections.abc import Collection

from cachd.model import Digest, File


class Hashes:
    """What is known. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sha256: dict[Digest, Digest] = {}
        self._blobs: dict[Digest, Digest] = {}  # the other way round
        self._unrecorded: set[Digest] = set()

    def note(self, blob: Digest, sha256: Digest | None) -> None:
        """A blob was found to have this content, if that was found out."""
        if sha256 is None:
            return
        with self._lock:
            self._sha256[blob], self._blobs[sha256] = sha256, blob
            self._unrecorded.add(blob)

    def read(self, file: File) -> None:
        """A recorded manifest says so."""
        if file.sha256 and file.digest:
            with self._lock:
                self._sha256[file.blob], self._blobs[file.sha256] = file.sha256, file.blob

    def forget(self, blob: Digest) -> None:
        """The blob is damaged, or gone."""
        with self._lock:
            self._unrecorded.discard(blob)
            if (sha256 := self._sha256.pop(blob, None)) and self._blobs.get(sha256) == blob:
                del self._blobs[sha256]

    def of(self, file: File) -> Digest | None:
        """What the content of a file is known to hash to, where its source does not say so itself.

        Nothing of a file without a digest: its source may change it and say nothing.
        """
        if file.digest is None or file.is_named_by_content:
            return None
        return self._sha256.get(file.blob, file.sha256)

    def blob_of(self, sha256: Digest) -> Digest | None:
        """A blob that has this content."""
        return self._blobs.get(sha256)

    def unrecorded(self) -> frozenset[Digest]:
        """The blobs noted since they were last `recorded`."""
        with self._lock:
            return frozenset(self._unrecorded)

    def recorded(self, blobs: Collection[Digest]) -> None:
        with self._lock:
            self._unrecorded.difference_update(blobs)
