"""Chooses the snapshots to evict for space, each with the reason.

    score = recent uses x seconds to fetch the snapshot again x 2 ** (priority / 10)

The snapshot with the lowest score per byte freed is evicted first. A blob that several snapshots share is
freed when the last of them is evicted. Protected snapshots are never evicted.

`recent uses` is a count that halves every HALF_LIFE_SECONDS, as in the LRFU family of policies between least
recently and least frequently used (Lee et al., 2001). The score per byte is the GreedyDual-Size rule for
objects of unequal size and cost (Cao and Irani, 1997).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from cachd.model import Digest, Percentage

HALF_LIFE_SECONDS = 3 * 86400.0
SITTING_SECONDS = 600.0  # uses closer together than this count as one, such as a probe every second
FRESH_SECONDS = 60.0  # a snapshot used within this time is evicted last: its pod may be starting
_FRESH_FACTOR = 1e6
# An engine that starts opens one file after another, in several processes. Between two of them no file may be
# open for minutes: while its workers start, or until the kubelet restarts a container (at most 300 s later).
OPENED_SECONDS = 300.0
UNKNOWN_RATE = 50e6  # bytes a second, assumed for a source that was never measured
UNVERIFIED_FACTOR, GATED_FACTOR, GONE_FACTOR = 2.0, 4.0, 100.0
_MAX_NAMED = 5  # snapshots named in an error


@dataclass(frozen=True, slots=True)
class Use:
    """The uses of a snapshot: the time of the last one (Unix time), and the recent uses at that time."""

    last: float
    weight: float = 1.0

    def again(self, now: float) -> Use:
        """The value after another use. Uses within SITTING_SECONDS count once."""
        if now - self.last < SITTING_SECONDS:
            return Use(max(self.last, now), self.weight)
        return Use(now, self.popularity(now) + 1)

    def popularity(self, now: float) -> float:
        """The recent uses at the time `now`."""
        return self.weight * math.pow(0.5, max(now - self.last, 0.0) / HALF_LIFE_SECONDS)

    @classmethod
    def combined(cls, under_names: Sequence[Use]) -> Use | None:
        """The uses under several names as one; None without any."""
        if not under_names:
            return None
        last = max(use.last for use in under_names)
        return cls(last, sum(use.popularity(last) for use in under_names))


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One snapshot as the policy sees it.

    `names`: the names that lead to it; none if a newer snapshot replaced it. `blobs`: the bytes on disk of
    each blob. `use` is None if no name leads to it. `protected`: what protects it; empty if nothing does.
    `opened_at`: when one of its files was last opened (Unix time), if that is known.
    """

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
        """Bytes on disk, including blobs that other snapshots share."""
        return sum(self.blobs.values())

    def score(self, now: float) -> float:
        """The score of the module's formula; 0 when no name leads to the snapshot.

        It is a million times higher for FRESH_SECONDS after a use.
        """
        if self.use is None:
            return 0.0
        fresh = _FRESH_FACTOR if now - self.use.last < FRESH_SECONDS else 1.0
        return self.use.popularity(now) * self.refetch_seconds * math.pow(2, self.priority / 10) * fresh


@dataclass(frozen=True, slots=True)
class Choice:
    """A snapshot to evict, the bytes that this frees after all choices before it, and the reason."""

    candidate: Candidate
    frees: int
    why: str


def bytes_over(taken: int, space: int, *, high: Percentage, low: Percentage) -> int:
    """Bytes to evict: if more than the `high` watermark is taken, what exceeds the `low` one; else 0."""
    return taken - low.of(space) if taken > high.of(space) else 0


def largest_first(candidates: Collection[Candidate]) -> list[str]:
    """The largest snapshots as texts for people, each with its size and protection."""
    largest = sorted(candidates, key=lambda c: (-c.size, c.manifest))
    named = [
        f"{c.names[0] if c.names else 'a replaced snapshot'} ({c.size} bytes, {c.protected or 'evictable'})"
        for c in largest[:_MAX_NAMED]
    ]
    more = len(largest) - len(named)
    return [*named, f"{more} more models"] if more > 0 else named


