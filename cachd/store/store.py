"""Says what the rest of cachd may ask of the store."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Protocol

from cachd.model import Digest, File, Manifest, ModelSpec, Snapshot
from cachd.store.changes import Changes
from cachd.store.content import ContentStore
from cachd.store.copies import Copies
from cachd.store.history import Histories
from cachd.store.layout import Layout
from cachd.store.leases import Leases
from cachd.store.manifests import Manifests
from cachd.store.names import Names
from cachd.store.pending import PendingPulls
from cachd.store.permit import Permit
from cachd.store.pins import Pins
from cachd.store.protection import Protection
from cachd.store.space import Reservation, Space
from cachd.store.sweep import Sweep
from cachd.store.usage_log import UsageLog
from cachd.store.watch import Watch


class Store(Protocol):
    """The models of one root.

        absent ------publish------> ready         publish, rollback: ready stays ready, at another snapshot
        ready -------withdraw, evict, withdraw_refused------> absent
        ready -------quarantine, quarantine_copy, check------> quarantined
        quarantined -------publish, rollback------> ready
        quarantined -------withdraw, withdraw_refused------> absent

    The methods below change what pods see, durably and one at a time. Any thread may call any of them.
    All raise NoSpace or DiskFailed when the disk fails. Each docstring ends with the other errors.
    """

    layout: Layout  # where pods find the models
    names: Names  # which snapshot each name leads to
    manifests: Manifests  # the files of each snapshot
    changes: Changes  # the names whose status file is outdated
    history: Histories  # which snapshots each name led to before
    pins: Pins
    leases: Leases
    protection: Protection  # who uses a snapshot now
    pending: PendingPulls  # what to resume after a restart
    content: ContentStore  # the blobs
    copies: Copies  # the files of the views that are copies of their blobs
    space: Space
    sweep: Sweep
    usage_log: UsageLog
    watch: Watch
    reports_open_files: bool  # whether the kernel does, on this file system

    def reserve(
        self, manifest: Manifest, *, owed: int = 0, owed_inodes: int = 0
    ) -> AbstractContextManager[Reservation]:
        """Reserve space for the missing blobs; nobody removes the others meanwhile. TooBig, NoSpace."""

    def need(self, manifest: Manifest) -> int:
        """Bytes that must be available before a pull of the manifest can begin."""

    def publish(
        self, spec: ModelSpec, manifest: Manifest, *, now: float, permit: Permit | None = None
    ) -> Snapshot:
        """Let the spec's name lead to a manifest whose blobs are all here. Cancelled, InUse."""

    def rollback(self, name: str, *, now: float) -> Snapshot:
        """Let a name lead to its previous snapshot again. NotFound if none is kept; InUse."""

    def withdraw(self, name: str, *, force: bool = False) -> int:
        """Remove a name, and its snapshot if no other name leads there; the bytes freed. NotFound, InUse."""

    def evict(self, manifest: str) -> int:
        """Remove a snapshot with all its names; the bytes freed. NotFound, InUse."""

    def withdraw_refused(
        self, is_refused: Callable[[Manifest], bool], *, among: Collection[str] | None = None
    ) -> tuple[list[tuple[Snapshot, Manifest]], set[str]]:
        """Withdraw all refused snapshots, even if in use; the withdrawn names, and what is still in use."""

    def drop(self, manifest: str) -> int:
        """Remove a snapshot unless a name, a rollback or a process needs it; the bytes freed."""

    def sweep_snapshots(self, *, keep: Collection[str] = ()) -> int:
        """Drop every snapshot that nothing needs, but those of the bases in `keep`; the bytes freed."""

    def check(self, name: str, *, now: float) -> str | None:
        """What pods would find wrong with a ready name; quarantines it then. None if nothing is wrong."""

    def quarantine(self, file: File, wrong: str, inode: int, *, now: float) -> list[str]:
        """Make every name that uses a damaged blob wait for its repair; these names. Replaced."""

    def quarantine_copy(self, file: File, place: str, wrong: str, inode: int, *, now: float) -> list[str]:
        """As `quarantine`, for every name that shows copies of a blob of which one is damaged. Replaced."""

    def to_repair(self, spec: ModelSpec) -> Manifest | None:
        """The files that a quarantined spec had; None if it is not quarantined."""

    def watch_all(self) -> dict[Digest, File]:
        """Watch the views of every snapshot; one file for each of their blobs."""
