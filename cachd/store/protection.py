"""Decides whether a snapshot may be removed now: nobody may have pinned, leased, held or opened it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cachd.errors import InUse
from cachd.kernel.leases import is_open
from cachd.model import Manifest, Snapshot
from cachd.policy.eviction import OPENED_SECONDS, opened_lately
from cachd.store.holds import Holds
from cachd.store.index import Index
from cachd.store.leases import Leases
from cachd.store.pins import PinnedBy, Pins
from cachd.store.watch import Watch

_FORCE = "force it (--force, force=true)"


class InUseBy(StrEnum):
    """Who uses a snapshot now, in words for people."""

    POD = "held by a pod"
    ANYBODY = "on a shared volume, where nobody can tell whether another node uses it"
    PROCESS = "open in a process on this node"


@dataclass(frozen=True, slots=True)
class UseRules:
    """The snapshots that count as in use although the kernel reports no open file.

    `keep_opened_seconds`: a snapshot whose files were opened so lately. `is_unknown`: every snapshot, because
    the root is on a shared volume, and this kernel does not know what other nodes use.
    """

    keep_opened_seconds: float = OPENED_SECONDS
    is_unknown: bool = False


class Protection:
    """What protects the snapshots of one root from removal. Any thread may ask."""

    def __init__(
        self,
        index: Index,
        *,
        pins: Pins,
        leases: Leases,
        holds: Holds,
        watch: Watch,
        rules: UseRules,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._content, self._names, self._manifests = index.content, index.names, index.manifests
        self._copies = index.copies
        self._pins, self._leases, self._holds, self._watch = pins, leases, holds, watch
        self.rules, self._clock = rules, clock

    def in_use_by(self, manifest: Manifest) -> InUseBy | None:
        """Who uses a snapshot now; None if nobody does."""
        with self._content.reads.paused():
            if self._holds.is_held(manifest.id):
                return InUseBy.POD
            is_read = is_open([self._content.at(f.blob) for f in manifest.files])
            is_read = is_read or self._copies.is_open(manifest.id)
        if is_read:
            return InUseBy.PROCESS
        return InUseBy.ANYBODY if self.rules.is_unknown else None

    def is_in_use(self, manifest: Manifest) -> bool:
        """Whether a pod holds the snapshot, or a process on this node has one of its files open or mapped."""
        return self.in_use_by(manifest) is not None

    def opened_lately(self, manifest: str) -> str:
        """`opened 40 s ago` if a process opened a file of it within `keep_opened_seconds`, otherwise empty.

        A process that opened one file so lately may be about to open the others.
        """
        now = self._clock()
        return opened_lately(self._watch.opened_at(manifest, now), now, within=self.rules.keep_opened_seconds)

    def check_unused(self, name: str) -> None:
        """Raises InUse if the name is pinned or leased, or is the only name of a snapshot that is in use."""
        self._check_kept(name)
        snapshot = self._names.known(name)
        if snapshot is not None:
            self.check_names_unused([snapshot], self._manifests.of(snapshot))

    def check_names_unused(self, named: Sequence[Snapshot], manifest: Manifest) -> None:
        """Raises InUse if one of these names of a snapshot is pinned or leased, or if the snapshot is in use
        and has no other name."""
        for snapshot in named:
            self._check_kept(snapshot.name)
        if not self._names.has_others(named) and (by := self.in_use_by(manifest)):
            raise _in_use(named[0].name, by)

    def check_names_unopened(self, named: Sequence[Snapshot], manifest: Manifest) -> None:
        """As `check_names_unused`; raises InUse also if a process opened one of the files lately.

        A starting engine opens its files one after another, and may have none open in between.
        """
        self.check_names_unused(named, manifest)
        if lately := self.opened_lately(named[0].manifest):
            raise InUse(f"a file of {named[0].name} was {lately}", code="opened_lately")

    def check_unnamed_unopened(self, manifest: str) -> None:
        """Raises InUse if a snapshot without a name is held, open, or was opened lately.

        Raises FileNotFoundError if it is gone, DiskFailed or Leased if its manifest is unreadable.
        """
        if by := self.in_use_by(self._manifests.read(manifest)):
            raise _in_use(f"snapshot {manifest}", by)
        if lately := self.opened_lately(manifest):
            raise InUse(f"a file of snapshot {manifest} was {lately}", code="opened_lately")

    def take_hold(self, manifest: str, *, of: str) -> None:
        """As `takes_hold`; raises InUse if a pod holds the snapshot. `of` names it in the message."""
        if not self.takes_hold(manifest):
            raise _in_use(of, InUseBy.POD)

    def takes_hold(self, manifest: str) -> bool:
        """Unlink the hold file, so that no pod can hold the snapshot any more; False if one holds it now.

        The caller holds `Names.changing`. Raises Unavailable or DiskFailed.
        """
        with self._content.reads.paused():
            return self._holds.take(manifest)

    def end(self, name: str) -> None:
        """Remove the pin and the leases of a name that is being removed. Raises DiskFailed."""
        self._pins.remove(name)
        self._leases.release_all(name)

    def _check_kept(self, name: str) -> None:
        """Raises InUse if the name is pinned or leased."""
        if by := self._pins.by(name):
            is_listed = PinnedBy.configuration in by
            first = "unpin it in the configuration" if is_listed else f"unpin it (cachd unpin {name})"
            raise InUse(f"{name} is pinned", code="pinned", hint=f"{first}, or {_FORCE}")
        if held := self._leases.of(name, self._clock()):
            raise InUse(
                f"{name} is leased by {held[-1].holder or 'an unnamed holder'} (leases: {len(held)})",
                code="leased",
                hint=f"wait until the leases are released or expire, or {_FORCE}",
            )


def _in_use(what: str, by: InUseBy) -> InUse:
    if by is InUseBy.ANYBODY:
        return InUse(
            f"{what} is {by}",
            code="shared_volume",
            hint=f"stop what uses it on all nodes, then {_FORCE}; a volume of this node alone: shared: false",
        )
    return InUse(
        f"{what} is {by}",
        hint=f"stop what uses it, or {_FORCE}: files that are open stay readable",
    )
