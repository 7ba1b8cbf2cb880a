"""The request and response documents of the HTTP API."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cachd.api.outcomes import outcome_of
from cachd.errors import CachdError, Leased, NotFound
from cachd.fields import Bytes, Rate, Seconds, Text
from cachd.model import (
    NAME_PATTERN,
    Limits,
    Manifest,
    ModelSpec,
    SchemeName,
    Snapshot,
    check_name,
)
from cachd.policy.eviction import Candidate
from cachd.store.capacity import Capacity
from cachd.store.catalog import iso, ready_document
from cachd.store.leases import Lease
from cachd.store.store import Store
from cachd.store.watch import Watched
from cachd.transfer.evictor import Eviction
from cachd.transfer.plans import Plan
from cachd.transfer.pulls import Pulls
from cachd.transfer.request import Pull
from cachd.transfer.waits import Waits
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.warms import Warms

MOST_OF_A_PAGE = 500


Include = Annotated[
    list[str],
    Field(
        max_length=1000,
        description="patterns of the files to pull, such as *.safetensors or dir/; empty: all files",
    ),
]
Exclude = Annotated[list[str], Field(max_length=1000, description="patterns of files not to pull")]


class Asked(BaseModel):
    """The body of POST /v1/models."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"ref": "hf://org/model@main", "exclude": ["*.bin"]}]}
    )

    ref: str = Field(
        description="where the model comes from: org/model[@revision] or org/model/file on the Hugging Face"
        " Hub, the same as a huggingface.co URL, s3://bucket/prefix/, https://host/file, https://host/dir/"
        " or file:///path"
    )
    name: str | None = Field(
        None,
        description=f"the model's name on this node, matching {NAME_PATTERN}; default: derived from the ref",
    )
    include: Include = []
    exclude: Exclude = []
    hub_id: str | None = Field(
        None,
        description="for a ref outside the Hub: the Hub ID (org/model) under which the Hub view shows this"
        " model",
    )
    pin: bool = Field(
        False,
        description="pin the model: until it is unpinned, it is never evicted, and only a forced delete"
        " removes it",
    )
    priority: int = Field(
        0,
        ge=-100,
        le=100,
        description="pulls with a higher priority go first, and their models are evicted later",
    )
    refresh: bool = Field(
        False, description="ask the source again what the ref points to, even when the model is ready"
    )
    replace: bool = Field(
        False,
        description="take the name even if it belongs to another model or is pinned, and cancel any other"
        " pull that runs under it",
    )

    def spec(self) -> ModelSpec:
        """The spec of the requested model. Raises Invalid."""
        return ModelSpec.asked(self.ref, self.name, self.include, self.exclude, hub_id=self.hub_id)


class AskedLease(BaseModel):
    """The body of the calls that take (POST) and renew (PUT) a lease."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"seconds": 600, "holder": "pod/vllm-0"}]}
    )

    seconds: Seconds = Field(gt=0, le=7 * 86400, description="how long the lease lasts from now")
    holder: Text = Field("", max_length=200, description="who holds the lease, for people to read")


class AskedSize(BaseModel):
    """The body of POST /v1/evictions: the space to make available. Set exactly one of `bytes` and `ref`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"bytes": "40GB"}]})

    bytes: Bytes | None = Field(None, description="the space to make available, such as 40GB")
    ref: str | None = Field(
        None, description="make available what a pull of this ref needs; written as in POST /v1/models"
    )
    include: Include = []
    exclude: Exclude = []

    @model_validator(mode="after")
    def _check_exactly_one(self) -> Self:
        if (self.bytes is None) == (self.ref is None):
            raise ValueError("write either bytes or ref")
        return self

    def spec(self) -> ModelSpec | None:
        """The spec of the model to make space for; None when `bytes` is set. Raises Invalid."""
        return None if self.ref is None else ModelSpec.asked(self.ref, None, self.include, self.exclude)


