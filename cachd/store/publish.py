"""Publishes snapshots in such an order that a ready file never promises a missing file.

    blobs durable -> manifest -> hold file -> list of copies -> plain tree -> Hub files -> address
        -> Hub branch -> history -> next ready file and next link staged
        -> [point of no return] old ready file removed -> name swapped -> new ready file in place

A failure before that point leaves the name as it was. A kill after it leaves the name without a ready file:
then the name is free at the next start, and whoever wanted the publish runs it again (a pull from pending/, a
rollback from rollbacks/).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import structlog

from cachd.kernel import durable
from cachd.model import Manifest, ModelSpec, Snapshot, snapshot_of
from cachd.store import catalog
from cachd.store.history import Rollback
from cachd.store.index import Index
from cachd.store.permit import Permit
from cachd.store.pins import Pins
from cachd.store.pod_views import PodViews
from cachd.store.watch import Watch

log = structlog.get_logger(__name__)

_TICK_SECONDS = 1e-6  # the resolution of `published_at` in a ready file


class Publisher:
    """Publishes the snapshots of one root."""

    def __init__(self, index: Index, views: PodViews, *, watch: Watch, pins: Pins) -> None:
        self._layout, self._content = index.layout, index.content
        self._names, self._manifests, self._history = index.names, index.manifests, index.history
        self._views, self._watch, self._pins = views, watch, pins

    def publish(
        self, spec: ModelSpec, manifest: Manifest, *, now: float, permit: Permit | None = None
    ) -> Snapshot:
        """Show a manifest in both views, then declare it ready under the spec's name.

        All its blobs must be in the store. Publishing a snapshot again completes an interrupted publish.
        `permit`: checked before anything changes; None allows every change of the name.

        Raises NoSpace, DiskFailed, what `Permit.use` raises, and InUse as `Names.check_hub_folder` does.
        """
        snapshot = snapshot_of(spec, manifest, now)  # before the lock: 100,000 files take half a second
        with self._names.changing():
            if permit:
                elsewhere = self._is_pinned_elsewhere(spec, manifest)
                # From here on `revoke` returns False: the pull that replaces this one publishes after it.
                permit.use(self._names.owner(spec.name), spec, is_pinned_elsewhere=elsewhere)
            return self._publish(snapshot, manifest, self._names.get(spec.name), None)

    def publish_previous(self, rollback: Rollback, manifest: Manifest) -> Snapshot:
        """Publish the snapshot of a rollback that is recorded on disk. The caller holds `Names.changing`.

        Raises as `publish` does.
        """
        snapshot = snapshot_of(rollback.to.spec, manifest, rollback.at)
        return self._publish(snapshot, manifest, rollback.replaced, rollback.rolled_back_from)

    def _publish(
        self,
        snapshot: Snapshot,
        manifest: Manifest,
        replaced: Snapshot | None,
        rolled_back_from: ModelSpec | None,
    ) -> Snapshot:
        snapshot, name = self._views.with_address(self._after_others(snapshot)), snapshot.name
        snapshot = self._views.with_main(snapshot)
        self._names.check_hub_folder(snapshot.spec)
        damaged = self._names.quarantine_of(name)
        self._content.sync(f.blob for f in manifest.files)
        manifest = self._manifests.with_copied(manifest)
        self._manifests.record(manifest, snapshot.hub_folder)
        self._views.show(snapshot, manifest)
        try:
            self._views.point(snapshot)
            self._history.replace(replaced, snapshot, rolled_back_from=rolled_back_from)
            self._watch.cover(manifest, [snapshot.hub_folder])  # before pods may open it
            if rolled_back_from is None:
                self._history.end_rollback(name)  # or a restart would undo this publish
            self._declare(snapshot)
            self._names.end_quarantine(name)
            self._history.end_rollback(name)
        finally:
            for folder in {snapshot.hub_folder} | ({replaced.hub_folder} if replaced else set()):
                self._views.repair_branches(folder)
        log.info("published", name=name, manifest=manifest.id, size_bytes=manifest.size)
        if damaged:
            before = damaged.snapshot.revision if damaged.snapshot.manifest != manifest.id else None
            log.info("repaired", name=name, manifest=manifest.id, revision=manifest.revision, before=before)
        return snapshot

    def _declare(self, snapshot: Snapshot) -> None:
        """Swap the name, then write the ready file. What may need space is staged before either changes."""
        layout, name = self._layout, snapshot.name
        link, ready = layout.staging / f"{name}.link", layout.staging / f"{name}.json"
        document = json.dumps(catalog.ready_document(snapshot), indent=1) + "\n"
        try:
            durable.write_file(ready, document.encode())
            durable.make_link(link, f".trees/{snapshot.manifest}")
        except BaseException:
            for staged in (ready, link):
                durable.remove(staged)
            raise
        try:
            self._names.check()
            # point of no return
            (self._hide if layout.is_shared else durable.remove)(layout.ready_file(name))
            durable.move(link, layout.model(name))
            durable.sync_directory(layout.models)
            durable.move(ready, layout.ready_file(name))
            self._names.declared(snapshot)
            durable.sync_directory(layout.ready)
        except BaseException:
            if not layout.ready_file(name).exists():
                self._names.undeclared(name)  # memory follows the disk, which pods see
            raise

    def _hide(self, ready: Path) -> None:
        """Remove a ready file, durably. Raises OSError if another process has taken this one's staging."""
        if ready.exists():
            durable.move(ready, self._layout.staging / f"{ready.name}.hidden")
            durable.sync_directory(ready.parent)

    def _after_others(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot, published later than all others of its Hub folder even if the clock was set back.

        A Hub branch names the snapshot that was published last.
        """
        others = [s.published_at for s in self._names.in_hub_folder(snapshot.hub_folder)]
        return replace(
            snapshot, published_at=max([snapshot.published_at, *(t + _TICK_SECONDS for t in others)])
        )

    def _is_pinned_elsewhere(self, spec: ModelSpec, manifest: Manifest) -> bool:
        """Whether the name is pinned and has another snapshot, ready or quarantined, or another spec."""
        known = self._names.known(spec.name)
        if known is None or (known.spec, known.manifest) == (spec, manifest.id):
            return False
        return self._pins.has(spec.name)
