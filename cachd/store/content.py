"""Blobs: verified, immutable, named by digest."""

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
from cachd.model import Digest, Extent, File, Manifest
from cachd.store import durable
from cachd.store.digests import NO_SHA256, of_whole
from cachd.store.hashes import Hashes
from cachd.store.ingest import Ingest, parts_of
from cachd.store.layout import Layout
from cachd.store.protection import is_open
from cachd.store.proven import Proven
from cachd.store.reads import Reads

log = structlog.get_logger(__name__)

_PIECE_BYTES = 64 << 10
_OWNERS = "owners"
_MOST_OWNERS = 1000  # of one ingest; whoever comes later has no say in how long it is kept
_READ_BYTES = 1 << 20


class ContentStore:
    """The blobs of one root, and the ingests on their way to become blobs."""

    def __init__(self, layout: Layout, *, trusts_claims: bool = False) -> None:
        self._layout = layout
        self.proven = Proven(layout.proven, lambda blob: bool(self.inode(blob)), trusts_claims=trusts_claims)
        self.reads = Reads()
        self.hashes = Hashes()
        self._lock = threading.Lock()
        self._claims: dict[Digest, list[str]] = {}  # the names whose pulls need a blob, one for each pull
        self._expected: Counter[str] = Counter()  # names whose pulls have not ended, their blobs known or not
        self._owning = threading.Lock()  # the notes whose an ingest is
        self._aside = {path.name for path in layout.damaged_blobs.iterdir()}  # looked up for every file

    def path(self, blob: Digest) -> Path:
        return self._layout.blob(blob)

    def at(self, blob: Digest) -> str:
        """The path as text."""
        return self._layout.blob_at(blob)

    def alike(self, file: File) -> Digest | None:
        """The blob of another name that has the content of a file which states a sha256, and is here."""
        found = self.hashes.blob_of(file.digest) if file.digest and file.is_named_by_content else None
        if found is None or self.has(replace(file, kept=None)):
            return None
        return found if self.has(replace(file, kept=found)) else None

    def inode(self, blob: Digest) -> int:
        """Which file the blob is; 0 when there is none."""
        try:
            return os.lstat(self.at(blob)).st_ino
        except FileNotFoundError:
            return 0

    def has(self, file: File) -> bool:
        """Whether the file's blob is here, at its size."""
        try:
            return os.lstat(self.at(file.blob)).st_size == file.size
        except FileNotFoundError:
            return False

    def pieces(self, file: File) -> Generator[bytes, None, None]:
        """The content of a file's blob, a little at a time. Raises DiskFailed."""
        path = self.path(file.blob)
        with durable.disk_errors(path), open(durable.open_file(path, os.O_RDONLY), "rb") as opened:
            while piece := opened.read(_PIECE_BYTES):
                yield piece

    def agrees(self, file: File, extent: Extent, view: memoryview) -> bool:
        """Whether the file's blob has these bytes there. Raises Leased, Unavailable, DiskFailed."""
        path = self.path(file.blob)
        with durable.disk_errors(path), self.reads.reading():
            try:
                fd = durable.open_file(path, os.O_RDONLY)
            except FileNotFoundError:  # found damaged meanwhile
                return False
            try:
                return os.pread(fd, extent.size, extent.start) == view
            finally:
                os.close(fd)

    def computed_sha256(self, file: File, go_on: Callable[[], None]) -> Digest:
        """The sha256 of a blob that is here, read for it. Raises DiskFailed, and what `go_on` raises."""
        path, found = self.path(file.blob), hashlib.sha256()
        with durable.disk_errors(path), open(durable.open_file(path, os.O_RDONLY), "rb") as opened:
            while content := opened.read(_READ_BYTES):
                found.update(content)
                go_on()
        return Digest("sha256", found.hexdigest())

    def missing(self, manifest: Manifest) -> list[File]:
        """One file for each blob that is not here."""
        return [f for f in {f.blob: f for f in manifest.files}.values() if not self.has(f)]

    def allocated(self, file: File) -> int:
        """Bytes of disk that an ingest of the file holds already."""
        return _blocks(f"{self._layout.ingest_at(file.blob)}/data")

    def is_begun(self, file: File) -> bool:
        """Whether there is an ingest of the file."""
        return os.path.exists(self._layout.ingest_at(file.blob))

    def begin(self, file: File, check: Callable[[], None] = lambda: None) -> Ingest:
        """Begin the file's ingest, or resume the one an earlier pull left. Raises NoSpace, DiskFailed.

        What is good of a damaged blob is taken over. `check` may raise Cancelled while what is here is read.
        """
        ingest = Ingest(self._layout.ingest(file.blob), file, check)
        with self._lock:
            names = set(self._claims.get(file.blob, ()))
        self._own(self._layout.ingest(file.blob), names)
        damaged = self._layout.damaged(file.blob)
        if damaged.name in self._aside and durable.is_regular(damaged):
            try:
                with durable.disk_errors(damaged):
                    ingest.salvage(damaged)
                log.info("good parts taken over", path=file.path, resumed_bytes=ingest.resumed, of=file.size)
            except Leased as error:
                log.warning("nothing is taken over", path=file.path, reason=error.detail)
            except BaseException:
                ingest.close()
                raise
        return ingest

    def commit(self, ingest: Ingest) -> None:
        """Publish a hashed ingest as a blob. Raises Corrupt, and discards it, when the digest is wrong.

        A blob that is here already stays: views link to it.
        """
        file = ingest.file
        if not ingest.agrees:
            got = ingest.digest()
            ingest.discard()
            self.forget_damaged(file.blob)  # its parts lie as well: all is fetched anew
            raise corrupt(file, got)
        sha256 = None if file.is_named_by_content else self._sha256_of(ingest)
        if not self.has(file):
            self._move_in(ingest)
            self.hashes.note(file.blob, sha256)
        if ingest.is_of_one_source:
            self.proven.add(file)
        with suppress(Unavailable):  # an empty directory that nobody can open now does no harm
            ingest.discard()
        self.forget_damaged(file.blob)
        log.debug("blob committed", path=file.path, blob=str(file.blob), size_bytes=file.size)

    def _sha256_of(self, ingest: Ingest) -> Digest | None:
        """The sha256 that was taken along. Where one is known of the file, it must be that: other models may
        share the blob by it. Raises Corrupt, and discards the ingest."""
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
            if file.digest is None or lines.count("\n") > 1:  # else a repair has no part to choose
                durable.write_file(parts_of(target), lines.encode())
            durable.move(data, target)

    def put(self, file: File, content: memoryview) -> None:
        """Publish the whole content of a file with a digest as a blob. Raises Corrupt, NoSpace or DiskFailed.

        Nothing is written before it is verified, and what a crash leaves the next start removes: no ingest.
        A blob that is here already stays: views link to it.
        """
        if file.digest is None:
            raise ValueError(f"{file.path}: only a digest can vouch for bytes that come without parts")
        if (got := of_whole(file.digest, content)) != file.digest:
            raise corrupt(file, got)
        sha256 = None if file.is_named_by_content else of_whole(NO_SHA256, content)
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
    def claim(self, manifest: Manifest, name: str = "") -> Iterator[None]:
        """Keep the manifest's blobs while the pull of a name needs them, linked or not. What an earlier pull
        left of them is the name's, too, from then on."""
        blobs = {f.blob for f in manifest.files}
        with self._lock:
            for blob in blobs:
                self._claims.setdefault(blob, []).append(name)
        try:
            here = {path.name for path in self._layout.ingests.iterdir()}
            for blob in blobs if here else ():
                if (directory := self._layout.ingest(blob)).name in here:
                    self._own(directory, {name})
            yield
        finally:
            self.proven.close()
            with self._lock:
                for blob in blobs:
                    self._claims[blob].remove(name)
                    if not self._claims[blob]:
                        del self._claims[blob]

    # --- whose an ingest is ---

    def expect(self, name: str) -> None:
        """Keep the ingests that are a name's: a pull of it waits, and has not said yet what it needs."""
        with self._lock:
            self._expected[name] += 1

    def expect_no_more(self, name: str) -> None:
        """A pull of the name has ended."""
        with self._lock:
            self._expected[name] -= 1
            self._expected = +self._expected

    def is_expected(self, blob: Digest) -> bool:
        """Whether a pull that waits or runs needs a blob, or may go on with its ingest."""
        with self._lock:
            if blob in self._claims:
                return True
            expected = set(self._expected)
        return bool(expected and expected & _owners(self._layout.ingest(blob)))

    def _own(self, ingest: Path, names: set[str]) -> None:
        """Note that an ingest is these names', too. A note like the ingest's own: for a process that dies."""
        with self._owning:
            owners = _owners(ingest)
            for name in sorted(names - owners - {""})[: max(_MOST_OWNERS - len(owners), 0)]:
                with suppress(CachdError), durable.disk_errors(ingest):
                    durable.append_note(ingest / _OWNERS, f"{name}\n")

    def _disown(self, ingest: Path, names: Collection[str]) -> bool:
        """Note that an ingest is not these names' any more; whether it is nobody's now."""
        with self._owning:
            owners = _owners(ingest)
            left = owners.difference(names)
            if left and left != owners:
                durable.write_note(ingest / _OWNERS, "".join(f"{name}\n" for name in sorted(left)).encode())
            return not left

    def set_aside(self, blob: Digest, inode: int) -> None:
        """Take a damaged blob away from the good ones, if it is still this file; its repair may read it."""
        path, aside = self.path(blob), self._layout.damaged(blob)
        with durable.disk_errors(path), suppress(FileNotFoundError):
            if os.lstat(path).st_ino != inode:
                return
            if path.is_dir() and not path.is_symlink():
                durable.remove_tree(path)
                return
            with suppress(FileNotFoundError):
                durable.move(parts_of(path), parts_of(aside))  # first: without the blob they would be lost
            self._aside.add(aside.name)
            self.hashes.forget(blob)
            durable.move(path, aside)
            durable.sync_directory(path.parent)

    def is_set_aside(self, blob: Digest) -> bool:
        """Whether there is a damaged blob whose good parts its repair takes over."""
        return f"{blob.algorithm}-{blob.hex}" in self._aside

    def forget_damaged(self, blob: Digest) -> int:
        """Remove what `set_aside` took away; bytes freed."""
        if not self.is_set_aside(blob):
            return 0
        aside = self._layout.damaged(blob)
        with durable.disk_errors(aside):
            size = _blocks(aside)
            for path in (aside, parts_of(aside)):
                durable.remove(path)
        self._aside.discard(aside.name)
        return size

    def is_claimed(self, blob: Digest) -> bool:
        """Whether a pull needs the blob now, here or not."""
        with self._lock:
            return blob in self._claims

    def is_free(self, blob: Digest) -> bool:
        """Whether `drop` would remove the blob: no view links to it and no pull claims it."""
        try:
            return os.lstat(self.path(blob)).st_nlink == 1 and not self.is_claimed(blob)
        except FileNotFoundError:
            return False

    def claimed(self) -> set[Digest]:
        """The blobs that running pulls need."""
        with self._lock:
            return set(self._claims)

    def sizes(self, manifest: Manifest) -> dict[Digest, int]:
        """Bytes of disk that each blob of a manifest takes; those that are gone are left out."""
        found = {}
        for blob in {f.blob for f in manifest.files}:
            with suppress(FileNotFoundError):
                path = self.path(blob)
                found[blob] = os.lstat(path).st_blocks * 512 + _blocks(parts_of(path))
        return found

    def free(self, manifest: Manifest, names: Collection[str] = ()) -> int:
        """Remove the manifest's blobs that no view links to and no pull claims, and what interrupted pulls
        left of them for these names and no other; bytes of disk freed."""
        return self.empty(self.discard(manifest, names))

    def discard(self, manifest: Manifest, names: Collection[str] = ()) -> dict[Path, int]:
        """Move what `free` removes to the trash, which takes no time; the bytes of disk of each piece there,
        for `empty`."""
        moved: dict[Path, int] = {}
        for blob in {f.blob for f in manifest.files}:
            self._discard_ingest(blob, moved, names)
            self._discard_blob(blob, moved)
        return moved

    def drop(self, blob: Digest) -> int:
        """Remove a blob that no view links to and no pull claims; bytes of disk freed, 0 when it stays."""
        moved: dict[Path, int] = {}
        self._discard_blob(blob, moved)
        return self.empty(moved)

    def drop_ingest(self, blob: Digest) -> int:
        """Remove what ended pulls left of a blob, unless one that waits or runs may go on with it; bytes of
        disk freed."""
        moved: dict[Path, int] = {}
        if not self.is_expected(blob):
            self._discard_ingest(blob, moved, _owners(self._layout.ingest(blob)))
        return self.empty(moved)

    def _discard_blob(self, blob: Digest, moved: dict[Path, int]) -> None:
        path, trash = self.path(blob), self._trash(blob)
        with durable.disk_errors(path), suppress(FileNotFoundError):
            with self._lock:  # a claim made from here on finds the blob gone
                if blob in self._claims or os.lstat(path).st_nlink > 1:
                    return
                size = _blocks(path) + _blocks(parts_of(path))
                durable.remove(parts_of(path))
                durable.take_away(path, trash)
            moved[trash] = size
            self.hashes.forget(blob)
            self.proven.forget(blob)
            durable.sync_directory(path.parent)

    def _discard_ingest(self, blob: Digest, moved: dict[Path, int], names: Collection[str]) -> None:
        """Move what interrupted pulls of these names left out of the way, and what was set aside for a
        repair. What is another's, too, stays."""
        directory, trash = self._layout.ingest(blob), self._trash(blob)
        with durable.disk_errors(directory), self._lock:
            is_nobodys = self._disown(directory, names)
            if blob in self._claims or not is_nobodys:
                return
            size = _blocks(directory / "data")
            if not self.path(blob).exists():
                durable.remove(parts_of(self.path(blob)))  # of a commit that was cut off
            with suppress(FileNotFoundError):
                durable.take_away(directory, trash)
                moved[trash] = size
        self.forget_damaged(blob)

    def _trash(self, blob: Digest) -> Path:
        return self._layout.trash / f"{blob.hex}.{secrets.token_hex(4)}"

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


def _owners(ingest: Path) -> set[str]:
    """The names whose pulls began an ingest, or came to need it since."""
    try:
        return set(durable.read_file(ingest / _OWNERS).decode(errors="replace").split())
    except (OSError, Leased):
        return set()


def corrupt(file: File, got: Digest | None, expected: Digest | None = None) -> Corrupt:
    """What says that a source's bytes have another digest than it states, or than they had."""
    expected = expected or file.digest
    return Corrupt(
        f"{file.path}: expected {expected}, got {got} ({file.size} bytes from {file.origin})",
        hint="nothing was published; if it happens again the source or the way to it is damaged",
        file=file.path,
        expected=str(expected),
        got=str(got),
    )


def _blocks(path: Path | str) -> int:
    """Bytes of disk that a file takes; none when it is not there."""
    try:
        return os.lstat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
