"""A stream's turn at a part: receives its bytes, writes and hashes them, and records them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from cachd.errors import CachdError
from cachd.model import Extent
from cachd.sources.source import Body
from cachd.transfer.download.blocks import NoSpaceNow
from cachd.transfer.download.part import Part
from cachd.transfer.download.supplier import Supplier

if TYPE_CHECKING:
    from cachd.transfer.download.assembly import Assembly

log = structlog.get_logger(__name__)

YIELD_AFTER_SECONDS = 1.0  # a stream works on one thing for so long before it may yield to another pull


class Turn:
    """One supplier's work with one stream's buffer. `part`: the part that it works on."""

    def __init__(
        self,
        assembly: Assembly,
        supplier: Supplier,
        part: Part,
        buffer: memoryview,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.part = part
        self._assembly, self._supplier, self._buffer, self._clock = assembly, supplier, buffer, clock
        self._ingest, self._streams = assembly.ingest, assembly.engine.streams

    def fetch(self) -> None:
        """Fetch the rest of the part, unless the stream must yield or the supplier stops.

        Raises NoRanges, NoSpaceNow, what `Supplier.open` raises, and what an ingest raises.
        """
        with self._supplier.open(self.part.rest, self.part) as body:
            self._copy(body)

    def fetch_in_order(self) -> None:
        """Read the complete file from its first byte, for a source that sends no less.

        Missing parts are taken as they come by; the bytes of other parts are dropped. Raises as `fetch`.
        """
        read, size = 0, self._ingest.file.size
        with self._supplier.open(Extent(0, size), self.part) as body:
            while not self._supplier.is_stopped:
                self._supplier.skip(body, self.part.reached - read, self._buffer)
                self._copy(body)
                read = self.part.reached
                following = self._assembly.take(self._supplier, at_least=read) if read < size else None
                if following is None:
                    return
                self.part = following

    def _copy(self, body: Body) -> None:
        """Write the bytes of `body` into the ingest; hash the file on the way if nobody else does."""
        part, assembly = self.part, self._assembly
        assembly.comes_from(self._supplier)
        part.sender, part.hash = self._supplier, part.hash or self._ingest.part_hash()
        alone = self._streams.has_a_file_each(self._supplier.quota)
        hashes = alone and assembly.following.join_in(part.reached)
        try:
            self._receive(body, part, hashes=hashes)
        finally:
            if hashes:
                assembly.following.leave()
        if not self._ingest.is_hashed:
            assembly.following.go_on()

    def _receive(self, body: Body, part: Part, *, hashes: bool) -> None:
        """Receive until the part is complete. `hashes`: this stream also hashes the file."""
        began, ingest, supplier = self._clock(), self._ingest, self._supplier
        try:
            while not (part.reached == part.extent.stop or supplier.is_stopped):
                is_long = self._clock() - began > YIELD_AFTER_SECONDS
                if (is_long or self._streams.is_one_too_many) and self._yields():
                    break
                most = self._assembly.unkept_bytes - (part.reached - part.kept)
                if most <= 0:  # more streams are at work than when these bytes came
                    keep(self._assembly, part)
                    continue
                view = supplier.read(body, self._buffer[: min(most, part.extent.stop - part.reached)])
                self._assembly.blocks.allocate(ingest, part, len(view))
                write(self._assembly, part, view)
                if hashes:
                    ingest.take(view)
                if len(view) > most - len(view):  # less is left than was received
                    keep(self._assembly, part)
                    kept = Extent(part.extent.start, part.reached)
                    if not part.is_complete and ingest.offer.wants_sync(kept):
                        ingest.finish(kept)
                self._assembly.following.go_on()
        except (CachdError, NoSpaceNow):
            keep(self._assembly, part)
            raise
        if part.is_complete and not supplier.is_stopped:
            assert part.hash
            ingest.finish(part.extent)
            self._assembly.vouchers.note(part.extent, part.hash.hexdigest, supplier.origin)
        else:  # no sync: a cancelled download must not wait for the disk
            keep(self._assembly, part)

    def _yields(self) -> bool:
        """Whether another pull, or the lower number of streams, requires that this stream ends its turn."""
        if not (self._supplier.has_ranges and self._streams.should_yield(self._supplier.quota)):
            return False
        log.debug("part queued again", path=self._ingest.file.path, at=self.part.reached)
        return True


def write(assembly: Assembly, part: Part, view: memoryview) -> None:
    """Write and hash the next bytes of a part. Raises what an ingest raises.

    A complete part is noted before its bytes count as received: as soon as all bytes do, another thread may
    complete the digest, for which it needs the hashes of all parts.
    """
    assert part.hash
    assembly.ingest.write(part.reached, view)
    part.hash.update(view)
    part.reached += len(view)
    if part.is_complete:
        keep(assembly, part)
    assembly.ingest.received(Extent(part.extent.start, part.reached))


def keep(assembly: Assembly, part: Part) -> None:
    """Note the part's received bytes, so that they survive this process."""
    if part.hash and part.reached > part.kept:
        assembly.ingest.keep(Extent(part.extent.start, part.reached), part.hash)
        part.kept = part.reached
