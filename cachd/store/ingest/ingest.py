"""Joins the data file, the journal and the digest of a blob that is being written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from pathlib import Path

from cachd.errors import Cancelled, Leased
from cachd.kernel import durable
from cachd.model import Digest, Extent, File
from cachd.policy.parts import Received
from cachd.store.digests import PartHash
from cachd.store.ingest import recovery
from cachd.store.ingest.about import About
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.file_digest import READ_BYTES, FileDigest
from cachd.store.ingest.journal import Journal
from cachd.store.ingest.offer import Offer
from cachd.store.ingest.recovery import Recovered

Check = Callable[[], None]


def _no() -> None:
    """The check of an ingest that nobody cancels."""


class Ingest:
    """One blob being written.

        Ingest() --> begun --finish--> parts durable --follow--> complete --seal--> committed
                       ^                                            |
                       +-----forget: some parts are fetched again---+

        begun, parts durable, complete --close--> kept: the next Ingest() resumes it
                                       --discard--> aborted: its files are gone

    `write`, `received` and `keep` bring bytes while it is begun. `follow` completes it once all bytes have
    arrived. The content store renames the sealed file to the blob.

    Many threads may call `write`, `received`, `keep` and `finish` at once, for disjoint parts. Only one
    thread at a time may call `follow` or `take`. The caller closes the ingest after all others have left it.

    Any method may raise NoSpace when the disk is full, Unavailable when too many files are open, and
    DiskFailed when the disk fails otherwise.
    """

    def __init__(self, directory: Path, file: File, check: Check = _no, offer: Offer | None = None) -> None:
        """Begin or resume. `check` is called while existing bytes are read back. When it raises Cancelled,
        the existing bytes stay for the next resume. Readers get synced bytes through `offer`."""
        self.file, self.directory = file, directory
        self._lock = threading.Lock()
        self._received = Received()
        self.offer = offer or Offer(file.size, directory, directory / "streamed")
        with durable.disk_errors(directory):
            directory.mkdir(mode=0o700, exist_ok=True)
            self._about = About(directory, file)
            self._data = DataFile(directory, check)
            self._journal = Journal(directory, file, self._data, self._about, self.offer.add)
            self._digest = FileDigest(file, self._data)
            self._parts = self._digest.parts
            try:
                self._resume()
                self._data.set_size(file.size)
            except (Leased, Cancelled):
                self.close()  # the existing bytes may be intact, and can be read later
                raise
            except BaseException as error:
                if isinstance(error, OSError) and error.errno in durable.SCARCE:
                    self.close()
                else:
                    self.discard()
                raise
        self.resumed = self._received.bytes

    def _resume(self) -> None:
        if not self._about.resume():
            self._journal.begin()
            self.offer.open([], is_complete=False)
            return
        recorded = list(self._journal.recorded())
        found = list(recovery.resumed(recorded, self._data, self._parts, memoryview(bytearray(READ_BYTES))))
        self._count_recovered(found)
        self._journal.end_torn_line()
        is_complete = recovery.has_all_synced(recorded, found)
        self.offer.open([each.part for each in found if each.is_synced], is_complete=is_complete)

    def salvage(self, damaged: Path) -> None:
        """Copy missing parts from a damaged blob: those that still have their recorded hash."""
        found = recovery.copied(damaged, self.file, self.gaps, self._data, self._parts)
        self._count_recovered(found)
        self._about.is_of_one_source = False
        self._journal.sync()
        self.resumed = self._received.bytes

    def _count_recovered(self, found: Iterable[Recovered]) -> None:
        for each in found:
            self._received.add(each.part)
            self._parts.record(each.part, each.hashed)
            if not each.is_synced:
                self._journal.add_unsynced(each.part, each.hashed)

    # --- progress ---

    @property
    def is_of_one_source(self) -> bool:
        """Whether all bytes came from the file's own source."""
        return self._about.is_of_one_source

    @property
    def is_received(self) -> bool:
        """Whether every byte has been received."""
        return self.prefix == self.file.size

    @property
    def is_hashed(self) -> bool:
        """Whether the complete file is hashed."""
        return self._digest.is_complete

    @property
    def behind(self) -> int:
        """Bytes that `follow` can hash now."""
        return self._digest.behind(self.prefix)

    @property
    def prefix(self) -> int:
        """Bytes from the start of the file that are here without a gap."""
        with self._lock:
            return self._received.prefix

    @property
    def parts(self) -> frozenset[Extent]:
        """The extents that have a part hash."""
        return self._parts.extents()

    @property
    def allocated(self) -> int:
        """Bytes of disk that the data occupies."""
        return self._data.allocated

    def gaps(self) -> list[Extent]:
        """The extents still to be fetched."""
        with self._lock:
            return list(self._received.gaps(self.file.size))

    # --- streams ---

    def comes_from(self, file: File) -> None:
        """Note that the next bytes come from the source of `file`. To be called before they are written.

        With bytes of two sources, the ingest proves for neither that it has the file.
        """
        with durable.disk_errors(self.directory):
            self._about.comes_from(file)

    def allocate(self, extent: Extent) -> None:
        """Allocate disk blocks for an extent, so that a full disk fails here and not at a later write."""
        self._data.allocate(extent)

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of `view` at `offset`. The caller then counts it as `received`."""
        self._data.write(offset, view)

    def received(self, extent: Extent) -> None:
        """Count bytes just written as received. Without `keep`, a crash of the daemon loses them."""
        with self._lock:
            self._received.add(extent)

    def part_hash(self) -> PartHash:
        """A new part hash: the caller feeds it the part's bytes in order, then passes it to `keep`."""
        return self._parts.new()

    def keep(self, part: Extent, hashed: PartHash) -> None:
        """Let the received bytes of a part, which `hashed` covers exactly, survive a crash of the daemon.

        Call it again, with the same `hashed`, when more of the part has arrived.
        """
        self._parts.record(part, hashed)
        self._journal.keep(part, hashed)

    def finish(self, part: Extent) -> None:
        """Let a complete part that was kept, and what was kept of other parts, survive a crash of the node.

        A failed sync is final: this and every later call raise DiskFailed.
        """
        if part.size < self.file.size:  # a file of one part is synced by its commit
            self._journal.sync()

    # --- the digest ---

    def follow(self, buffer: memoryview) -> None:
        """Hash bytes that are `behind`, at most 64 MiB of them, reading them back through `buffer`."""
        self._digest.follow(self.prefix, buffer)

    def takes_from(self, offset: int) -> bool:
        """Whether the digest needs the bytes in order and the next one it needs is at `offset`."""
        return self._digest.takes_from(offset)

    def take(self, view: memoryview) -> None:
        """Hash bytes that have just arrived at the hashed offset, while they are in the processor's cache.

        The caller must be the one thread that may call `follow`.
        """
        self._digest.take(view)

    def digest(self) -> Digest | None:
        """The digest of a hashed file by the algorithm of its manifest; None when the manifest has no digest.

        Raises ValueError before the file is hashed.
        """
        return self._digest.digest()

    @property
    def agrees(self) -> bool:
        """Whether a hashed file has the digest of its manifest; True when the manifest has no digest."""
        return self.file.digest in (None, self.digest())

    @property
    def sha256(self) -> Digest | None:
        """The sha256 of a hashed file, if it was computed in addition to the digest of its manifest."""
        return self._digest.sha256()

    def read_sha256(self) -> Digest:
        """The sha256 of a hashed file, computed by reading the data back."""
        return self._digest.read_sha256()

    def spoiled(self, buffer: memoryview) -> frozenset[Extent]:
        """The parts of a hashed file whose bytes on disk are not the bytes that were received."""
        return self._digest.spoiled(buffer)

    def part_lines(self) -> str:
        """The part hashes of a hashed file as journal lines. No part overlaps another.

        They cover the complete file, unless its digest needs the bytes in order: then they may leave gaps.
        """
        return self._parts.lines()

    def forget(self, parts: frozenset[Extent]) -> None:
        """Mark these parts as missing, so that they are fetched again. Only the other parts stay received.

        No other thread may use the ingest meanwhile. Readers of the offer get no more bytes.
        """
        self.offer.withdraw()  # first: readers have wrong bytes, and a crash must not let them go on
        self._parts.forget(parts)
        with self._lock:
            self._received = Received()
            for part in self._parts.extents():
                self._received.add(part)
        self._digest.begin()
        self._journal.rewrite(self._parts.lines())
        self.offer.add(self._parts.extents())

    # --- the end ---

    def seal(self) -> Path:
        """Make the data of a complete ingest read-only and durable. Returns its path.

        Raises ValueError before the file is hashed.
        """
        if not self.is_hashed:
            raise ValueError(f"{self.file.path}: sealed before it was hashed")
        self._data.seal()
        return self._data.path

    def close(self) -> None:
        """Close the ingest; its files stay for the next begin. Closing twice is fine."""
        self.offer.close()
        self._data.close()
        self._journal.close()

    def discard(self) -> None:
        """Close the ingest and delete its directory."""
        self.close()
        self.offer.withdraw()
        with durable.disk_errors(self.directory):
            durable.remove_tree(self.directory)
