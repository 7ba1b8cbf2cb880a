"""How far a pull is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from cachd.model import Digest, Manifest
from cachd.sources.source import Cut
from cachd.transfer.download import Download
from cachd.transfer.waits import Reason, Waits

_WINDOW_SECONDS = 10.0
_SLOW_SECONDS, _SLOW_BYTES_PER_SECOND = 5.0, 64 << 10


@dataclass(frozen=True, slots=True)
class _Figures:
    """Where a pull was when it ended."""

    done: int
    fetched: int
    resumed: int
    files_done: int


class Progress:
    """What a pull has done and has left. Written by its thread, read by anybody.

    `state` is queued, resolving, waiting (to be tried again), downloading, publishing, ready, failed or
    cancelled. Bytes count equal content once. `cut` ends the pull, wherever it is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = "queued"
        self.manifest: Manifest | None = None
        self.cut = Cut()
        self.resolve_seconds = 0.0  # that its source was asked what its ref is
        self._waits: Waits | None = Waits(Reason.slot)
        self._clock = clock
        self._present = 0
        self._downloads: dict[Digest, Download] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._final: _Figures | None = None

    def begin(self, manifest: Manifest, missing: int) -> None:
        """The manifest is known; `missing` of its bytes are no blobs yet."""
        self.manifest = manifest
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
        self._final = _Figures(self.done, self.fetched, self.resumed, self.files_done)
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
    def done(self) -> int:
        """Bytes that are here: blobs from before, resumed parts, and what has landed."""
        if self._final:
            return self._final.done
        return self._present + sum(d.landed for d in list(self._downloads.values()))

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

    @property
    def waits(self) -> Waits | None:
        """What it waits for; None while it gets on."""
        if self._waits or self.state != "downloading":
            return self._waits
        if self.is_paused:
            return Waits(Reason.space)
        if not self.is_slow:
            return None
        told = [d.waits for d in list(self._downloads.values()) if d.waits and not d.done.done()]
        return min(told, key=lambda waits: waits.until or 0.0) if told else Waits(Reason.slow)

    @property
    def is_paused(self) -> bool:
        """Whether it waits for room on a disk that another process fills."""
        return any(d.is_waiting_for_room for d in list(self._downloads.values()) if not d.done.done())

    @property
    def fetched(self) -> int:
        """Bytes received from the source for this pull."""
        if self._final:
            return self._final.fetched
        return sum(d.fetched for d in list(self._downloads.values()))

    @property
    def resumed(self) -> int:
        """Bytes that an earlier life of the daemon left and that were believed."""
        if self._final:
            return self._final.resumed
        return sum(d.resumed for d in list(self._downloads.values()))

    @property
    def files_done(self) -> int:
        """Files that are whole; those that were here before included."""
        if self._final:
            return self._final.files_done
        if self.manifest is None:
            return 0
        unfinished = {blob for blob, d in list(self._downloads.items()) if not d.done.done()}
        return sum(f.blob not in unfinished for f in self.manifest.files)

    @property
    def rate(self) -> float:
        """Bytes a second received over the last ten seconds."""
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds until the last byte at the present rate; None when that cannot be said."""
        return (self.total - self.done) / self.rate if self.rate > 0 and self.manifest else None
