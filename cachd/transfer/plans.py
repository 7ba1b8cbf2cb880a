"""Plans what to remove for space: describes the snapshots on disk to the policy, which chooses."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from cachd.errors import NoSpace
from cachd.model import Digest, Manifest, Snapshot
from cachd.policy.eviction import Candidate, Choice, Use, choose, expired, largest_first, refetch_seconds
from cachd.store.store import Store
from cachd.store.sweep import Leftover
from cachd.store.usage_log import GATED, GONE
from cachd.transfer.usage import record_opens


@dataclass(frozen=True, slots=True)
class Plan:
    """What to remove for `short` bytes: first `partials`, then `choices`, each in order.

    `candidates`: every snapshot, with its protection.
    """

    short: int
    partials: Sequence[Leftover]
    choices: Sequence[Choice]
    candidates: Sequence[Candidate]

    @property
    def frees(self) -> int:
        """The bytes that all of it frees."""
        return sum(found.size for found in self.partials) + sum(choice.frees for choice in self.choices)

    @property
    def is_enough(self) -> bool:
        """Whether it frees what is short."""
        return self.frees >= self.short


EMPTY_PLAN = Plan(0, (), (), ())


class Victims:
    """What is still to be removed for one pull.

    `plan`: the rest of the plan for its bytes. `for_inodes`: the rest of the choices for its inodes. Changed
    only with `Planner.lock` held.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.plan = EMPTY_PLAN
        self.for_inodes: Sequence[Choice] = ()

    @property
    def manifests(self) -> set[str]:
        """The snapshots among them."""
        return {choice.candidate.manifest for choice in (*self.plan.choices, *self.for_inodes)}

    def next(self) -> Leftover | Choice:
        """Take the next one from the plan."""
        if self.plan.partials:
            first, *partials = self.plan.partials
            self.plan = replace(self.plan, partials=partials)
            return first
        choice, *choices = self.plan.choices
        self.plan = replace(self.plan, choices=choices)
        return choice

    def next_for_inodes(self) -> Choice | None:
        """Take the next one that frees inodes, if one is left."""
        if not self.for_inodes:
            return None
        choice, *self.for_inodes = self.for_inodes
        return choice


