"""Verifies one published blob by reading it."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from cachd.errors import CachdError
from cachd.metrics import Metrics
from cachd.model import File
from cachd.store.content.blobs import inode_of
from cachd.store.digests import NO_SHA256, Hasher, in_order
from cachd.store.scrub import Replaced, verify_blob
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.upkeep.repairs import Repairs

log = structlog.get_logger(__name__)


class BlobChecks:
    """Verifies blobs. Safe from any thread."""

    def __init__(self, store: Store, repairs: Repairs, scrub_log: ScrubLog, metrics: Metrics) -> None:
        self._store, self._repairs = store, repairs
        self._scrub_log, self._metrics = scrub_log, metrics

    def check(self, file: File, took: Callable[[int], None]) -> str | None:
        """Read a blob and its copies, and compare their digests; start a repair if one is damaged.

        `took` is called with the bytes of each read, and may raise Cancelled. Returns what is wrong; None
        when nothing is. Also raises Leased, Unavailable or DiskFailed.
        """

        def counted(count: int) -> None:
            self._metrics.scrub_bytes.inc(count)
            took(count)

        path, reads = self._store.content.path(file.blob), self._store.content.reads
        inode = self._store.content.inode(file.blob)
        try:
            beside = self._hasher_beside(file)
            wrong = verify_blob(path, file, reads, counted, beside=beside)
            if not wrong and beside:
                self._store.content.hashes.note(file.blob, beside.digest())
            if wrong:  # read a second time: an error that does not repeat is no damage on disk
                wrong = verify_blob(path, file, reads, lambda _: took(0))
        except Replaced:
            return None
        if not wrong:
            wrong = self._wrong_copy(file, counted)
            if not wrong:
                self._scrub_log.verified(file.blob)
            return wrong
        return wrong if self._repairs.repair_blob(file, wrong, inode) else None

    def _wrong_copy(self, file: File, took: Callable[[int], None]) -> str | None:
        """Read all copies of an intact blob. Starts a repair if one is damaged, and returns what is wrong."""
        copies = self._store.copies
        for place in copies.of_blob(file.blob):
            inode = inode_of(place)
            wrong = copies.wrong(file, place, took)
            if wrong:  # read a second time, as a blob is
                wrong = copies.wrong(file, place, lambda _: took(0))
            if wrong and self._repairs.repair_copy(file, place, wrong, inode):
                return f"a copy of it in a view: {wrong}"
        return None

    def record_hashes(self) -> None:
        """Write the sha256 that `check` computed of blobs with a weaker digest into their manifests."""
        try:
            self._store.manifests.record_hashes()
        except CachdError as error:
            log.warning("sha256 not recorded", reason=error.detail)

    def _hasher_beside(self, file: File) -> Hasher | None:
        """A hasher that computes the sha256 of a blob with a weaker digest; None if it is not needed."""
        is_needed = file.digest and not file.is_named_by_content and not self._store.content.hashes.of(file)
        return in_order(NO_SHA256, file.size) if is_needed else None
