"""One model: from a ref to a ready snapshot. The file to read first.

    resolve   ref -> manifest: one revision, every file with size, digest, validator
    reserve   the space of what is missing, before the first byte; others are evicted for it
    download  each missing blob: parts -> ingest -> digest -> commit
    publish   views, then the name, then the ready file

Killed at any of these, the next pull of the same ref begins where the disk says this one ended.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass

import structlog

from cachd.errors import CachdError, Cancelled, Changed, DiskFailed, Invalid, NoSpace, Unavailable
from cachd.model import File, Manifest, Snapshot, Wish
from cachd.policy import backoff, shards
from cachd.sources.source import Source
from cachd.sources.table import Table
from cachd.store.permit import Permit
from cachd.store.space import Reservation
from cachd.store.store import Store
from cachd.transfer import threads
from cachd.transfer.cores import together
from cachd.transfer.download import Download
from cachd.transfer.downloads import Downloads
from cachd.transfer.progress import Progress
from cachd.transfer.reclaim import Reclaim
from cachd.transfer.streams import Share

log = structlog.get_logger(__name__)

_SAMPLE_SECONDS = 0.5
_RESOLVE_RETRIES = 4


@dataclass(frozen=True, slots=True)
class Means:
    """What every pull works with. `table`: what the operator allows now, and limits."""

    store: Store
    reclaim: Reclaim
    downloads: Downloads
    table: Callable[[], Table] = Table


def pull(
    wish: Wish, source: Source, means: Means, *, share: Share, progress: Progress, permit: Permit
) -> Snapshot:
    """Make a wish come true. Raises CachdError, and then nothing new is published.

    A model that was damaged becomes what it was: its ref is not resolved again.
    """
    whole = means.store.snapshots.to_repair(wish) or _resolve(wish, source, progress)
    try:
        return _pull_once(whole, wish, source, means, share, progress, permit)
    except Changed as error:
        log.info("the source moved: resolved again", name=wish.name, reason=error.detail)
        whole = _resolve(wish, source, progress)
    except DiskFailed as error:
        if error.facts.get("errno") != errno.EIO:
            raise
        log.warning("the disk failed: tried once more with what is here", name=wish.name, reason=error.detail)
    return _pull_once(whole, wish, source, means, share, progress, permit)


def _pull_once(
    whole: Manifest,
    wish: Wish,
    source: Source,
    means: Means,
    share: Share,
    progress: Progress,
    permit: Permit,
) -> Snapshot:
    store = means.store
    manifest = whole.select(wish.include, wish.exclude)
    means.table().check_files(manifest)
    with means.reclaim.reserve(manifest) as reservation:
        missing = store.content.missing(manifest)
        progress.begin(manifest, sum(f.size for f in missing))
        while missing:  # again when one was found damaged meanwhile
            _download(missing, wish, source, means, share, reservation, progress)
            missing = store.content.missing(manifest)
        if not store.snapshots.to_repair(wish):  # it was looked at before, and what was left out is unknown
            _check_shards(manifest, whole, store)
        _check_contents(manifest, means, progress)
        progress.state = "publishing"
        snapshot = store.snapshots.publish(wish, manifest, now=time.time(), permit=permit)
    try:
        means.table().check_digests(manifest)
    except CachdError:  # refused since it was looked at, and perhaps since all models were
        store.snapshots.withdraw_refused(lambda _: True, among={manifest.id})
        raise
    return snapshot


def _check_contents(manifest: Manifest, means: Means, progress: Progress) -> None:
    """Raises Forbidden when a file is refused by a sha256 that its source does not say.

    Such files are hashed once more, and only while digests are refused.
    """
    table, content = means.table(), means.store.content

    def go_on() -> None:
        if progress.cancelled.is_set():
            raise Cancelled(f"{manifest.base}: cancelled while its files were hashed")

    for file in manifest.files if table.refused else ():
        if file.sha256 is None:
            table.check_digest(file, content.computed_sha256(file, go_on))


def _check_shards(manifest: Manifest, whole: Manifest, store: Store) -> None:
    """Raises Invalid when an index names shards that the source lacks; what a wish leaves out it may."""
    paths = {f.path for f in whole.files}
    indexes = [f for f in manifest.files if f.path.endswith(shards.INDEX)]
    for index in indexes:
        if index.size > shards.LONGEST_INDEX_BYTES:
            continue
        if absent := shards.missing(index.path, store.content.read(index), paths):
            raise Invalid(
                f"{index.path} names {len(absent)} shards that {whole.base} lacks: {absent[0]!r:.120}",
                code="incomplete_model",
                mend="report it to whoever keeps the source, or exclude the index if no engine needs it",
            )


def _resolve(wish: Wish, source: Source, progress: Progress) -> Manifest:
    """Ask the source what the ref means now; a source that is briefly away is asked again."""
    progress.state = "resolving"
    failures = 0
    while True:
        try:
            with threads.given(str(wish.ref)), together.gathered():
                whole = source.resolve(wish.ref)
            if progress.cancelled.is_set():
                raise Cancelled(f"{wish.name}: cancelled while it was resolved")
            return whole
        except Unavailable as error:
            failures += 1
            if failures > _RESOLVE_RETRIES:
                raise
            seconds = backoff.delay(failures, told=error.retry_after, chance=random.random())  # noqa: S311
            log.info("resolve asked again", name=wish.name, code=error.code, in_seconds=round(seconds, 1))
            if progress.cancelled.wait(seconds):
                raise Cancelled(f"{wish.name}: cancelled while its source was away") from error


def _download(
    missing: list[File],
    wish: Wish,
    source: Source,
    means: Means,
    share: Share,
    reservation: Reservation,
    progress: Progress,
) -> None:
    """Fetch every missing blob, the largest first; the first failure ends the others.

    A download that another pull began, from another place, and that fails there is begun anew from here.
    """
    joined: list[Download] = []
    unfinished: dict[Future[None], File] = {}

    downloads, table = means.downloads, means.table()

    def join(file: File) -> None:
        download = downloads.join(
            file,
            source,
            share,
            scheme=wish.ref.scheme,
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
            ended, _ = wait(unfinished, timeout=_SAMPLE_SECONDS, return_when=FIRST_EXCEPTION)
            for future in ended:
                file = unfinished.pop(future)
                if _failed_elsewhere(future, file, joined):
                    join(file)
                else:
                    future.result()
            if progress.cancelled.is_set():
                raise Cancelled(f"{wish.name}: cancelled after {progress.done} of {progress.total} bytes")
        progress.sample()
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
