"""Turns one ref into a ready snapshot. Read this file first.

    resolve   ref -> manifest: one pinned revision; each file with its size, digest and validator
    reserve   space for the missing bytes, before the first is fetched; other models may be evicted for it
    fetch     each missing blob: parts -> ingest -> digest -> commit
    copy      files that clients refuse to read through one of several hard links
    publish   views, then the name, then the ready file

If the daemon dies in any of these steps, the next pull of the same ref resumes from what is on disk.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import structlog

from cachd.errors import CachdError, Cancelled, Changed, DiskFailed, Unavailable
from cachd.kernel import threads
from cachd.model import File, Manifest, Snapshot
from cachd.store.space import Reservation
from cachd.store.store import Store
from cachd.transfer.attempt import Attempt, NotYet
from cachd.transfer.checks import (
    check_contents,
    check_numbers,
    check_preflight,
    check_shards,
    check_weights,
    selected,
)
from cachd.transfer.fetch import fetch
from cachd.transfer.resolves import TOO_SLOW
from cachd.transfer.view_copies import staged_copies
from cachd.transfer.waits import Reason, Waits

log = structlog.get_logger(__name__)

_LEAST_SECONDS = 1.0  # a repeated resolve gets this much even when earlier ones used up the time limit


def pull(attempt: Attempt) -> Snapshot:
    """Make a model ready. After a CachdError or NotYet, nothing new is published.

    A quarantined model gets the same files back: its ref is resolved again only if the source has changed.
    Raises Changed when the source has other files by now, and the name is pinned at those that it had.
    """
    damaged = attempt.context.store.to_repair(attempt.spec)
    resolved = damaged or _resolve(attempt)
    try:
        return _make_ready(resolved, attempt)
    except Changed as error:
        log.info("the source changed: resolving again", name=attempt.spec.name, reason=error.detail)
        resolved = _resolve(attempt)
        if damaged:
            resolved = _same_revision(damaged, resolved, attempt) or _new_revision(damaged, resolved, attempt)
    except DiskFailed as error:
        if error.errno != errno.EIO:
            raise
        log.warning("disk error: trying the pull once more", name=attempt.spec.name, reason=error.detail)
    return _make_ready(resolved, attempt)


def _same_revision(damaged: Manifest, now: Manifest, attempt: Attempt) -> Manifest | None:
    """The damaged manifest with the places and validators that its missing files have at the source now.

    None if the source no longer states the same digest of each of them.
    """
    offered, found = {f.path: f for f in now.files}, {f.path: f for f in damaged.files}
    for lost in attempt.context.store.content.missing(damaged):
        for path in [f.path for f in damaged.files if f.blob == lost.blob]:
            same = offered.get(path)
            if same is None or same.digest is None or (same.size, same.stated) != (lost.size, lost.stated):
                return None
            found[path] = replace(found[path], origin=same.origin, validator=same.validator)
    return replace(damaged, files=tuple(found.values()))


def _new_revision(damaged: Manifest, now: Manifest, attempt: Attempt) -> Manifest:
    """The manifest that the source has now, for a repair that cannot bring back the damaged one."""
    name = attempt.spec.name
    if attempt.context.store.pins.has(name):
        raise Changed(
            f"{name} is pinned at revision {damaged.revision}, and its source no longer has the bytes of a"
            f" damaged file: it has revision {now.revision}",
            hint=f"cachd unpin {name} lets the repair take the new revision",
        )
    log.warning("repair takes a new revision", name=name, before=damaged.revision, revision=now.revision)
    return now


def _make_ready(resolved: Manifest, attempt: Attempt) -> Snapshot:
    """Fetch what is missing, and publish. `resolved` has all files of the source; the spec selects."""
    spec, store = attempt.spec, attempt.context.store
    manifest = store.manifests.as_kept(selected(resolved, spec, attempt.context.table()))
    damaged = store.to_repair(spec)
    is_repair = damaged is not None
    if damaged and damaged.id == manifest.id:  # it may have fewer copies than the spec asks for by now
        manifest = replace(manifest, copied=damaged.copied)
    manifest = store.manifests.with_copied(manifest)  # before `reserve`, which pays for the copies
    if not is_repair:  # the first pull made this check, and the files that the spec excluded are unknown
        check_numbers(manifest, resolved, spec)
    with attempt.context.reclaim.reserve(manifest, spec.name) as reservation:
        _fetch_needed(manifest, attempt, reservation)
        if not is_repair:
            with threads.in_brief_turns():  # an index or a header may take seconds to read
                warnings = check_shards(manifest, resolved, spec, store.content)
                check_weights(manifest, store.content)
                findings = check_preflight(manifest, store.content, attempt.context.preflight)
            manifest = replace(manifest, warnings=warnings, findings=findings)
        check_contents(manifest, attempt.context.table(), store.content, attempt.progress.cancel_token)
        with staged_copies(manifest, attempt, reservation):
            attempt.context.reclaim.settle(reservation)
            attempt.progress.begin_publish()
            # point of no return
            snapshot = store.publish(spec, manifest, now=attempt.context.now(), permit=attempt.permit)
    _withdraw_if_refused(manifest, attempt)
    if not is_repair:
        _log_findings(snapshot)
    return snapshot


def _log_findings(snapshot: Snapshot) -> None:
    for first in snapshot.findings[:1]:  # the worst one
        log.warning(
            "preflight found",
            name=snapshot.name,
            revision=snapshot.revision,
            level=first.level.value,
            code=first.code,
            file=first.file,
            detail=first.detail,
            findings=len(snapshot.findings),
        )


def _resolve(attempt: Attempt) -> Manifest:
    """Ask the source for the ref's current manifest. While the source is slow, another pull uses the slot.

    Raises NotYet when the source is temporarily unavailable.
    """
    progress, resolves, clock = attempt.progress, attempt.context.resolves, attempt.context.clock

    def lend() -> None:
        progress.pause_resolve(Waits(Reason.slow))
        attempt.slot.lend()

    progress.begin_resolve()
    began = clock()
    try:
        seconds = max(resolves.seconds - progress.resolve_seconds, _LEAST_SECONDS)
        manifest = resolves.resolve(
            attempt.source, attempt.spec.ref, progress.cancel_token, seconds=seconds, slow=lend
        )
    except Cancelled as error:
        raise Cancelled(f"{attempt.spec.name}: cancelled while its ref was resolved") from error
    except Unavailable as error:
        if error.code == TOO_SLOW:
            raise
        raise NotYet(error) from error
    finally:
        progress.resolve_seconds += clock() - began
    progress.pause_resolve(Waits(Reason.slot))
    attempt.slot.take_when_free()
    progress.begin_resolve()
    return manifest


def _fetch_needed(manifest: Manifest, attempt: Attempt, reservation: Reservation) -> None:
    """Fetch until every blob of the manifest is on the disk, and proven by this source."""
    needed = _needed(manifest, attempt.context.store)
    attempt.progress.begin_download(manifest, sum(f.size for f in needed))
    while needed:  # repeats if a blob was found damaged meanwhile, or another source brought one
        fetch(needed, attempt, reservation)
        needed = _needed(manifest, attempt.context.store)


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
        owned = store.manifests.owned(manifest.base)
        for file in unproven:
            if file.blob in owned:
                proven.add(file)
    if gone := next((f for f in missing if f.kept), None):
        raise Changed(f"{gone.path}: the blob with its content, {gone.blob}, is no longer on this node")
    return missing + [f for f in unproven if not proven.has(f)]


def _withdraw_if_refused(manifest: Manifest, attempt: Attempt) -> None:
    """Withdraw the model again if the operator refused a digest of it during the publish. Raises Forbidden.

    The check of all models for refused digests (`Refusals`) may have run before this one was published.
    """
    try:
        attempt.context.table().check_digests(manifest)
    except CachdError:
        attempt.context.store.withdraw_refused(lambda _: True, among={manifest.id})
        raise
