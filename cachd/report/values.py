"""The reports about models and errors: frozen values that pydantic describes and serializes.

The code that makes a report is checked by mypy, so nothing is validated when it is sent. Fields of type
`When` hold ISO 8601 in UTC.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, WithJsonSchema

from cachd.errors import CachdError
from cachd.model.finding import Finding, Level
from cachd.report.define import report
from cachd.store.pins import PinnedBy
from cachd.transfer.progress import State as PullState
from cachd.transfer.waits import Reason
from cachd.upkeep.jobs import JobState

T = TypeVar("T")
When = Annotated[str, WithJsonSchema({"type": "string", "format": "date-time"})]


def is_none(value: object) -> bool:
    """Whether a field is left out of the JSON."""
    return value is None


LEFT_OUT = Field(exclude_if=is_none)  # the field is absent when it does not apply
Text = Annotated[str | None, LEFT_OUT]
Count = Annotated[int | None, LEFT_OUT]


@report
class ErrorReport:
    """An error: its stable `code`, what happened, what to do about it, and the numbers of its class."""

    code: str
    detail: str
    error_class: str
    hint: Text = None
    origin_status: Count = None
    proxy_status: Count = None
    hub_error: Text = None
    retry_after: Annotated[float | None, LEFT_OUT] = None
    bytes_done: Count = None
    bytes_total: Count = None
    need: Count = None
    free: Count = None
    usable: Count = None
    short: Count = None
    short_inodes: Count = None
    held_by: Annotated[Sequence[str] | None, LEFT_OUT] = None
    file: Text = None
    expected: Text = None
    got: Text = None
    path: Text = None
    mode: Text = None
    uid: Count = None
    gid: Count = None
    errno: Count = None
    size: Count = None
    deaths: Count = None
    role_needed: Text = None
    role: Text = None


def error_report(error: CachdError | None) -> ErrorReport | None:
    """The report of an error; None without one."""
    return from_document(ErrorReport, error.as_document()) if error else None


class ModelState(StrEnum):
    """The state of a model: that of its pull, or one of its snapshot.

    `damaged`: the model was ready until damage was found; its `pull` is the repair. `refused`: the
    operator refuses the digest of one of its files.
    """

    queued = "queued"
    resolving = "resolving"
    waiting = "waiting"
    downloading = "downloading"
    publishing = "publishing"
    ready = "ready"
    failed = "failed"
    cancelled = "cancelled"
    damaged = "damaged"
    refused = "refused"


@report
class PullBytes:
    """Bytes of a model: all, on this node, received by this pull, left behind by earlier pulls; and those of
    parts that another connection took over, because theirs was far slower."""

    total: int
    done: int
    fetched: int | None
    resumed: int | None
    hedged: int | None


@report
class PullFiles:
    """Files of a model: all, and those that are complete."""

    total: int
    done: int


@report
class WaitReport:
    """Why and until when a pull waits, and what its origin said."""

    reason: Reason
    until: When | None
    detail: str | None


@report
class LeftOutReport:
    """Files of the source that patterns and weights left out, and the bytes that this saved.

    `weights`: the forms of weights among them, such as `bin` and `gguf:Q8_0`.
    """

    files: int
    bytes: int
    weights: Sequence[str]


@report
class SpecReport:
    """What was asked for: a ref, the name that leads to it, and the files that it selects."""

    ref: str
    name: str
    include: Sequence[str]
    exclude: Sequence[str]
    hub_id: Text = None
    weights: Text = None
    formats: Text = None
    copy: Annotated[Sequence[str] | None, LEFT_OUT] = None
    layout: Text = None


@report
class PullReport(SpecReport):
    """The progress of a pull, and its error if it failed. It begins when it gets a slot.

    `retry_at`: when the daemon itself starts a pull that failed again; null if it does not.
    """

    state: PullState
    paused: bool
    waits: WaitReport | None
    priority: int
    began_at: When | None
    ended_at: When | None
    revision: str | None
    bytes: PullBytes
    files: PullFiles
    rate_bytes_per_second: int
    eta_seconds: float | None
    verified: bool | None
    verified_by: Mapping[str, int] | None
    left_out: LeftOutReport | None
    error: ErrorReport | None
    retry_at: When | None


@report
class HubReport:
    """Where a model is in the Hub view: its folder, its commit, and the branch that leads to it.

    `refs`: the branches and tags of the Hub view that named the commit when the model was published. A model
    that was pulled by its commit has `main`, if nothing was pulled from `main`. `renamed_to`: the new name of
    a renamed repository, which leads to the same folder.
    """

    repo: str
    commit: str
    revision: str | None
    refs: Sequence[str]
    renamed_to: Text = None


@report
class FindingReport:
    """A finding of a preflight: the code of the check, its level, the file, the numbers, and a hint."""

    code: str
    level: Level
    detail: str
    file: Text = None
    hint: Text = None
    numbers: Annotated[Mapping[str, int] | None, LEFT_OUT] = None


def finding_report(finding: Finding) -> FindingReport:
    """The report of a finding."""
    return from_document(FindingReport, finding.as_document())


@report
class ReadyReport(SpecReport):
    """A published snapshot, as its ready file says. Its paths are relative to the cache.

    `warnings`: what is odd about the model. `preflight`: what engines would find wrong with it. `advice`: how
    to pull less of a source that has the same weights in several forms.
    """

    revision: str
    manifest: str
    bytes: int
    files: int
    verified: bool
    verified_by: Mapping[str, int]
    left_out: LeftOutReport | None
    warnings: Sequence[str]
    preflight: Sequence[FindingReport]
    advice: str | None
    published_at: When
    path: str
    file: str | None
    immutable_path: str
    hub: HubReport
    cachd: str


@report
class PreviousReport:
    """A snapshot to which a name can be rolled back."""

    ref: str
    revision: str
    manifest: str
    immutable_path: str
    bytes: int
    published_at: When


@report
class HeldLease:
    """A lease as every reader sees it: without its id, which allows to renew and to release it."""

    holder: str
    expires_at: When


@report
class DamageReport:
    """The damage that was found in a model, and when."""

    since: When
    reason: str


@report
class JobBytes:
    """Bytes of a job: all, those processed, and for a warming those that were read from the disk."""

    total: int
    done: int
    loaded: Count = None


@report
class DamagedFile:
    """A file that a verification found damaged; an empty path stands for the model itself."""

    path: str
    wrong: str


@report
class VerificationReport:
    """A requested verification of a model."""

    state: JobState
    bytes: JobBytes
    error: ErrorReport | None
    damaged: Sequence[DamagedFile]
    began_at: When
    ended_at: When | None


@report
class WarmingReport:
    """The loading of a model into the page cache."""

    state: JobState
    bytes: JobBytes
    error: ErrorReport | None


@report
class ModelReport:
    """One model: its state, revision, paths, leases and use, and the progress or error of its pull.

    `path` is absolute. `file` is the path of the only file, if the model has just one. `final`: waiting is
    pointless, because the pull failed and would fail again. `verified` and `verified_by` are about the
    published files, so they are null until there are some. `pinned_by`: who pinned it; empty if nobody did.
    `in_use_by`: a pod that holds the model, or a process that has a file of it open; in words, as
    /v1/capacity says it.
    """

    name: str
    state: ModelState
    final: bool
    ref: str
    path: str
    file: str | None
    immutable_path: str | None
    verified: bool | None
    verified_by: Mapping[str, int] | None
    pinned: bool
    pinned_by: Sequence[PinnedBy]
    leases: Sequence[HeldLease]
    in_use: bool
    in_use_by: str | None
    last_used: When | None
    last_opened: When | None
    ready: ReadyReport | None
    pull: PullReport | None
    previous: Sequence[PreviousReport]
    damage: DamageReport | None
    verified_at: When | None
    verification: VerificationReport | None
    resident_bytes: int
    warming: WarmingReport | None


@report
class ModelPage:
    """Models in the order of their names. `next`, if present, is the value of `after` for the next page."""

    models: Sequence[ModelReport]
    next: Text = None


# --- JSON ---


_adapters: dict[type[Any], TypeAdapter[Any]] = {}  # made at the first use, not when the daemon starts


def adapter(kind: type[Any]) -> TypeAdapter[Any]:
    """Pydantic's adapter of a report's class."""
    found = _adapters.get(kind)
    if found is None:
        found = _adapters[kind] = TypeAdapter(kind)
    return found


def as_json(report: object) -> bytes:
    """A report as JSON."""
    return adapter(type(report)).dump_json(report)


def as_document(report: object) -> dict[str, Any]:
    """A report as the values of JSON."""
    document: dict[str, Any] = adapter(type(report)).dump_python(report, mode="json")
    return document


def from_document(kind: type[T], document: Mapping[str, object]) -> T:
    """The report of this class with the fields of a document. Raises pydantic's ValidationError."""
    report: T = adapter(kind).validate_python(document)
    return report
