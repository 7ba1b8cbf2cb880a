"""Pays for the disk blocks of a file from the reservations of the pulls that wait for it.

Blocks are allocated only for bytes that have arrived. So a size that a source merely claims takes no space
and evicts no model.
"""

from __future__ import annotations

import threading

from cachd.errors import NoSpace
from cachd.model import Extent
from cachd.store.ingest import Ingest
from cachd.store.overhead import beside_file
from cachd.store.space import Reservation
from cachd.transfer.download.part import Part
from cachd.transfer.download.tally import Tally

_ALLOCATE_BYTES = 8 << 20  # blocks are allocated this far ahead of the bytes that have arrived


class NoSpaceNow(Exception):
    """Another process has taken the disk space that was reserved for bytes that have arrived."""


class Blocks:
    """The disk blocks of one file. Safe from any thread.

    Bytes that arrive and find no space are dropped. Nothing is requested again until there is space.
    """

    def __init__(self, tally: Tally) -> None:
        self._file, self._size, self._tally = tally.file, tally.file.size, tally
        self._lock = threading.Lock()
        self._reservations: list[Reservation] = []
        self._allocated = 0  # bytes of disk of the ingest, when last measured

    def share_with(self, reservation: Reservation) -> None:
        """Add the reservation of another pull that waits for this file: its space may be used, too."""
        with self._lock:
            self._reservations.append(reservation)

    def payer(self) -> Reservation:
        """The reservation that pays for the next blocks: that of a pull that has not ended."""
        with self._lock:
            return next((p for p in self._reservations if not p.has_ended), self._reservations[0])

    def begin(self, allocated: int) -> None:
        """Note the blocks that the ingest has already."""
        self._allocated = allocated

    def begin_ingest(self) -> None:
        """Reserve what the ingest of a small file takes, because it did not arrive in one piece."""
        with self._lock:
            reservations = list(self._reservations)
        for each in reservations:
            each.expect(self._file.blob, beside_file(self._file, by_ingest=True))

    def check_space(self, ingest: Ingest, part: Part) -> None:
        """Raise NoSpaceNow if a part should not be asked for yet, because bytes of the file found no space.

        Bytes of the part that were dropped get their blocks now. Raises NoSpace as `allocate` does.
        """
        if part.lacking:
            self.allocate(ingest, part, part.lacking)
            part.lacking = 0
            return
        size = min(part.rest.size, _ALLOCATE_BYTES)
        if self._tally.is_waiting_for_space and not self.payer().has_space_for(size):
            raise NoSpaceNow

    def allocate(self, ingest: Ingest, part: Part, count: int) -> None:
        """Allocate blocks for the next `count` bytes of a part, which have arrived.

        Raises NoSpace, or NoSpaceNow when another process has taken the reserved space.
        """
        least = part.reached + count - part.allocated
        least = min(least, self._size - self._allocated)  # a resumed ingest has some blocks already
        if least <= 0:
            return
        payer = self.payer()
        most = max(min(_ALLOCATE_BYTES, part.extent.stop - part.allocated), least)
        with payer.grant(least, most) as granted:
            if not granted:
                self._drop(part, count)
                raise NoSpaceNow
            self._tally.is_waiting_for_space = False
            stop = max(min(part.allocated + granted, part.extent.stop), part.reached + count)
            try:
                ingest.allocate(Extent(part.allocated, stop))
            except NoSpace:
                payer.return_unused(granted)
                if payer.has_space_for(least):  # statvfs shows free space: a quota or the like is exhausted
                    raise
                self._drop(part, count)
                raise NoSpaceNow from None
            part.allocated = stop
            self.took(ingest, granted, payer)

    def _drop(self, part: Part, count: int) -> None:
        """Count the bytes as missing again, unless they were dropped before."""
        if not part.lacking:
            self._tally.forget(count)
        part.lacking = count

    def took(self, ingest: Ingest, granted: int = 0, payer: Reservation | None = None) -> None:
        """Charge newly allocated bytes to the reservations of all pulls that wait for the file."""
        with self._lock:
            now = ingest.allocated
            count, self._allocated = now - self._allocated, now
        if payer:
            payer.return_unused(granted - count)
        self.spend_in_others(payer, count)

    def spend_in_others(self, payer: Reservation | None, count: int) -> None:
        """Charge `count` bytes to all reservations but the payer's."""
        if payer is not None and len(self._reservations) == 1:
            return
        with self._lock:
            others = [each for each in self._reservations if each is not payer]
        for each in others:
            each.spend(count)

    def has_space_again(self, size: int) -> bool:
        """Whether `size` bytes that had arrived, and were dropped for lack of space, have space now.

        Evicts for them what was chosen for the pull. Raises NoSpace.
        """
        payer = self.payer()
        with payer.grant(size, size) as granted:
            payer.return_unused(granted)
        return bool(granted)
