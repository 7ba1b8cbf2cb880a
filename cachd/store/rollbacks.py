"""Points a name back at the snapshot that it led to before.

    rollbacks/NAME.json recorded -> [point of no return] the previous snapshot published (publish.py)
        -> rollbacks/NAME.json removed

After a kill past that point, the next start completes the rollback. If an error leaves the name as it was,
the history is restored and the record removed. If the old ready file is gone already, the record stays for
the next start.
"""

from __future__ import annotations

import structlog

from cachd.errors import CachdError, DiskFailed, Leased, NotFound
from cachd.model import Snapshot, count_text
from cachd.store.history import Rollback
from cachd.store.index import Index
from cachd.store.publish import Publisher

log = structlog.get_logger(__name__)


class Rollbacks:
    """The rollbacks of one root."""

    def __init__(self, index: Index, publisher: Publisher) -> None:
        self._content, self._names, self._manifests = index.content, index.names, index.manifests
        self._history, self._publisher = index.history, publisher

    def rollback(self, name: str, *, now: float) -> Snapshot:
        """Publish again the snapshot that a name led to before. Nothing is fetched from its source.

        If an earlier rollback of the name failed half-way, this completes it. Raises NotFound if no previous
        snapshot is kept, DiskFailed if some of its blobs are missing, and as `Publisher.publish` does.
        """
        with self._names.changing():
            rollback = self._history.begun_rollback(name) or self._next(name, now)
            current = self._names.known(name)
            try:
                published = self._complete(rollback)
            except BaseException:
                if current is not None and self._names.known(name) == current:
                    self._history.undo_rollback(name)
                raise
        left = rollback.rolled_back_from
        log.info(
            "rolled back",
            name=name,
            revision=published.revision,
            manifest=published.manifest,
            rolled_back_from=str(left.ref),
        )
        return published

    def resume(self) -> None:
        """At start, complete the rollbacks that a crash interrupted. Logs those that cannot be completed.

        Raises Leased.
        """
        for rollback in self._history.begun_rollbacks():
            to = rollback.to
            try:
                with self._names.changing():
                    if self._manifests.has(to.manifest) and not self._is_done(rollback):
                        self._complete(rollback)
                    self._history.end_rollback(to.name)
            except Leased:
                raise  # the daemon opens the store again when the lease has ended
            except CachdError as error:
                log.warning("rollback not completed", name=to.name, revision=to.revision, reason=error.detail)
            else:
                log.info("interrupted rollback ended", name=to.name, revision=to.revision)

    def _is_done(self, rollback: Rollback) -> bool:
        ready = self._names.get(rollback.to.name)
        return ready is not None and (ready.spec, ready.manifest) == (rollback.to.spec, rollback.to.manifest)

    def _next(self, name: str, now: float) -> Rollback:
        """The rollback of a name to its previous snapshot. Raises NotFound if none is kept."""
        current, before = self._names.known(name), next(iter(self._history.of(name)), None)
        if current is None or before is None:
            raise NotFound(
                f"no previous snapshot of {name!r} is kept",
                code="no_previous",
                hint="pull the wanted revision; the option keep_previous sets how many snapshots are kept",
            )
        return Rollback(before, self._names.get(name), current.spec, now)

    def _complete(self, rollback: Rollback) -> Snapshot:
        to = rollback.to
        manifest = self._manifests.of(to)
        with self._content.claim(manifest):
            if missing := self._content.missing(manifest):
                raise DiskFailed(
                    f"{to.name}: {count_text(len(missing), 'file')} of revision {to.revision} cannot be"
                    " found here",
                    code="previous_incomplete",
                    hint="pull that revision: cachd then fetches the missing files",
                )
            self._history.begin_rollback(rollback)
            # point of no return for a kill
            return self._publisher.publish_previous(rollback, manifest)
