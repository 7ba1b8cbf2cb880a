"""The life of one download: its suppliers come and go, its streams begin it, and the last thread ends it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

import structlog

from cachd.errors import CachdError, Cancelled, Changed, DiskFailed, NoSpace
from cachd.model import Extent, File
from cachd.store.content import ContentStore
from cachd.store.ingest import Ingest
from cachd.transfer.download.beginning import begin
from cachd.transfer.download.blocks import Blocks
from cachd.transfer.download.part import Part
from cachd.transfer.download.proving import prove
from cachd.transfer.download.schedule import Schedule, Stage
from cachd.transfer.download.supplier import Supplier
from cachd.transfer.download.tally import Tally
from cachd.transfer.engine import Engine

log = structlog.get_logger(__name__)


class Download:
    """The transfer of one blob, from all suppliers that joined it.

        waiting --turn--> beginning --fetch_small: the digest is right--> over
           ^                |  |  |
           |                |  |  +--prove: the blob is here--> proving --drop: each has proven--> over
           |                |  +--serve: large, or a small file that broke off--> fetching --commit--> over
           +--no space----+
              wrong digest, or the supplier failed

        any --end: failure, or the last supplier left--> over --_close: the last thread left--> closed

    The download counts the threads that work on it. When it is over, the last of them closes the ingest, so
    that no descriptor is closed under a running thread. After that, it calls `closed`, and then reports the
    outcome to the pulls.
    """

    def __init__(
        self, file: File, content: ContentStore, engine: Engine, closed: Callable[[Download], None]
    ) -> None:
        self.file, self.content, self.engine, self._closed = file, content, engine, closed
        self.tally = Tally(file)
        self.blocks = Blocks(self.tally)
        self.schedule = Schedule(engine, self.tally)
        self.ingest: Ingest | None = None  # closed by the last thread
        self._inside = 0
        self._outcome: CachdError | None = None

    # --- for the pulls ---

    @property
    def is_closed_to_others(self) -> bool:
        """Whether nobody may join, because the blob is here and its suppliers prove that they have it."""
        return self.schedule.stage is Stage.proving

    @cached_property
    def commits(self) -> Part:
        """Counts the failures to begin or to commit the file."""
        return Part(Extent(0, self.file.size))

    def join(self, supplier: Supplier) -> bool:
        """Add a supplier. Returns False if the download is over, and will be closed soon."""
        schedule = self.schedule
        with schedule.lock:
            if self.tally.is_over:
                return False
            supplier.download = self
            schedule.suppliers.append(supplier)
            self.blocks.share_with(supplier.reservation)
            supplier.queued = 1
            supplier.outcomes.expect()
        self.engine.streams.more_files(supplier.quota, 1)
        self.engine.streams.append(supplier.quota, supplier.turn)
        return True

    def leave(self, supplier: Supplier) -> None:
        """End a supplier whose pull no longer wants the file. If it is the last one, cancel the download.

        Received bytes stay, for the other suppliers or for a resume. The pull learns of the end soon after.
        """
        self.drop(supplier, self._cancelled())

    def cancel(self) -> None:
        """Cancel the download for all pulls. It ends once its threads have left. Received bytes stay."""
        self.end(self._cancelled())

    def _cancelled(self) -> Cancelled:
        path, received, size = self.file.path, self.tally.received, self.file.size
        return Cancelled(f"{path}: cancelled after {received} of {size} bytes")

    def hasten(self) -> None:
        """If it has not begun, let it begin before the other files of its pulls."""
        with self.schedule.lock:
            waits = self.schedule.stage is Stage.waiting and not self.tally.is_over
            suppliers = list(self.schedule.suppliers) if waits else []
        for each in suppliers:
            self.schedule.submit(each)

    def watch(self, now: float) -> None:
        """Move parts away from a supplier that is much slower than another one. To be called regularly."""
        schedule = self.schedule
        with schedule.lock:
            if self.tally.is_over or schedule.stage is Stage.proving or len(schedule.suppliers) < 2:
                return
            all_parts_taken = not (schedule.assembly and schedule.assembly.parts)
            schedule.suppliers.watch(now, all_parts_taken=all_parts_taken)
        schedule.call()

    # --- on a stream ---

    def turn(self, supplier: Supplier, buffer: memoryview) -> None:
        """Let a supplier's stream begin the download, fetch the next part, or continue the proof."""
        with self.inside(supplier) as inside:
            if not inside:
                return
            match self.schedule.begins(supplier):
                case Stage.waiting:
                    begin(self, supplier, buffer)
                case Stage.fetching if self.schedule.assembly is not None:
                    self.schedule.assembly.work(supplier, buffer)
                case Stage.proving:
                    prove(self, supplier, buffer)
        if not self.tally.is_over:
            self.schedule.call()

    # --- the end ---

    def inside(self, supplier: Supplier | None = None) -> AbstractContextManager[bool]:
        """A context in which the calling thread counts as working on the download. Yields False when it is
        over.

        An exception that is raised inside ends the supplier. If no supplier is given, or the disk has failed,
        it ends the download.
        """
        return _Inside(self, supplier)

    def enter(self, supplier: Supplier | None) -> bool:
        """See `inside`."""
        with self.schedule.lock:
            inside = not (self.tally.is_over or (supplier is not None and supplier.is_stopped))
            self._inside += inside
        return inside

    def failed(self, supplier: Supplier | None, error: Exception) -> None:
        """See `inside`."""
        if not isinstance(error, CachdError):
            log.error("a download failed in a way it should not", file=self.file.path, exc_info=error)
            self.end(CachdError(f"{self.file.path}: {type(error).__name__}", hint="see the daemon's log"))
        elif supplier is None or isinstance(error, NoSpace | DiskFailed):
            self.end(error)
        else:
            self.drop(supplier, error)

    def exit(self) -> None:
        """See `inside`."""
        with self.schedule.lock:
            self._inside -= 1
            is_over, assembly = self.tally.is_over, self.schedule.assembly
            close = is_over and not self._inside
            commit = not (is_over or self._inside) and assembly is not None and assembly.begins_commit()
        if close:
            self._close()
        elif commit and assembly is not None:  # after every stream has left: one may still sync the journal
            self.engine.committers.submit(assembly.commit)

    def drop(self, supplier: Supplier, outcome: CachdError | None) -> None:
        """End one supplier, because it left, failed, or has proven to have the blob.

        If it is the last one, this ends the download.
        """
        with self.schedule.lock:
            if self.tally.is_over or supplier not in self.schedule.suppliers:
                return
            is_last = len(self.schedule.suppliers) == 1
            if not is_last:
                self.schedule.suppliers.remove(supplier)
        if is_last:
            self.end(outcome)
            return
        supplier.end(outcome)
        self.schedule.call()

    def end(self, outcome: CachdError | None) -> None:
        """End the download for every supplier. Threads inside leave soon."""
        with self.schedule.lock:
            if self.tally.is_over:
                return
            self.tally.is_over, self._outcome = True, outcome
            last = not self._inside
            suppliers = list(self.schedule.suppliers)
        for each in suppliers:
            each.stop()
        if last:
            self._close()

    def _close(self) -> None:
        """Close the ingest, then report the outcome to the pulls. Called once, by the last thread."""
        if self.ingest is not None:
            if self._leaves_nothing(self._outcome) or not (self.tally.received or self._is_disk_to_blame()):
                try:
                    self.ingest.discard()
                except CachdError as error:  # such as a read-only disk: the next ingest takes it over
                    log.warning("ingest not removed", file=self.file.path, reason=error.detail)
            self.ingest.close()
        self._closed(self)
        suppliers = list(self.schedule.suppliers)
        self.schedule.suppliers.clear()  # which refer to this download, as the assembly does
        self.schedule.assembly = None
        for each in suppliers:
            each.end(self._outcome)

    def _is_disk_to_blame(self) -> bool:
        return isinstance(self._outcome, DiskFailed)

    @staticmethod
    def _leaves_nothing(outcome: CachdError | None) -> bool:
        """Whether the ingest must be discarded. After a failed sync or read (EIO) its journal is valid."""
        if isinstance(outcome, DiskFailed):
            return outcome.errno != errno.EIO
        if isinstance(outcome, NoSpace):
            return not outcome.short  # if bytes are short, only a reservation was too small
        return isinstance(outcome, Changed)


class _Inside:
    """The context of `Download.inside`. A class, as a generator would cost more for every small file."""

    __slots__ = ("_download", "_is_inside", "_supplier")

    def __init__(self, download: Download, supplier: Supplier | None) -> None:
        self._download, self._supplier = download, supplier

    def __enter__(self) -> bool:
        self._is_inside = self._download.enter(self._supplier)
        return self._is_inside

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not self._is_inside:
            return False
        try:
            if isinstance(error, Exception):
                self._download.failed(self._supplier, error)
                return True
            return False
        finally:
            self._download.exit()
