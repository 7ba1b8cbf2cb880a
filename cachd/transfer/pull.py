"""One model: from a ref to a ready snapshot. The file to read first.

    resolve   ref -> manifest: one revision, every file with size, digest, validator
    reserve   the space of what is missing, before the first byte; others are evicted for it
    download  each missing blob: parts -> ingest -> digest -> commit
    publish   views, then the name, then the ready file

Killed at any of these, the next pull of the same ref begins where the disk says this one ended.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import structlog

from cachd.errors import CachdError, Cancelled, Changed, DiskFailed, Invalid, NoSpace, Unavailable
from cachd.model import File, Manifest, ModelSpec, Snapshot
from cachd.policy import shards
from cachd.sources.source import Source
from cachd.sources.table import Table
from cachd.store.permit import Permit
from cachd.store.space import Reservation
from cachd.store.store import Store
from cachd.transfer.download import Download
from cachd.transfer.downloads import Downloads
from cachd.transfer.progress import Progress
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.resolves import TOO_SLOW, Resolves
from cachd.transfer.streams import StreamQuota
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

_SAMPLE_SECONDS = 0.5
_LEAST_SECONDS = 1.0  # for a resolve after others that took all the time there is


@dataclass(frozen=True, slots=True)
class PullContext:
    """What every pull works with. `table`: what the operator allows now, and limits."""

    store: Store
    reclaim: Reclaim
    downloads: Downloads
    resolves: Resolves
    table: Callable[[], Table] = Table


class NotYet(Exception):
    """The source is briefly away: the same pull again later may get further."""

    def __init__(self, reason: Unavailable) -> None:
        super().__init__(reason.detail)
        self.reason = reason


class Slot(Protocol):
    """A pull's claim to be one of those at work."""

    def lend(self) -> None:
        """Let another pull have it, while this one waits for its origin."""

    def take(self) -> None:
        """Count as at work again, at once."""

    def take_in_turn(self) -> None:
        """Wait until it is free again. Raises Cancelled."""


def pull(
    spec: ModelSpec,
    source: Source,
    context: PullContext,
    *,
    quota: StreamQuota,
    progress: Progress,
    permit: Permit,
    slot: Slot,
) -> Snapshot:
    """Make a model ready. Raises CachdError or NotYet, and then nothing new is published.

    A model that was damaged becomes what it was: its ref is not resolved again.
    """
    whole = context.store.snapshots.to_repair(spec) or _resolve(spec, source, context, progress, slot)
    try:
        return _pull_once(whole, spec, source, context, quota, progress, permit, slot)
    except Changed as error:
        log.info("the source moved: resolved again", name=spec.name, reason=error.detail)
        whole = _resolve(spec, source, context, progress, slot)
    except DiskFailed as error:
        if error.facts.get("errno") != errno.EIO:
            raise
        log.warning("the disk failed: tried once more with what is here", name=spec.name, reason=error.detail)
    return _pull_once(whole, spec, source, context, quota, progress, permit, slot)


def _pull_once(
    whole: Manifest,
    spec: ModelSpec,
    source: Source,
    context: PullContext,
    quota: StreamQuota,
    progress: Progress,
    permit: Permit,
    slot: Slot,
) -> Snapshot:
    store = context.store
    manifest = store.snapshots.as_kept(whole.select(spec.include, spec.exclude))
    context.table().check_files(manifest)
    with context.reclaim.reserve(manifest, spec.name) as reservation:
        needed = _needed(manifest, store)
        progress.begin(manifest, sum(f.size for f in needed))
        while needed:  # again when one was found damaged meanwhile, or came from another source
            _download(needed, spec, source, context, quota, reservation, progress, slot)
            needed = _needed(manifest, store)
        if not store.snapshots.to_repair(spec):  # it was looked at before, and what was left out is unknown
            _check_shards(manifest, whole, store)
        _check_contents(manifest, context, progress)
        context.reclaim.settle(reservation)
        progress.state = "publishing"
        snapshot = store.snapshots.publish(spec, manifest, now=time.time(), permit=permit)
    try:
        context.table().check_digests(manifest)
    except CachdError:  # refused since it was looked at, and perhaps since all models were
        store.snapshots.withdraw_refused(lambda _: True, among={manifest.id})
        raise
    return snapshot


def _check_contents(manifest: Manifest, context: PullContext, progress: Progress) -> None:
    """Raises Forbidden when a file is refused by a sha256 that its source does not say.

    Such files are hashed once more, and only while digests are refused.
    """
    table, content = context.table(), context.store.content
    for file in manifest.files if table.refused else ():
        if not file.is_named_by_content:
            known = file.known_sha256 or content.hashes.of(file)
            table.check_digest(file, known or content.computed_sha256(file, progress.cancel_token.check))


