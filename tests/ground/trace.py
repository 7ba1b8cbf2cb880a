"""A seeded trace of requests for models, which counts the bytes that an eviction policy fetches again.

Requests ask for 50 models of unequal size, with popularities by Zipf's law, on a disk that holds ten average
models. In the second half other models are popular. A request for a model that is not on the disk fetches it,
and the policy chooses what to evict first. The policies are cachd's own, LRU, LFU, and one that knows the
future.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from cachd.model import Digest
from cachd.policy.eviction import Candidate, Use, choose, refetch_seconds

MODELS, SLOTS, REQUESTS = 50, 10, 3000
BETWEEN_SECONDS = 1200.0


@dataclass(frozen=True)
class Trace:
    """Sizes in bytes of the models, and which is asked for, in turn."""

    sizes: Sequence[int]
    asked: Sequence[int]

    @property
    def capacity(self) -> int:
        """Bytes of the disk."""
        return max(SLOTS * sum(self.sizes) // len(self.sizes), *self.sizes)


def trace(seed: int, *, requests: int = REQUESTS, skew: float = 1.0) -> Trace:
    """Seeded: 2 to 64 GB a model, asked for by Zipf's law, the ranks dealt anew half-way."""
    chance = random.Random(seed)
    sizes = [round(2e9 * 2 ** chance.uniform(0, 5)) for _ in range(MODELS)]
    totals = list(accumulate(1 / rank**skew for rank in range(1, MODELS + 1)))
    asked: list[int] = []
    for _ in range(2):
        ranked = chance.sample(range(MODELS), MODELS)
        asked += chance.choices(ranked, cum_weights=totals, k=requests // 2)
    return Trace(sizes, asked)


# Of the models that are here, the ones to lose for so many bytes, at this place of the trace.
Policy = Callable[[Mapping[int, Use], int, int], Sequence[int]]


def refetched(on: Trace, policy: Policy) -> int:
    """Bytes fetched for models that had been here before."""
    here: dict[int, Use] = {}
    seen: dict[int, Use] = {}
    total = 0
    for place, model in enumerate(on.asked):
        now = place * BETWEEN_SECONDS
        use = seen[model].again(now) if model in seen else Use(now)
        if model not in here:
            total += on.sizes[model] if model in seen else 0
            short = sum(on.sizes[m] for m in here) + on.sizes[model] - on.capacity
            for victim in policy(here, short, place) if short > 0 else ():
                del here[victim]
        here[model] = seen[model] = use
        assert sum(on.sizes[m] for m in here) <= on.capacity
    return total


def policies(on: Trace) -> dict[str, Policy]:
    """Each policy by its name; `offline` knows the future."""
    following, last = _next_uses(on.asked), _last_uses(on.asked)
    counts = [list(accumulate((asked == m for asked in on.asked), initial=0)) for m in range(MODELS)]

    def worst_first(badness: Callable[[int, int], float]) -> Policy:
        def policy(here: Mapping[int, Use], short: int, place: int) -> list[int]:
            victims = []
            for model in sorted(here, key=lambda m: badness(m, place), reverse=True):
                if short <= 0:
                    break
                victims.append(model)
                short -= on.sizes[model]
            return victims

        return policy

    def cachd(here: Mapping[int, Use], short: int, place: int) -> list[int]:
        candidates = [
            Candidate(str(m), (str(m),), {_blob(m): on.sizes[m]}, use, refetch_seconds(on.sizes[m], 1e9))
            for m, use in here.items()
        ]
        return [
            int(choice.candidate.manifest)
            for choice in choose(candidates, need=short, now=place * BETWEEN_SECONDS)
        ]

    return {
        "cachd": cachd,
        "LRU": worst_first(lambda model, place: -last[model][place]),
        "LFU": worst_first(lambda model, place: -counts[model][place]),
        "offline": worst_first(lambda model, place: following[model][place]),
    }


def _next_uses(asked: Sequence[int]) -> list[list[float]]:
    """For each model and place, where it is asked for next."""
    following = [[float("inf")] * (len(asked) + 1) for _ in range(MODELS)]
    for place in range(len(asked) - 1, -1, -1):
        for model in range(MODELS):
            following[model][place] = place if asked[place] == model else following[model][place + 1]
    return following


def _last_uses(asked: Sequence[int]) -> list[list[int]]:
    """For each model and place, where it was asked for last before it."""
    last = [[-1] * (len(asked) + 1) for _ in range(MODELS)]
    for place, found in enumerate(asked):
        for model in range(MODELS):
            last[model][place + 1] = place if found == model else last[model][place]
    return last


def _blob(model: int) -> Digest:
    return Digest("sha256", f"{model:064x}")
