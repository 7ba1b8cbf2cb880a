"""How far a pull is."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from cachd.model import Digest, Manifest
from cachd.sources.source import CancelToken
from cachd.transfer.download import Download
from cachd.transfer.waits import Reason, Waits

_WINDOW_SECONDS = 10.0
_SLOW_SECONDS, _SLOW_BYTES_PER_SECOND = 5.0, 64 << 10


@dataclass(frozen=True, slots=True)
class Figures:
    """Where a pull is: `done` bytes are here, `fetched` of them received for it, `resumed` left by an earlier
    life of the daemon and believed; `files_done` files are whole, those from before included; `is_paused`
    when it waits for room on a disk that another process fills."""

    done: int
    fetched: int
    resumed: int
    files_done: int
    is_paused: bool


class Progress:
    """What a pull has done and has left. Written by its thread, read by anybody.

    `state` is queued, resolving, waiting (to be tried again), downloading, publishing, ready, failed or
    cancelled. Bytes count equal content once. `cancel_token` ends the pull, wherever it is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = "queued"
        self.manifest: Manifest | None = None
        self.cancel_token = CancelToken()
        self.resolve_seconds = 0.0  # that its source was asked what its ref is
        self._waits: Waits | None = Waits(Reason.slot)
        self._clock = clock
        self._present = 0
        self._files: Counter[Digest] = Counter()  # of the manifest, by blob
        self._downloads: dict[Digest, Download] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._final: Figures | None = None

    def begin(self, manifest: Manifest, missing: int) -> None:
        """The manifest is known; `missing` of its bytes are no blobs yet."""
        self.manifest, self._files = manifest, Counter([f.blob for f in manifest.files])
        self._present = manifest.size - missing
        self._downloads = {}
        self.begins("downloading")

    def begins(self, state: str) -> None:
        """It is at work, and waits for nothing that is known before."""
        self.state, self._waits = state, None

    def waits_for(self, waits: Waits, state: str = "waiting") -> None:
        """It gets on when that is over."""
        self.state, self._waits = state, waits

    def end(self) -> None:
        """Nothing changes any more: keep the figures and let the downloads go."""
        self._final, self._files = self.now, Counter()
        self._downloads = {}
        self._samples.clear()

    def watch(self, download: Download) -> None:
        """Count a download, in the place of one of the same blob that failed."""
        self._downloads[download.file.blob] = download

    def sample(self) -> None:
        """Remember how far it is now, for the rate."""
        now = self._clock()
        self._samples.append((now, self.fetched))
        while now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def total(self) -> int:
        """Bytes of the model; 0 before it is resolved."""
        return self.manifest.size if self.manifest else 0

    @property
    def now(self) -> Figures:
        """Where it is, in one pass over its files."""
        if self._final:
            return self._final
        done, fetched, resumed, unfinished, is_paused = self._present, 0, 0, 0, False
        for blob, download in list(self._downloads.items()):
            done += download.received
            fetched += download.fetched
            resumed += download.resumed
            if not download.is_over:
                unfinished += self._files[blob]
                is_paused |= download.is_waiting_for_space
        return Figures(done, fetched, resumed, self._files.total() - unfinished, is_paused)

    @property
    def done(self) -> int:
        """See `Figures`."""
        return self.now.done

    @property
    def fetched(self) -> int:
        """See `Figures`."""
        return self.now.fetched

    @property
    def is_slow(self) -> bool:
        """Whether bytes are missing and hardly any came of late."""
        samples = list(self._samples)
        if not samples or self.state != "downloading":
            return False
        now, fetched = samples[-1]
        before = next((each for each in reversed(samples) if now - each[0] >= _SLOW_SECONDS), None)
        if before is None or fetched - before[1] >= _SLOW_BYTES_PER_SECOND * (now - before[0]):
            return False
        return self.done < self.total

    def waits(self, now: Figures) -> Waits | None:
        """What it waits for when it is there; None while it gets on."""
        if self._waits or self.state != "downloading":
            return self._waits
        if now.is_paused:
            return Waits(Reason.space)
        if not self.is_slow:
            return None
        told = [d.waits for d in list(self._downloads.values()) if d.waits and not d.is_over]
        return min(told, key=lambda waits: waits.until or 0.0) if told else Waits(Reason.slow)

    @property
    def rate(self) -> float:
        """Bytes a second received over the last ten seconds."""
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0

    def eta_seconds(self, now: Figures) -> float | None:
        """Seconds from there until the last byte at the present rate; None when that cannot be said."""
        rate = self.rate
        return (self.total - now.done) / rate if rate > 0 and self.manifest else None
