"""One file: its parts spread over the streams into an ingest, its digest following, then the commit.

This is the only place where bytes are asked for again. A part that breaks off goes on where it stopped;
a part that fails more than `retries` times within 64 KiB ends the download, so that an origin that gives a
byte at a time ends it, too.

While a pull has a file for every stream, each stream takes one from part to part, and its digest with it:
bytes are hashed where they have just come, which on few cores is what bounds a pull of many shards. When
there are fewer files than streams, these share one, and its digest follows them on a hashing thread.

Bytes get their blocks when they have arrived, from what was promised to a pull that waits for the file: what
a source says of its size alone takes none, and makes no other model go.

A wrong digest is repaired once. Parts that the disk has lost or changed since they came are fetched again,
and nothing else is. Where the disk holds what came, no hash tells which part is wrong, as sources publish
none: the file is fetched again by new connections. Wrong again, it is discarded: `Corrupt`.
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
from cachd.model import Extent, File
from cachd.policy import backoff
from cachd.policy.parts import part_bytes, split, unkept_bytes
from cachd.sources.source import Body, CancelToken, NoRanges, Source
from cachd.store.content import ContentStore, corrupt
from cachd.store.digests import PartHash
from cachd.store.ingest import Ingest
from cachd.store.space import Reservation
from cachd.transfer import threads
from cachd.transfer.cores import together
from cachd.transfer.engine import Engine
from cachd.transfer.proof import Proof
from cachd.transfer.streams import SLOW_SECONDS, StreamQuota
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

_FOLLOW_BYTES = 4 << 20
_PROGRESS_BYTES = 64 << 10
_TURN_SECONDS = 1.0
_SMALL_BYTES = 256 << 10  # at most a stream's buffer
_TOGETHER_BYTES = 128 << 10  # with more, a file's bytes keep a core busy, and others serve the rest
_STEP_BYTES = 64 << 10
_SHARING = 4  # streams that come to share the last files of many
_LOOK_FOR_ROOM_SECONDS = 0.5
_WHOLE_SECONDS = 30.0  # of an origin without ranges, which begins anew
_STEP_AHEAD_BYTES = 8 << 20  # blocks taken at once for bytes of which the first have arrived


class GaveWay(Unavailable):
    """The stream was taken for another pull: its origin hardly sent."""


class _NoSpaceNow(Exception):
    """Bytes have arrived, and another process has taken the space that was promised for them."""


class Part:
    """An extent on its way: how far it got, how much of that is kept, how far it has blocks, the hash of what
    came, and failures since it made progress."""

    def __init__(self, extent: Extent) -> None:
        self.extent = extent
        self.reached = self.kept = self.allocated = extent.start
        self.hash: PartHash | None = None  # from the first byte on: many parts wait
        self._failures = 0
        self._failed_at = extent.start

    @property
    def rest(self) -> Extent:
        return Extent(self.reached, self.extent.stop)

    def failed(self, at: int) -> int:
        """Count a failure when `at` bytes had come; how many there are since the last progress."""
        if at - self._failed_at >= _PROGRESS_BYTES:
            self._failures, self._failed_at = 0, at
        self._failures += 1
        return self._failures


class Download:
    """The transfer of one blob. `done` resolves when it is committed, or carries the reason it is not.

    Threads enter and leave; whoever leaves last after the end closes the ingest, so that no descriptor is
    ever closed under a running thread.
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
        self._allocated = 0  # bytes of disk of the ingest, when last looked at
        self._received = engine.metrics.download_bytes.labels(scheme)
        self._unkept_bytes = unkept_bytes(engine.streams.most)
        self._quota = StreamQuota()
        self._lock = threading.Lock()
        self._ingest: Ingest | None = None
        self._fetched = self._forgotten = 0
        self._wrong = ""  # the digest that a repair was for
        self._cancel_token = CancelToken()
        self._inside = 0
        self._following = False
        self._by_parts = True
        self._later: deque[Part] = deque()  # parts for after the one at work, while each stream has a file
        self._everything = Part(Extent(0, file.size))
        self._committing = False
        self._waits_for_space = False
        self._proof: Proof | None = None
        self._is_proven = False
        self._over = False
        self._outcome: CachdError | None = None
        self.waits: Waits | None = None  # since its origin failed, until the next byte

    # --- for the pull ---

    @property
    def received(self) -> int:
        """Bytes of the file that are here, resumed ones included; what came twice counts once."""
        if self._is_proven:
            return self.file.size
        return min(self.resumed + self._fetched - self._forgotten, self.file.size)

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not; `done` says so within the moment."""
        return self._over

    @property
    def is_waiting_for_space(self) -> bool:
        """Whether another process has taken the room it was promised; it begins when there is some again."""
        return self._waits_for_space

    @property
    def fetched(self) -> int:
        """Bytes received from the source in this life of the daemon."""
        return self._fetched

    def share_with(self, reservation: Reservation) -> None:
        """Let another pull, too, pay for the file's blocks, and tell it which of them are taken."""
        with self._lock:
            self._reservations.append(reservation)

    def start(self, quota: StreamQuota) -> None:
        """Queue the download behind what its pull's share already holds."""
        self._quota = quota
        self._engine.streams.more_files(quota, 1)
        self._engine.streams.append(quota, self._begin)

    def cancel(self) -> None:
        """End the download as soon as its threads have left. What has landed stays for a resume."""
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
            except Unavailable as error:  # no descriptor for its ingest or its blob
                self._again(self._everything, 0, error, self._begin)

    def _fetch_first(self, buffer: memoryview) -> None:
        """Fetch a small file, or begin the ingest of a larger one with its first part. Raises Unavailable."""
        if self._content.has(self.file):
            self._take_what_is_here(buffer)
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

    def _take_what_is_here(self, buffer: memoryview) -> None:
        """End with the blob that is here, once the source has proven that it has it. Raises Unavailable."""
        if self._content.proven.has(self.file):  # committed by another download since the pull looked
            self._end(None)
        elif not self.file.size:
            self._is_proven_now()
        elif self.file.size <= _SMALL_BYTES:
            self._fetch_small(buffer, is_here=True)
        else:
            self._prove(buffer)

    def _prove(self, buffer: memoryview) -> None:
        """Compare parts that the source could not foretell; when one differs, have it send the whole file."""
        if self._proof is None:
            self._proof = Proof(self.file, by_samples=self._content.proven.begins(self.file))
            log.debug("a source proves what it has", file=self.file.path, size_bytes=self.file.size)
        try:
            if self._proof.samples and self._shows_samples(self._proof, buffer):
                self._is_proven_now()
                return
        except NoRanges:
            self._proof.has_ranges = False
        self._proof.samples.clear()
        self._pass_through(self._proof, buffer)

    def _shows_samples(self, proof: Proof, buffer: memoryview) -> bool:
        """Whether the source has what is here, wherever it is asked. Raises NoRanges, Unavailable."""
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

    def _pass_through(self, proof: Proof, buffer: memoryview) -> None:
        """Hash the whole file as the source sends it, and write nothing. Raises Corrupt."""
        began = time.monotonic()
        try:
            with self._open(proof.rest) as body:
                while proof.reached < self.file.size and not self._over:
                    is_long = time.monotonic() - began > _TURN_SECONDS
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
            self._is_proven_now()

    def _is_proven_now(self) -> None:
        """The source has what is here."""
        if not self._over:
            self._is_proven = True
            self._content.proven.add(self.file)
            self._end(None)

    def _go_on(self) -> None:
        """Let the next part begin, or all of them when there are streams for them."""
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
        """Somebody else fills the disk: rather than take the last of it, go on later."""
        paused, self._waits_for_space = self._waits_for_space, True
        if not paused:
            log.warning("paused: the disk is at its reserve", file=self.file.path, size_bytes=self.file.size)
        self._engine.streams.submit_later(self._quota, task, _LOOK_FOR_ROOM_SECONDS)

    def _begin_with_space(self, rest: int) -> bool:
        """Begin the ingest; False when there is no room for what it takes over of a damaged blob."""
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
        """Receive the file into the buffer and publish it from there: no ingest, no other thread. One that is
        here is compared.

        When it breaks off, or another pull waits for the stream, it goes on as a part where it stopped.
        """
        content, received = buffer[: self.file.size], 0
        part = Part(Extent(0, self.file.size))
        began = time.monotonic()
        try:
            with self._open(part.extent) as body:
                while received < self.file.size:
                    if time.monotonic() - began > _TURN_SECONDS and self._engine.streams.should_yield(
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
        """Publish the whole content of a small file; one that is here already needs no blocks."""
        payer, size = self._payer(), 0 if is_here else self.file.size
        is_taken = not size or payer.take(size)
        with nullcontext(size) if is_taken else payer.grant(size, size) as granted:
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
                self._ask_anew(error.facts["got"], self.file.size, "source")
                self._engine.streams.submit(self._quota, self._begin)
                return
        self._tell_others(payer, size)
        self._end(None)

    # --- blocks ---

    def _payer(self) -> Reservation:
        """A pull that still waits for the file."""
        with self._lock:
            return next((p for p in self._reservations if not p.has_ended), self._reservations[0])

    def _give_blocks(self, ingest: Ingest, part: Part, count: int) -> None:
        """See that the next `count` bytes of a part, which have arrived, have blocks. Raises NoSpace, or
        _NoRoomNow when another process has taken what was promised."""
        least = part.reached + count - part.allocated
        least = min(least, self.file.size - self._allocated)  # some of a part may have blocks from before
        if least <= 0:
            return
        payer = self._payer()
        most = max(min(_STEP_AHEAD_BYTES, part.extent.stop - part.allocated), least)
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
                if payer.has_space_for(least):  # it is no want of room that is counted
                    raise
                self._forget_received(count)
                raise _NoSpaceNow from None
            part.allocated = stop
            self._took_blocks(ingest, granted, payer)

    def _took_blocks(self, ingest: Ingest, granted: int, payer: Reservation | None = None) -> None:
        """Tell every pull that waits for the file how many more bytes of disk it has now."""
        with self._lock:
            now = ingest.allocated
            count, self._allocated = now - self._allocated, now
        if payer:
            payer.return_unused(granted - count)
        self._tell_others(payer, count)

    def _tell_others(self, payer: Reservation | None, count: int) -> None:
        with self._lock:
            others = [promise for promise in self._reservations if promise is not payer]
        for promise in others:
            promise.spend(count)

    def _forget_received(self, count: int) -> None:
        with self._lock:
            self._forgotten += count

    def _keep(self, part: Part, content: memoryview) -> None:
        """Begin the ingest of a small file after all, with what came of it."""
        ingest = self._begin_ingest()
        part.hash = ingest.part_hash()
        if not content:
            return
        with suppress(_NoSpaceNow):  # it comes again
            self._give_blocks(ingest, part, len(content))
            self._take_in(ingest, part, content)
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
        """Fetch what is left of a part; on a passing failure, ask for the rest of it later."""
        try:
            with self._open(part.rest) as body:
                self._copy(body, part, buffer)
        except NoRanges:
            self._fetch_whole_instead()
        except _NoSpaceNow:
            self._wait_for_space(self._task(part))
        except Unavailable as error:
            self._again(part, part.reached, error, self._task(part))

    def _fetch_whole_instead(self) -> None:
        """The origin sends whole files only: let one stream read it from the start."""
        with self._lock:
            if not self._by_parts:
                return
            self._by_parts = False
        log.info("no ranges: one stream", file=self.file.path, origin=self.file.origin)
        self._engine.streams.submit(self._quota, self._whole)

    def _whole(self, buffer: memoryview) -> None:
        """Read the file from its first byte, keep what is missing and drop what is here."""
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
                self._wait_for_space(self._whole)
            except Unavailable as error:
                self._again(self._everything, self.received, error, self._whole)

    def _copy(self, body: Body, part: Part, buffer: memoryview) -> None:
        ingest = self._ingest_here()
        with self._lock:
            alone = self._engine.streams.has_a_file_each(self._quota)
            takes = alone and not self._following and ingest.takes_from(part.reached)
            self._following |= takes
        try:
            self._copy_part(ingest, body, part, buffer, takes=takes)
        finally:
            if takes:
                with self._lock:
                    self._following = False
        if part.reached == part.extent.stop:
            self._go_on()
        if not ingest.is_hashed:
            self._follow_if_worthwhile()

    def _copy_part(self, ingest: Ingest, body: Body, part: Part, buffer: memoryview, *, takes: bool) -> None:
        part.hash = part.hash or ingest.part_hash()
        began = time.monotonic()
        most = min(self._unkept_bytes, len(buffer))
        try:
            while part.reached < part.extent.stop and not self._over:
                turn_is_over = time.monotonic() - began > _TURN_SECONDS
                if (turn_is_over or self._engine.streams.is_one_too_many) and self._gives_way(ingest, part):
                    return
                view = self._allowed(buffer[:most], part.extent.stop - part.reached)
                view = view[: body.readinto(view)]
                self._count(len(view))
                self._give_blocks(ingest, part, len(view))
                self._take_in(ingest, part, view)
                if takes:
                    ingest.take(view)
                if part.reached - part.kept > self._unkept_bytes - most:
                    self._keep_received(ingest, part)
                self._follow_if_worthwhile()
        except (CachdError, _NoSpaceNow):
            self._keep_received(ingest, part)
            raise
        if self._over:  # a stop waits for no disk
            self._keep_received(ingest, part)
        else:
            ingest.finish(part.extent, part.hash)

    def _gives_way(self, ingest: Ingest, part: Part) -> bool:
        """Leave the rest of a part for later when another pull has waited long enough or fewer streams do."""
        if not (self._by_parts and self._engine.streams.should_yield(self._quota)):
            return False
        log.debug("part left for later", path=self.file.path, at=part.reached)
        self._keep_received(ingest, part)
        self._engine.streams.submit(self._quota, self._task(part))  # which is another's from here on
        return True

    @staticmethod
    def _take_in(ingest: Ingest, part: Part, view: memoryview) -> None:
        """Write what has come next of a part."""
        assert part.hash
        ingest.write(part.reached, view)
        part.hash.update(view)
        part.reached += len(view)
        ingest.received(Extent(part.extent.start, part.reached))

    @staticmethod
    def _keep_received(ingest: Ingest, part: Part) -> None:
        """Let what has come of a part survive this process, if more has come than did before."""
        if part.hash and part.reached > part.kept:
            ingest.keep(Extent(part.extent.start, part.reached), part.hash)
            part.kept = part.reached

    def _drop(self, body: Body, count: int, buffer: memoryview) -> None:
        while count > 0 and not self._over:
            count -= body.readinto(self._allowed(buffer, count))

    def _allowed(self, buffer: memoryview, count: int) -> memoryview:
        """As much of the buffer as the limits let the stream receive now, waited for."""
        bandwidth, wanted = self._engine.bandwidth, min(len(buffer), count)
        return buffer[: bandwidth.allow(self._scheme, wanted, self._cancel_token, prefix=self._prefix)]

    @contextmanager
    def _open(self, extent: Extent) -> Iterator[Body]:
        """The source's bytes, counted by answer, and cut when the download ends meanwhile.

        Raises GaveWay when the stream is wanted by another pull.
        """
        patience = SLOW_SECONDS if self._by_parts else _WHOLE_SECONDS
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
        if extent.size <= _TOGETHER_BYTES:
            together.gather()
        else:
            together.scatter()
        count = self._engine.metrics.origin_requests
        try:
            with threads.given(self.file.path):
                opened = self._source.open(self.file, extent, cancel_token)
        except CachdError as error:
            status = error.facts.get("status")
            count.labels(self._scheme, f"{status // 100}xx" if isinstance(status, int) else "broken").inc()
            raise
        count.labels(self._scheme, "2xx").inc()
        return opened

    def _again(self, part: Part, at: int, error: Unavailable, task: Callable[[memoryview], None]) -> None:
        """Do `task` again after a wait. Raises `error` when there were too many since the last progress."""
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
            "part asked again",
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
        """Take the digest of what has landed; when that is the whole file, commit it."""
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
        """Nobody is inside and every byte is hashed."""
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
            except Unavailable as error:  # no descriptor for the names
                self._again(self._everything, 0, error, lambda _: self._commit())
            else:
                self._end(None)

    def _repair(self, ingest: Ingest) -> None:
        """Fetch again what the disk lost of a file with a wrong digest; when it lost nothing, all of it."""
        wrong, spoiled = ingest.digest(), ingest.spoiled(self._engine.hash_buffer())
        ingest.forget(spoiled or ingest.parts)
        missing = self._missing(ingest)
        size = sum(part.extent.size for part in missing)
        self._ask_anew(wrong, size, "disk" if spoiled else "source")
        with self._lock:
            self._committing = self._following = False
        tasks = [self._task(part) for part in missing] if self._by_parts else [self._whole]
        self._engine.streams.submit(self._quota, *tasks)

    def _ask_anew(self, wrong: object, size: int, reason: str) -> None:
        """Count a wrong digest for which `size` bytes are fetched again, by other connections than before."""
        self._wrong = str(wrong)
        log.warning("wrong digest: fetched again", file=self.file.path, reason=reason, size_bytes=size)
        self._engine.metrics.verify_failures.labels("pull").inc()
        self._engine.metrics.refetched_bytes.labels(reason).inc(size)
        with self._lock:
            self._forgotten += size
        self._source.anew()

    def _explain(self, error: Corrupt) -> None:
        """Tell of a file that is wrong after its repair what that says of the reason."""
        if error.facts["got"] == self._wrong:
            error.hint = "the source sent these very bytes twice: its copy is damaged, or its digest is wrong"

    # --- the end ---

    def _ingest_here(self) -> Ingest:
        if self._ingest is None:
            raise AssertionError(f"{self.file.path}: no ingest has begun")
        return self._ingest

    @contextmanager
    def _inside_or_over(self) -> Iterator[bool]:
        """Be counted while working on the ingest; False when the download is over.

        A failure inside ends the download with it.
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
            whole = (
                not self._over and not self._inside and self._ingest is not None and self._ingest.is_hashed
            )
            commit = whole and not self._committing
            self._committing |= commit
        if close:
            self._close()
        elif commit:  # not before every stream has left: a journal may still be synced
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
        """Nobody is inside any more: close the ingest, then tell the pulls."""
        if self._ingest is not None:
            if self._leaves_nothing(self._outcome) or not (self.received or self._is_disk_to_blame()):
                try:
                    self._ingest.discard()
                except CachdError as error:  # read-only by now: the file's next ingest takes it on
                    log.warning("ingest left behind", file=self.file.path, reason=error.detail)
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
        """Whether nothing of the ingest may be used again. After a failed sync or read its journal may."""
        if isinstance(outcome, DiskFailed):
            return outcome.facts.get("errno") != errno.EIO
        if isinstance(outcome, NoSpace):
            return "short" not in outcome.facts  # a full disk; else what is here may be used again
        return isinstance(outcome, Changed)
