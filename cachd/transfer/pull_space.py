"""Makes space for one pull: the snapshots chosen for it are evicted only as its bytes arrive."""

from __future__ import annotations

from contextlib import ExitStack, suppress

import structlog

from cachd.errors import NoSpace
from cachd.model import Manifest
from cachd.policy.eviction import Choice
from cachd.store.space import Reservation
from cachd.store.store import Store
from cachd.transfer.evictor import Evictor
from cachd.transfer.plans import Planner, Victims

log = structlog.get_logger(__name__)


class PullSpace:
    """The space of one pull. `automatic`: whether other models may be evicted for it.

    new ──reserve──> reserved ──make_space (the next victim is evicted)──> reserved ──close──> closed
    """

    def __init__(
        self, name: str, store: Store, planner: Planner, evictor: Evictor, *, automatic: bool
    ) -> None:
        self._store, self._planner, self._evictor, self._automatic = store, planner, evictor, automatic
        self._victims = Victims(name)

    def reserve(self, manifest: Manifest, stack: ExitStack) -> Reservation:
        """Reserve what the manifest lacks, and choose victims if needed. Raises TooBig or NoSpace.

        The reservation ends with the `stack`.
        """
        stack.callback(self.close)
        reservation = self._reserved(manifest, stack)
        reservation.make_space = lambda least: self.make_space(reservation, least)
        return reservation

    def make_space(self, reservation: Reservation, least: int) -> bool:
        """Evict the next victim. Returns and raises as `Reservation.make_space` does."""
        space = self._store.space
        with self._planner.lock:
            if reservation.has_ended:
                return False
            if reservation.owed_inodes and space.lacks_inodes():
                self._free_inodes(reservation)
                return True
            if space.most_of(reservation, least) >= least:  # an eviction or a deletion freed enough meanwhile
                return True
            if not reservation.owed:  # another process has taken the reserved space
                return False
            self._plan_again(reservation)
            self._free_next(reservation)
            return True

    def close(self) -> None:
        """The pull has ended: its remaining victims stay, and may be chosen for other pulls."""
        with suppress(ValueError):
            self._planner.victims.remove(self._victims)

    def _reserved(self, manifest: Manifest, stack: ExitStack) -> Reservation:
        with suppress(NoSpace):
            return stack.enter_context(self._store.reserve(manifest))
        owed = owed_inodes = 0
        with self._planner.lock:
            while True:
                try:
                    reservation = stack.enter_context(
                        self._store.reserve(manifest, owed=owed, owed_inodes=owed_inodes)
                    )
                except NoSpace as error:
                    if not self._choose(error.short, error.short_inodes):
                        raise self._planner.with_holders(error) from error
                    owed, owed_inodes = max(owed, error.short), max(owed_inodes, error.short_inodes)
                    continue
                self._planner.victims.append(self._victims)
                return reservation

    def _choose(self, short: int, inodes: int) -> bool:
        """Choose victims for so many bytes, or for `inodes` if not 0. Returns whether they suffice."""
        victims = self._victims
        if not self._automatic:
            return False
        if inodes:
            plan = self._planner.plan_inodes(inodes, for_pull=victims)
            victims.for_inodes = plan.choices
        else:
            plan = victims.plan = self._planner.plan(short, for_pull=victims)
        return plan.is_enough

    def _free_next(self, reservation: Reservation) -> None:
        victim = self._victims.next()
        expected = victim.frees if isinstance(victim, Choice) else victim.size
        with self._store.space.freeing(reservation, expected) as report:
            if isinstance(victim, Choice):
                report(sum(gone.freed for gone in self._evictor.evict([victim], "pull")))
            else:
                report(self._evictor.drop_partials([victim]))

    def _free_inodes(self, reservation: Reservation) -> None:
        choice = self._victims.next_for_inodes()
        if choice is None:
            reservation.owed_inodes = 0  # no victim is left: from here on, the file system decides
        elif self._evictor.evict([choice], "pull"):
            reservation.owed_inodes = max(reservation.owed_inodes - choice.frees, 0)

    def _plan_again(self, reservation: Reservation) -> None:
        """Choose new victims if the chosen ones are gone, were used or became protected. Raises NoSpace."""
        owed, victims = reservation.owed, self._victims
        if victims.plan.frees >= owed and self._planner.are_as_planned(victims):
            return
        plan = self._planner.plan(owed, for_pull=victims)
        if not plan.is_enough:
            raise self._planner.with_holders(
                NoSpace(
                    f"{victims.name} still needs {owed} bytes to be freed, and only {plan.frees} can be",
                    hint="models chosen for eviction are now in use or protected; retry, or delete a model",
                    short=owed - plan.frees,
                )
            )
        log.info("other models chosen for eviction", name=victims.name, owed_bytes=owed)
        victims.plan = plan
