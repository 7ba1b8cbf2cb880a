"""Turns verified bytes into blobs: by an ingest, or by one write for a small file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

import structlog

from cachd import files
from cachd.errors import Leased, Unavailable
from cachd.kernel import durable
from cachd.model import Digest, File, Manifest
from cachd.store.content.blobs import Blobs, blocks_of
from cachd.store.content.claims import Claims
from cachd.store.content.damaged import DamagedBlobs
from cachd.store.content.offers import Offers
from cachd.store.content.owners import Owners
from cachd.store.content.removal import Removal
from cachd.store.content.trash import Trash
from cachd.store.digests import NO_SHA256, corrupt, digest_of
from cachd.store.ingest import Ingest
from cachd.store.ingest.part_lines import parts_of
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


class ContentStore(Blobs):
    """The blobs of one cache root, and the ingests (partial downloads) that become blobs.

    `claims`, `owners`: which pulls need a blob or may resume its ingest. `damaged`: blobs with wrong bytes.
    `removal`, `trash`: remove what nobody needs. `offers`: synced bytes for readers who do not wait.
    `check`: raises InUse if this process may no longer write.
    """

    def __init__(
        self, layout: Layout, *, trusts_claims: bool = False, check: Callable[[], object] = lambda: None
    ) -> None:
        super().__init__(layout, trusts_claims=trusts_claims)
        self._check = check
        self._log = log.bind()  # once, because each small file would bind it
        self.claims = Claims()
        self.owners = Owners(self.claims)
        self.damaged = DamagedBlobs(self)
        self.trash = Trash(layout)
        self.offers = Offers(layout)
        self.removal = Removal(self, self.claims, self.owners, self.damaged, self.trash)

    @contextmanager
    def claim(self, manifest: Manifest, name: str = "") -> Iterator[None]:
        """Inside, the manifest's blobs are kept for the pull of `name`, even if no view links to them.

        From then on, `name` also owns the ingests of these blobs that earlier pulls left.
        """
        blobs = {f.blob for f in manifest.files}
        with self.claims.claimed(blobs, name):
            begun = self.begun(manifest.files)
            for file in manifest.files if begun else ():
                if file.blob in begun:
                    self.owners.add(self.layout.ingest(file.blob, file.size), {name})
            with self.proven.during_pull():
                yield

    # --- by an ingest ---

    def is_begun(self, file: File) -> bool:
        """Whether the file has an ingest on disk."""
        return os.access(self.layout.ingest_at(file.blob, file.size), os.F_OK)

    def begun(self, files: Iterable[File]) -> set[Digest]:
        """The blobs of these files that have an ingest on disk, from one listing of its directory."""
        if not (names := set(os.listdir(self.layout.ingests))):
            return set()
        return {f.blob for f in files if os.path.basename(self.layout.ingest_at(f.blob, f.size)) in names}

    def allocated(self, file: File) -> int:
        """Bytes of disk that the file's ingest occupies; 0 when it has none."""
        return blocks_of(f"{self.layout.ingest_at(file.blob, file.size)}/data")

    def begin(self, file: File, check: Callable[[], None] = lambda: None) -> Ingest:
        """Begin the file's ingest, or resume the one that an earlier pull left behind.

        If a damaged copy of the blob is kept, its intact parts are copied into the ingest. `check` is called
        while existing bytes are read back; it may raise Cancelled. Raises NoSpace, DiskFailed or Unavailable.
        """
        ingest = Ingest(self.layout.ingest(file.blob, file.size), file, check, self.offers.of(file))
        self.owners.add(ingest.directory, self.claims.names(file.blob))
        damaged = self.damaged.path(file.blob)
        if self.damaged.has(file.blob) and files.is_regular(damaged):
            try:
                with durable.disk_errors(damaged), suppress(FileNotFoundError):  # not needed any more
                    ingest.salvage(damaged)
                log.info(
                    "intact parts of the damaged blob reused",
                    path=file.path,
                    resumed_bytes=ingest.resumed,
                    of=file.size,
                )
            except Leased as error:
                log.warning("damaged blob not reused", path=file.path, reason=error.detail)
            except BaseException:
                ingest.close()
                raise
        return ingest

    def commit(self, ingest: Ingest) -> None:
        """Make a hashed ingest a blob. When its digest is wrong, discards the ingest and raises Corrupt.

        A blob that is here already stays, because views link to it. Raises NoSpace, DiskFailed, Unavailable.
        """
        file = ingest.file
        if not ingest.agrees:
            got = ingest.digest()
            ingest.discard()
            self.damaged.forget(file.blob)  # parts copied from it may be wrong: the next ingest reuses none
            raise corrupt(file, got)
        sha256 = None if file.is_named_by_content else self._sha256_of(ingest)
        self._check()
        ingest.offer.verify()
        if not self.has(file):
            self._move_in(ingest)
            self.hashes.note(file.blob, sha256)
        if ingest.is_of_one_source:
            self.proven.add(file)
        ingest.offer.tell()
        with suppress(Unavailable):  # no free descriptor to list the directory: an empty one does no harm
            ingest.discard()
        self.damaged.forget(file.blob)
        self._log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

    def _sha256_of(self, ingest: Ingest) -> Digest | None:
        """The sha256 that the ingest computed in addition to the source's digest; None if it did not.

        If a manifest records a sha256 of the file, the content must have it, because other models may share
        the blob by this sha256. Otherwise discards the ingest and raises Corrupt.
        """
        file, sha256 = ingest.file, ingest.sha256
        if file.sha256 and sha256 is None:
            sha256 = ingest.read_sha256()
        if file.sha256 not in (None, sha256):
            ingest.discard()
            raise corrupt(file, sha256, file.sha256)
        return sha256

    def _move_in(self, ingest: Ingest) -> None:
        file, target = ingest.file, self.path(ingest.file.blob)
        data = ingest.seal()
        with durable.disk_errors(target):
            self._make_directory(file.blob)
            lines = ingest.part_lines()
            # With a digest and a single part, the part hash tells a scrub or a repair nothing more.
            if file.digest is None or lines.count("\n") > 1:
                durable.write_file(parts_of(target), lines.encode())
            durable.move(data, target)  # point of no return

    # --- in one write ---

    def put(self, file: File, content: memoryview) -> None:
        """Write the complete content of a file as a blob, without an ingest. The file must have a digest.

        The content is verified before anything is written. A crash leaves at most a staged file, which the
        next start removes. A blob that is here already stays, because views link to it. Raises Corrupt,
        NoSpace, DiskFailed or Unavailable.
        """
        if file.digest is None:
            raise ValueError(f"{file.path}: without a digest its content cannot be verified")
        if (got := digest_of(file.digest, content)) != file.digest:
            raise corrupt(file, got)
        sha256 = None if file.is_named_by_content else digest_of(NO_SHA256, content)
        if file.sha256 not in (None, sha256):
            raise corrupt(file, sha256, file.sha256)
        self._check()
        if not self.has(file):
            self._put_in(file, content)
            self.hashes.note(file.blob, sha256)
        self.proven.add(file)
        self.offers.tell(file)

    def _put_in(self, file: File, content: memoryview) -> None:
        target, staged = self.at(file.blob), self.layout.staged_blob_at(file.blob)
        with durable.disk_errors(target):
            try:
                durable.write_sealed(staged, content)
                try:
                    durable.move(staged, target)  # point of no return
                except FileNotFoundError:
                    self._make_directory(file.blob)
                    durable.move(staged, target)
            except BaseException:
                durable.unlink(staged)
                raise
        self.damaged.forget(file.blob)
        self._log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

    def _make_directory(self, blob: Digest) -> None:
        """Make the directory for blobs of this digest algorithm, if it is not there yet."""
        self.path(blob).parent.mkdir(mode=0o700, exist_ok=True)