def opened_lately(opened_at: float | None, now: float, *, within: float) -> str:
    """The protection `opened … ago` if `opened_at` is less than `within` seconds ago; else empty."""
    if opened_at is None or abs(now - opened_at) >= within:  # abs: a clock that was set back
        return ""
    return f"opened {duration_in_words(now - opened_at)} ago"


def refetch_seconds(
    size: int,
    bytes_per_second: float | None,
    *,
    verified: bool = True,
    gated: bool = False,
    gone: bool = False,
) -> float:
    """The cost of fetching `size` bytes again, in seconds.

    It is higher if the source may not deliver the same bytes again: it publishes no digests (`verified` is
    false), it denied access at the last pull (`gated`), or it no longer has the model (`gone`).
    """
    seconds = size / (bytes_per_second or UNKNOWN_RATE)
    seconds *= 1.0 if verified else UNVERIFIED_FACTOR
    seconds *= GATED_FACTOR if gated else 1.0
    return seconds * (GONE_FACTOR if gone else 1.0)


def choose(
    candidates: Iterable[Candidate], *, need: int, now: float, claimed: Collection[Digest] = ()
) -> list[Choice]:
    """The snapshots to evict for `need` bytes, in order, each of them necessary.

    If all unprotected snapshots together free less than `need`, returns all of them. A running pull needs the
    blobs in `claimed`, so no eviction frees them.

    Greedy by score per byte. At each step, the snapshot with the lowest score that alone frees the rest is
    tried as the last one, so that no large snapshot is evicted for a few bytes.
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
    """The unprotected snapshots that nobody used for `unused_seconds`, the longest unused first."""
    everybody = list(candidates)
    old = [c for c in everybody if not c.protected and c.use and now - c.use.last >= unused_seconds]
    return _explained(everybody, sorted(old, key=lambda c: (_last(c), c.manifest)), claimed, now)


class _Held:
    """Counts the snapshots that hold each blob, while one snapshot after the other is evicted."""

    def __init__(self, everybody: Iterable[Candidate], claimed: Collection[Digest]) -> None:
        everybody = list(everybody)
        self._holders = Counter(blob for c in everybody for blob in c.blobs)
        self._kept = set(claimed).union(*(c.blobs for c in everybody if c.protected))

    def frees(self, candidate: Candidate) -> int:
        """Bytes that evicting the candidate now frees: the blobs that no other snapshot holds."""
        return sum(s for b, s in candidate.blobs.items() if self._holders[b] == 1 and b not in self._kept)

    def share(self, candidate: Candidate) -> float:
        """Bytes that count as the candidate's own: each blob is divided among the snapshots that hold it."""
        return sum(s / self._holders[b] for b, s in candidate.blobs.items() if b not in self._kept)

    def lose(self, *candidates: Candidate) -> int:
        """Count the candidates as evicted. Returns the bytes freed."""
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
        f"last used {duration_in_words(now - candidate.use.last)} ago,"
        f" {candidate.use.popularity(now):.2f} recent uses,"
        f" about {duration_in_words(candidate.refetch_seconds)} to fetch again"
    )
    if candidate.priority:
        why += f", priority {candidate.priority}"
    sharing = sorted(
        c.names[0] if c.names else c.manifest for c in left if candidate.blobs.keys() & c.blobs.keys()
    )
    return f"{why}; files it shares with {', '.join(sharing[:3])} stay" if sharing else why


def _rank(candidate: Candidate, score: float, share: float) -> tuple[float, float, str]:
    """The sort key of evictions: the lowest score per byte first, then the longest unused."""
    return score / share if share else float("inf"), _last(candidate), candidate.manifest


def _last(candidate: Candidate) -> float:
    return candidate.use.last if candidate.use else float("-inf")


def duration_in_words(seconds: float) -> str:
    """A duration such as `3 h` or `40 s`, in the largest unit that fits twice."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(seconds, 0):.0f} s"
