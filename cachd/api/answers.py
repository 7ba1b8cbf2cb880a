"""The answers of the HTTP API that no other part of cachd makes: capacity, evictions, options and so on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Literal

from fastapi.responses import Response
from pydantic import JsonValue

from cachd.model import Limits
from cachd.policy.eviction import Candidate
from cachd.report.values import (
    ErrorReport,
    HeldLease,
    VerificationReport,
    WarmingReport,
    When,
    as_json,
)
from cachd.store.catalog import iso
from cachd.store.protection import Lease
from cachd.store.space import Capacity
from cachd.store.watch import Watched
from cachd.transfer.reclaim import Eviction, Plan


def json_answer(content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with the JSON that `as_json` returned in another thread."""
    return Response(content, status, headers, media_type="application/json")


def answer(report: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A small report as an answer, serialized here."""
    return json_answer(as_json(report), status, headers)


# --- space ---


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


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewsReport:
    """How many directories of the views are watched, how many are not, and why not."""

    watched: int
    unwatched: int
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityReport:
    """The file system, the space of the models, and every snapshot, the largest first."""

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
    snapshots: Sequence[SnapshotReport]

    @classmethod
    def of(
        cls, now: Capacity, candidates: Iterable[Candidate], views: Watched, by: InUseReportedBy
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
            snapshots=[SnapshotReport.of(c) for c in sorted(candidates, key=lambda c: (-c.size, c.manifest))],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialDownload:
    """The partial download of an ended pull, which would be removed."""

    blob: str
    frees_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEviction(SnapshotReport):
    """A snapshot that would be evicted, the bytes of disk that this would free, and the reason."""

    frees_bytes: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class PastEvictions:
    """The evictions since the daemon started, the newest first."""

    evictions: Sequence[EvictionReport]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionsDone:
    """What was evicted, in order, to make `need_bytes` available."""

    dry_run: Literal[False] = False
    need_bytes: int
    short_bytes: int
    freed_bytes: int
    evictions: Sequence[EvictionReport]


# --- models ---


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReport(HeldLease):
    """A lease for the caller who took it. Whoever knows its id may renew and release it."""

    id: str
    name: str

    @classmethod
    def of(cls, lease: Lease) -> LeaseReport:
        """The report of a lease."""
        return cls(id=lease.id, name=lease.name, holder=lease.holder, expires_at=iso(lease.expires_at))


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunVerification(VerificationReport):
    """A verification that was started or already runs."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BegunWarming(WarmingReport):
    """A warming that was started or already runs."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """A deleted model. `configured`: the configuration lists it, so it will be pulled again."""

    name: str
    freed_bytes: int
    configured: bool


# --- the node ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """The process answers."""

    status: Literal["alive"] = "alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """The cache's file system is writable, and the required models are ready if that was asked."""

    status: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsReport:
    """The download limits in bytes per second: of all sources together, and by kind of source."""

    bytes_per_second: int | None
    sources: Mapping[str, int]

    @classmethod
    def of(cls, limits: Limits) -> LimitsReport:
        """The report of the limits in force."""
        return cls(bytes_per_second=limits.bytes_per_second, sources=dict(limits.sources))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionReport:
    """An option in force: its value, the kind of place that set it, and that place."""

    key: str
    value: JsonValue
    source: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionsFile:
    """The configuration file on the disk, and why it is not in force."""

    path: str | None
    in_force: bool
    waiting_for_restart: Sequence[str]
    error: ErrorReport | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionsReport:
    """Every option in force, and the state of the configuration file."""

    options: Sequence[OptionReport]
    file: OptionsFile


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEntry:
    """An entry of the option `sources`: its prefix, the columns it sets, and where each was set."""

    prefix: str
    columns: Mapping[str, JsonValue]
    where: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEntries:
    """Every entry of the option `sources`."""

    sources: Sequence[SourceEntry]


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnReport:
    """One setting for a ref, and the prefix of the entry that sets it; null if an option or default does."""

    column: str
    value: JsonValue
    prefix: str | None
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePatterns:
    """The patterns of files that may not and that may be pulled."""

    refuse: Sequence[str]
    allow: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RefSettings:
    """Whether a ref may be pulled, and the settings that apply to it."""

    ref: str
    verdict: Literal["allowed", "refused"]
    error: ErrorReport | None
    columns: Sequence[ColumnReport]
    files: FilePatterns
    refused_digests: Sequence[str]


# --- upkeep ---


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobBytes:
    """Bytes of a blob: all, and those that were read."""

    total: int
    done: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobBeingRead:
    """The blob that is being read again."""

    blob: str
    bytes: BlobBytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedModel:
    """A model that waits for its repair."""

    name: str
    since: When
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubsReport:
    """The state of scrubbing. Without `bytes_per_second`, nothing is read again by itself."""

    bytes_per_second: int | None
    interval_seconds: float
    blobs: int
    bytes: int
    due: int
    oldest_verified_at: When | None
    reading: BlobBeingRead | None
    damaged: Sequence[DamagedModel]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptLeftover:
    """Something that neither a model nor a pull needs, and the bytes that its removal frees."""

    kind: str
    name: str
    changed_at: When
    freed_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepReport:
    """The leftovers that were removed, or would be in a dry run."""

    dry_run: bool
    freed_bytes: int
    swept: Sequence[SweptLeftover]
