"""The life of one download: its suppliers come and go, its streams begin it, and the last thread ends it."""

from __future__ import annotations

import errno
import math
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import structlog

from cachd.errors import CachdError, Cancelled, Changed, DiskFailed, NoSpace, Unavailable
from cachd.model import Extent, File
from cachd.policy import backoff
from cachd.store.content import ContentStore
from cachd.store.ingest import Ingest
from cachd.transfer.download.assembly import SPACE_RETRY_SECONDS, Assembly
from cachd.transfer.download.blocks import Blocks
from cachd.transfer.download.part import Part
from cachd.transfer.download.proving import Proving
from cachd.transfer.download.small import MOST_BYTES, fetch_small
from cachd.transfer.download.supplier import GaveWay, Supplier
from cachd.transfer.download.suppliers import Suppliers
from cachd.transfer.download.tally import Tally
from cachd.transfer.engine import Engine
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)


class Download:
    """The transfer of one blob, from all suppliers that joined it.

        waiting --turn: _begin--> fetching in parts (assembly.py) --commit--------> over
            |  ^                     ^
            |  +--no space,          +--small file breaks off
            |     wrong digest--+    |
            +--turn: _begin--> small file (small.py) --put------------------------> over
            |
            +--turn: _begin, the blob is here--> proving (proving.py) --all proven--> over

        any --end: failure, or the last supplier left--> over --_close: the last thread left--> closed

    The download counts the threads that work on it. When it is over, the last of them closes the ingest, so
    that no descriptor is ever closed under a running thread. Only then the suppliers' `done` are resolved.

    `closed` is called once, just before that.
    """

    def __init__(
        self,
        file: File,
        content: ContentStore,
        engine: Engine,
        closed: Callable[[Download], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.file, self.content, self.engine = file, content, engine
        self.lock = threading.Lock()
        self.suppliers = Suppliers()
        self.tally = Tally(file.size)
        self.blocks = Blocks(file.size, self.tally)
        self._closed, self._clock = closed, clock
        self._inside = 0
        self._is_beginning = self._is_proving = self._over = False
        self._assembly: Assembly | None = None
        self._ingest: Ingest | None = None
        self._begun_failures: Part | None = None
        self._outcome: CachdError | None = None

    # --- for the pulls ---

    @property
    def received(self) -> int:
        """See `Tally.received`."""
        return self.tally.received

    @property
    def fetched(self) -> int:
        """Bytes received from the sources since the download began."""
        return self.tally.fetched

    @property
    def resumed(self) -> int:
        """Bytes that an earlier pull left, and that passed their check."""
        return self.tally.resumed

    @property
    def waits(self) -> Waits | None:
        """Set when an origin fails, cleared by the next byte."""
        return self.tally.waits

    @property
    def is_over(self) -> bool:
        """Whether it has ended. Each `done` is resolved once every thread has left."""
        return self._over

    @property
    def is_waiting_for_space(self) -> bool:
        """Whether it is paused until other processes leave the disk enough free space."""
        return self.blocks.is_waiting

    @property
    def is_closed_to_others(self) -> bool:
        """Whether nobody may join, because the blob is here and its suppliers prove that they have it."""
        return self._is_proving

    def join(self, supplier: Supplier) -> bool:
        """Add a supplier. Returns False when the download is over: each `done` is resolved soon."""
        with self.lock:
            if self._over:
                return False
            supplier.download = self
            self.suppliers.add(supplier)
            self.blocks.share_with(supplier.reservation)
            supplier.queued = 1
        self.engine.streams.more_files(supplier.quota, 1)
        self.engine.streams.append(supplier.quota, supplier.turn)
        return True

    def leave(self, supplier: Supplier) -> None:
        """End a supplier, whose pull wants the file no more. The last one cancels the download.

        What was received stays: for the other suppliers, or for a resume. `done` is resolved soon after.
        """
        self.drop(
            supplier,
            Cancelled(f"{self.file.path}: cancelled after {self.received} of {self.file.size} bytes"),
        )

    def cancel(self) -> None:
        """Cancel the download for all; it ends once its threads have left. What was received stays."""
        self.end(Cancelled(f"{self.file.path}: cancelled after {self.received} of {self.file.size} bytes"))

    def watch(self) -> None:
        """Move parts away from a supplier that is much slower than another one. To be called regularly."""
        now = self._clock()
        with self.lock:
            if self._over or self._is_proving or len(self.suppliers) < 2:
                return
            all_parts_taken = not (self._assembly and self._assembly.parts)
            self.suppliers.watch(now, all_parts_taken=all_parts_taken)
        self.call()

    # --- on a stream ---

    def turn(self, supplier: Supplier, buffer: memoryview) -> None:
        """Let a supplier's stream begin the download, fetch the next part, or go on with the proof."""
        with self.inside(supplier) as inside:
            if not inside:
                return
            with self.lock:
                supplier.queued -= 1
                is_begun = self._assembly is not None or self._is_proving
                begins = not (is_begun or self._is_beginning) and self._may_begin(supplier)
                self._is_beginning |= begins
            if begins:
                self._begin(supplier, buffer)
            elif self._assembly is not None:
                self._assembly.work(supplier, buffer)
            elif self._is_proving:
                self._prove(supplier, buffer)
        if not self._over:
            self.call()

    def _may_begin(self, supplier: Supplier) -> bool:
        return len(self.suppliers) == 1 or self.suppliers.most_turns(supplier, self._clock()) != 0

    def _begin(self, supplier: Supplier, buffer: memoryview) -> None:
        """Prove a blob that is here, fetch a small file completely, or begin a larger one."""
        try:
            if self.content.has(self.file):
                self._is_proving = True
                self._prove(supplier, buffer)
                return
            is_small = self.file.digest and 0 < self.file.size <= MOST_BYTES
            if is_small and not self.content.is_begun(self.file):
                fetch_small(self, supplier, buffer)
                return
            assembly = self._begin_with_space(supplier)
        except Unavailable as error:  # no file descriptor left for its ingest or its blob
            self._begun_failures = self._begun_failures or Part(Extent(0, self.file.size))
            self.retry(supplier, self._begun_failures, 0, error)
            return
        finally:
            self._is_beginning = False
        if assembly is not None:
            assembly.begin(supplier)
            self.serve(assembly)
            self.call()
            assembly.work(supplier, buffer)

    def _begin_with_space(self, supplier: Supplier) -> Assembly | None:
        """Begin the ingest; None, and nothing has begun, while a damaged blob's parts find no space."""
        rest = max(self.file.size - self.content.allocated(self.file), 0)
        if not rest or not self.content.is_set_aside(self.file.blob):
            return self.begin_assembly(supplier)
        payer = self.blocks.payer()
        with payer.grant(rest, rest) as granted:
            if not granted:
                self.wait_for_space(supplier)
                return None
            assembly = self.begin_assembly(supplier)
            self.blocks.took(assembly.ingest, granted, payer)
            return assembly

    def begin_assembly(self, supplier: Supplier) -> Assembly:
        """Begin or resume the ingest. Raises what `ContentStore.begin` raises, and Cancelled at the end.

        The caller passes the result to `serve` when it has queued the parts.
        """
        self.blocks.begin(self.content.allocated(self.file))
        ingest = self.content.begin(supplier.file, self._check)
        self._ingest = ingest
        self.tally.resumed = ingest.resumed
        supplier.listener.resumed(ingest.resumed)
        return Assembly(self, ingest)

    def _check(self) -> None:
        if self._over:
            raise Cancelled(f"{self.file.path}: cancelled while its ingest was read back")

    def serve(self, assembly: Assembly) -> None:
        """Let all suppliers fetch parts of the file."""
        self._assembly = assembly

    def _prove(self, supplier: Supplier, buffer: memoryview) -> None:
        """Go on with one supplier's proof; none is needed for an empty file, or if it was given before."""
        if self.content.proven.has(supplier.file):  # another pull of the same source proved it meanwhile
            self.drop(supplier, None)
        elif not self.file.size:
            self.has_proven(supplier)
        else:
            supplier.proving = supplier.proving or Proving(self, supplier)
            supplier.proving.run(buffer)

    def has_proven(self, supplier: Supplier) -> None:
        """Note that this supplier's source has the blob. Its pull may use it."""
        self.content.proven.add(supplier.file)
        self.tally.is_proven = True
        self.drop(supplier, None)

    # --- turns ---

    def call(self) -> None:
        """Queue a turn on a stream for each part that a supplier may take."""
        now = self._clock()
        turns: list[tuple[Supplier, int]] = []
        later: list[tuple[Supplier, float]] = []
        with self.lock:
            if self._over or self._is_beginning:
                return
            for each in self.suppliers:
                if (count := self._turns_for(each, now)) > 0:
                    each.queued += count
                    turns.append((each, count))
                elif self._assembly and (due := self._assembly.next_due(each, now)) < each.called_at:
                    each.called_at = due
                    later.append((each, due - now))
        for each, count in turns:
            self.engine.streams.submit(each.quota, *[each.turn] * count)
        for each, seconds in later:
            self.engine.streams.submit_later(each.quota, each.turn_later, seconds)

    def _turns_for(self, supplier: Supplier, now: float) -> int:
        """How many more turns the supplier needs. The caller holds the lock."""
        if self._assembly is not None:
            return self._assembly.turns_for(supplier, now)
        is_called = supplier.queued > 0 or supplier.called_at < math.inf
        if self._is_proving:
            return 0 if is_called or supplier.proving else 1
        return 0 if is_called or not self._may_begin(supplier) else 1

    def submit(self, supplier: Supplier) -> None:
        """Queue a turn of the supplier before the other tasks of its pull."""
        with self.lock:
            supplier.queued += 1
        self.engine.streams.submit(supplier.quota, supplier.turn)

    def append(self, supplier: Supplier) -> None:
        """Queue a turn of the supplier after the other tasks of its pull."""
        with self.lock:
            supplier.queued += 1
        self.engine.streams.append(supplier.quota, supplier.turn)

    def should_yield(self, supplier: Supplier) -> bool:
        """See `Streams.should_yield`."""
        return self.engine.streams.should_yield(supplier.quota)

    def retry(self, supplier: Supplier, part: Part, at: int, error: Unavailable) -> None:
        """Let the supplier take a turn again after its failure. Raises `error` after too many of them."""
        if self._over or supplier.is_stopped:
            return
        if isinstance(error, GaveWay):
            self.append(supplier)
        else:
            self._call_later(supplier, self.retry_seconds(supplier, part, at, error))

    def retry_seconds(self, supplier: Supplier, part: Part, at: int, error: Unavailable | Cancelled) -> float:
        """Count a failure at byte `at`. Returns the seconds to wait; raises `error` after too many."""
        failures = part.failed(at)
        if failures > self.engine.retries or not isinstance(error, Unavailable):
            raise error
        seconds = backoff.delay(failures, told=error.retry_after, chance=random.random())  # noqa: S311
        supplier.listener.retried(error)
        log.info(
            "part will be retried", file=self.file.path, at=at, code=error.code, in_seconds=round(seconds, 1)
        )
        self.tally.waits = Waits(Reason.origin, time.time() + seconds, error.detail)
        with self.lock:
            self.suppliers.failed(supplier, self._clock(), seconds)
        return seconds

    def wait_for_space(self, supplier: Supplier | None = None) -> None:
        """Note that bytes found no space: another process fills the disk, and the reserve must stay free.

        `supplier` takes a turn again soon.
        """
        if not self.blocks.is_waiting:
            log.warning("paused: the disk is at its reserve", file=self.file.path, size_bytes=self.file.size)
        self.blocks.is_waiting = True
        if supplier is not None:
            self._call_later(supplier, SPACE_RETRY_SECONDS)

    def _call_later(self, supplier: Supplier, seconds: float) -> None:
        supplier.called_at = self._clock() + seconds
        self.engine.streams.submit_later(supplier.quota, supplier.turn_later, seconds)

    def ask_anew(self, supplier: Supplier, missing: Collection[Part]) -> int:
        """Prepare to fetch parts again after a wrong digest, over new connections. Returns their bytes."""
        size = sum(part.extent.size for part in missing)
        log.warning("wrong digest: fetching again", file=self.file.path, size_bytes=size)
        self.tally.forget(size)
        supplier.source.anew()
        return size

    # --- the end ---

    @contextmanager
    def inside(self, supplier: Supplier | None = None) -> Iterator[bool]:
        """Count the calling thread as working on the download. Yields False when it is over.

        A failure that is raised inside ends the supplier; if there is none, or the disk failed, the download.
        """
        with self.lock:
            inside = not (self._over or (supplier is not None and supplier.is_stopped))
            self._inside += inside
        if not inside:
            yield False
            return
        try:
            yield True
        except (NoSpace, DiskFailed) as error:
            self.end(error)
        except CachdError as error:
            if supplier is None:
                self.end(error)
            else:
                self.drop(supplier, error)
        except Exception as error:
            log.exception("a download failed in a way it should not", file=self.file.path)
            self.end(CachdError(f"{self.file.path}: {type(error).__name__}", hint="see the daemon's log"))
        finally:
            self._leave()

    def _leave(self) -> None:
        with self.lock:
            self._inside -= 1
            close = self._over and not self._inside
            assembly = self._assembly
            commit = not (self._over or self._inside) and assembly is not None and assembly.begins_commit()
        if close:
            self._close()
        elif commit and assembly is not None:  # after every stream has left: one may still sync the journal
            self.engine.committers.submit(assembly.commit)

    def drop(self, supplier: Supplier, outcome: CachdError | None) -> None:
        """End one supplier: it left, failed, or has proven to have the blob. The last ends the download."""
        with self.lock:
            if self._over or supplier not in self.suppliers:
                return
            is_last = len(self.suppliers) == 1
            if not is_last:
                self.suppliers.remove(supplier)
        if is_last:
            self.end(outcome)
            return
        supplier.end(outcome)
        self.call()

    def end(self, outcome: CachdError | None) -> None:
        """End the download for every supplier. Threads inside leave soon."""
        with self.lock:
            if self._over:
                return
            self._over, self._outcome = True, outcome
            last = not self._inside
            suppliers = list(self.suppliers)
        for each in suppliers:
            each.stop()
        if last:
            self._close()

    def _close(self) -> None:
        """Close the ingest, then resolve `done`. Called once, when the last thread has left."""
        if self._ingest is not None:
            if self._leaves_nothing(self._outcome) or not (self.received or self._is_disk_to_blame()):
                try:
                    self._ingest.discard()
                except CachdError as error:  # such as a read-only disk: the next ingest takes it over
                    log.warning("ingest not removed", file=self.file.path, reason=error.detail)
            self._ingest.close()
        self._closed(self)
        suppliers = list(self.suppliers)
        self.suppliers.clear()  # which refer to this download
        self._assembly = None
        for each in suppliers:
            each.end(self._outcome)

    def _is_disk_to_blame(self) -> bool:
        return isinstance(self._outcome, DiskFailed)

    @staticmethod
    def _leaves_nothing(outcome: CachdError | None) -> bool:
        """Whether the ingest must be discarded. After a failed sync or read (EIO) its journal is valid."""
        if isinstance(outcome, DiskFailed):
            return outcome.facts.get("errno") != errno.EIO
        if isinstance(outcome, NoSpace):
            return "short" not in outcome.facts  # with "short", only a reservation was too small
        return isinstance(outcome, Changed)
