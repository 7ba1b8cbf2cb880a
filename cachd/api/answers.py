"""The answers of the HTTP API that the package report does not have: options, limits, leases and so on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fastapi.responses import Response
from pydantic import JsonValue

from cachd.model import Limits
from cachd.report.define import report
from cachd.report.values import (
    DamageReport,
    ErrorReport,
    HeldLease,
    JobBytes,
    VerificationReport,
    WarmingReport,
    When,
    as_json,
)
from cachd.store.catalog import iso
from cachd.store.leases import Lease


def json_answer(content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer with the JSON that `as_json` returned in another thread."""
    return Response(content, status, headers, media_type="application/json")


def answer(report: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A small report as an answer, serialized here."""
    return json_answer(as_json(report), status, headers)


# --- models ---


@report
class LeaseReport(HeldLease):
    """A lease for the caller who took it. Whoever knows its id may renew and release it."""

    id: str
    name: str

    @classmethod
    def of(cls, lease: Lease) -> LeaseReport:
        """The report of a lease."""
        return cls(id=lease.id, name=lease.name, holder=lease.holder, expires_at=iso(lease.expires_at))


@report
class BegunVerification(VerificationReport):
    """A verification that was started or already runs."""

    name: str


@report
class BegunWarming(WarmingReport):
    """A warming that was started or already runs."""

    name: str


@report
class Deleted:
    """A deleted model. `configured`: the configuration lists it, so it will be pulled again."""

    name: str
    freed_bytes: int
    configured: bool


# --- the node ---


@report
class Alive:
    """The process answers."""

    status: Literal["alive"] = "alive"


@report
class NodeReady:
    """The cache's file system is writable, and the required models are ready if that was asked."""

    status: Literal["ready"] = "ready"


@report
class LimitsReport:
    """The download limits in bytes per second: of all sources together, and by kind of source."""

    bytes_per_second: int | None
    sources: Mapping[str, int]

    @classmethod
    def of(cls, limits: Limits) -> LimitsReport:
        """The report of the limits in force."""
        return cls(bytes_per_second=limits.bytes_per_second, sources=dict(limits.sources))


@report
class OptionReport:
    """An option in force: its value, the kind of place that set it, and that place."""

    key: str
    value: JsonValue
    source: str
    where: str


@report
class OptionsFile:
    """The configuration file on the disk, and why it is not in force.

    `last_good`: the daemon started with the last good configuration, because the file is wrong. `loaded_at`:
    when the configuration that is in force was taken over.
    """

    path: str | None
    in_force: bool
    last_good: bool
    loaded_at: When
    waiting_for_restart: Sequence[str]
    error: ErrorReport | None


@report
class OptionsReport:
    """Every option in force, and the state of the configuration file."""

    options: Sequence[OptionReport]
    file: OptionsFile


@report
class SourceEntry:
    """An entry of the option `sources`: its prefix, the columns it sets, and where each was set."""

    prefix: str
    columns: Mapping[str, JsonValue]
    where: Mapping[str, str]


@report
class SourceEntries:
    """Every entry of the option `sources`."""

    sources: Sequence[SourceEntry]


@report
class ColumnReport:
    """One setting for a ref, and the prefix of the entry that sets it; null if an option or default does."""

    column: str
    value: JsonValue
    prefix: str | None
    where: str


@report
class FilePatterns:
    """The patterns of files that may not and that may be pulled."""

    refuse: Sequence[str]
    allow: Sequence[str]


@report
class RefSettings:
    """Whether a ref may be pulled, and the settings that apply to it."""

    ref: str
    verdict: Literal["allowed", "refused"]
    error: ErrorReport | None
    columns: Sequence[ColumnReport]
    files: FilePatterns
    refused_digests: Sequence[str]


# --- upkeep ---


@report
class BlobBeingRead:
    """The blob that is being read again."""

    blob: str
    bytes: JobBytes


@report
class DamagedModel(DamageReport):
    """A model that waits for its repair."""

    name: str


@report
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


@report
class SweptLeftover:
    """Something that neither a model nor a pull needs, and the bytes that its removal frees."""

    kind: str
    name: str
    changed_at: When
    freed_bytes: int


@report
class SweepReport:
    """The leftovers that were removed, or would be in a dry run."""

    dry_run: bool
    freed_bytes: int
    swept: Sequence[SweptLeftover]
