"""Which snapshots to lose for space, and why.

    worth = uses of late, halved every HALF_LIFE_SECONDS x seconds to fetch it again x 2 ** (priority / 10)

What is worth least for the bytes that losing it frees goes first. Bytes that another snapshot holds, too,
are freed by the last of them only. What is protected never goes. `uses of late` is the exponentially
decayed count of the LRFU family (Lee et al., 2001), between least-recently and least-frequently used; worth
a byte is the GreedyDual-Size rule for things of unequal size and cost (Cao and Irani, 1997).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cachd.model import Digest

HALF_LIFE_SECONDS = 3 * 86400.0
SITTING_SECONDS = 600.0  # uses closer together than this are one: a probe every second is no popularity
FRESH_SECONDS = 60.0  # used so lately, a snapshot goes only when no other can: its pod may be starting
_FRESH_FACTOR = 1e6
# An engine that starts opens one file after another, in several processes. Between two of them none may be
# open for minutes: while its workers start, or until the kubelet starts a container again (300 s at most).
OPENED_SECONDS = 300.0
UNKNOWN_RATE = 50e6  # bytes a second of a source that was never measured
UNVERIFIED_FACTOR, GATED_FACTOR, GONE_FACTOR = 2.0, 4.0, 100.0


@dataclass(frozen=True, slots=True)
class Use:
    """How a snapshot was used: when last, in seconds since the epoch, and how often until then."""

    last: float
    weight: float = 1.0

    def again(self, now: float) -> Use:
        """What it is after a use now; many within one sitting count once."""
        if now - self.last < SITTING_SECONDS:
            return Use(max(self.last, now), self.weight)
        return Use(now, self.popularity(now) + 1)

    def popularity(self, now: float) -> float:
        """Uses of late."""
        return self.weight * math.pow(0.5, max(now - self.last, 0.0) / HALF_LIFE_SECONDS)


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One snapshot: its names, none when a newer one replaced it; the bytes on disk of each of its blobs;
    its use, None when nobody can ask for it; by what it is protected, empty when by nothing; and when one of
    its files was last opened, None when that is not known."""

    manifest: str
    names: tuple[str, ...]
    blobs: Mapping[Digest, int]
    use: Use | None
    refetch_seconds: float
    priority: int = 0
    protected: str = ""
    opened_at: float | None = None

    @property
    def size(self) -> int:
        """Bytes on disk, those it shares included."""
        return sum(self.blobs.values())

    def score(self, now: float) -> float:
        if self.use is None:
            return 0.0
        fresh = _FRESH_FACTOR if now - self.use.last < FRESH_SECONDS else 1.0
        return self.use.popularity(now) * self.refetch_seconds * math.pow(2, self.priority / 10) * fresh


@dataclass(frozen=True, slots=True)
class Choice:
    """A snapshot to lose after those before it: the bytes that frees, and the reason in words."""

    candidate: Candidate
    frees: int
    why: str


def opened_lately(opened_at: float | None, now: float, *, within: float) -> str:
    """What protects a snapshot that somebody opened within so many seconds; empty when nobody did."""
    if opened_at is None or abs(now - opened_at) >= within:  # abs: a clock that was set back
        return ""
    return f"opened {told_seconds(now - opened_at)} ago"


def refetch_seconds(
    size: int,
    bytes_per_second: float | None,
    *,
    verified: bool = True,
    gated: bool = False,
    gone: bool = False,
) -> float:
    """What it costs to have `size` bytes again. A source that publishes no digests may send others, one
    that wants a token may refuse it, one that is gone will not come back."""
    seconds = size / (bytes_per_second or UNKNOWN_RATE)
    seconds *= 1.0 if verified else UNVERIFIED_FACTOR
    seconds *= GATED_FACTOR if gated else 1.0
    return seconds * (GONE_FACTOR if gone else 1.0)


