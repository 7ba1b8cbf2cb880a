"""The reports about disk space: capacity, planned evictions and past evictions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from enum import StrEnum
from typing import Literal

from cachd.policy.eviction import Candidate
from cachd.report.define import report
from cachd.report.values import When
from cachd.store.capacity import Capacity
from cachd.store.catalog import iso
from cachd.store.watch import Watched
from cachd.transfer.evictor import Eviction
from cachd.transfer.plans import Plan


class InUseReportedBy(StrEnum):
    """How cachd knows that a model is in use."""

    kernel = "kernel"
    protections = "pins and leases only"


class EvictionReason(StrEnum):
    """Why a snapshot was evicted (transfer/reclaim.py)."""

    pull = "pull"
    pressure = "pressure"
    unused = "unused"
    asked = "asked"


@report
class SnapshotReport:
    """A snapshot on the disk: the names that lead to it, its bytes, its last use, and its protection."""

    names: Sequence[str]
    manifest: str
    bytes: int
    last_used: When | None
    last_opened: When | None
    protected_by: str | None

    @classmethod
    def of(cls, candidate: Candidate) -> SnapshotReport:
        """The report of a snapshot as the eviction policy sees it."""
        return cls(
            names=candidate.names,
            manifest=candidate.manifest,
            bytes=candidate.size,
            last_used=iso(candidate.use.last) if candidate.use else None,
            last_opened=iso(candidate.opened_at) if candidate.opened_at else None,
            protected_by=candidate.protected or None,
        )


@report
class ViewsReport:
    """How many directories of the views are watched, how many are not, and why not."""

    watched: int
    unwatched: int
    reason: str | None


@report
class KubeletReport:
    """Below which percentages of free bytes and inodes the kubelet deletes images or evicts pods.

    `thresholds_from`: how cachd knows. `reason`: why not from a place that the options name.
    """

    available_percent: float
    inodes_percent: float
    thresholds_from: Literal["option", "kubelet", "file", "defaults"]
    reason: str | None


@report
class CapacityReport:
    """The file system, the space of the models, and every snapshot, the largest first.

    `kubelet` is null on a disk that the node does not use.
    """

    total_bytes: int
    free_bytes: int
    reserved_bytes: int
    reserve_free_bytes: int
    limit_bytes: int | None
    usable_bytes: int
    available_bytes: int
    over_bytes: int
    used_bytes: int
    blob_bytes: int
    ingest_bytes: int
    held_bytes: int
    inodes: int
    free_inodes: int
    reserve_inodes: int
    in_use_reported_by: InUseReportedBy
    views: ViewsReport
    kubelet: KubeletReport | None
    snapshots: Sequence[SnapshotReport]

    @classmethod
    def of(
        cls,
        now: Capacity,
        candidates: Iterable[Candidate],
        views: Watched,
        *,
        by: InUseReportedBy,
        kubelet: KubeletReport | None,
    ) -> CapacityReport:
        """The report of the space now."""
        return cls(
            total_bytes=now.total,
            free_bytes=now.free,
            reserved_bytes=now.reserved,
            reserve_free_bytes=now.reserve_free,
            limit_bytes=now.limit,
            usable_bytes=now.usable,
            available_bytes=max(now.available, 0),
            over_bytes=max(-now.available, 0),
            used_bytes=now.usage.total,
            blob_bytes=now.usage.blobs,
            ingest_bytes=now.usage.ingests,
            held_bytes=now.usage.held,
            inodes=now.inodes,
            free_inodes=now.free_inodes,
            reserve_inodes=now.reserve_inodes,
            in_use_reported_by=by,
            views=ViewsReport(
                watched=views.directories, unwatched=views.unwatched, reason=views.reason or None
            ),
            kubelet=kubelet,
            snapshots=[SnapshotReport.of(c) for c in sorted(candidates, key=lambda c: (-c.size, c.manifest))],
        )


@report
class PartialDownload:
    """The partial download of an ended pull, which would be removed."""

    blob: str
    frees_bytes: int


@report
class PlannedEviction(SnapshotReport):
    """A snapshot that would be evicted, the bytes of disk that this would free, and the reason."""

    frees_bytes: int
    why: str


@report
class EvictionPlan:
    """What would be evicted, in order, for `need_bytes`, of which `short_bytes` are not available now."""

    dry_run: Literal[True] = True
    need_bytes: int
    short_bytes: int
    frees_bytes: int
    enough: bool
    partial_downloads: Sequence[PartialDownload]
    evictions: Sequence[PlannedEviction]
    protected: Sequence[SnapshotReport]

    @classmethod
    def of(cls, need: int, plan: Plan) -> EvictionPlan:
        """The report of a plan to make `need` bytes available."""
        return cls(
            need_bytes=need,
            short_bytes=plan.short,
            frees_bytes=plan.frees,
            enough=plan.is_enough,
            partial_downloads=[
                PartialDownload(blob=found.name, frees_bytes=found.size) for found in plan.partials
            ],
            evictions=[
                PlannedEviction(
                    **asdict(SnapshotReport.of(choice.candidate)), frees_bytes=choice.frees, why=choice.why
                )
                for choice in plan.choices
            ],
            protected=[SnapshotReport.of(c) for c in plan.candidates if c.protected],
        )


@report
class EvictionReport:
    """A snapshot that was evicted, why, and the bytes of disk that this was expected to free and did free."""

    at: When
    names: Sequence[str]
    manifest: str
    reason: EvictionReason
    why: str
    frees_bytes: int
    freed_bytes: int

    @classmethod
    def of(cls, eviction: Eviction) -> EvictionReport:
        """The report of an eviction."""
        return cls(
            at=iso(eviction.at),
            names=eviction.names,
            manifest=eviction.manifest,
            reason=EvictionReason(eviction.reason),
            why=eviction.why,
            frees_bytes=eviction.frees,
            freed_bytes=eviction.freed,
        )


@report
class EvictionHistory:
    """The evictions since the daemon started, the newest first."""

    evictions: Sequence[EvictionReport]


@report
class EvictionsDone:
    """What was evicted, in order, to make `need_bytes` available."""

    dry_run: Literal[False] = False
    need_bytes: int
    short_bytes: int
    freed_bytes: int
    evictions: Sequence[EvictionReport]