class AskedLimits(BaseModel):
    """The body of PUT /v1/limits."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"bytes_per_second": 500_000_000, "sources": {"hf": "200MB"}}]},
    )

    bytes_per_second: Rate | None = Field(
        None, description="limit for all sources together; null or 0: no limit"
    )
    sources: dict[SchemeName, Rate | None] = Field(
        {},
        description="limit in bytes per second for each kind of source: hf, s3, https, http, file;"
        " null or 0: no limit",
    )

    def limits(self) -> Limits:
        return Limits.of(self.bytes_per_second, self.sources.items())


def limits_document(limits: Limits) -> dict[str, Any]:
    return {"bytes_per_second": limits.bytes_per_second, "sources": dict(limits.sources)}


def capacity_document(
    now: Capacity, candidates: Iterable[Candidate], views: Watched, *, tells_use: bool
) -> dict[str, Any]:
    """The answer of GET /v1/capacity: the file system, the space of the models, and every snapshot, largest
    first."""
    return {
        "total_bytes": now.total,
        "free_bytes": now.free,
        "reserved_bytes": now.reserved,
        "reserve_free_bytes": now.reserve_free,
        "limit_bytes": now.limit,
        "usable_bytes": now.usable,
        "available_bytes": max(now.available, 0),
        "over_bytes": max(-now.available, 0),
        "used_bytes": now.usage.total,
        "blob_bytes": now.usage.blobs,
        "ingest_bytes": now.usage.ingests,
        "held_bytes": now.usage.held,
        "inodes": now.inodes,
        "free_inodes": now.free_inodes,
        "reserve_inodes": now.reserve_inodes,
        "in_use_told_by": "kernel" if tells_use else "pins and leases only",
        "views": {"watched": views.directories, "unwatched": views.unwatched, "reason": views.reason or None},
        "snapshots": [candidate_document(c) for c in sorted(candidates, key=lambda c: (-c.size, c.manifest))],
    }


def candidate_document(candidate: Candidate) -> dict[str, Any]:
    return {
        "names": list(candidate.names),
        "manifest": candidate.manifest,
        "bytes": candidate.size,
        "last_used": iso(candidate.use.last) if candidate.use else None,
        "last_opened": iso(candidate.opened_at) if candidate.opened_at else None,
        "protected_by": candidate.protected or None,
    }


def plan_document(need: int, plan: Plan) -> dict[str, Any]:
    """The answer of a dry run of POST /v1/evictions: what it would evict, in order, and what is protected."""
    return {
        "need_bytes": need,
        "short_bytes": plan.short,
        "frees_bytes": plan.frees,
        "enough": plan.is_enough,
        "partial_downloads": [{"blob": found.name, "frees_bytes": found.size} for found in plan.partials],
        "evictions": [
            {**candidate_document(choice.candidate), "frees_bytes": choice.frees, "why": choice.why}
            for choice in plan.choices
        ],
        "protected": [candidate_document(c) for c in plan.candidates if c.protected],
    }


def eviction_document(eviction: Eviction) -> dict[str, Any]:
    return {
        "at": iso(eviction.at),
        "names": list(eviction.names),
        "manifest": eviction.manifest,
        "reason": eviction.reason,
        "why": eviction.why,
        "frees_bytes": eviction.frees,
        "freed_bytes": eviction.freed,
    }


def lease_document(lease: Lease) -> dict[str, Any]:
    """A lease for the caller who took it. Whoever knows its id may renew and release it."""
    return {"id": lease.id, "name": lease.name, **held_document(lease)}


def held_document(lease: Lease) -> dict[str, Any]:
    """A lease as every reader of the API sees it: without its id."""
    return {"holder": lease.holder, "expires_at": iso(lease.expires_at)}


class Models:
    """All models of this node: those that are ready, being pulled, failed or damaged."""

    def __init__(self, store: Store, pulls: Pulls, scrubs: Scrubs, warms: Warms) -> None:
        self.store, self.pulls = store, pulls
        self.scrubs, self.warms = scrubs, warms

    def names(self) -> list[str]:
        ready = {s.name for s in self.store.names.all()}
        damaged = {each.snapshot.name for each in self.store.names.quarantined()}
        return sorted(ready | damaged | {p.spec.name for p in self.pulls.known()})

    def state(self, name: str) -> str:
        """The state of a model: ready, damaged, refused, unknown, or a state of `Progress`.

        `damaged`: the model was ready until damage was found, and no repair of it is running. `refused`: the
        operator refuses the digest of one of its files.
        """
        pull = self.pulls.get(name)
        if self.store.names.get(name):
            return "ready"
        if self.store.names.quarantine(name) and (pull is None or pull.done.done()):
            return "damaged"
        if pull and pull.error and pull.error.code == "refused_digest":
            return "refused"
        return pull.progress.state if pull else "unknown"

    def failure(self, name: str) -> CachdError | None:
        """The error of the newest pull of a name; None when the model is ready or that pull still runs."""
        pull = self.pulls.get(name)
        return None if pull is None or self.store.names.get(name) else pull.error

    def is_final(self, name: str) -> bool:
        """Whether waiting is pointless: the pull of this name failed and would fail again."""
        failure = self.failure(name)
        return failure is not None and outcome_of(failure).is_final

    def counted(self) -> Mapping[str, int]:
        """The number of models in each state."""
        counts: dict[str, int] = {}
        for name in self.names():
            state = self.state(name)
            counts[state] = counts.get(state, 0) + 1
        return counts

    def describe(self, name: str) -> dict[str, Any]:
        """The document of one model. Raises NotFound. Blocks: it asks the kernel which files are open."""
        snapshot, pull = self.store.names.get(name), self.pulls.get(name)
        damage, verified = self.store.names.quarantine(name), self.scrubs.verification(name)
        warming = self.warms.warming(name)
        manifest = self._manifest(snapshot) if snapshot else None
        verified_at = self.scrubs.verified_at(snapshot, manifest) if snapshot and manifest else None
        use = self.store.usage_log.of(name)
        opened_at = self.store.usage_log.opened_at(snapshot.manifest) if snapshot else None
        known = snapshot or pull or (damage.snapshot if damage else None)
        if known is None:
            raise unknown_model(name)
        return {
            "name": name,
            "state": self.state(name),
            "final": self.is_final(name),
            "ref": str(known.spec.ref),
            "path": str(self.store.layout.model(name)),
            "file": str(self.store.layout.model(name) / snapshot.file)
            if snapshot and snapshot.file
            else None,
            "immutable_path": str(self.store.layout.address(snapshot.address)) if snapshot else None,
            "verified": snapshot.verified if snapshot else _verified(pull),
            "verified_by": dict(snapshot.verified_by) if snapshot else _verified_by(pull),
            "pinned": self.store.pins.has(name),
            "leases": [held_document(lease) for lease in self.store.leases.of(name, time.time())],
            "in_use": bool(snapshot) and (manifest is None or self.store.protection.is_in_use(manifest)),
            "last_used": iso(use.last) if use else None,
            "last_opened": iso(opened_at) if opened_at else None,
            "ready": ready_document(snapshot) if snapshot else None,
            "pull": pull_document(pull) if pull else None,
            "previous": [
                {
                    key: document[key]
                    for key in ("ref", "revision", "manifest", "immutable_path", "bytes", "published_at")
                }
                for document in map(ready_document, self.store.history.of(name))
            ],
            "damage": {"since": iso(damage.since), "reason": damage.reason} if damage else None,
            "verified_at": iso(verified_at) if verified_at else None,
            "verification": verified.as_document() if verified else None,
            "resident_bytes": self.warms.resident_of(manifest) if manifest else 0,
            "warming": warming.as_document() if warming else None,
        }

    def page(self, *, after: str, limit: int) -> dict[str, Any]:
        """The documents of the first `limit` models whose names sort after `after`. Blocks.

        When more models follow, `next` is the value of `after` for the next page.
        """
        names = [name for name in self.names() if name > after]
        documents = []
        for name in names[:limit]:
            with suppress(NotFound):  # deleted since `names` was read
                documents.append(self.describe(name))
        return {"models": documents} | ({"next": names[limit - 1]} if len(names) > limit else {})

    def check_known(self, name: str) -> None:
        """Raises Invalid when the name is malformed, NotFound when this node has no model of that name."""
        if self.state(check_name(name)) == "unknown":
            raise unknown_model(name)

    def _manifest(self, snapshot: Snapshot) -> Manifest | None:
        try:
            return self.store.manifests.of(snapshot)
        except (NotFound, Leased):  # it was removed, or another process holds a kernel lease on its manifest
            return None


def unknown_model(name: str, **facts: object) -> NotFound:
    return NotFound(
        f"no model is named {name!r:.120}",
        code="no_such_model",
        hint="pull it with POST /v1/models (cachd pull REF)",
        **facts,
    )


def pull_document(pull: Pull) -> dict[str, Any]:
    """The progress of a pull, and its error if it failed."""
    progress, manifest, now = pull.progress, pull.progress.manifest, pull.progress.now
    return {
        **pull.spec.as_document(),
        "state": progress.state,
        "paused": now.is_paused,
        "waits": waits_document(progress.waits(now)),
        "priority": pull.quota.priority,
        "revision": manifest.revision if manifest else None,
        "bytes": {
            "total": progress.total,
            "done": now.done,
            "fetched": now.fetched,
            "resumed": now.resumed,
        },
        "files": {"total": len(manifest.files) if manifest else 0, "done": now.files_done},
        "rate_bytes_per_second": round(progress.rate),
        "eta_seconds": progress.eta_seconds(now),
        "verified": _verified(pull),
        "verified_by": _verified_by(pull),
        "error": error_document(pull.error),
    }


def waits_document(waits: Waits | None) -> dict[str, object] | None:
    """Why and until when a pull waits, and what its origin said; None while the pull makes progress."""
    if waits is None:
        return None
    until = iso(waits.until) if waits.until else None
    return {"reason": waits.reason.value, "until": until, "detail": waits.detail or None}


def error_document(error: CachdError | None) -> dict[str, object] | None:
    return error.as_document() if error else None


def _verified(pull: Pull | None) -> bool | None:
    """Whether the source publishes a digest of every file; None until the ref is resolved."""
    return pull.progress.manifest.is_verified if pull and pull.progress.manifest else None


def _verified_by(pull: Pull | None) -> dict[str, int] | None:
    """The number of files that each digest algorithm verifies, weakest algorithm first; None until the ref is
    resolved."""
    return dict(pull.progress.manifest.verified_by) if pull and pull.progress.manifest else None
