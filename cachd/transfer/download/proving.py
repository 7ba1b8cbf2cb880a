"""A supplier proves that it has a blob which is here already and came from another source."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from cachd.errors import Unavailable
from cachd.model import Extent
from cachd.sources.source import NoRanges
from cachd.store.digests import corrupt
from cachd.transfer.download.part import Part
from cachd.transfer.download.turn import YIELD_AFTER_SECONDS
from cachd.transfer.proof import Proof

if TYPE_CHECKING:
    from cachd.transfer.download.download import Download
    from cachd.transfer.download.supplier import Supplier

log = structlog.get_logger(__name__)


class Proving:
    """One supplier's proof: random samples are compared with the blob, or the complete file is hashed.

        samples --_agree: all equal--> proven
           |
           +--one differs, or no ranges--> complete file --_hash: digest right--> proven

    Nothing is written. Each supplier proves on its own, so a slow one keeps no other waiting.
    """

    def __init__(self, download: Download, supplier: Supplier) -> None:
        self._download, self._supplier, self._file = download, supplier, supplier.file
        self._streams, self._clock = download.engine.streams, download.engine.clock
        self._proof = Proof(self._file, by_samples=download.content.proven.begin_proof(self._file))
        self._everything = Part(Extent(0, self._file.size))  # counts the failures
        log.debug("source must prove a blob", file=self._file.path, size_bytes=self._file.size)

    def run(self, buffer: memoryview) -> None:
        """Go on with the proof. Raises Corrupt if the source lacks the blob, or what it failed with.

        After a temporary failure, or when the stream must yield, a later turn continues the proof.
        """
        try:
            if self._proof.samples and self._agree(buffer):
                has_proven(self._download, self._supplier)
                return
        except NoRanges:
            self._proof.has_ranges = False
        except Unavailable as error:
            self._download.schedule.retry(self._supplier, self._everything, self._proof.reached, error)
            return
        self._proof.samples.clear()
        self._hash(buffer)

    def _agree(self, buffer: memoryview) -> bool:
        """Whether every sample from the source equals the blob. Raises NoRanges, Unavailable."""
        samples = self._proof.samples
        while samples:
            extent, received = samples[-1], 0
            with self._supplier.open(extent, self._everything) as body:
                while received < extent.size and not self._supplier.is_stopped:
                    received += len(self._supplier.read(body, buffer[received : extent.size]))
            if self._supplier.is_stopped:
                return False
            if not self._download.content.agrees(self._file, extent, buffer[:received]):
                return False
            samples.pop()
        return True

    def _hash(self, buffer: memoryview) -> None:
        """Hash the complete file as the source sends it. Raises Corrupt."""
        proof, supplier, began = self._proof, self._supplier, self._clock()
        try:
            with supplier.open(proof.rest, self._everything) as body:
                while proof.reached < self._file.size and not supplier.is_stopped:
                    is_long = self._clock() - began > YIELD_AFTER_SECONDS
                    if is_long and proof.has_ranges and self._streams.should_yield(supplier.quota):
                        self._download.schedule.submit(supplier)
                        return
                    proof.take(supplier.read(body, buffer[: self._file.size - proof.reached]))
        except NoRanges:
            supplier.has_ranges = proof.has_ranges = False
            proof.begin()
            self._download.schedule.submit(supplier)
        except Unavailable as error:
            self._download.schedule.retry(supplier, self._everything, proof.reached, error)
        else:
            if supplier.is_stopped:
                return
            if proof.digest() != self._file.digest:
                raise corrupt(self._file, proof.digest())
            has_proven(self._download, supplier)


def prove(download: Download, supplier: Supplier, buffer: memoryview) -> None:
    """Go on with a supplier's proof; none is needed for an empty file, or if it was given before."""
    if download.content.proven.has(supplier.file):  # another pull of the same source proved it meanwhile
        download.drop(supplier, None)
    elif not supplier.file.size:
        has_proven(download, supplier)
    else:
        supplier.proving = supplier.proving or Proving(download, supplier)
        supplier.proving.run(buffer)


def has_proven(download: Download, supplier: Supplier) -> None:
    """Note that this supplier's source has the blob. Its pull may use it."""
    download.content.proven.add(supplier.file)
    download.tally.is_proven = True
    download.drop(supplier, None)
