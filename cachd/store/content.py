"""Blobs: verified, immutable, named by digest."""

from __future__ import annotations

import os
import secrets
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from cachd.errors import Corrupt, Unavailable
from cachd.model import Digest, File, Manifest
from cachd.store import durable
from cachd.store.digests import of_whole
from cachd.store.ingest import Ingest
from cachd.store.layout import Layout
from cachd.store.protection import is_open

log = structlog.get_logger(__name__)


class ContentStore:
    """The blobs of one root, and the ingests on their way to become blobs."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._claims: Counter[Digest] = Counter()

    def path(self, blob: Digest) -> Path:
        return self._layout.blob(blob)

    def at(self, blob: Digest) -> str:
        """The path as text."""
        return self._layout.blob_at(blob)

    def has(self, file: File) -> bool:
        """Whether the file's blob is here, at its size."""
        try:
            return os.lstat(self.at(file.blob)).st_size == file.size
        except FileNotFoundError:
            return False

    def read(self, file: File) -> bytes:
        """The whole content of a small file's blob. Raises DiskFailed."""
        path = self.path(file.blob)
        with durable.disk_errors(path):
            return path.read_bytes()

    def missing(self, manifest: Manifest) -> list[File]:
        """One file for each blob that is not here."""
        return [f for f in {f.blob: f for f in manifest.files}.values() if not self.has(f)]

    def allocated(self, file: File) -> int:
        """Bytes of disk that an ingest of the file holds already."""
        try:
            return os.lstat(f"{self._layout.ingest_at(file.blob)}/data").st_blocks * 512
        except FileNotFoundError:
            return 0

    def begin(self, file: File) -> Ingest:
        """Begin the file's ingest, or resume the one an earlier pull left. Raises NoSpace, DiskFailed."""
        return Ingest(self._layout.ingest(file.blob), file)

    def commit(self, ingest: Ingest) -> None:
        """Publish a hashed ingest as a blob. Raises Corrupt, and discards it, when the digest is wrong."""
        file = ingest.file
        if not ingest.agrees:
            got = ingest.digest()
            ingest.discard()
            raise _corrupt(file, got)
        target = self.path(file.blob)
        data = ingest.seal()
        with durable.disk_errors(target):
            self._make_directory(file.blob)
            if file.digest is None:
                durable.write_file(_parts(target), ingest.part_lines().encode())
            durable.move(data, target)
        with suppress(Unavailable):  # an empty directory that nobody can open now does no harm
            ingest.discard()
        log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

    def put(self, file: File, content: memoryview) -> None:
        """Publish the whole content of a file with a digest as a blob. Raises Corrupt, NoSpace or DiskFailed.

        Nothing is written before it is verified, and what a crash leaves the next start removes: no ingest.
        """
        if file.digest is None:
            raise ValueError(f"{file.path}: only a digest can vouch for bytes that come without parts")
        if (got := of_whole(file.digest, content)) != file.digest:
            raise _corrupt(file, got)
        target, staged = self.at(file.blob), self._layout.staged_blob_at(file.blob)
        with durable.disk_errors(target):
            try:
                durable.write_sealed(staged, content)
                try:
                    durable.move(staged, target)
                except FileNotFoundError:
                    self._make_directory(file.blob)
                    durable.move(staged, target)
            except BaseException:
                durable.unlink(staged)
                raise
        log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

    def _make_directory(self, blob: Digest) -> None:
        """Make the directory of an algorithm's blobs when the first of them comes."""
        self.path(blob).parent.mkdir(mode=0o700, exist_ok=True)

    def sync(self, blobs: Iterable[Digest]) -> None:
        """Make the names of committed blobs durable."""
        for directory in {self.path(blob).parent for blob in {b.algorithm: b for b in blobs}.values()}:
            with durable.disk_errors(directory):
                durable.sync_directory(directory)
        with durable.disk_errors(self._layout.blobs):
            durable.sync_directory(self._layout.blobs)

    @contextmanager
    def claim(self, manifest: Manifest) -> Iterator[None]:
        """Keep the manifest's blobs while a pull needs them, linked or not."""
        blobs = {f.blob for f in manifest.files}
        with self._lock:
            self._claims.update(blobs)
        try:
            yield
        finally:
            with self._lock:
                self._claims.subtract(blobs)
                self._claims = +self._claims

    def claimed(self) -> set[Digest]:
        """The blobs that running pulls need."""
        with self._lock:
            return set(self._claims)

    def sizes(self, manifest: Manifest) -> dict[Digest, int]:
        """Bytes of disk that each blob of a manifest takes; those that are gone are left out."""
        found = {}
        for blob in {f.blob for f in manifest.files}:
            with suppress(FileNotFoundError):
                found[blob] = _allocated(self.path(blob)) + self._parts_allocated(blob)
        return found

    def free(self, manifest: Manifest) -> int:
        """Remove the manifest's blobs that no view links to and no pull claims, and what interrupted pulls
        left of them; bytes of disk freed."""
        return self.empty(self.discard(manifest))

    def discard(self, manifest: Manifest) -> dict[Path, int]:
        """Move what `free` removes to the trash, which takes no time; the bytes of disk of each piece there,
        for `empty`."""
        moved: dict[Path, int] = {}
        for file in {f.blob: f for f in manifest.files}.values():
            path, trash = self.path(file.blob), self._layout.trash / f"{file.blob.hex}.{secrets.token_hex(4)}"
            with durable.disk_errors(path), suppress(FileNotFoundError):
                with self._lock:  # a claim made from here on finds the blob gone
                    if file.blob in self._claims:
                        continue
                    self._discard_ingest(file, trash.with_suffix(".ingest"), moved)
                    if os.lstat(path).st_nlink > 1:
                        continue
                    size = _allocated(path) + self._parts_allocated(file.blob)
                    durable.take_away(path, trash)
                moved[trash] = size
                durable.remove(_parts(path))
                durable.sync_directory(path.parent)
        return moved

    def _parts_allocated(self, blob: Digest) -> int:
        with suppress(FileNotFoundError):
            return _allocated(_parts(self.path(blob)))
        return 0

    def _discard_ingest(self, file: File, trash: Path, moved: dict[Path, int]) -> None:
        """Move what an interrupted pull left out of the way."""
        size = self.allocated(file)
        with suppress(FileNotFoundError):
            durable.take_away(self._layout.ingest(file.blob), trash)
            moved[trash] = size

    def empty(self, moved: Mapping[Path, int]) -> int:
        """Delete pieces of the trash, to be called with no lock held: large files take long. Bytes freed.

        A file that a process has open stays until it has not, so that its bytes are told for as long as
        they are taken.
        """
        freed = 0
        for path, size in moved.items():
            with durable.disk_errors(path):
                if path.is_dir() and not path.is_symlink():
                    durable.remove_tree(path)
                elif durable.is_regular(path) and is_open([path]):
                    log.info("deleted and still open", file=path.name, held_bytes=size)
                    continue
                else:
                    durable.remove(path)
            freed += size
        return freed

    def empty_trash(self) -> None:
        """Delete what an earlier life, or a file that was still open, left in the trash."""
        self.empty(dict.fromkeys(self._layout.trash.iterdir(), 0))


def _corrupt(file: File, got: Digest | None) -> Corrupt:
    return Corrupt(
        f"{file.path}: expected {file.digest}, got {got} ({file.size} bytes from {file.origin})",
        mend="nothing was published; if it happens again the source or the way to it is damaged",
        file=file.path,
        expected=str(file.digest),
        got=str(got),
    )


def _allocated(path: Path) -> int:
    """Bytes of disk."""
    return os.lstat(path).st_blocks * 512


def _parts(blob: Path) -> Path:
    """Where the hashes of its parts stand, of a blob whose source published no digest."""
    return blob.with_name(blob.name + ".parts")
