"""Reports files: those of a model of this node, and those of a ref that was only resolved."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from cachd.errors import Unavailable
from cachd.model import File, Manifest, ModelSpec
from cachd.report.define import report
from cachd.report.models import Models, left_out_report, unknown_model
from cachd.report.readiness import RETRY_SECONDS
from cachd.report.space import EvictionPlan
from cachd.report.values import LeftOutReport, Text
from cachd.store.store import Store
from cachd.transfer.reclaim import Reclaim

MAX_FILES_ON_A_PAGE = 10_000


@report
class FileReport:
    """A file of a model: its path in the source, its bytes, and whether they are on this node.

    `digest`: what the source states, null if it states none. `sha256`: as the source states it or cachd
    computed it, in hex; null while it is not known.
    """

    path: str
    bytes: int
    digest: str | None
    sha256: str | None
    here: bool


@report
class FilePage:
    """Files of one revision in the order of their paths. `next`, if present, is the value of `after` for the
    next page. `total`: how many files the model has."""

    name: str
    revision: str
    total: int
    files: Sequence[FileReport]
    next: Text = None


@report
class ResolveReport:
    """What a pull of a ref would do now. Nothing was pulled.

    `name`: the name that the model would have. `here_bytes` are on this node already, `fetch_bytes` would be
    fetched. `file_count` counts all files; `files` are the first of them. `space`: what would be evicted for
    the pull; null without a cache. `evicts`: whether the options allow a pull to evict models.
    """

    ref: str
    name: str
    revision: str
    bytes: int
    here_bytes: int
    fetch_bytes: int
    file_count: int
    files: Sequence[FileReport]
    verified: bool
    verified_by: Mapping[str, int]
    left_out: LeftOutReport | None
    advice: str | None
    evicts: bool | None
    space: EvictionPlan | None


def file_page(models: Models, name: str, *, after: str, limit: int) -> FilePage:
    """The first `limit` files of a model whose paths sort after `after`. Blocks.

    Raises NotFound for an unknown name, Unavailable while the files are not known.
    """
    manifest, store = _manifest_of(models, name), models.store
    start = bisect_right(manifest.files, after, key=lambda file: file.path) if after else 0
    files = manifest.files[start : start + limit]
    return FilePage(
        name=name,
        revision=manifest.revision,
        total=len(manifest.files),
        files=[_file(file, store) for file in files],
        next=files[-1].path if start + limit < len(manifest.files) else None,
    )


def resolve_report(spec: ModelSpec, manifest: Manifest, store: Store, reclaim: Reclaim) -> ResolveReport:
    """What a pull of the spec would do, whose files the manifest lists. Blocks."""
    need = store.need(manifest)
    return _resolved(
        spec,
        manifest,
        store,
        evicts=reclaim.is_automatic,
        space=EvictionPlan.of(need, reclaim.plan(need)),
    )


def resolve_report_without_cache(spec: ModelSpec, manifest: Manifest) -> ResolveReport:
    """What a pull of the spec into an empty cache would fetch."""
    return _resolved(spec, manifest, None, evicts=None, space=None)


def _resolved(
    spec: ModelSpec,
    manifest: Manifest,
    store: Store | None,
    *,
    evicts: bool | None,
    space: EvictionPlan | None,
) -> ResolveReport:
    missing = store.content.missing(manifest) if store else []
    fetched = sum(file.size for file in missing) if store else manifest.size
    return ResolveReport(
        ref=str(spec.ref),
        name=spec.name,
        revision=manifest.revision,
        bytes=manifest.size,
        here_bytes=manifest.size - fetched,
        fetch_bytes=fetched,
        file_count=len(manifest.files),
        files=[_file(file, store) for file in manifest.files[:MAX_FILES_ON_A_PAGE]],
        verified=manifest.has_all_digests,
        verified_by=dict(manifest.verified_by),
        left_out=left_out_report(manifest),
        advice=manifest.advice,
        evicts=evicts,
        space=space,
    )


def _file(file: File, store: Store | None) -> FileReport:
    computed = store.content.hashes.of(file) if store else None
    sha256 = file.known_sha256 or computed
    return FileReport(
        path=file.path,
        bytes=file.size,
        digest=str(file.digest) if file.digest else None,
        sha256=sha256.hex if sha256 else None,
        here=store is not None and store.content.has(file),
    )


def _manifest_of(models: Models, name: str) -> Manifest:
    """The files of the ready model, else of the damaged one, else of the newest pull."""
    names = models.store.names
    quarantine = names.quarantine_of(name)
    snapshot = names.get(name) or (quarantine.snapshot if quarantine else None)
    if snapshot is not None:
        return models.store.manifests.of(snapshot)
    pull = models.pulls.get(name)
    if pull is None:
        raise unknown_model(name)
    if pull.progress.manifest is None:
        raise Unavailable(
            f"the files of {name} are not known: its ref is not resolved ({pull.progress.state})",
            code="not_resolved",
            hint=f"cachd show {name} says why",
            retry_after=RETRY_SECONDS,
        )
    return pull.progress.manifest
