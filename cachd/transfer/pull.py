"""Turns one ref into a ready snapshot. Read this file first.

    resolve   ref -> manifest: one pinned revision; each file with its size, digest and validator
    reserve   space for the missing bytes, before the first is fetched; other models may be evicted for it
    download  each missing blob: parts -> ingest -> digest -> commit
    publish   views, then the name, then the ready file

If the daemon dies in any of these steps, the next pull of the same ref resumes from what is on disk.
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
_LEAST_SECONDS = 1.0  # a repeated resolve gets this much even when earlier ones used up the time limit


@dataclass(frozen=True, slots=True)
class PullContext:
    """What all pulls share. `table` returns the operator's current rules and bandwidth limits."""

    store: Store
    reclaim: Reclaim
    downloads: Downloads
    resolves: Resolves
    table: Callable[[], Table] = Table


class NotYet(Exception):
    """The source is temporarily unavailable (`reason`). The same pull may succeed later."""

    def __init__(self, reason: Unavailable) -> None:
        super().__init__(reason.detail)
        self.reason = reason


class Slot(Protocol):
    """The slot of one pull. The number of slots limits how many pulls run at once."""

    def lend(self) -> None:
        """Let another pull use the slot while this one waits for its origin."""

    def take(self) -> None:
        """Take the slot back at once, even if one pull too many runs then."""

    def take_in_turn(self) -> None:
        """Wait for a free slot, then take it. Raises Cancelled."""


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
    """Make a model ready. After a CachdError or NotYet, nothing new is published.

    A quarantined model gets the same files back: its ref is resolved again only if the source has changed.
    """
    resolved = context.store.snapshots.to_repair(spec) or _resolve(spec, source, context, progress, slot)
    try:
        return _pull_once(resolved, spec, source, context, quota, progress, permit, slot)
    except Changed as error:
        log.info("the source changed: resolving again", name=spec.name, reason=error.detail)
        resolved = _resolve(spec, source, context, progress, slot)
    except DiskFailed as error:
        if error.errno != errno.EIO:
            raise
        log.warning("disk error: trying the pull once more", name=spec.name, reason=error.detail)
    return _pull_once(resolved, spec, source, context, quota, progress, permit, slot)


def _pull_once(
    resolved: Manifest,
    spec: ModelSpec,
    source: Source,
    context: PullContext,
    quota: StreamQuota,
    progress: Progress,
    permit: Permit,
    slot: Slot,
) -> Snapshot:
    store = context.store
    manifest = store.snapshots.as_kept(resolved.select(spec.include, spec.exclude))
    context.table().check_files(manifest)
    with context.reclaim.reserve(manifest, spec.name) as reservation:
        needed = _needed(manifest, store)
        progress.begin(manifest, sum(f.size for f in needed))
        while needed:  # repeats if a blob was found damaged meanwhile, or another source brought one
            _download(needed, spec, source, context, quota, reservation, progress, slot)
            needed = _needed(manifest, store)
        # A repair skips this check: the first pull made it, and the files that the spec excluded are unknown.
        if not store.snapshots.to_repair(spec):
            _check_shards(manifest, resolved, store)
        _check_contents(manifest, context, progress)
        context.reclaim.settle(reservation)
        progress.state = "publishing"
        snapshot = store.snapshots.publish(spec, manifest, now=time.time(), permit=permit)
    try:
        context.table().check_digests(manifest)
    except CachdError:  # refused after the checks above, and perhaps after `Refusals` checked all models
        store.snapshots.withdraw_refused(lambda _: True, among={manifest.id})
        raise
    return snapshot


def _check_contents(manifest: Manifest, context: PullContext, progress: Progress) -> None:
    """Raises Forbidden when the operator refuses a file's sha256 and the source does not state that sha256.

    Such a file is read and hashed if its sha256 is unknown. This happens only while any digest is refused.
    """
    table, content = context.table(), context.store.content
    for file in manifest.files if table.refused else ():
        if not file.is_named_by_content:
            known = file.known_sha256 or content.hashes.of(file)
            table.check_digest(file, known or content.computed_sha256(file, progress.cancel_token.check))


def _needed(manifest: Manifest, store: Store) -> list[File]:
    """The files to fetch.

    Their blob is missing, or another source brought the blob and this source must still prove that it has
    the same content.

    Raises Changed when a file's content was kept in the blob of another digest (`kept`) and that blob is
    gone: no file is fetched under a digest that its source does not state.
    """
    proven = store.content.proven
    missing = store.content.missing(manifest)
    here = {f.blob: f for f in manifest.files}
    for file in missing:
        del here[file.blob]
    unproven = [f for f in here.values() if not proven.has(f)]
    if unproven:
        owned = store.snapshots.owned(manifest.base)
        for file in unproven:
            if file.blob in owned:
                proven.add(file)
    if gone := next((f for f in missing if f.kept), None):
        raise Changed(f"{gone.path}: the blob with its content, {gone.blob}, is no longer on this node")
    return missing + [f for f in unproven if not proven.has(f)]


def _check_shards(manifest: Manifest, resolved: Manifest, store: Store) -> None:
    """Raises Invalid when an index names shards that the source lacks. The spec may exclude shards."""
    paths = {f.path for f in resolved.files}
    indexes = [f for f in manifest.files if f.path.endswith(shards.INDEX)]
    for index in indexes:
        with closing(store.content.pieces(index)) as pieces:
            absent = shards.missing(index.path, pieces, paths)
        if absent:
            more = "" if len(absent) < shards.MOST_TOLD else " or more"
            raise Invalid(
                f"{index.path} names {len(absent)}{more} shards that {resolved.base} lacks:"
                f" {absent[0]!r:.120}",
                code="incomplete_model",
                hint="report it to the owner of the source, or exclude the index if no engine needs it",
            )


def _resolve(
    spec: ModelSpec, source: Source, context: PullContext, progress: Progress, slot: Slot
) -> Manifest:
    """Ask the source for the ref's current manifest. While the source is slow, another pull uses the slot.

    Raises NotYet when the source is temporarily unavailable.
    """

    def lend() -> None:
        progress.waits_for(Waits(Reason.slow), state="resolving")
        slot.lend()

    progress.begins("resolving")
    began = time.monotonic()
    try:
        seconds = max(context.resolves.seconds - progress.resolve_seconds, _LEAST_SECONDS)
        manifest = context.resolves.resolve(
            source, spec.ref, progress.cancel_token, seconds=seconds, slow=lend
        )
    except Cancelled as error:
        raise Cancelled(f"{spec.name}: cancelled while its ref was resolved") from error
    except Unavailable as error:
        if error.code == TOO_SLOW:
            raise
        raise NotYet(error) from error
    finally:
        progress.resolve_seconds += time.monotonic() - began
    progress.waits_for(Waits(Reason.slot), state="resolving")
    slot.take_in_turn()
    progress.begins("resolving")
    return manifest


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
    """Fetch every missing blob, the largest first. The first failure ends the other downloads.

    When a download that another pull started fails at that pull's origin, it is restarted from this origin.
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
        error.bytes_done, error.bytes_total = progress.done, progress.total
        raise
    finally:
        downloads.leave(joined)


def _failed_elsewhere(future: Future[None], file: File, joined: list[Download]) -> bool:
    """Whether a shared download failed at another origin than this file's own."""
    failure = future.exception()
    if failure is None or isinstance(failure, NoSpace | DiskFailed):
        return False
    return all(d.file.origin != file.origin for d in joined if d.done is future)
