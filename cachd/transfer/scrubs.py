"""Published models read again, in time or when asked.

look     is every file where pods look for it (looks.py)?
scrub    every blob once in the interval: does it still hash to its digest?
verify   the same of one model, at once
repair   readiness was withdrawn: pull what is missing of the very same files, and publish again (repairs.py)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial

import structlog

from cachd.errors import CachdError, Cancelled, Leased, NotFound, Unavailable
from cachd.metrics import Metrics
from cachd.model import File, Manifest, Snapshot
from cachd.policy.rate_limiter import RateLimiter
from cachd.store.catalog import iso
from cachd.store.digests import NO_SHA256, Hasher, in_order
from cachd.store.kernel import read_when_idle
from cachd.store.scrub import Moved, reread
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.transfer import threads
from cachd.transfer.jobs import Job, Jobs
from cachd.transfer.looks import Looks
from cachd.transfer.pulls import Pulls
from cachd.transfer.repairs import Repairs
from cachd.transfer.streams import NICENESS

log = structlog.get_logger(__name__)

_TURN_SECONDS = 1.0
_MOST_SECONDS = 300.0  # of scrubbing before what has come since is found
_AT_ONCE = 2  # models verified at once when asked


class Verification(Job):
    """One reading of a whole model when asked for. It ends whole or damaged."""

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
    """A thread that scrubs, one that looks, others that verify. Nothing is scrubbed at 0 bytes a second."""

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

    # --- when asked ---

    def verify(self, name: str) -> Verification:
        """Start reading a ready model again, or join who does. Raises NotFound, or Unavailable."""
        snapshots = self._store.snapshots
        if snapshots.get(name) is None and snapshots.has(name):
            raise Unavailable(f"{name} is damaged and being repaired", code="damaged", retry_after=5.0)
        snapshot = snapshots.ready(name)
        return self._verifications.start(Verification(name, snapshot.size), self._verify)

    def look_again(self) -> None:
        """Look at everything at once, and scrub what has come since the last time."""
        self._looks.look_again()

    def verification(self, name: str) -> Verification | None:
        """The last one of a name since the daemon started."""
        return self._verifications.last(name)

    def verified_at(self, snapshot: Snapshot, manifest: Manifest) -> float | None:
        """When (epoch) every blob of a ready model was last known to be whole."""
        return self._scrub_log.oldest((f.blob for f in manifest.files), since=snapshot.published_at)

    def oldest(self) -> float | None:
        """When (epoch) the blob was read again that was not for the longest; None when there is none."""
        return self._scrub_log.oldest(self._looks.files)

    def as_document(self) -> dict[str, object]:
        """What is read again, and what waits for its repair."""
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
        running.run(lambda: self._look_and_read(running))
        log.info("verified", name=running.name, state=running.state, size_bytes=running.done)

    def _look_and_read(self, running: Verification) -> str:
        if wrong := self._repairs.look(running.name):
            running.found("", wrong)
        else:
            self._verify_files(running)
        return "damaged" if running.damaged else "whole"

    def _verify_files(self, running: Verification) -> None:
        snapshot = self._store.snapshots.get(running.name)
        if snapshot is None:
            raise NotFound(f"{running.name} is not here any more")
        files = {f.blob: f for f in self._store.snapshots.manifest(snapshot).files}.values()

        def took(count: int) -> None:
            running.took(count)
            self._go_on()

        for file in files:
            if wrong := self._check(file, took):
                running.found(file.path, wrong)
        self._record_hashes()

    # --- in time ---

    def _run(self) -> None:
        os.nice(NICENESS)
        read_when_idle()
        while not self._stop.wait(_TURN_SECONDS):  # not before the daemon answers
            try:
                if self._rate:
                    self._turn()
            except Cancelled:
                return
            except Exception:
                log.exception("a scrub failed in a way it should not")

    def _turn(self) -> None:
        """Read what is due, the longest unread first; for a while, then find what has come since."""
        until = time.monotonic() + _MOST_SECONDS
        pace = RateLimiter(self._rate, time.monotonic())
        for file in self._due():
            if time.monotonic() >= until:
                break
            try:
                self._check(file, partial(self._read_paced, file, pace))
            except Leased as error:
                log.warning("blob not read again", blob=str(file.blob), reason=error.detail)
        self._record_hashes()
        self._scrub_log.save()

    def _due(self) -> list[File]:
        before, files = time.time() - self._interval_seconds, self._looks.files
        ages = [(at, str(blob), blob) for blob, at in self._scrub_log.ages() if at <= before]
        return [files[blob] for _, _, blob in sorted(ages) if blob in files]

    def _read_paced(self, file: File, pace: RateLimiter, count: int) -> None:
        done = self._reading[1] if self._reading and self._reading[0] is file else 0
        self._reading = (file, done + count)
        self._go_on(pace.reserve(count, time.monotonic()))

    def _go_on(self, seconds: float = 0.0) -> None:
        """Wait. Raises Cancelled when the daemon stops."""
        if self._stop.wait(seconds):
            raise Cancelled("the daemon stops")

    # --- one blob ---

    def _check(self, file: File, took: Callable[[int], None]) -> str:
        """Read a blob again and do what its state asks for; what is wrong with it, empty when nothing is."""

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
            if wrong:  # read twice: what one reading got wrong is no damage
                wrong = reread(path, file, reads, lambda _: self._go_on())
        except Moved:
            return ""
        finally:
            self._reading = None
        if not wrong:
            self._scrub_log.is_whole(file.blob)
            return ""
        return wrong if self._repairs.damaged(file, wrong, inode) else ""

    def _hasher_beside(self, file: File) -> Hasher | None:
        """What takes the sha256 of a blob whose digest is weaker, unless it is known."""
        is_needed = file.digest and not file.is_named_by_content and not self._store.content.hashes.of(file)
        return in_order(NO_SHA256, file.size) if is_needed else None

    def _record_hashes(self) -> None:
        try:
            self._store.snapshots.record_hashes()
        except CachdError as error:
            log.warning("sha256 not recorded", reason=error.detail)
