"""Downloads one file: streams write its parts into an ingest, the digest is computed, the blob is committed.

Retries happen only here. A part that breaks off is resumed where it stopped. After more than `retries`
failures without 64 KiB of progress between them, the part fails the download; an origin that sends one byte
per request ends that way, too.

While a pull has at least one file per stream, each stream fetches one file, part after part, and hashes the
bytes as they arrive, while they are in the processor's cache. Hashing limits a pull of many shards on few
cores. When there are fewer files than streams, several streams share a file and a hashing thread hashes it.

Disk blocks are allocated only for bytes that have arrived, from the reservation of a pull that waits for the
file. So a size that a source merely claims takes no space and evicts no model.

A wrong digest is repaired once. Parts that the disk lost or changed after they arrived are fetched again. If
the disk holds exactly what arrived, nothing says which part is wrong, because sources publish no hashes of
parts: then the complete file is fetched again over new connections. If the digest is wrong again, the file is
discarded and the download ends with `Corrupt`.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress

import structlog

from cachd.errors import CachdError, Cancelled, Changed, Corrupt, DiskFailed, NoSpace, Unavailable
from cachd.kernel import threads
from cachd.model import Extent, File
from cachd.policy import backoff
from cachd.policy.parts import part_bytes, split, unkept_bytes
from cachd.sources.source import Body, CancelToken, NoRanges, Source
from cachd.store.content import ContentStore, corrupt
from cachd.store.digests import PartHash
from cachd.store.ingest import Ingest
from cachd.store.space import Reservation
from cachd.transfer.cores import together
from cachd.transfer.engine import Engine
from cachd.transfer.proof import Proof
from cachd.transfer.streams import SLOW_SECONDS, StreamQuota
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

_FOLLOW_BYTES = 4 << 20
_PROGRESS_BYTES = 64 << 10
_YIELD_AFTER_SECONDS = 1.0  # a stream runs its task so long before it may yield to another pull
_SMALL_BYTES = 256 << 10  # must fit into a stream's buffer
_ONE_CORE_BYTES = 128 << 10  # larger requests keep a core busy: their threads are not gathered on one core
_STEP_BYTES = 64 << 10
_SHARING = 4  # while each stream has a file, parts are sized as if this many streams shared it
_SPACE_RETRY_SECONDS = 0.5
_NO_RANGES_SLOW_SECONDS = 30.0  # more patience, because a file without ranges starts over from byte 0
_ALLOCATE_BYTES = 8 << 20  # blocks are allocated this far ahead of the bytes that have arrived


class GaveWay(Unavailable):
    """The stream was taken for another pull, because this download's origin sent hardly anything."""


class _NoSpaceNow(Exception):
    """Another process has taken the disk space that was reserved for bytes that have arrived."""


class Part:
    """An extent that is being fetched.

    Bytes up to `reached` have arrived, those up to `kept` survive a death of the process, and those up to
    `allocated` have disk blocks. `hash` covers the bytes that have arrived.
    """

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.reached = self.kept = self.allocated = extent.start
        self.hash: PartHash | None = None  # created with the first byte, since many parts are only queued
        self._failures = 0
        self._failed_at = extent.start

    @property
    def rest(self) -> Extent:
        return Extent(self.reached, self.extent.stop)

    def failed(self, at: int) -> int:
        """Count a failure at byte `at` of the file. Returns the failures since the last progress."""
        if at - self._failed_at >= _PROGRESS_BYTES:
            self._failures, self._failed_at = 0, at
        self._failures += 1
        return self._failures


