"""Points a name back at the snapshot that it led to before.

    1  rollbacks/NAME.json recorded: from here on a restart completes the rollback   # point of no return
    2  the previous snapshot published (publish.py): history, then name, then ready file
    3  rollbacks/NAME.json removed

A failure in step 2 that leaves the name as it was takes the record and the history back. If the old ready
file is gone already, the record stays, and the next start completes the rollback.
"""

from __future__ import annotations

import structlog

from cachd.errors import CachdError, DiskFailed, NotFound
from cachd.model import Snapshot
from cachd.store.content import ContentStore
from cachd.store.history import Histories, Rollback
from cachd.store.manifests import Manifests
from cachd.store.names import Names
from cachd.store.publish import Publisher

log = structlog.get_logger(__name__)


class Rollbacks:
    """The rollbacks of one root."""

    def __init__(
        self,
        content: ContentStore,
        names: Names,
        manifests: Manifests,
        history: Histories,
        publisher: Publisher,
    ) -> None:
        self._content, self._names, self._manifests = content, names, manifests
        self._history, self._publisher = history, publisher

    def rollback(self, name: str, *, now: float) -> Snapshot:
        """Publish again the snapshot that a name led to before. Nothing is fetched from its source.

        Raises NotFound if no previous snapshot is kept, DiskFailed if some of its blobs are missing, and as
        `Publisher.publish` does.
        """
        with self._names.changing():
            current, before = self._names.known(name), next(iter(self._history.of(name)), None)
            if current is None or before is None:
                raise _no_previous(name)
            rollback = Rollback(before, self._names.get(name), current.spec, now)
            published = self._complete(rollback)
        log.info("rolled back", name=name, revision=before.revision, rolled_back_from=current.revision)
        return published

    def resume(self) -> None:
        """At start, complete the rollbacks that a crash interrupted. Logs those that cannot be completed."""
        for rollback in self._history.begun_rollbacks():
            to = rollback.to
            try:
                with self._names.changing():
                    ready = self._names.get(to.name)
                    if ready is None or (ready.spec, ready.manifest) != (to.spec, to.manifest):
                        self._complete(rollback)
                    self._history.end_rollback(to.name)
            except CachdError as error:
                log.warning("rollback not completed", name=to.name, revision=to.revision, reason=error.detail)
            else:
                log.info("interrupted rollback completed", name=to.name, revision=to.revision)

    def _complete(self, rollback: Rollback) -> Snapshot:
        name, to, known = rollback.to.name, rollback.to, self._names.known(rollback.to.name)
        manifest = self._manifests.of(to)
        with self._content.claim(manifest):
            if missing := self._content.missing(manifest):
                raise DiskFailed(
                    f"{name}: {len(missing)} files of revision {to.revision} are no longer here",
                    code="previous_incomplete",
                    hint="pull that revision: cachd then fetches the missing files",
                )
            self._history.begin_rollback(rollback)
            # point of no return
            try:
                return self._publisher.publish_previous(rollback, manifest)
            except BaseException:
                if known is not None and self._names.known(name) == known:
                    self._history.undo_rollback(name)
                raise


def _no_previous(name: str) -> NotFound:
    return NotFound(
        f"no previous snapshot of {name!r} is kept",
        code="no_previous",
        hint="pull the wanted revision; the option keep_previous sets how many snapshots are kept",
    )
