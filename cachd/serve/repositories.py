"""Finds the revision of a repository that a client asks for: among the ready models, or in a pull.

A revision that is not here is pulled like any other model: by the same lists, within the same limits, and
verified. Clients see its files as soon as the source has listed them.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass, replace
from glob import escape

import structlog
from structlog.contextvars import bound_contextvars

from cachd.errors import CachdError, NotFound, Unavailable
from cachd.model import COMMIT, File, Manifest, ModelSpec, Ref, Snapshot, commit_of, folder_of
from cachd.model.name import LONGEST_NAME
from cachd.report.models import Models
from cachd.report.outcomes import outcome_of
from cachd.serve.bounds import PerMinute, Places, Waits
from cachd.sources.schemes import Sources
from cachd.transfer.request import Pull

log = structlog.get_logger(__name__)

_LISTED_SECONDS = 60.0  # how long a client waits until the source has listed the files
_STEP_SECONDS, _LONGEST_STEP_SECONDS = 0.002, 0.05
_MAX_READ, _MAX_READ_FILES = 8, 100_000  # manifests in memory; a file takes up to 1 KB
_MAX_PULLS, _MAX_PULLS_IN_MINUTE = 64, 120
_FINAL_SECONDS, _BRIEF_SECONDS = 60.0, 5.0  # how long a failure is the answer without another pull


@dataclass(frozen=True, slots=True)
class Revision:
    """A revision and its files. `snapshot`: where they are ready; None while `pull` fetches them."""

    repo: str
    manifest: Manifest
    snapshot: Snapshot | None = None
    pull: Pull | None = None

    @property
    def commit(self) -> str:
        """Its 40 hex digits."""
        return commit_of(self.manifest)

    def file(self, path: str) -> File | None:
        """The file with this path."""
        return next((file for file in self.manifest.files if file.path == path), None)

    def lacks(self, path: str) -> bool:
        """Whether the revision certainly has no such file. Its listing may be a selection."""
        return self.manifest.left_out is None or path in self.manifest.absent


class Repositories:
    """The repositories of this node, and those that it may pull. Safe from any thread.

    `waits`: counts the requests that wait for a listing. `hub_only`: leaves out the models of other sources,
    because a token of the Hub says nothing about them. Clients may have started 64 pulls that have not ended,
    and each client 120 in a minute.
    """

    def __init__(
        self,
        models: Models,
        sources: Sources,
        waits: Waits,
        *,
        hub_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._models, self._store, self._pulls = models, models.store, models.pulls
        self._sources, self._clock, self._now = sources, clock, now
        self._hub_only, self._waits = hub_only, waits
        self._unfinished = Places(_MAX_PULLS, "too many models are pulled for clients of the Hub endpoint")
        self._in_minute = PerMinute(_MAX_PULLS_IN_MINUTE, "this client has asked for too many models", clock)
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._read: dict[str, tuple[float, Manifest]] = {}  # by id; the one that was used last stands last

    def revision(self, repo: str, revision: str, peer: str) -> Revision:
        """A revision, pulled for a client if it is not here. Waits until its files are listed.

        Raises NotFound for a repository that is unknown or may not be pulled, and any error of a pull.
        """
        if (found := self.cached(repo, revision)) is not None:
            return found
        return self._listed(repo, revision, self._pull(repo, revision, peer), peer)

    def with_file(self, found: Revision, path: str, peer: str) -> Revision:
        """The same commit with a file that the model on this node leaves out: only this file is pulled.

        Raises NotFound if there is no such file.
        """
        snapshot = found.snapshot
        if snapshot is None or snapshot.spec.ref.scheme != "hf":
            raise NotFound(f"{found.repo} has no file {path:.200}", code="file_not_found")
        for each in self._snapshots(found.repo):
            if each.commit == found.commit:
                manifest = self._files(each)
                if any(file.path == path for file in manifest.files):
                    return Revision(found.repo, manifest, each)
        spec = ModelSpec.asked(f"hf://{found.repo}@{found.commit}", include=[escape(path)])
        try:
            pull = self._started(spec, peer)
            manifest = self._manifest(pull, peer)
            return Revision(found.repo, manifest, self._store.names.get(pull.spec.name), pull)
        except CachdError as error:
            if error.code == "nothing_selected":
                raise NotFound(f"{found.repo} has no file {path:.200}", code="file_not_found") from error
            raise

    # --- what is here ---

    def cached(self, repo: str, revision: str) -> Revision | None:
        """A revision of which a model on this node is ready; complete models come first."""
        found = [
            Revision(repo, self._files(each), each)
            for each in self._snapshots(repo)
            if revision == each.commit or revision in _names_of(each)
        ]
        return min(found, key=lambda each: each.manifest.left_out is not None, default=None)

    def branches(self, repo: str) -> dict[str, str]:
        """The commits of the branches and tags of a repository that are here, by their names."""
        return {name: each.commit for each in self._snapshots(repo) for name in sorted(_names_of(each))}

    def _snapshots(self, repo: str) -> Iterator[Snapshot]:
        """The ready models of a repository."""
        for each in self._store.names.in_hub_folder(folder_of(repo)):
            is_shown = not self._hub_only or each.spec.ref.scheme == "hf"
            if each.repo == repo and is_shown and not self._is_refused(each):
                yield each

    def _files(self, snapshot: Snapshot) -> Manifest:
        """The files of a snapshot. Those of a few are kept in memory, because clients ask for each file."""
        if (kept := self._kept(snapshot)) is not None:
            return kept
        with self._reading:  # one at a time, so that a few huge ones do not take all memory
            manifest = self._kept(snapshot) or self._store.manifests.of(snapshot)
        with self._lock:
            self._read[snapshot.manifest] = snapshot.published_at, manifest
            while len(self._read) > 1 and self._are_too_many():
                del self._read[next(iter(self._read))]
        return manifest

    def _kept(self, snapshot: Snapshot) -> Manifest | None:
        """The files of a snapshot, if they are in memory."""
        with self._lock:
            published_at, manifest = self._read.get(snapshot.manifest, (0.0, None))
            if manifest is None or published_at != snapshot.published_at:
                return None
            self._read[snapshot.manifest] = self._read.pop(snapshot.manifest)
            return manifest

    def _are_too_many(self) -> bool:
        files = sum(len(manifest.files) for _, manifest in self._read.values())
        return len(self._read) > _MAX_READ or files > _MAX_READ_FILES

    def _is_refused(self, snapshot: Snapshot) -> bool:
        try:
            self._sources.table.check(snapshot.spec.ref.base)
        except CachdError:
            return True
        return False

    # --- what is pulled ---

    def _pull(self, repo: str, revision: str, peer: str) -> Pull:
        """The pull that brings a revision: a running one, else a new one."""
        ref = Ref.parse(f"hf://{repo}")
        for pull in self._pulls.running():
            if pull.spec.ref.base == ref.base and not pull.spec.is_selective:
                if (pull.spec.ref.revision or "main") == revision:
                    return pull
                # A client knows the commit from the listing of a branch, so this may be that branch's pull.
                if COMMIT.fullmatch(revision) and self._has_commit(pull, revision, peer):
                    return pull
        self._sources.table.check(ref.base)
        spec = ModelSpec.asked(f"hf://{repo}" if revision == "main" else f"hf://{repo}@{revision}")
        return self._started(spec, peer)

    def _has_commit(self, pull: Pull, commit: str, peer: str) -> bool:
        try:
            return commit_of(self._manifest(pull, peer)) == commit
        except CachdError:
            return False

    def _started(self, spec: ModelSpec, peer: str) -> Pull:
        """Start or join the pull of a spec. Its failure stays the answer for a while."""
        spec = self._under_free_name(spec)
        before = self._pulls.get(spec.name)
        if before is not None and before.spec == spec and not before.done.done():
            return before  # it is counted already, or nobody's
        if before is not None and before.spec == spec and before.error is not None:
            is_final = outcome_of(before.error).is_final
            until = (before.ended_at or 0.0) + (_FINAL_SECONDS if is_final else _BRIEF_SECONDS)
            if self._now() < until:
                raise before.error
        self._in_minute.count(peer)
        self._unfinished.take(peer)
        pull = None
        try:
            with bound_contextvars(who="cachd:hub"), self._waits.slots.without_slot():  # it syncs a file
                pull = self._pulls.start(spec)
        finally:
            if pull is None:
                self._unfinished.leave(peer)
        if pull is None:  # it has just become ready
            raise Unavailable(f"{spec.name} became ready meanwhile", retry_after=1.0)
        pull.done.add_done_callback(lambda _: self._unfinished.leave(peer))
        log.info("pull for a client of the Hub endpoint", name=spec.name, ref=str(spec.ref))
        return pull

    def _under_free_name(self, spec: ModelSpec) -> ModelSpec:
        """The spec under its default name or, if another model has that, with digits of a hash behind it."""
        owner = self._store.names.owner(spec.name)
        running = self._pulls.get(spec.name)
        if running is not None and not running.done.done():
            owner = running.spec
        if owner is None or owner == spec:
            return spec
        digits = hashlib.sha256(str(spec).encode()).hexdigest()[:8]
        return replace(spec, name=f"{spec.name[: LONGEST_NAME - len(digits) - 1]}-{digits}")

    def _listed(self, repo: str, revision: str, pull: Pull, peer: str) -> Revision:
        manifest = self._manifest(pull, peer)
        return self.cached(repo, revision) or Revision(repo, manifest, pull=pull)

    def _manifest(self, pull: Pull, peer: str) -> Manifest:
        """The files of a pull, once its source has listed them. Raises the error of a failed pull."""
        if (manifest := pull.progress.manifest) is None:
            with self._waits.one(peer):
                manifest = self._awaited_manifest(pull)
        if pull.error is not None:
            raise pull.error
        return manifest

    def _awaited_manifest(self, pull: Pull) -> Manifest:
        deadline, step = self._clock() + _LISTED_SECONDS, _STEP_SECONDS
        while (manifest := pull.progress.manifest) is None:
            if wait([pull.done], timeout=step).done:
                return self._store.manifests.of(pull.done.result())
            step = min(2 * step, _LONGEST_STEP_SECONDS)
            if self._clock() > deadline:
                raise Unavailable(
                    f"{pull.spec.ref}: its source has not listed the files within {_LISTED_SECONDS:g} s",
                    code="not_resolved",
                    hint="ask again",
                    retry_after=5.0,
                )
        return manifest


def _names_of(snapshot: Snapshot) -> set[str]:
    """The branches and tags that lead to a snapshot."""
    names = {snapshot.spec.hub_revision, "main" if snapshot.is_main else None}
    return {name for name in names if name}
