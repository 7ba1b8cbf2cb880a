"""The content store: verified, immutable blobs, each named by its digest."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import structlog

from cachd.errors import CachdError, Corrupt, Leased, Unavailable
from cachd.kernel import durable
from cachd.kernel.leases import is_open
from cachd.model import Digest, Extent, File, Manifest
from cachd.store.digests import NO_SHA256, digest_of
from cachd.store.hashes import Hashes
from cachd.store.ingest import Ingest
from cachd.store.ingest.part_lines import parts_of
from cachd.store.layout import Layout
from cachd.store.proven import Proven
from cachd.store.reads import Reads

log = structlog.get_logger(__name__)

_PIECE_BYTES = 64 << 10
_OWNERS = "owners"
_MOST_OWNERS = 1000  # per ingest; later names are not recorded, so they do not keep the ingest
_READ_BYTES = 1 << 20


class ContentStore:
    """The blobs of one cache root, and the ingests (partial downloads) that become blobs.

    `trusts_claims`: a source need not prove that it has a blob that came from another source.
    """

    def __init__(self, layout: Layout, *, trusts_claims: bool = False) -> None:
        self._layout = layout
        self.proven = Proven(layout.proven, lambda blob: bool(self.inode(blob)), trusts_claims=trusts_claims)
        self.reads = Reads()
        self.hashes = Hashes()
        self._lock = threading.Lock()
        self._claims: dict[Digest, list[str]] = {}  # the names of the pulls that need a blob, one per pull
        self._expected: Counter[str] = Counter()  # how many pulls of each name have not ended
        self._owning = threading.Lock()  # guards the `owners` files of all ingests
        self._damaged = {path.name for path in layout.damaged_blobs.iterdir()}  # every download looks one up

    def path(self, blob: Digest) -> Path:
        return self._layout.blob(blob)

    def at(self, blob: Digest) -> str:
        """`path` as a string."""
        return self._layout.blob_at(blob)

    def alike(self, file: File) -> Digest | None:
        """A blob under another name that has the file's content.

        None when the source states no sha256, no such blob is known, or the file's own blob is here.
        """
        found = self.hashes.blob_of(file.digest) if file.digest and file.is_named_by_content else None
        if found is None or self.has(replace(file, kept=None)):
            return None
        return found if self.has(replace(file, kept=found)) else None

    def inode(self, blob: Digest) -> int:
        """The inode number of the blob's file; 0 when there is no such file."""
        try:
            return os.lstat(self.at(blob)).st_ino
        except FileNotFoundError:
            return 0

    def has(self, file: File) -> bool:
        """Whether the file's blob is here and has the right size."""
        try:
            return os.lstat(self.at(file.blob)).st_size == file.size
        except FileNotFoundError:
            return False

    def pieces(self, file: File) -> Generator[bytes, None, None]:
        """Yield the content of a file's blob in 64 KiB pieces. Raises DiskFailed, Leased or Unavailable."""
        path = self.path(file.blob)
        with durable.disk_errors(path), open(durable.open_file(path, os.O_RDONLY), "rb") as opened:
            while piece := opened.read(_PIECE_BYTES):
                yield piece

    def agrees(self, file: File, extent: Extent, view: memoryview) -> bool:
        """Whether the file's blob has exactly the bytes of `view` at `extent`; False when the blob is gone.

        Raises Leased, Unavailable or DiskFailed.
        """
        path = self.path(file.blob)
        with durable.disk_errors(path), self.reads.reading():
            try:
                fd = durable.open_file(path, os.O_RDONLY)
            except FileNotFoundError:  # meanwhile the blob was found damaged, and moved to damaged/
                return False
            try:
                return os.pread(fd, extent.size, extent.start) == view
            finally:
                os.close(fd)

    def computed_sha256(self, file: File, go_on: Callable[[], None]) -> Digest:
        """Read a blob that is here and return its sha256.

        Calls `go_on` after each MiB. Raises what `go_on` raises, and DiskFailed, Leased or Unavailable.
        """
        path, found = self.path(file.blob), hashlib.sha256()
        with durable.disk_errors(path), open(durable.open_file(path, os.O_RDONLY), "rb") as opened:
            while content := opened.read(_READ_BYTES):
                found.update(content)
                go_on()
        return Digest("sha256", found.hexdigest())

    def missing(self, manifest: Manifest) -> list[File]:
        """The files whose blob is not here, one file per blob."""
        return [f for f in {f.blob: f for f in manifest.files}.values() if not self.has(f)]

    def allocated(self, file: File) -> int:
        """Bytes of disk that the file's ingest occupies; 0 when it has none."""
        return _blocks(f"{self._layout.ingest_at(file.blob)}/data")

    def is_begun(self, file: File) -> bool:
        """Whether the file has an ingest on disk."""
        return os.path.exists(self._layout.ingest_at(file.blob))

    def begin(self, file: File, check: Callable[[], None] = lambda: None) -> Ingest:
        """Begin the file's ingest, or resume the one that an earlier pull left behind.

        If a damaged copy of the blob is kept, its intact parts are copied into the ingest. `check` is called
        while existing bytes are read back; it may raise Cancelled. Raises NoSpace, DiskFailed or Unavailable.
        """
        ingest = Ingest(self._layout.ingest(file.blob), file, check)
        with self._lock:
            names = set(self._claims.get(file.blob, ()))
        self._own(self._layout.ingest(file.blob), names)
        damaged = self._layout.damaged(file.blob)
        if damaged.name in self._damaged and durable.is_regular(damaged):
            try:
                with durable.disk_errors(damaged):
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
            self.forget_damaged(file.blob)  # parts copied from it may be wrong, too: fetch everything anew
            raise corrupt(file, got)
        sha256 = None if file.is_named_by_content else self._sha256_of(ingest)
        if not self.has(file):
            self._move_in(ingest)
            self.hashes.note(file.blob, sha256)
        if ingest.is_of_one_source:
            self.proven.add(file)
        with suppress(Unavailable):  # no free descriptor to list the directory: an empty one does no harm
            ingest.discard()
        self.forget_damaged(file.blob)
        log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

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
            durable.move(data, target)

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
        if not self.has(file):
            self._put_in(file, content)
            self.hashes.note(file.blob, sha256)
        self.proven.add(file)

    def _put_in(self, file: File, content: memoryview) -> None:
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
        self.forget_damaged(file.blob)
        log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

    def _make_directory(self, blob: Digest) -> None:
        """Make the directory for blobs of this digest algorithm, if it is not there yet."""
        self.path(blob).parent.mkdir(mode=0o700, exist_ok=True)

    def sync(self, blobs: Iterable[Digest]) -> None:
        """Make the names of committed blobs durable."""
        for directory in {self.path(blob).parent for blob in {b.algorithm: b for b in blobs}.values()}:
            with durable.disk_errors(directory):
                durable.sync_directory(directory)
        with durable.disk_errors(self._layout.blobs):
            durable.sync_directory(self._layout.blobs)

    @contextmanager
    def claim(self, manifest: Manifest, name: str = "") -> Iterator[None]:
        """Keep the manifest's blobs while inside, whether views link to them or not, for the pull of `name`.

        From then on `name` also owns the ingests that earlier pulls left of these blobs.
        """
        blobs = {f.blob for f in manifest.files}
        with self._lock:
            for blob in blobs:
                self._claims.setdefault(blob, []).append(name)
        try:
            here = {path.name for path in self._layout.ingests.iterdir()}
            for blob in blobs if here else ():
                if (directory := self._layout.ingest(blob)).name in here:
                    self._own(directory, {name})
            with self.proven.during_pull():
                yield
        finally:
            with self._lock:
                for blob in blobs:
                    self._claims[blob].remove(name)
                    if not self._claims[blob]:
                        del self._claims[blob]

    # --- owners of ingests ---

    def expect(self, name: str) -> None:
        """Keep the ingests that `name` owns: a pull of it has begun, and has not claimed its blobs yet."""
        with self._lock:
            self._expected[name] += 1

    def expect_no_more(self, name: str) -> None:
        """Undo one `expect`: a pull of the name has ended."""
        with self._lock:
            self._expected[name] -= 1
            self._expected = +self._expected

    def is_expected(self, blob: Digest) -> bool:
        """Whether a pull claims the blob, or a waiting or running pull may resume its ingest."""
        with self._lock:
            if blob in self._claims:
                return True
            expected = set(self._expected)
        return bool(expected and expected & _owners(self._layout.ingest(blob)))

    def _own(self, ingest: Path, names: set[str]) -> None:
        """Add owners to an ingest. A failure is ignored.

        The file of owners is not synced: it survives a crash of the daemon, not always one of the node.
        """
        with self._owning:
            owners = _owners(ingest)
            for name in sorted(names - owners - {""})[: max(_MOST_OWNERS - len(owners), 0)]:
                with suppress(CachdError), durable.disk_errors(ingest):
                    durable.append_note(ingest / _OWNERS, f"{name}\n")

    def _disown(self, ingest: Path, names: Collection[str]) -> bool:
        """Remove owners of an ingest. Returns True, and writes nothing, when no other owner is left."""
        with self._owning:
            owners = _owners(ingest)
            left = owners.difference(names)
            if left and left != owners:
                durable.write_note(ingest / _OWNERS, "".join(f"{name}\n" for name in sorted(left)).encode())
            return not left

    def set_aside(self, blob: Digest, inode: int) -> None:
        """Move a damaged blob to damaged/ for its repair to read. Does nothing if the inode is another."""
        path, damaged = self.path(blob), self._layout.damaged(blob)
        with durable.disk_errors(path), suppress(FileNotFoundError):
            if os.lstat(path).st_ino != inode:
                return
            if path.is_dir() and not path.is_symlink():
                durable.remove_tree(path)
                return
            with suppress(FileNotFoundError):
                # Part hashes first: a part-hash file without its blob is removed as a leftover.
                durable.move(parts_of(path), parts_of(damaged))
            self._damaged.add(damaged.name)
            self.hashes.forget(blob)
            durable.move(path, damaged)
            durable.sync_directory(path.parent)

    def is_set_aside(self, blob: Digest) -> bool:
        """Whether a damaged copy of the blob is kept. The repair reuses its intact parts."""
        return f"{blob.algorithm}-{blob.hex}" in self._damaged

    def forget_damaged(self, blob: Digest) -> int:
        """Delete the copy that `set_aside` kept. Returns the bytes of disk freed."""
        if not self.is_set_aside(blob):
            return 0
        damaged = self._layout.damaged(blob)
        with durable.disk_errors(damaged):
            size = _blocks(damaged)
            for path in (damaged, parts_of(damaged)):
                durable.remove(path)
        self._damaged.discard(damaged.name)
        return size

    def is_claimed(self, blob: Digest) -> bool:
        """Whether a running pull claims the blob, which need not be here."""
        with self._lock:
            return blob in self._claims

    def is_free(self, blob: Digest) -> bool:
        """Whether `drop` would remove the blob: no view links to it and no pull claims it."""
        try:
            return os.lstat(self.path(blob)).st_nlink == 1 and not self.is_claimed(blob)
        except FileNotFoundError:
            return False

    def claimed(self) -> set[Digest]:
        """The blobs that running pulls claim."""
        with self._lock:
            return set(self._claims)

    def sizes(self, manifest: Manifest) -> dict[Digest, int]:
        """Bytes of disk that each blob of a manifest occupies; blobs that are not here are left out."""
        found = {}
        for blob in {f.blob for f in manifest.files}:
            with suppress(FileNotFoundError):
                path = self.path(blob)
                found[blob] = os.lstat(path).st_blocks * 512 + _blocks(parts_of(path))
        return found

    def free(self, manifest: Manifest, names: Collection[str] = ()) -> int:
        """Remove the manifest's blobs with their ingests and damaged copies. Returns the bytes of disk freed.

        A blob stays while a view links to it or a pull claims it. An ingest and a damaged copy stay while a
        pull claims the blob or a name that is not in `names` owns the ingest.
        """
        return self.empty(self.discard(manifest, names))

    def discard(self, manifest: Manifest, names: Collection[str] = ()) -> dict[Path, int]:
        """Like `free`, but only moves blobs and ingests to the trash, which is quick for any size.

        Returns the bytes of disk of each trash entry; the caller passes them to `empty`.
        """
        trashed: dict[Path, int] = {}
        for blob in {f.blob for f in manifest.files}:
            self._discard_ingest(blob, trashed, names)
            self._discard_blob(blob, trashed)
        return trashed

    def drop(self, blob: Digest) -> int:
        """Remove a blob unless a view links to it or a pull claims it. Returns the bytes of disk freed."""
        trashed: dict[Path, int] = {}
        self._discard_blob(blob, trashed)
        return self.empty(trashed)

    def drop_ingest(self, blob: Digest) -> int:
        """Remove a blob's ingest unless a waiting or running pull may resume it. Returns the bytes freed."""
        trashed: dict[Path, int] = {}
        if not self.is_expected(blob):
            self._discard_ingest(blob, trashed, _owners(self._layout.ingest(blob)))
        return self.empty(trashed)

    def _discard_blob(self, blob: Digest, trashed: dict[Path, int]) -> None:
        path, trash = self.path(blob), self._trash(blob)
        with durable.disk_errors(path), suppress(FileNotFoundError):
            with self._lock:  # whoever claims the blob after this finds it gone
                if blob in self._claims or os.lstat(path).st_nlink > 1:
                    return
                size = _blocks(path) + _blocks(parts_of(path))
                durable.remove(parts_of(path))
                durable.take_away(path, trash)
            trashed[trash] = size
            self.hashes.forget(blob)
            self.proven.forget(blob)
            durable.sync_directory(path.parent)

    def _discard_ingest(self, blob: Digest, trashed: dict[Path, int], names: Collection[str]) -> None:
        """Move an ingest to the trash and delete the damaged copy of its blob.

        Does neither while a pull claims the blob or a name not in `names` owns the ingest.
        """
        directory, trash = self._layout.ingest(blob), self._trash(blob)
        with durable.disk_errors(directory), self._lock:
            has_no_owner = self._disown(directory, names)
            if blob in self._claims or not has_no_owner:
                return
            size = _blocks(directory / "data")
            if not self.path(blob).exists():
                durable.remove(parts_of(self.path(blob)))  # left by a commit that a crash interrupted
            with suppress(FileNotFoundError):
                durable.take_away(directory, trash)
                trashed[trash] = size
        self.forget_damaged(blob)

    def _trash(self, blob: Digest) -> Path:
        return self._layout.trash / f"{blob.hex}.{secrets.token_hex(4)}"

    def empty(self, trashed: Mapping[Path, int]) -> int:
        """Delete trash entries, given with their bytes of disk. Returns the bytes freed.

        The caller should hold no lock, because deleting a large file takes long. A file that a process has
        open stays in the trash until it is closed: its bytes are still taken, and so they are still counted.
        """
        freed = 0
        for path, size in trashed.items():
            with durable.disk_errors(path):
                if path.is_dir() and not path.is_symlink():
                    durable.remove_tree(path)
                elif durable.is_regular(path) and is_open([path]):
                    log.info("deleted file still open", file=path.name, held_bytes=size)
                    continue
                else:
                    durable.remove(path)
            freed += size
        return freed

    def empty_trash(self) -> None:
        """Delete what is in the trash since an earlier run of the daemon, or because it was still open."""
        self.empty(dict.fromkeys(self._layout.trash.iterdir(), 0))


def _owners(ingest: Path) -> set[str]:
    """The names whose pulls began an ingest, or have needed it since."""
    try:
        return set(durable.read_file(ingest / _OWNERS).decode(errors="replace").split())
    except (OSError, Leased):
        return set()


def corrupt(file: File, got: Digest | None, expected: Digest | None = None) -> Corrupt:
    """The error for content with a wrong digest. `expected`: by default the digest that the source states."""
    expected = expected or file.digest
    return Corrupt(
        f"{file.path}: expected {expected}, got {got} ({file.size} bytes from {file.origin})",
        hint="nothing was published; if it happens again, the source or the network to it corrupts data",
        file=file.path,
        expected=str(expected),
        got=str(got),
    )


def _blocks(path: Path | str) -> int:
    """Bytes of disk that a file occupies; 0 when there is no such file."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
