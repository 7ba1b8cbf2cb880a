"""Removes names and snapshots in such an order that a ready file never promises a missing file.

    ready files hidden -> checked once more -> hold file taken
        -> [point of no return] names removed, each with its quarantine, pin, leases and Hub branch
        -> views removed, copies and blobs in the trash -> manifest removed -> trash emptied

A failure before that point puts the ready files back. After a kill past it, a recorded manifest without a
name is left; `sweep_snapshots` removes it once nothing needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from cachd.errors import InUse, NotFound
from cachd.kernel import durable
from cachd.model import Digest, Manifest, Snapshot
from cachd.store.index import Index
from cachd.store.names import no_such_model
from cachd.store.pod_views import PodViews
from cachd.store.protection import Protection
from cachd.store.watch import Watch

log = structlog.get_logger(__name__)

_Check = Callable[[Sequence[Snapshot], Manifest], None]  # raises InUse


class Withdrawals:
    """Removes the snapshots of one root."""

    def __init__(self, index: Index, views: PodViews, *, protection: Protection, watch: Watch) -> None:
        self._layout, self._content = index.layout, index.content
        self._names, self._manifests, self._history = index.names, index.manifests, index.history
        self._views, self._protection, self._watch = views, protection, watch

    # --- names ---

    def withdraw(self, name: str, *, force: bool = False) -> int:
        """Remove a name, and its snapshot if it has no other name. Returns the bytes freed.

        Snapshots that were kept only for a rollback of the name are removed, too. Raises NotFound if the name
        is unknown and, unless `force`, InUse if it is pinned or leased, or if it is the only name of a
        snapshot that is held or open. Files that a process has open stay readable for it. Raises DiskFailed.
        """
        with self._names.changing():
            snapshot = self._names.known(name)
            if snapshot is None:
                raise no_such_model(name)
            self._remove_names([snapshot], None if force else self._protection.check_names_unused)
            trashed = self._remove(snapshot.manifest, [name]) | self._forget_history([snapshot])
        return self._content.trash.empty(trashed)

    def evict(self, manifest: str) -> int:
        """Remove a snapshot and all its names. Returns the bytes freed.

        Raises NotFound if the snapshot is gone, InUse if one of its names is pinned or leased, or if it is
        held, open, or was opened lately. Raises DiskFailed.
        """
        with self._names.changing():
            named = self._names.of(manifest)
            if named:
                self._remove_names(named, self._protection.check_names_unopened, is_eviction=True)
                trashed = self._remove(manifest, [s.name for s in named])
            elif self._manifests.has(manifest):
                trashed = self._remove_unopened(manifest)
            else:
                raise NotFound(f"snapshot {manifest} is no longer here", code="no_such_snapshot")
            trashed |= self._forget_history(named)
        return self._content.trash.empty(trashed)

    def withdraw_refused(
        self, is_refused: Callable[[Manifest], bool], *, among: Collection[str] | None = None
    ) -> tuple[list[tuple[Snapshot, Manifest]], set[str]]:
        """Withdraw every name of every refused snapshot, even if pinned, leased or in use.

        Returns the withdrawn names (each as its snapshot and manifest), and the ids of the refused manifests
        whose files stay because somebody uses them. No name, address or rollback leads to those any more.
        Call this again with them as `among` to remove the ones that nobody uses by then. `among`: the
        manifest ids to consider; None considers all. Raises DiskFailed.
        """
        withdrawn, trashed, held = [], dict[Path, int](), set[str]()
        with self._names.changing():
            for refused, manifest in list(self._manifests.readable(among)):
                if not is_refused(manifest):
                    continue
                self._history.drop(refused)
                named = [s for s in self._names.all_known() if s.manifest == refused]
                for snapshot in named:
                    self._remove_names([snapshot], None)
                withdrawn += [(snapshot, manifest) for snapshot in named]
                self._views.close_addresses(refused, manifest.revision)
                if self._protection.is_in_use(manifest) or not self._protection.takes_hold(refused):
                    held.add(refused)
                else:
                    trashed |= self._remove(refused)
        self._content.trash.empty(trashed)
        return withdrawn, held

    # --- snapshots without a name ---

    def unneeded(self, *, keep: Collection[str] = ()) -> list[tuple[str, int]]:
        """The snapshots that nothing needs: (manifest id, bytes of the blobs that no other manifest has).

        No name leads to them, none is kept for a rollback, and nobody uses them. Snapshots whose base is in
        `keep` are left out: a running pull may be about to publish one of them.
        """
        unneeded = dict(self._unneeded(keep))
        if not unneeded:
            return []
        needed = Counter(blob for _, manifest in self._manifests.readable() for blob in _sizes(manifest))
        return [
            (each, sum(size for blob, size in _sizes(manifest).items() if needed[blob] == 1))
            for each, manifest in unneeded.items()
        ]

    def _unneeded(self, keep: Collection[str]) -> Iterator[tuple[str, Manifest]]:
        """The snapshots that nothing needs, without their bytes: no other manifest is read."""
        candidates = set(self._manifests.unnamed()) - self._history.manifests()
        for each, manifest in self._manifests.readable(candidates) if candidates else ():
            if manifest.base not in keep and not self._is_read(manifest):
                yield each, manifest

    def drop(self, manifest: str) -> int:
        """Remove a snapshot unless a name, a rollback or a process needs it. Returns the bytes freed.

        Raises DiskFailed.
        """
        with self._names.changing():
            is_kept = manifest in self._history.manifests()
            trashed = {} if is_kept else self._remove_unneeded(manifest)
        return self._content.trash.empty(trashed)

    def sweep_snapshots(self, *, keep: Collection[str] = ()) -> int:
        """Remove the snapshots that `unneeded` lists. Returns the bytes freed. Raises DiskFailed."""
        return sum(self.drop(manifest) for manifest, _ in list(self._unneeded(keep)))

    # --- private; the caller holds `Names.changing` ---

    def _remove_names(
        self, named: Sequence[Snapshot], check: _Check | None, *, is_eviction: bool = False
    ) -> None:
        """Remove names of one snapshot. `check` is None if the removal is forced.

        The ready files are hidden before anything else. A pod that read one just before has opened the files
        by now, or will fail to open them. So `check` runs a second time, and the ready files are put back if
        it raises. Then the hold file is unlinked under a kernel lease, which proves that no pod holds it.
        """
        manifest = None
        if check:
            manifest = self._manifests.of(named[0])
            check(named, manifest)
        moves = [(self._layout.ready_file(s.name), self._layout.staging / f"{s.name}.json") for s in named]
        for ready, hidden in moves:
            with suppress(FileNotFoundError):  # an operator may have deleted it
                durable.move(ready, hidden)
        durable.sync_directory(self._layout.ready)
        try:
            self._names.check()
            if check and manifest:
                check(named, manifest)
                if not self._names.has_others(named):
                    self._protection.take_hold(named[0].manifest, of=named[0].name)
        except BaseException:
            for ready, hidden in moves:
                with suppress(FileNotFoundError):
                    durable.move(hidden, ready)
            durable.sync_directory(self._layout.ready)
            raise
        # point of no return
        for snapshot, (_, hidden) in zip(named, moves, strict=True):
            durable.remove(hidden)
            self._remove_name(snapshot, is_eviction=is_eviction)

    def _remove_name(self, snapshot: Snapshot, *, is_eviction: bool) -> None:
        """Remove all that belongs to a name whose ready file is gone."""
        name = snapshot.name
        if is_eviction:
            self._names.note_eviction(name)
        self._names.undeclared(name)
        self._names.end_quarantine(name)
        self._history.end_rollback(name)
        self._protection.end(name)
        self._views.repair_branches(snapshot.hub_folder)
        durable.remove(self._layout.model(name))
        log.info("withdrawn", name=name, manifest=snapshot.manifest)

    def _forget_history(self, named: Sequence[Snapshot]) -> dict[Path, int]:
        """Remove what was kept only for a rollback of these names. Returns the trash, as `_remove` does."""
        trashed: dict[Path, int] = {}
        for snapshot in named:
            for before in self._history.forget(snapshot.name):
                trashed |= self._remove_unneeded(before)
        return trashed

    def _remove_unneeded(self, manifest: str) -> dict[Path, int]:
        """As `_remove_unopened`; does nothing if a name leads to it, if it is in use, or if it is gone."""
        if manifest in self._names.manifests():
            return {}
        try:
            return self._remove_unopened(manifest)
        except (FileNotFoundError, InUse):
            return {}

    def _remove_unopened(self, manifest: str) -> dict[Path, int]:
        """Remove a snapshot that has no name. Returns the trash, as `_remove` does.

        Raises InUse if it is held, open, or was opened lately.
        """
        self._protection.check_unnamed_unopened(manifest)
        self._protection.take_hold(manifest, of=f"snapshot {manifest}")
        return self._remove(manifest)

    def _remove(self, manifest: str, names: Collection[str] = ()) -> dict[Path, int]:
        """Remove a snapshot from both views and move its blobs to the trash, unless a name still uses it.

        Partial downloads of the same blobs by pulls of `names` go to the trash, too. Returns the paths now in
        the trash, each with its bytes. The caller deletes them without the lock.
        """
        if manifest in self._names.manifests():
            return {}
        self._watch.leave(manifest)
        trashed = self._views.discard_copies(manifest)
        gone = self._views.remove(manifest)
        trashed |= self._content.removal.discard(gone, names) if gone else {}
        self._manifests.remove(manifest)
        return trashed

    def _is_read(self, manifest: Manifest) -> bool:
        """Whether a snapshot is in use, or one of its files was opened lately."""
        return bool(self._protection.opened_lately(manifest.id)) or self._protection.is_in_use(manifest)


def _sizes(manifest: Manifest) -> dict[Digest, int]:
    """Bytes of each blob of a manifest."""
    return {f.blob: f.size for f in manifest.files}