def _needed(manifest: Manifest, store: Store) -> list[File]:
    """What is missing, and what is here of another source and this one has not proven yet that it has.

    Raises Changed when the blob is gone that had a file under another name: it is not fetched under that.
    """
    proven = store.content.proven
    missing = store.content.missing(manifest)
    are_missing = {f.blob for f in missing}
    here = [f for f in {f.blob: f for f in manifest.files}.values() if f.blob not in are_missing]
    unproven = [f for f in here if not proven.has(f)]
    if unproven:
        owned = store.snapshots.owned(manifest.base)
        for file in unproven:
            if file.blob in owned:
                proven.add(file)
    if gone := next((f for f in missing if f.kept), None):
        raise Changed(f"{gone.path}: the blob that had it, {gone.blob}, is not here any more")
    return missing + [f for f in unproven if not proven.has(f)]


def _check_shards(manifest: Manifest, whole: Manifest, store: Store) -> None:
    """Raises Invalid when an index names shards that the source lacks; what a spec leaves out it may."""
    paths = {f.path for f in whole.files}
    indexes = [f for f in manifest.files if f.path.endswith(shards.INDEX)]
    for index in indexes:
        with closing(store.content.pieces(index)) as pieces:
            absent = shards.missing(index.path, pieces, paths)
        if absent:
            more = "" if len(absent) < shards.MOST_TOLD else " or more"
            raise Invalid(
                f"{index.path} names {len(absent)}{more} shards that {whole.base} lacks: {absent[0]!r:.120}",
                code="incomplete_model",
                hint="report it to whoever keeps the source, or exclude the index if no engine needs it",
            )


def _resolve(
    spec: ModelSpec, source: Source, context: PullContext, progress: Progress, slot: Slot
) -> Manifest:
    """Ask the source what the ref means now; one that is slow does so without a slot.

    Raises NotYet when it is briefly away.
    """

    def lend() -> None:
        progress.waits_for(Waits(Reason.slow), state="resolving")
        slot.lend()

    progress.begins("resolving")
    began = time.monotonic()
    try:
        seconds = max(context.resolves.seconds - progress.resolve_seconds, _LEAST_SECONDS)
        whole = context.resolves.resolve(source, spec.ref, progress.cancel_token, seconds=seconds, slow=lend)
    except Cancelled as error:
        raise Cancelled(f"{spec.name}: cancelled while it was resolved") from error
    except Unavailable as error:
        if error.code == TOO_SLOW:
            raise
        raise NotYet(error) from error
    finally:
        progress.resolve_seconds += time.monotonic() - began
    progress.waits_for(Waits(Reason.slot), state="resolving")
    slot.take_in_turn()
    progress.begins("resolving")
    return whole


def _download(
    missing: list[File],
    spec: ModelSpec,
    source: Source,
    context: PullContext,
    quota: StreamQuota,
    reservation: Reservation,
    progress: Progress,
    slot: Slot,
) -> None:
    """Fetch every missing blob, the largest first; the first failure ends the others.

    A download that another pull began, from another place, and that fails there is begun anew from here.
    """
    joined: list[Download] = []
    unfinished: dict[Future[None], File] = {}

    downloads, table = context.downloads, context.table()

    def join(file: File) -> None:
        download = downloads.join(
            file,
            source,
            quota,
            scheme=spec.ref.scheme,
            reservation=reservation,
            prefix=table.limited_by(file.origin),
        )
        joined.append(download)
        progress.watch(download)
        unfinished[download.done] = file

    try:
        for file in sorted(missing, key=lambda f: -f.size):
            join(file)
        while unfinished:
            progress.sample()
            if progress.is_slow:
                slot.lend()
            else:
                slot.take()
            downloads.claim(quota)
            ended, _ = wait(unfinished, timeout=_SAMPLE_SECONDS, return_when=FIRST_EXCEPTION)
            for future in ended:
                file = unfinished.pop(future)
                if _failed_elsewhere(future, file, joined):
                    join(file)
                else:
                    future.result()
            if progress.cancel_token.is_cancelled:
                raise Cancelled(f"{spec.name}: cancelled after {progress.done} of {progress.total} bytes")
        progress.sample()
        slot.take()
    except CachdError as error:
        error.facts = {**error.facts, "bytes_done": progress.done, "bytes_total": progress.total}
        raise
    finally:
        downloads.leave(joined)


def _failed_elsewhere(future: Future[None], file: File, joined: list[Download]) -> bool:
    """Whether a download failed at a place that is not the file's own."""
    failure = future.exception()
    if failure is None or isinstance(failure, NoSpace | DiskFailed):
        return False
    return all(d.file.origin != file.origin for d in joined if d.done is future)