def choose(
    candidates: Iterable[Candidate], *, need: int, now: float, claimed: Collection[Digest] = ()
) -> list[Choice]:
    """The snapshots to lose for `need` bytes, in order, none of which could stay; all that may go when even
    those free less. Blobs in `claimed` are freed by nothing: a running pull needs them.

    Greedy by worth a byte; at each step the least worthy snapshot that covers the rest alone is tried as
    the last one, so that no giant goes for a few bytes.
    """
    everybody = list(candidates)
    held, taken, freed, lost = _Held(everybody, claimed), list[Candidate](), 0, 0.0
    score = {c: c.score(now) for c in everybody if not c.protected}
    rest = sorted(score, key=lambda c: c.manifest)
    best: tuple[float, list[Candidate]] | None = None
    while rest and freed < need:
        for last in rest:
            if (best is None or lost + score[last] < best[0]) and freed + held.frees(last) >= need:
                best = lost + score[last], [*taken, last]
        following = min(rest, key=lambda c: _rank(c, score[c], held.share(c)))
        rest.remove(following)
        if held.share(following):
            taken.append(following)
            freed += held.lose(following)
            lost += score[following]
    found = best[1] if best else taken
    if freed >= need:
        for candidate in sorted(found, key=lambda c: (-score[c], c.manifest)):
            without = [c for c in found if c is not candidate]
            if _Held(everybody, claimed).lose(*without) >= need:
                found = without
    return _explained(everybody, found, claimed, now)


def expired(
    candidates: Iterable[Candidate], *, unused_seconds: float, now: float, claimed: Collection[Digest] = ()
) -> list[Choice]:
    """The snapshots that nobody used for so long, the longest unused first."""
    everybody = list(candidates)
    old = [c for c in everybody if not c.protected and c.use and now - c.use.last >= unused_seconds]
    return _explained(everybody, sorted(old, key=lambda c: (_last(c), c.manifest)), claimed, now)


class _Held:
    """Who holds which blob while one snapshot after the other is lost."""

    def __init__(self, everybody: Iterable[Candidate], claimed: Collection[Digest]) -> None:
        everybody = list(everybody)
        self._holders = Counter(blob for c in everybody for blob in c.blobs)
        self._kept = set(claimed).union(*(c.blobs for c in everybody if c.protected))

    def frees(self, candidate: Candidate) -> int:
        """Bytes that losing it now frees: those of the blobs that it alone holds."""
        return sum(s for b, s in candidate.blobs.items() if self._holders[b] == 1 and b not in self._kept)

    def share(self, candidate: Candidate) -> float:
        """Bytes that it may count as its own: those of a blob are divided among who still holds it."""
        return sum(s / self._holders[b] for b, s in candidate.blobs.items() if b not in self._kept)

    def lose(self, *candidates: Candidate) -> int:
        """Let them go; the bytes freed."""
        freed = 0
        for candidate in candidates:
            freed += self.frees(candidate)
            self._holders.subtract(candidate.blobs.keys())
        return freed


def _explained(
    everybody: Sequence[Candidate], found: Sequence[Candidate], claimed: Collection[Digest], now: float
) -> list[Choice]:
    held, left = _Held(everybody, claimed), [c for c in everybody if c not in found]
    return [Choice(c, held.lose(c), _why(c, left, now)) for c in found]


def _why(candidate: Candidate, left: Iterable[Candidate], now: float) -> str:
    if candidate.use is None:
        return "a newer snapshot replaced it and nobody reads it"
    why = (
        f"last used {told_seconds(now - candidate.use.last)} ago,"
        f" {candidate.use.popularity(now):.2f} uses of late,"
        f" about {told_seconds(candidate.refetch_seconds)} to fetch again"
    )
    if candidate.priority:
        why += f", priority {candidate.priority}"
    sharing = sorted(
        c.names[0] if c.names else c.manifest for c in left if candidate.blobs.keys() & c.blobs.keys()
    )
    return f"{why}; files it shares with {', '.join(sharing[:3])} stay" if sharing else why


def _rank(candidate: Candidate, score: float, share: float) -> tuple[float, float, str]:
    """Of what goes first: the least worth a byte, then the longest unused."""
    return score / share if share else float("inf"), _last(candidate), candidate.manifest


def _last(candidate: Candidate) -> float:
    return candidate.use.last if candidate.use else float("-inf")


def told_seconds(seconds: float) -> str:
    """`3 h`, `40 s`: in the largest unit of which there are two."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(seconds, 0):.0f} s"
