"""Assembles a file from parts in an ingest, verifies it, repairs it, and commits it.

A wrong digest is repaired. Parts that the disk lost or changed after they arrived are fetched again, once. If
the disk has exactly what arrived, a source was wrong: vouchers.py says whose parts are fetched again. Each
source gets a second chance, over new connections. If a complete file from it is wrong again, it fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import structlog

from cachd.errors import Cancelled, Corrupt, Unavailable
from cachd.model import Extent
from cachd.policy.parts import part_bytes, split, unkept_bytes
from cachd.sources.source import NoRanges
from cachd.store.digests import corrupt
from cachd.store.ingest import Ingest
from cachd.transfer.download.blocks import NoSpaceNow
from cachd.transfer.download.following import Following
from cachd.transfer.download.part import Part, Parts
from cachd.transfer.download.schedule import SPACE_RETRY_SECONDS, Stage
from cachd.transfer.download.supplier import GaveWay, Supplier
from cachd.transfer.download.turn import Turn
from cachd.transfer.download.vouchers import Vouchers

if TYPE_CHECKING:
    from cachd.transfer.download.download import Download

log = structlog.get_logger(__name__)

_SHARING = 4  # while each stream has a file of its own, parts are sized as if so many streams shared it
_MOVED_SECONDS = 1.0  # for so long, only other suppliers may take a part that was taken from a supplier
_MAX_ROUNDS = 16  # of repairs, when several suppliers were wrong in turn


class Assembly:
    """One file that arrives in parts. `ingest`: where they are written.

        fetching --work: a part at a time--> complete --following--> hashed --commit--> committed
           ^                                                            |
           +---------------------- _repair: digest wrong ---------------+

    No stream and no hashing thread is inside when the file is committed or repaired.
    """

    def __init__(
        self, download: Download, ingest: Ingest, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ingest, self.engine, self.blocks = ingest, download.engine, download.blocks
        self.following = Following(ingest, download, download.engine)
        self.vouchers = Vouchers()
        self.parts = Parts()
        self._download, self._schedule, self._tally = download, download.schedule, download.tally
        self._clock = clock
        self._is_committing = False
        self._rounds = 0  # of repairs

    @property
    def unkept_bytes(self) -> int:
        """Bytes that a stream may receive before it records them."""
        return unkept_bytes(self.engine.streams.at_work)

    @classmethod
    def begun(cls, download: Download, supplier: Supplier) -> Self:
        """Begin or resume the ingest. Raises what `ContentStore.begin` raises; Cancelled when all have left.

        The caller queues the parts, and then calls `serve`.
        """

        def check() -> None:
            if download.tally.is_over:
                raise Cancelled(f"{download.file.path}: cancelled while its ingest was read back")

        content = download.content
        download.blocks.begin(content.allocated(download.file))
        ingest = download.ingest = content.begin(supplier.file, check)
        download.tally.resumed = ingest.resumed
        supplier.listener.resumed(ingest.resumed)
        return cls(download, ingest)

    # --- on a stream ---

    def begin(self, supplier: Supplier) -> None:
        """Queue the missing parts."""
        self.parts.add(self._missing(supplier))
        self.following.go_on()

    def serve(self) -> None:
        """Let all suppliers fetch parts of the file."""
        self._schedule.assembly, self._schedule.stage = self, Stage.fetching

    def _missing(self, supplier: Supplier) -> list[Part]:
        streams = self.engine.streams
        sharing = _SHARING if streams.has_a_file_each(supplier.quota) else streams.most
        length = part_bytes(self.ingest.file.size, min(sharing, streams.most))
        return [Part(extent) for gap in self.ingest.gaps() for extent in split(gap, length)]

    def comes_from(self, supplier: Supplier) -> None:
        """Note, before its first byte is written, that bytes of this supplier's source are in the ingest."""
        self.ingest.comes_from(supplier.file)

    def turns_for(self, supplier: Supplier, now: float) -> int:
        """How many more turns the supplier shall queue. The caller holds the download's lock."""
        count = self.parts.count(supplier, now)
        if not count:
            return 0
        if self.engine.streams.has_a_file_each(supplier.quota):
            count = min(count, 1 - supplier.running)
        most = self._schedule.suppliers.most_turns(supplier, now)
        if most is not None:
            count = min(count, most - supplier.running)
        return count - supplier.queued

    def next_due(self, supplier: Supplier, now: float) -> float:
        """When the supplier may take a part that waits. The caller holds the download's lock."""
        due = self.parts.next_due(supplier, now)
        if self.parts and now < supplier.rests_until:
            due = min(due, supplier.rests_until)
        return due

    def take(self, supplier: Supplier, *, at_least: int = 0) -> Part | None:
        """Take the next part for the supplier, which starts at byte `at_least` or later; None: none now."""
        now = self._clock()
        with self._schedule.lock:
            part = self.parts.take(supplier, now, at_least=at_least)
            if part is None:
                return None
            rest = part.rest_for(supplier)
            if rest is not part and part.hash and part.sender:
                sent = Extent(part.extent.start, part.reached)
                self.vouchers.note(sent, part.hash.hexdigest, part.sender.origin)
            return rest

    def work(self, supplier: Supplier, buffer: memoryview) -> None:
        """Fetch the next part that the supplier may take, if there is one.

        A part that breaks off is queued again. Raises what makes the supplier, or the download, fail.
        """
        now = self._clock()
        with self._schedule.lock:
            most = self._schedule.suppliers.most_turns(supplier, now)
            if most is not None and supplier.running >= most:
                return
            supplier.running += 1
        part = self.take(supplier)
        turn = None
        try:
            if part is not None:
                turn = Turn(self, supplier, part, buffer)
                self._run(turn, supplier, part)
        finally:
            with self._schedule.lock:
                supplier.running -= 1
                if turn is not None and not turn.part.is_complete:
                    self.parts.put_back(turn.part)

    def _run(self, turn: Turn, supplier: Supplier, part: Part) -> None:
        try:
            self.blocks.check_space(self.ingest, part)
            if supplier.has_ranges:
                turn.fetch()
            else:
                turn.fetch_in_order()
        except NoRanges:
            supplier.has_ranges = False
            log.info("no ranges: one stream", file=supplier.file.path, origin=supplier.origin)
        except NoSpaceNow:
            self._schedule.wait_for_space()
            if supplier.has_ranges:
                turn.part.wait(self._clock() + SPACE_RETRY_SECONDS)
            else:
                supplier.rests_until = self._clock() + SPACE_RETRY_SECONDS
        except (Unavailable, Cancelled) as error:
            self.broke_off(supplier, turn.part, error)

    def broke_off(self, supplier: Supplier, part: Part, error: Unavailable | Cancelled) -> None:
        """Decide when an unfinished part is retried. The caller queues it. Raises `error` if none is left."""
        if supplier.is_stopped:
            return
        if isinstance(error, GaveWay):
            if len(self._schedule.suppliers) > 1:
                part.wait(self._clock() + _MOVED_SECONDS, supplier)
            else:
                self._schedule.append(supplier)
            return
        seconds = self._schedule.retry_seconds(supplier, part, part.reached, error)
        if supplier.has_ranges:  # else the supplier rests, because it would read past this part to the next
            part.wait(self._clock() + seconds, supplier)

    # --- on a committing thread ---

    def begins_commit(self) -> bool:
        """Whether the caller must submit `commit`: the file is hashed, and nobody has begun to commit it.

        The caller holds the download's lock.
        """
        if self._is_committing or not self.ingest.is_hashed:
            return False
        self._is_committing = True
        return True

    def commit(self) -> None:
        """Commit the hashed file, or repair a wrong digest. No other thread works on the ingest meanwhile."""
        with self._download.inside() as inside:
            if not inside:
                return
            if not self.ingest.agrees:
                self._repair()
                return
            self.blocks.took(self.ingest)
            try:
                self._download.content.commit(self.ingest)  # point of no return: the blob is here
            except Unavailable as error:  # no file descriptor left for the commit
                self._commit_later(error)
            else:
                self._download.end(None)

    def _commit_later(self, error: Unavailable) -> None:
        supplier = self._schedule.suppliers.best(self._clock())
        seconds = self._schedule.retry_seconds(supplier, self._download.commits, 0, error)
        self.engine.streams.submit_later(supplier.quota, lambda _: self.commit(), seconds)

    def _repair(self) -> None:
        """Fetch the parts again that the disk damaged, or else those of a source that may be wrong."""
        got, parts = str(self.ingest.digest()), self.ingest.parts
        self._rounds += 1
        spoiled: frozenset[Extent] = frozenset()
        if self._rounds == 1:
            spoiled = self.ingest.spoiled(self.engine.hash_buffer())
        blamed = self._blame(got, parts, is_disk=bool(spoiled))
        if not len(self._schedule.suppliers):
            return
        best = self._best(parts)
        if spoiled:
            forget = spoiled
        elif best.origin in blamed:
            forget = parts
        else:
            forget = self.vouchers.not_of(best.origin, parts)
        self.ingest.forget(forget)
        missing = self._missing(best)
        size = sum(part.extent.size for part in missing)
        ask_anew(best, size, "disk" if spoiled else "source")
        with self._schedule.lock:
            self.parts.add(missing)
            self._is_committing = False
            self.following.leave()
        self._schedule.call()

    def _blame(self, got: str, parts: frozenset[Extent], *, is_disk: bool) -> set[str]:
        """Blame the origins that sent the complete file, which is wrong. Those blamed before fail.

        Returns the blamed origins. `is_disk`: the disk changed bytes after they arrived. Then nobody is
        blamed, except a single origin, so that its file is fetched again only once. Raises Corrupt when no
        supplier is left.
        """
        suppliers = list(self._schedule.suppliers)
        origins = {each.origin for each in suppliers}
        if is_disk and len(origins) > 1:
            return set()
        blamed = origins if len(origins) == 1 else self.vouchers.complete(parts)
        failed = [each for each in suppliers if each.origin in blamed and each.wrong]
        if len(failed) == len(suppliers) or self._rounds > _MAX_ROUNDS:
            try:
                self._download.content.commit(self.ingest)  # discards the ingest, and raises Corrupt
            except Corrupt as error:
                raise explained(error, suppliers[0].wrong) from None
        for each in suppliers:
            if each in failed:
                self._download.drop(each, explained(corrupt(each.file, self.ingest.digest()), each.wrong))
            elif each.origin in blamed:
                each.wrong = got
        return blamed

    def _best(self, parts: frozenset[Extent]) -> Supplier:
        """Choose the supplier that completes the file. From now on, only one serves at a time."""
        with self._schedule.lock:
            suppliers = self._schedule.suppliers
            suppliers.take_turns = True
            for each in suppliers:
                each.vouched = self.vouchers.bytes_of(each.origin, parts)
            return suppliers.best(self._clock())


def ask_anew(supplier: Supplier, size: int, reason: str) -> None:
    """Prepare to fetch `size` bytes again after a wrong digest, over new connections."""
    path = supplier.file.path
    log.warning("wrong digest: fetching again", file=path, reason=reason, size_bytes=size)
    supplier.listener.mismatched(reason, size)
    supplier.download.tally.forget(size)
    supplier.source.anew()


def explained(error: Corrupt, before: str) -> Corrupt:
    """The error, with a hint if the wrong digest is the same as `before`."""
    if error.got == before:
        error.hint = "the source sent the same bytes twice: its copy is damaged, or its digest is wrong"
    return error
