"""Frees disk space: the policy chooses which snapshots to evict, and the store evicts them.

There are four reasons to evict:

pull       A pull needs space. The policy chooses victims; if they do not free enough, the pull is refused.
           They are evicted one by one, each only when bytes that have arrived need its disk blocks.
pressure   More space is taken than the high watermark allows, or bytes that have arrived find no free space.
           Unprotected snapshots are evicted, down to the low watermark.
unused     Nobody used a snapshot for `unused_seconds`.
asked      An operator asked for space.

Except for `unused`, partial downloads of ended pulls are removed before any snapshot is evicted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress

from cachd.errors import NoSpace
from cachd.metrics import Metrics
from cachd.model import Manifest
from cachd.policy.eviction import Candidate
from cachd.store.space import Reservation
from cachd.store.store import Store
from cachd.transfer.evictor import Eviction, Evictor
from cachd.transfer.plans import Plan, Planner
from cachd.transfer.pull_space import PullSpace
from cachd.transfer.space_watch import EvictionRules, SpaceWatch


class Reclaim:
    """What pulls and operators ask of evictions.

    `watch` is the thread that evicts for `pressure` and what is `unused`.
    """

    def __init__(self, store: Store, metrics: Metrics, rules: EvictionRules) -> None:
        self._store, self._automatic = store, rules.automatic
        self._planner, self._evictor = Planner(store), Evictor(store, metrics)
        self.watch = SpaceWatch(store, self._planner, self._evictor, rules)

    def start(self) -> None:
        """Start the thread."""
        self.watch.start()

    def close(self) -> None:
        """Join the thread."""
        self.watch.close()

    # --- for pulls ---

    @contextmanager
    def reserve(self, manifest: Manifest, name: str) -> Iterator[Reservation]:
        """Like Store.reserve, but chooses victims when free space is lacking.

        They are evicted later, as grants of the reservation need their blocks. Raises TooBig, or NoSpace with
        the models that hold the space.
        """
        space = PullSpace(name, self._store, self._planner, self._evictor, automatic=self._automatic)
        with self._store.content.claim(manifest, name), ExitStack() as stack:
            yield space.reserve(manifest, stack)

    def settle(self, reservation: Reservation) -> None:
        """When all bytes of a pull have arrived, free the space that its views and manifest are owed.

        If that is not possible, it returns all the same.
        """
        reservation.has_arrived()
        with suppress(NoSpace):
            while self._store.space.take_unclaimed(reservation) and reservation.make_space(1):
                pass

    # --- for operators ---

    def keep(self, names: Collection[str]) -> None:
        """Never evict these names: the configuration lists them, so they would be pulled again at once."""
        self._planner.listed = frozenset(names)

    def keeps(self, name: str) -> bool:
        """Whether the configuration lists the name."""
        return name in self._planner.listed

    @property
    def is_automatic(self) -> bool:
        """Whether a pull may evict models."""
        return self._automatic

    def candidates(self) -> list[Candidate]:
        """Every snapshot on disk as the policy sees it."""
        return self._planner.candidates()

    def evicted(self) -> list[Eviction]:
        """The last evictions, newest first."""
        return self._evictor.evicted()

    def plan(self, need: int) -> Plan:
        """What would be removed to make `need` bytes available."""
        return self._planner.plan(need - self._store.space.bounded().available)

    def make_available(self, need: int) -> list[Eviction]:
        """Evict until `need` bytes are available. If that cannot be, raises NoSpace and evicts nothing."""
        with self._planner.lock:
            plan = self.plan(need)
            if not plan.is_enough:
                raise self._planner.with_holders(
                    NoSpace(
                        f"{plan.short} more bytes are needed and only {plan.frees} can be freed",
                        hint="unpin or release models, or stop the pods that use them (see cachd capacity)",
                        need=need,
                        short=plan.short,
                    )
                )
            self._evictor.drop_partials(plan.partials)
            return self._evictor.evict(plan.choices, "asked")