class Planner:
    """Plans evictions of one store. `lock` is held from a plan to its last eviction or reservation.

    `victims`: those of the pulls that run. `listed`: names that the configuration lists, which would be
    pulled again at once.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self._store, self._clock = store, clock
        self.lock = threading.Lock()
        self.victims: list[Victims] = []
        self.listed: frozenset[str] = frozenset()

    def plan(self, short: int, *, for_pull: Victims | None = None) -> Plan:
        """What to remove for `short` bytes. Victims of pulls are protected, except those of `for_pull`."""
        return self._plan(short, [v for v in self.victims if v is not for_pull])

    def plan_ignoring_pulls(self, short: int) -> Plan:
        """What to remove for `short` bytes, even if a pull has chosen it for itself."""
        return self._plan(short, ())

    def plan_inodes(self, inodes: int, *, for_pull: Victims) -> Plan:
        """What to remove for so many inodes: the plan counts inodes instead of bytes."""
        others = [v for v in self.victims if v is not for_pull]
        candidates = [
            replace(c, blobs=dict.fromkeys(c.blobs, 1)) for c in self._candidates(_chosen_by(others))
        ]
        return Plan(inodes, (), self._choose(candidates, inodes), candidates)

    def plan_unused(self, unused_seconds: float) -> list[Choice]:
        """The snapshots that nobody used for so long."""
        return expired(
            self.candidates(),
            unused_seconds=unused_seconds,
            now=self._clock(),
            claimed=self._store.content.claims.blobs(),
        )

    def candidates(self) -> list[Candidate]:
        """Every snapshot on disk as the policy sees it."""
        return self._candidates(_chosen_by(list(self.victims)))

    def are_as_planned(self, victims: Victims) -> bool:
        """Whether the victims have the same use, blobs and lack of protection as when they were chosen."""
        others = [v for v in self.victims if v is not victims]
        now = {c.manifest: c for c in self._candidates(_chosen_by(others))}
        for choice in victims.plan.choices:
            before, found = choice.candidate, now.get(choice.candidate.manifest)
            if found is None or found.protected or found.use != before.use or found.blobs != before.blobs:
                return False
        return True

    def with_holders(self, error: NoSpace) -> NoSpace:
        """A copy of the error that also names what holds the space."""
        held_by = largest_first(self.candidates())
        now = self._store.space.capacity()
        if now.usage.held:
            held_by.append(f"deleted models that are still open ({now.usage.held} bytes)")
        others = now.total - now.free - now.usage.total
        if others > 0 and not now.is_limited:
            held_by.append(f"other files of this disk ({others} bytes)")
        detail = f"{error.detail}; held by {', '.join(held_by)}"
        return replace(error, detail=detail, held_by=held_by)

    def _plan(self, short: int, others: Collection[Victims]) -> Plan:
        short = max(short, 0)
        partials = self._partials(short, others)
        candidates = self._candidates(_chosen_by(others))
        choices = self._choose(candidates, short - sum(found.size for found in partials))
        return Plan(short, partials, choices, candidates)

    def _choose(self, candidates: Sequence[Candidate], need: int) -> list[Choice]:
        return choose(candidates, need=need, now=self._clock(), claimed=self._store.content.claims.blobs())

    def _partials(self, short: int, others: Collection[Victims]) -> list[Leftover]:
        """Partial downloads of ended pulls that free `short` bytes, or all of them; the oldest first.

        None on a shared volume: another node may wait to resume them.
        """
        if self._store.protection.rules.is_unknown:
            return []
        taken = {found.name for victims in others for found in victims.plan.partials}
        found, freed = list[Leftover](), 0
        for each in self._store.sweep.partial_downloads() if short > 0 else ():
            if freed >= short:
                break
            if each.name not in taken and each.size:
                found.append(each)
                freed += each.size
        return found

    def _candidates(self, chosen: Mapping[str, str]) -> list[Candidate]:
        """Every snapshot as the policy sees it. `chosen`: other pulls' victims, from `_chosen_by`."""
        record_opens(self._store, self._clock())
        claimed = self._store.content.claims.blobs()
        return [
            self._candidate(manifest, named, claimed, chosen.get(manifest.id))
            for manifest, named in self._store.manifests.with_names()
        ]

    def _candidate(
        self,
        manifest: Manifest,
        named: Sequence[Snapshot],
        claimed: Collection[Digest],
        chosen_for: str | None,
    ) -> Candidate:
        usage_log = self._store.usage_log
        lost = {usage_log.why_lost(s.spec.ref.base) for s in named}
        protected = self._protection(manifest, named, claimed)
        if not protected and chosen_for is not None:
            protected = f"will be evicted for the pull of {chosen_for} as its bytes arrive"
        return Candidate(
            manifest=manifest.id,
            names=tuple(s.name for s in named),
            blobs=self._sizes(manifest),
            use=Use.combined([usage_log.of(s.name) or Use(s.published_at) for s in named]),
            refetch_seconds=refetch_seconds(
                manifest.size,
                usage_log.rate(manifest.base.partition("://")[0]),
                verified=manifest.has_all_digests,
                gated=GATED in lost,
                gone=GONE in lost,
            ),
            priority=max((usage_log.priority(s.name) for s in named), default=0),
            protected=protected,
            opened_at=usage_log.opened_at(manifest.id),
        )

    def _sizes(self, manifest: Manifest) -> dict[Digest, int]:
        """Bytes of disk of each blob. The copies in the views count as a blob of this snapshot alone."""
        sizes, copies = self._store.content.sizes(manifest), self._store.copies.taken(manifest.id)
        return sizes | ({Digest("origin", manifest.id * 2): copies} if copies else {})

    def _protection(self, manifest: Manifest, named: Sequence[Snapshot], claimed: Collection[Digest]) -> str:
        """Why a snapshot may not be evicted; empty when it may."""
        store, now = self._store, self._clock()
        if pinned := [s.name for s in named if store.pins.has(s.name)]:
            return f"pinned as {pinned[0]}"
        for snapshot in named:
            if held := store.leases.of(snapshot.name, now):
                seconds = held[-1].expires_at - now
                return f"leased by {held[-1].holder or 'somebody'} for {seconds:.0f} s more"
        if listed := [s.name for s in named if s.name in self.listed]:
            return f"listed in the configuration as {listed[0]}"
        if all(f.blob in claimed for f in manifest.files):
            return "a running pull needs its files"
        if by := store.protection.in_use_by(manifest):
            return str(by)
        return store.protection.opened_lately(manifest.id)


def _chosen_by(victims: Collection[Victims]) -> dict[str, str]:
    """The manifest of each victim, with the name of the pull that it was chosen for."""
    return {manifest: each.name for each in victims for manifest in each.manifests}
