"""Verifies published models by reading them again, in the background or on request.

look     checks that every file is where pods look for it (looks.py)
scrub    reads and hashes every blob once per interval
verify   reads and hashes one model at once, on request
repair   pulls and publishes the missing files of a damaged model again (repairs.py)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial

import structlog

from cachd.errors import CachdError, Cancelled, Leased, NotFound, Unavailable
from cachd.kernel import threads
from cachd.kernel.calls import read_when_idle
from cachd.metrics import Metrics
from cachd.model import File, Manifest, Snapshot
from cachd.policy.rate_limiter import RateLimiter
from cachd.store.catalog import iso
from cachd.store.digests import NO_SHA256, Hasher, in_order
from cachd.store.scrub import Moved, reread
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.transfer.pulls import Pulls
from cachd.transfer.streams import NICENESS
from cachd.upkeep.jobs import Job, Jobs
from cachd.upkeep.looks import Looks
from cachd.upkeep.repairs import Repairs

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1.0
_MOST_SECONDS = 300.0  # after so long, the list of blobs that are due is made again
_AT_ONCE = 2  # models verified on request at the same time


class Verification(Job):
    """One requested verification of a model. Its final state is intact or damaged."""

    unexpected = "a verification failed in a way it should not"

    def __init__(self, name: str, total: int) -> None:
        super().__init__(name, total)
        self.damaged: list[tuple[str, str]] = []  # (path, what is wrong)
        self.began_at, self.ended_at = time.time(), 0.0

    def took(self, count: int) -> None:
        with self._lock:
            self.done += count

    def found(self, path: str, wrong: str) -> None:
        with self._lock:
            self.damaged.append((path, wrong))

    def end(self, state: str, error: CachdError | None = None) -> None:
        self.ended_at = time.time()
        super().end(state, error)

    def as_document(self) -> dict[str, object]:
        return super().as_document() | {
            "damaged": [{"path": path, "wrong": wrong} for path, wrong in sorted(self.damaged)],
            "began_at": iso(self.began_at),
            "ended_at": iso(self.ended_at) if self.ended_at else None,
        }


class Scrubs:
    """The threads that scrub, check and verify. With `bytes_per_second` 0, nothing is scrubbed."""

    def __init__(
        self, store: Store, pulls: Pulls, metrics: Metrics, *, bytes_per_second: int, interval_seconds: float
    ) -> None:
        self._store, self._metrics = store, metrics
        self._rate, self._interval_seconds = bytes_per_second, interval_seconds
        self._scrub_log = ScrubLog(store.layout.scrub_log)
        self._repairs = Repairs(store, pulls, self._scrub_log, metrics)
        self._looks = Looks(store, self._repairs, self._scrub_log, metrics)
        self._reading: tuple[File, int] | None = None
        self._verifications = Jobs[Verification](threads.pool(_AT_ONCE, "verify", lambda: os.nice(NICENESS)))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="scrub", daemon=True)

    def start(self) -> None:
        threads.start([self._thread])
        self._looks.start()

    def close(self) -> None:
        self._stop.set()
        self._looks.close()
        self._verifications.close()
        if self._thread.is_alive():
            self._thread.join()
        self._scrub_log.save()

    # --- on request ---

    def verify(self, name: str) -> Verification:
        """Start or join the verification of a ready model. Raises NotFound; Unavailable during a repair."""
        snapshots = self._store.snapshots
        if snapshots.get(name) is None and snapshots.has(name):
            raise Unavailable(f"{name} is damaged and being repaired", code="damaged", retry_after=5.0)
        snapshot = snapshots.ready(name)
        return self._verifications.start(Verification(name, snapshot.size), self._verify)

    def look_again(self) -> None:
        """Have the thread check all models now; new blobs are scrubbed from then on, too."""
        self._looks.look_again()

    def verification(self, name: str) -> Verification | None:
        """The last verification of a name since the daemon started."""
        return self._verifications.last(name)

    def verified_at(self, snapshot: Snapshot, manifest: Manifest) -> float | None:
        """Unix time of the oldest verification of any blob of a ready model."""
        return self._scrub_log.oldest((f.blob for f in manifest.files), since=snapshot.published_at)

    def oldest(self) -> float | None:
        """Unix time of the oldest verification of any blob; None without blobs."""
        return self._scrub_log.oldest(self._looks.files)

    def as_document(self) -> dict[str, object]:
        """The state of the scrub, and the models that wait for a repair."""
        reading, files = self._reading, self._looks.files
        oldest = self.oldest()
        return {
            "bytes_per_second": self._rate or None,
            "interval_seconds": self._interval_seconds,
            "blobs": len(files),
            "bytes": sum(f.size for f in files.values()),
            "due": len(self._due()) if self._rate else 0,
            "oldest_verified_at": iso(oldest) if oldest else None,
            "reading": {"blob": str(reading[0].blob), "bytes": {"total": reading[0].size, "done": reading[1]}}
            if reading
            else None,
            "damaged": [
                {"name": each.snapshot.name, "since": iso(each.since), "reason": each.reason}
                for each in self._store.snapshots.quarantined()
            ],
        }

    def _verify(self, running: Verification) -> None:
        running.run(lambda: self._check_model(running))
        log.info("verified", name=running.name, state=running.state, size_bytes=running.done)

    def _check_model(self, running: Verification) -> str:
        if wrong := self._repairs.look(running.name):
            running.found("", wrong)
        else:
            self._verify_files(running)
        return "damaged" if running.damaged else "intact"

    def _verify_files(self, running: Verification) -> None:
        snapshot = self._store.snapshots.get(running.name)
        if snapshot is None:
            raise NotFound(f"{running.name} is no longer here")
        files = {f.blob: f for f in self._store.snapshots.manifest(snapshot).files}.values()

        def took(count: int) -> None:
            running.took(count)
            self._wait()

        for file in files:
            if wrong := self._check(file, took):
                running.found(file.path, wrong)
        self._record_hashes()

    # --- in the background ---

    def _run(self) -> None:
        os.nice(NICENESS)
        read_when_idle()
        while not self._stop.wait(_TICK_SECONDS):  # waits first, so that the daemon answers requests before
            try:
                if self._rate:
                    self._scrub()
            except Cancelled:
                return
            except Exception:
                log.exception("a scrub failed in a way it should not")

    def _scrub(self) -> None:
        """Read the blobs that are due, the least recently verified first, for at most _MOST_SECONDS."""
        until = time.monotonic() + _MOST_SECONDS
        limiter = RateLimiter(self._rate, time.monotonic())
        for file in self._due():
            if time.monotonic() >= until:
                break
            try:
                self._check(file, partial(self._count_and_wait, file, limiter))
            except Leased as error:
                log.warning("blob not scrubbed", blob=str(file.blob), reason=error.detail)
        self._record_hashes()
        self._scrub_log.save()

    def _due(self) -> list[File]:
        before, files = time.time() - self._interval_seconds, self._looks.files
        due = [(at, str(blob), blob) for blob, at in self._scrub_log.times() if at <= before]
        return [files[blob] for _, _, blob in sorted(due) if blob in files]

    def _count_and_wait(self, file: File, limiter: RateLimiter, count: int) -> None:
        done = self._reading[1] if self._reading and self._reading[0] is file else 0
        self._reading = (file, done + count)
        self._wait(limiter.reserve(count, time.monotonic()))

    def _wait(self, seconds: float = 0.0) -> None:
        """Wait. Raises Cancelled when the daemon is stopping."""
        if self._stop.wait(seconds):
            raise Cancelled("the daemon stops")

    # --- one blob ---

    def _check(self, file: File, took: Callable[[int], None]) -> str:
        """Read a blob and compare its digest; start a repair if it is damaged.

        `took` is called with the bytes of each read. Returns what is wrong; empty when nothing is.
        """

        def counted(count: int) -> None:
            self._metrics.scrub_bytes.inc(count)
            took(count)

        path, reads = self._store.content.path(file.blob), self._store.snapshots.reads
        inode = self._store.content.inode(file.blob)
        try:
            beside = self._hasher_beside(file)
            wrong = reread(path, file, reads, counted, beside=beside)
            if not wrong and beside:
                self._store.content.hashes.note(file.blob, beside.digest())
            if wrong:  # read a second time: an error that does not repeat is no damage on disk
                wrong = reread(path, file, reads, lambda _: self._wait())
        except Moved:
            return ""
        finally:
            self._reading = None
        if not wrong:
            self._scrub_log.verified(file.blob)
            return ""
        return wrong if self._repairs.damaged(file, wrong, inode) else ""

    def _hasher_beside(self, file: File) -> Hasher | None:
        """A hasher that computes the sha256 of a blob with a weaker digest; None if it is not needed."""
        is_needed = file.digest and not file.is_named_by_content and not self._store.content.hashes.of(file)
        return in_order(NO_SHA256, file.size) if is_needed else None

    def _record_hashes(self) -> None:
        try:
            self._store.snapshots.record_hashes()
        except CachdError as error:
            log.warning("sha256 not recorded", reason=error.detail)