class Download:
    """The transfer of one blob. `done` resolves when the blob is committed, or raises the CachdError.

    The download counts the threads that work on it. When it is over, the last of them closes the ingest, so
    that no descriptor is ever closed under a running thread.
    """

    def __init__(
        self,
        scheme: str,
        source: Source,
        file: File,
        content: ContentStore,
        engine: Engine,
        reservation: Reservation,
        *,
        prefix: str = "",
    ) -> None:
        self._prefix = prefix
        self.file = file
        self.done: Future[None] = Future()
        self.done.set_running_or_notify_cancel()
        self.callers = 1
        self.resumed = 0
        self._scheme, self._source, self._content, self._engine = scheme, source, content, engine
        self._reservations = [reservation]
        self._allocated = 0  # bytes of disk of the ingest, when last measured
        self._received = engine.metrics.download_bytes.labels(scheme)
        self._unkept_bytes = unkept_bytes(engine.streams.most)
        self._quota = StreamQuota()
        self._lock = threading.Lock()
        self._ingest: Ingest | None = None
        self._fetched = self._forgotten = 0
        self._wrong = ""  # the wrong digest that the repair was for; empty before a repair
        self._cancel_token = CancelToken()
        self._inside = 0
        self._following = False
        self._by_parts = True
        self._later: deque[Part] = deque()  # parts not yet given to a stream, while each stream has a file
        self._everything = Part(Extent(0, file.size))
        self._committing = False
        self._waits_for_space = False
        self._proof: Proof | None = None
        self._is_proven = False
        self._over = False
        self._outcome: CachdError | None = None
        self.waits: Waits | None = None  # set when its origin fails, cleared by the next byte

    # --- for the pull ---

    @property
    def received(self) -> int:
        """Bytes of the file that are on this node, resumed ones included. Bytes fetched twice count once."""
        if self._is_proven:
            return self.file.size
        return min(self.resumed + self._fetched - self._forgotten, self.file.size)

    @property
    def is_over(self) -> bool:
        """Whether it has ended. `done` is set soon after, once every thread has left."""
        return self._over

    @property
    def is_waiting_for_space(self) -> bool:
        """Whether it is paused until other processes leave the disk enough free space."""
        return self._waits_for_space

    @property
    def fetched(self) -> int:
        """Bytes received from the source since the download began."""
        return self._fetched

    def share_with(self, reservation: Reservation) -> None:
        """Add the reservation of another pull that waits for this file: its space may be used, too."""
        with self._lock:
            self._reservations.append(reservation)

    def start(self, quota: StreamQuota) -> None:
        """Queue the download behind the tasks that the pull's stream quota already holds."""
        self._quota = quota
        self._engine.streams.more_files(quota, 1)
        self._engine.streams.append(quota, self._begin)

    def cancel(self) -> None:
        """Cancel the download; it ends once its threads have left. What was received stays for a resume."""
        if self._over:
            return
        self._end(Cancelled(f"{self.file.path}: cancelled after {self.received} of {self.file.size} bytes"))

    # --- on a stream ---

    def _begin(self, buffer: memoryview) -> None:
        with self._inside_or_over() as inside:
            if not inside:
                return
            try:
                self._fetch_first(buffer)
            except Unavailable as error:  # no file descriptor left for its ingest or its blob
                self._again(self._everything, 0, error, self._begin)

    def _fetch_first(self, buffer: memoryview) -> None:
        """Fetch a small file completely, or begin a larger one with its first part. Raises Unavailable."""
        if self._content.has(self.file):
            self._prove_blob(buffer)
            return
        is_small = self.file.digest and 0 < self.file.size <= _SMALL_BYTES
        if is_small and not self._content.is_begun(self.file):
            self._fetch_small(buffer, is_here=False)
            return
        held = self._content.allocated(self.file)
        if not self._begin_with_space(max(self.file.size - held, 0)):
            self._wait_for_space(self._begin)
            return
        ingest = self._ingest_here()
        parts = self._missing(ingest)
        self._follow_if_worthwhile()
        self._later.extend(parts[1:])
        if not self._engine.streams.has_a_file_each(self._quota):
            self._go_on()
        if parts:
            self._fetch(parts[0], buffer)

    def _prove_blob(self, buffer: memoryview) -> None:
        """Use the blob that is already here, once this source has proven to have it. Raises Unavailable."""
        if self._content.proven.has(self.file):  # another download committed it meanwhile
            self._end(None)
        elif not self.file.size:
            self._end_proven()
        elif self.file.size <= _SMALL_BYTES:
            self._fetch_small(buffer, is_here=True)
        else:
            self._prove(buffer)

    def _prove(self, buffer: memoryview) -> None:
        """Compare random samples with the blob; if one differs, fetch and hash the complete file."""
        if self._proof is None:
            self._proof = Proof(self.file, by_samples=self._content.proven.begins(self.file))
            log.debug("source must prove a blob", file=self.file.path, size_bytes=self.file.size)
        try:
            if self._proof.samples and self._agrees_in_samples(self._proof, buffer):
                self._end_proven()
                return
        except NoRanges:
            self._proof.has_ranges = False
        self._proof.samples.clear()
        self._hash_complete(self._proof, buffer)

    def _agrees_in_samples(self, proof: Proof, buffer: memoryview) -> bool:
        """Whether every sample from the source equals the blob. Raises NoRanges, Unavailable."""
        while proof.samples:
            extent, received = proof.samples[-1], 0
            with self._open(extent) as body:
                while received < extent.size and not self._over:
                    rest = buffer[received : extent.size]
                    count = body.readinto(self._allowed(rest, len(rest)))
                    received += count
                    self._count(count)
            if self._over or not self._content.agrees(self.file, extent, buffer[:received]):
                return False
            proof.samples.pop()
        return True

    def _hash_complete(self, proof: Proof, buffer: memoryview) -> None:
        """Hash the complete file as the source sends it, and write nothing. Raises Corrupt."""
        began = time.monotonic()
        try:
            with self._open(proof.rest) as body:
                while proof.reached < self.file.size and not self._over:
                    is_long = time.monotonic() - began > _YIELD_AFTER_SECONDS
                    if is_long and proof.has_ranges and self._engine.streams.should_yield(self._quota):
                        self._engine.streams.submit(self._quota, self._begin)
                        return
                    view = self._allowed(buffer, self.file.size - proof.reached)
                    view = view[: body.readinto(view)]
                    proof.take(view)
                    self._count(len(view))
        except NoRanges:
            proof.has_ranges = False
            proof.begin()
            self._engine.streams.submit(self._quota, self._begin)
        except Unavailable as error:
            self._again(self._everything, proof.reached, error, self._begin)
        else:
            if not self._over and proof.digest() != self.file.digest:
                raise corrupt(self.file, proof.digest())
            self._end_proven()

    def _end_proven(self) -> None:
        """End well, and note that this source has proven to have the blob."""
        if not self._over:
            self._is_proven = True
            self._content.proven.add(self.file)
            self._end(None)

    def _go_on(self) -> None:
        """Queue the next part, or all remaining parts when the pull has fewer files than streams."""
        with self._lock:
            count = 1 if self._engine.streams.has_a_file_each(self._quota) else len(self._later)
            parts = [self._later.popleft() for _ in range(min(count, len(self._later)))]
        self._engine.streams.submit(self._quota, *(self._task(part) for part in parts))

    def _missing(self, ingest: Ingest) -> list[Part]:
        streams = self._engine.streams
        sharing = _SHARING if streams.has_a_file_each(self._quota) else streams.most
        length = part_bytes(self.file.size, min(sharing, streams.most))
        return [Part(extent) for gap in ingest.gaps() for extent in split(gap, length)]

    def _wait_for_space(self, task: Callable[[memoryview], None]) -> None:
        """Run the task later: another process fills the disk, and the reserve must stay free."""
        paused, self._waits_for_space = self._waits_for_space, True
        if not paused:
            log.warning("paused: the disk is at its reserve", file=self.file.path, size_bytes=self.file.size)
        self._engine.streams.submit_later(self._quota, task, _SPACE_RETRY_SECONDS)

    def _begin_with_space(self, rest: int) -> bool:
        """Begin the ingest. Returns False, and begins nothing, while a damaged blob's parts find no space."""
        if not rest or not self._content.is_set_aside(self.file.blob):
            self._begin_ingest()
            return True
        payer = self._payer()
        with payer.grant(rest, rest) as granted:
            if granted:
                self._took_blocks(self._begin_ingest(), granted, payer)
        return bool(granted)

    def _begin_ingest(self) -> Ingest:
        """Begin or resume the ingest."""
        self._allocated = self._content.allocated(self.file)
        ingest = self._ingest = self._content.begin(self.file, self._cancel_token.check)
        self.resumed = ingest.resumed
        self._engine.metrics.resumed_bytes.inc(ingest.resumed)
        return ingest

    def _fetch_small(self, buffer: memoryview, *, is_here: bool) -> None:
        """Receive the complete file into the buffer and write the blob from there, without an ingest.

        `is_here`: the blob exists already; then the fetched content only proves that this source has it.
        If the transfer breaks off or yields to another pull, it goes on as a part of an ingest.
        """
        content, received = buffer[: self.file.size], 0
        part = Part(Extent(0, self.file.size))
        began = time.monotonic()
        try:
            with self._open(part.extent) as body:
                while received < self.file.size:
                    if time.monotonic() - began > _YIELD_AFTER_SECONDS and self._engine.streams.should_yield(
                        self._quota
                    ):
                        break
                    rest = content[received : received + _STEP_BYTES]
                    count = body.readinto(self._allowed(rest, len(rest)))
                    received += count
                    self._count(count)
                    if self._over:
                        self._keep(part, content[:received])
                        return
        except Unavailable as error:
            self._keep(part, content[:received])
            self._again(part, part.reached, error, self._task(part))
            return
        if received < self.file.size:
            self._keep(part, content[:received])
            self._engine.streams.submit(self._quota, self._task(part))
            return
        self._put(content, is_here=is_here)

    def _put(self, content: memoryview, *, is_here: bool) -> None:
        """Write a small file's content as a blob. One that is here already needs no blocks."""
        payer, size = self._payer(), 0 if is_here else self.file.size
        with payer.grant(size, size) if size else nullcontext(0) as granted:
            if granted < size:
                self._forget_received(self.file.size)
                self._wait_for_space(self._begin)
                return
            self._waits_for_space = False
            try:
                self._content.put(self.file, content)
            except Corrupt as error:
                payer.return_unused(granted)
                if self._wrong:
                    self._explain(error)
                    raise
                self._ask_anew(error.got, self.file.size, "source")
                self._engine.streams.submit(self._quota, self._begin)
                return
        self._spend_in_others(payer, size)
        self._end(None)

    # --- blocks ---

    def _payer(self) -> Reservation:
        """The reservation that pays for the next blocks: that of a pull that has not ended."""
        with self._lock:
            return next((p for p in self._reservations if not p.has_ended), self._reservations[0])

    def _allocate(self, ingest: Ingest, part: Part, count: int) -> None:
        """Allocate blocks for the next `count` bytes of a part, which have arrived.

        Raises NoSpace, or _NoSpaceNow when another process has taken the reserved space.
        """
        least = part.reached + count - part.allocated
        least = min(least, self.file.size - self._allocated)  # a resumed ingest has some blocks already
        if least <= 0:
            return
        payer = self._payer()
        most = max(min(_ALLOCATE_BYTES, part.extent.stop - part.allocated), least)
        with payer.grant(least, most) as granted:
            if not granted:
                self._forget_received(count)
                raise _NoSpaceNow
            self._waits_for_space = False
            stop = max(min(part.allocated + granted, part.extent.stop), part.reached + count)
            try:
                ingest.allocate(Extent(part.allocated, stop))
            except NoSpace:
                payer.return_unused(granted)
                if payer.has_space_for(least):  # statvfs shows free space: a quota or the like is exhausted
                    raise
                self._forget_received(count)
                raise _NoSpaceNow from None
            part.allocated = stop
            self._took_blocks(ingest, granted, payer)

    def _took_blocks(self, ingest: Ingest, granted: int, payer: Reservation | None = None) -> None:
        """Charge newly allocated bytes to the reservations of all pulls that wait for the file."""
        with self._lock:
            now = ingest.allocated
            count, self._allocated = now - self._allocated, now
        if payer:
            payer.return_unused(granted - count)
        self._spend_in_others(payer, count)

    def _spend_in_others(self, payer: Reservation | None, count: int) -> None:
        with self._lock:
            others = [each for each in self._reservations if each is not payer]
        for each in others:
            each.spend(count)

    def _forget_received(self, count: int) -> None:
        with self._lock:
            self._forgotten += count

    def _keep(self, part: Part, content: memoryview) -> None:
        """Begin an ingest for an unfinished small file, with the content received so far."""
        ingest = self._begin_ingest()
        part.hash = ingest.part_hash()
        if not content:
            return
        with suppress(_NoSpaceNow):  # these bytes are fetched again
            self._allocate(ingest, part, len(content))
            self._write(ingest, part, content)
            self._keep_received(ingest, part)

    def _count(self, received: int) -> None:
        with self._lock:
            self._fetched += received
            self.waits = None
        self._received.inc(received)
        self._engine.streams.received(received)

    def _task(self, part: Part) -> Callable[[memoryview], None]:
        def run(buffer: memoryview) -> None:
            with self._inside_or_over() as inside:
                if inside and self._by_parts:
                    self._fetch(part, buffer)

        return run

    def _fetch(self, part: Part, buffer: memoryview) -> None:
        """Fetch the rest of a part; after a temporary failure, queue what is still missing for later."""
        try:
            with self._open(part.rest) as body:
                self._copy(body, part, buffer)
        except NoRanges:
            self._stop_using_parts()
        except _NoSpaceNow:
            self._wait_for_space(self._task(part))
        except Unavailable as error:
            self._again(part, part.reached, error, self._task(part))

    def _stop_using_parts(self) -> None:
        """The origin serves no ranges: let one stream read the file from its first byte."""
        with self._lock:
            if not self._by_parts:
                return
            self._by_parts = False
        log.info("no ranges: one stream", file=self.file.path, origin=self.file.origin)
        self._engine.streams.submit(self._quota, self._fetch_from_start)

    def _fetch_from_start(self, buffer: memoryview) -> None:
        """Read the file from its first byte; write the missing bytes and skip those that are already here."""
        with self._inside_or_over() as inside:
            if not inside:
                return
            read = 0
            try:
                with self._open(self._everything.extent) as body:
                    for gap in self._ingest_here().gaps():
                        self._drop(body, gap.start - read, buffer)
                        for extent in split(gap, part_bytes(self.file.size, 1)):
                            self._copy(body, Part(extent), buffer)
                        read = gap.stop
            except _NoSpaceNow:
                self._wait_for_space(self._fetch_from_start)
            except Unavailable as error:
                self._again(self._everything, self.received, error, self._fetch_from_start)

    def _copy(self, body: Body, part: Part, buffer: memoryview) -> None:
        ingest = self._ingest_here()
        with self._lock:
            alone = self._engine.streams.has_a_file_each(self._quota)
            hashes = alone and not self._following and ingest.takes_from(part.reached)
            self._following |= hashes
        try:
            self._copy_part(ingest, body, part, buffer, hashes=hashes)
        finally:
            if hashes:
                with self._lock:
                    self._following = False
        if part.reached == part.extent.stop:
            self._go_on()
        if not ingest.is_hashed:
            self._follow_if_worthwhile()

    def _copy_part(self, ingest: Ingest, body: Body, part: Part, buffer: memoryview, *, hashes: bool) -> None:
        """Write the bytes of `body` into the ingest. `hashes`: this stream also hashes the file."""
        part.hash = part.hash or ingest.part_hash()
        began = time.monotonic()
        most = min(self._unkept_bytes, len(buffer))
        try:
            while part.reached < part.extent.stop and not self._over:
                is_long = time.monotonic() - began > _YIELD_AFTER_SECONDS
                if (is_long or self._engine.streams.is_one_too_many) and self._yields(ingest, part):
                    return
                view = self._allowed(buffer[:most], part.extent.stop - part.reached)
                view = view[: body.readinto(view)]
                self._count(len(view))
                self._allocate(ingest, part, len(view))
                self._write(ingest, part, view)
                if hashes:
                    ingest.take(view)
                if part.reached - part.kept > self._unkept_bytes - most:
                    self._keep_received(ingest, part)
                self._follow_if_worthwhile()
        except (CachdError, _NoSpaceNow):
            self._keep_received(ingest, part)
            raise
        if self._over:  # no sync: a cancelled download must not wait for the disk
            self._keep_received(ingest, part)
        else:
            ingest.finish(part.extent, part.hash)

    def _yields(self, ingest: Ingest, part: Part) -> bool:
        """Queue the rest of a part for later if another pull, or the lower number of streams, requires it."""
        if not (self._by_parts and self._engine.streams.should_yield(self._quota)):
            return False
        log.debug("part queued again", path=self.file.path, at=part.reached)
        self._keep_received(ingest, part)
        self._engine.streams.submit(self._quota, self._task(part))  # another stream may own it from here on
        return True

    @staticmethod
    def _write(ingest: Ingest, part: Part, view: memoryview) -> None:
        """Write and hash the next bytes of a part."""
        assert part.hash
        ingest.write(part.reached, view)
        part.hash.update(view)
        part.reached += len(view)
        ingest.received(Extent(part.extent.start, part.reached))

    @staticmethod
    def _keep_received(ingest: Ingest, part: Part) -> None:
        """Note the part's received bytes, so that they survive this process."""
        if part.hash and part.reached > part.kept:
            ingest.keep(Extent(part.extent.start, part.reached), part.hash)
            part.kept = part.reached

    def _drop(self, body: Body, count: int, buffer: memoryview) -> None:
        while count > 0 and not self._over:
            count -= body.readinto(self._allowed(buffer, count))

    def _allowed(self, buffer: memoryview, count: int) -> memoryview:
        """Wait for the bandwidth limits. Returns the start of the buffer that may be filled now."""
        bandwidth, wanted = self._engine.bandwidth, min(len(buffer), count)
        return buffer[: bandwidth.allow(self._scheme, wanted, self._cancel_token, prefix=self._prefix)]

    @contextmanager
    def _open(self, extent: Extent) -> Iterator[Body]:
        """Request an extent from the source. The end of the download aborts the request.

        Raises GaveWay when the stream is taken for another pull.
        """
        patience = SLOW_SECONDS if self._by_parts else _NO_RANGES_SLOW_SECONDS
        with (
            self._engine.streams.asking(self._quota, patience) as asking,
            self._cancel_token.reaches(asking.cancel_token),
        ):
            try:
                with self._ask(extent, asking.cancel_token) as body, asking.cancel_token.reaches(body):
                    yield body
            except (Unavailable, Cancelled) as error:
                if asking.is_taken and not self._over:
                    raise GaveWay(f"{self.file.path}: its stream was taken for another pull") from error
                raise

    def _ask(self, extent: Extent, cancel_token: CancelToken) -> Body:
        if extent.size <= _ONE_CORE_BYTES:
            together.gather()
        else:
            together.scatter()
        count = self._engine.metrics.origin_requests
        try:
            with threads.given(self.file.path):
                opened = self._source.open(self.file, extent, cancel_token)
        except CachdError as error:
            status = error.origin_status
            count.labels(self._scheme, f"{status // 100}xx" if status else "broken").inc()
            raise
        count.labels(self._scheme, "2xx").inc()
        return opened

    def _again(self, part: Part, at: int, error: Unavailable, task: Callable[[memoryview], None]) -> None:
        """Run `task` again after a backoff. Raises `error` after too many failures without progress."""
        if self._over:
            return
        if isinstance(error, GaveWay):
            self._engine.streams.append(self._quota, task)
            return
        failures = part.failed(at)
        if failures > self._engine.retries:
            raise error
        seconds = backoff.delay(failures, told=error.retry_after, chance=random.random())  # noqa: S311
        self._engine.metrics.origin_retries.labels(error.code).inc()
        log.info(
            "part will be retried",
            file=self.file.path,
            at=at,
            code=error.code,
            in_seconds=round(seconds, 1),
        )
        self.waits = Waits(Reason.origin, time.time() + seconds, error.detail)
        self._engine.streams.submit_later(self._quota, task, seconds)

    # --- on a hashing thread ---

    def _follow_if_worthwhile(self) -> None:
        ingest = self._ingest_here()
        with self._lock:
            if self._following or not (ingest.behind >= _FOLLOW_BYTES or ingest.is_whole):
                return
            self._following = True
        self._engine.hashers.submit(self._follow)

    def _follow(self) -> None:
        """Hash the bytes received so far. The commit follows when the last thread leaves a hashed file."""
        with self._inside_or_over() as inside:
            if not inside:
                return
            ingest = self._ingest_here()
            while not self._over:
                ingest.follow(self._engine.hash_buffer())
                with self._lock:
                    if not ingest.behind:
                        self._following = False
                        break

    # --- on a committing thread ---

    def _commit(self) -> None:
        """Commit the hashed file, or repair a wrong digest. No other thread works on the ingest meanwhile."""
        with self._inside_or_over() as inside:
            if not inside:
                return
            ingest = self._ingest_here()
            if not (ingest.agrees or self._wrong):
                self._repair(ingest)
                return
            self._took_blocks(ingest, 0)
            try:
                self._content.commit(ingest)
            except Corrupt as error:
                self._explain(error)
                raise
            except Unavailable as error:  # no file descriptor left for the commit
                self._again(self._everything, 0, error, lambda _: self._commit())
            else:
                self._end(None)

    def _repair(self, ingest: Ingest) -> None:
        """Fetch the parts again that the disk damaged. If there are none, fetch the complete file again."""
        wrong, spoiled = ingest.digest(), ingest.spoiled(self._engine.hash_buffer())
        ingest.forget(spoiled or ingest.parts)
        missing = self._missing(ingest)
        size = sum(part.extent.size for part in missing)
        self._ask_anew(wrong, size, "disk" if spoiled else "source")
        with self._lock:
            self._committing = self._following = False
        tasks = [self._task(part) for part in missing] if self._by_parts else [self._fetch_from_start]
        self._engine.streams.submit(self._quota, *tasks)

    def _ask_anew(self, wrong: object, size: int, reason: str) -> None:
        """Count a wrong digest and prepare to fetch `size` bytes again over new connections."""
        self._wrong = str(wrong)
        log.warning("wrong digest: fetching again", file=self.file.path, reason=reason, size_bytes=size)
        self._engine.metrics.verify_failures.labels("pull").inc()
        self._engine.metrics.refetched_bytes.labels(reason).inc(size)
        with self._lock:
            self._forgotten += size
        self._source.anew()

    def _explain(self, error: Corrupt) -> None:
        """Set the hint when the repaired file has the same wrong digest as before."""
        if error.got == self._wrong:
            error.hint = "the source sent the same bytes twice: its copy is damaged, or its digest is wrong"

    # --- the end ---

    def _ingest_here(self) -> Ingest:
        if self._ingest is None:
            raise AssertionError(f"{self.file.path}: no ingest has begun")
        return self._ingest

    @contextmanager
    def _inside_or_over(self) -> Iterator[bool]:
        """Count the calling thread as working on the ingest. Yields False when the download is over.

        An exception raised inside ends the download and becomes its outcome.
        """
        with self._lock:
            if self._over:
                inside = False
            else:
                self._inside += 1
                inside = True
        if not inside:
            yield False
            return
        try:
            yield True
        except CachdError as error:
            self._end(error)
        except Exception as error:
            log.exception("a download failed in a way it should not", file=self.file.path)
            self._end(CachdError(f"{self.file.path}: {type(error).__name__}", hint="see the daemon's log"))
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._lock:
            self._inside -= 1
            close = self._over and not self._inside
            is_hashed = (
                not self._over and not self._inside and self._ingest is not None and self._ingest.is_hashed
            )
            commit = is_hashed and not self._committing
            self._committing |= commit
        if close:
            self._close()
        elif commit:  # only after every stream has left: one may still be syncing the journal
            self._engine.committers.submit(self._commit)

    def _end(self, outcome: CachdError | None) -> None:
        with self._lock:
            if self._over:
                return
            self._over, self._outcome = True, outcome
            last = not self._inside
        self._cancel_token.cancel()
        if last:
            self._close()

    def _close(self) -> None:
        """Close the ingest, then set `done`. Called once, when no thread works on the download any more."""
        if self._ingest is not None:
            if self._leaves_nothing(self._outcome) or not (self.received or self._is_disk_to_blame()):
                try:
                    self._ingest.discard()
                except CachdError as error:  # such as a read-only disk: the next ingest takes it over
                    log.warning("ingest not removed", file=self.file.path, reason=error.detail)
            self._ingest.close()
        self._engine.streams.more_files(self._quota, -1)
        if self._outcome is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self._outcome)

    def _is_disk_to_blame(self) -> bool:
        return isinstance(self._outcome, DiskFailed)

    @staticmethod
    def _leaves_nothing(outcome: CachdError | None) -> bool:
        """Whether the ingest must be discarded. After a failed sync or read (EIO) its journal is valid."""
        if isinstance(outcome, DiskFailed):
            return outcome.errno != errno.EIO
        if isinstance(outcome, NoSpace):
            return not outcome.short  # with `short`, only a reservation was too small
        return isinstance(outcome, Changed)
