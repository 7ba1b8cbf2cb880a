"""Verifies every published blob again and again, in the background.

presence   checks that every file is where pods look for it (presence.py)
scrub      reads and hashes every blob once per interval
verify     reads and hashes one model at once, on request (verifications.py)
repair     pulls and publishes the missing files of a damaged model again (repairs.py)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial

import structlog

from cachd.errors import DiskFailed, Unavailable
from cachd.kernel.calls import read_when_idle
from cachd.kernel.periodic import Periodic
from cachd.metrics import Metrics
from cachd.model import File, Manifest, Snapshot
from cachd.policy.rate_limiter import RateLimiter
from cachd.store.catalog import iso
from cachd.store.scrub_log import ScrubLog
from cachd.store.store import Store
from cachd.transfer.pulls import Pulls
from cachd.transfer.streams import NICENESS
from cachd.upkeep.blob_checks import BlobChecks
from cachd.upkeep.presence import PresenceChecks
from cachd.upkeep.repairs import Repairs
from cachd.upkeep.verifications import Verification, Verifications

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1.0
_MAX_SECONDS = 300.0  # after so long, the list of blobs that are due is made again


class Scrubs:
    """Verifies blobs in a thread, the least recently verified first, but none if `bytes_per_second` is 0.

    It also owns the presence checks and the verifications on request.
    """

    def __init__(
        self,
        store: Store,
        pulls: Pulls,
        metrics: Metrics,
        *,
        bytes_per_second: int,
        interval_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._clock, self._now = store, clock, now
        self._rate, self._interval_seconds = bytes_per_second, interval_seconds
        self._scrub_log = ScrubLog(store.layout.scrub_log)
        self._reading: tuple[File, int] | None = None
        self._thread = Periodic("scrub", self._scrub, prepare=_be_modest)
        repairs = Repairs(store, pulls, self._scrub_log, metrics)
        self._presence = PresenceChecks(store, repairs, self._scrub_log, metrics)
        self._blobs = BlobChecks(store, repairs, self._scrub_log, metrics)
        self._verifications = Verifications(store, repairs, self._blobs, self._thread.rest)

    def start(self) -> None:
        """Start the threads. They let the daemon answer requests first."""
        if self._rate:
            self._thread.start(after=_TICK_SECONDS)
        self._presence.start()

    def close(self) -> None:
        """End what runs and join the threads."""
        self._thread.stop()
        self._presence.close()
        self._verifications.close()
        self._thread.close()
        self._scrub_log.save()

    def verify(self, name: str) -> Verification:
        """Start or join the verification of a ready model. Raises NotFound; Unavailable during a repair."""
        return self._verifications.start(name)

    def verification(self, name: str) -> Verification | None:
        """The last verification of a name since the daemon started."""
        return self._verifications.last(name)

    def check_all_soon(self) -> None:
        """Have the presence of all models checked now; new blobs are scrubbed from then on, too."""
        self._presence.check_all_soon()

    def verified_at(self, snapshot: Snapshot, manifest: Manifest) -> float | None:
        """Unix time of the oldest verification of any blob of a ready model."""
        return self._scrub_log.oldest((f.blob for f in manifest.files), since=snapshot.published_at)

    def oldest(self) -> float | None:
        """Unix time of the oldest verification of any blob; None without blobs."""
        return self._scrub_log.oldest(self._presence.files)

    def as_document(self) -> dict[str, object]:
        """The state of the scrub, and the models that wait for a repair."""
        reading, files = self._reading, self._presence.files
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
                for each in self._store.names.quarantined()
            ],
        }

    def _scrub(self) -> float:
        """Read the blobs that are due, the least recently verified first, for at most _MAX_SECONDS."""
        until = self._clock() + _MAX_SECONDS
        limiter = RateLimiter(self._rate, self._clock())
        for file in self._due():
            if self._clock() >= until:
                break
            try:
                self._blobs.check(file, partial(self._count_and_rest, file, limiter))
            except (Unavailable, DiskFailed) as error:  # the others are checked all the same
                log.warning("blob not scrubbed", blob=str(file.blob), reason=error.detail)
            finally:
                self._reading = None
        self._blobs.record_hashes()
        self._scrub_log.save()
        return _TICK_SECONDS

    def _due(self) -> list[File]:
        before, files = self._now() - self._interval_seconds, self._presence.files
        due = [(at, str(blob), blob) for blob, at in self._scrub_log.times() if at <= before]
        return [files[blob] for _, _, blob in sorted(due) if blob in files]

    def _count_and_rest(self, file: File, limiter: RateLimiter, count: int) -> None:
        done = self._reading[1] if self._reading and self._reading[0] is file else 0
        self._reading = (file, min(done + count, file.size))  # its copies are read, too
        self._thread.rest(limiter.reserve(count, self._clock()))


def _be_modest() -> None:
    """Give the calling thread the cores and the disk only when nobody else needs them."""
    os.nice(NICENESS)
    read_when_idle()
