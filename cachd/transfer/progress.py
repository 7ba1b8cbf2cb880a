"""Tracks the state of a pull: how far it is and what it waits for."""

from __future__ import annotations

import enum
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from cachd.model import Digest, Manifest
from cachd.sources.cancel import CancelToken
from cachd.transfer.download.tally import Tally
from cachd.transfer.waits import Reason, Waits

_WINDOW_SECONDS = 10.0
_SLOW_SECONDS, _SLOW_BYTES_PER_SECOND = 5.0, 64 << 10


@dataclass(frozen=True, slots=True)
class Figures:
    """How far a pull is.

    `done`: bytes on this node. `fetched`: bytes received by its downloads. `resumed`: bytes that earlier
    pulls left in ingests and that passed their check. `hedged`: bytes of parts that another connection took
    over from one that was far slower. `files_done`: complete files, including those that were here before.
    `is_paused`: it waits for disk space that another process has taken.
    """

    done: int
    fetched: int
    resumed: int
    files_done: int
    is_paused: bool
    hedged: int = 0


class State(enum.StrEnum):
    """The states of a pull; `Progress` draws them."""

    queued = "queued"
    resolving = "resolving"
    waiting = "waiting"
    downloading = "downloading"
    publishing = "publishing"
    ready = "ready"
    failed = "failed"
    cancelled = "cancelled"


class Progress:
    """The state of one pull. Written by the pull's thread, read by any thread.

    queued ──begin_resolve──> resolving <──begin_resolve── waiting (for a retry)
       │                       │  │  ^                       ^
       │                       │  └──┼──────await_retry──────┘
       │        begin_download │     │ begin_resolve (the source has changed)
       │                       v     │
       └──begin_download──> downloading ──begin_publish──> publishing ──end──> ready
          (a repair)

    `end` leads from every state to failed or cancelled, and to queued when the daemon stops. While a pull
    resolves, `pause_resolve` says what it waits for. Byte counts count equal content once. `cancel_token`
    ends the pull in any state.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = State.queued
        self.manifest: Manifest | None = None
        self.cancel_token = CancelToken()
        self.resolve_seconds = 0.0  # time spent resolving so far
        self._waits: Waits | None = Waits(Reason.slot)
        self._clock = clock
        self._present = 0
        self._files: Counter[Digest] = Counter()  # how many files of the manifest have each blob
        self._downloads: dict[Digest, Tally] = {}
        self._samples: deque[tuple[float, int]] = deque()
        self._final: Figures | None = None
        self._total = 0  # of a pull without a manifest

    def begin_resolve(self) -> None:
        """The source is asked for the manifest. In a retry, the error of the attempt before stays known."""
        waits = self._waits if self.state is State.waiting else None
        self.state, self._waits = State.resolving, replace(waits, until=None) if waits else None

    def pause_resolve(self, waits: Waits) -> None:
        """The resolve continues, but the pull waits: for a slow source, or for its slot."""
        self.state, self._waits = State.resolving, waits

    def await_retry(self, waits: Waits) -> None:
        """The source is unavailable, and will be asked again."""
        self.state, self._waits = State.waiting, waits

    def begin_download(self, manifest: Manifest, missing: int) -> None:
        """The manifest is known. `missing` of its bytes are in no blob yet."""
        self.manifest, self._files = manifest, Counter([f.blob for f in manifest.files])
        self._present = manifest.size - missing
        self._downloads = {}
        self.state, self._waits = State.downloading, None

    def begin_publish(self) -> None:
        """All blobs are on the disk."""
        self.state = State.publishing

    def end(self, state: State) -> None:
        """Freeze the figures and drop the downloads. `state` is ready, failed, cancelled or queued."""
        self._final, self._files = self.now, Counter()
        self._downloads = {}
        self._samples.clear()
        self._total = self.total
        self._waits = self._waits if state is State.queued else None
        self.state = state

    def restore(self, done: int, total: int) -> None:
        """Show how far a pull was that ended before this process began."""
        self._final, self._total = Figures(done, 0, 0, 0, is_paused=False), total

    def watch(self, download: Tally) -> None:
        """Count a download. It replaces an earlier one of the same blob, which failed."""
        self._downloads[download.file.blob] = download

    def sample(self) -> None:
        """Record the bytes fetched until now, for `rate` and `is_slow`."""
        now = self._clock()
        self._samples.append((now, self.fetched))
        while now - self._samples[0][0] > _WINDOW_SECONDS:
            self._samples.popleft()

    @property
    def total(self) -> int:
        """Bytes of the model; 0 before it is resolved."""
        return self.manifest.size if self.manifest else self._total

    @property
    def now(self) -> Figures:
        """The current figures, from one pass over the downloads."""
        if self._final:
            return self._final
        done, fetched, resumed, hedged, unfinished, is_paused = self._present, 0, 0, 0, 0, False
        for blob, download in list(self._downloads.items()):
            done += download.received
            fetched += download.fetched
            resumed += download.resumed
            hedged += download.hedged
            if not download.is_over:
                unfinished += self._files[blob]
                is_paused |= download.is_waiting_for_space
        return Figures(done, fetched, resumed, self._files.total() - unfinished, is_paused, hedged)

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
        """Whether bytes are missing and hardly any arrived lately."""
        samples = list(self._samples)
        if not samples or self.state is not State.downloading:
            return False
        now, fetched = samples[-1]
        before = next((each for each in reversed(samples) if now - each[0] >= _SLOW_SECONDS), None)
        if before is None or fetched - before[1] >= _SLOW_BYTES_PER_SECOND * (now - before[0]):
            return False
        return self.done < self.total

    def waits(self, now: Figures) -> Waits | None:
        """What the pull waits for, given its current figures; None while it makes progress."""
        if self._waits or self.state is not State.downloading:
            return self._waits
        if now.is_paused:
            return Waits(Reason.space)
        if not self.is_slow:
            return None
        found = [d.waits for d in list(self._downloads.values()) if d.waits and not d.is_over]
        return min(found, key=lambda waits: waits.until or 0.0) if found else Waits(Reason.slow)

    @property
    def rate(self) -> float:
        """Bytes a second received over the last ten seconds."""
        if len(self._samples) < 2:
            return 0.0
        (began, first), (ended, last) = self._samples[0], self._samples[-1]
        return (last - first) / (ended - began) if ended > began else 0.0

    def eta_seconds(self, now: Figures) -> float | None:
        """Seconds until the last byte at the current rate; None while no byte arrives."""
        rate = self.rate
        return (self.total - now.done) / rate if rate > 0 and self.manifest else None
