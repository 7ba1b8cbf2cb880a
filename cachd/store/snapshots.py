"""Snapshots: published under a name in an order that never lies, withdrawn in the reverse.

    publish   blobs durable -> manifest -> plain tree -> Hub files -> Hub branch -> old ready file removed
              -> name swapped -> ready file
    withdraw  ready file removed -> Hub branch -> name -> Hub files -> plain tree -> blobs -> manifest

A manifest on disk that no ready name uses is a withdrawal to be finished, or a snapshot that a newer one
replaced while pods still read it; `sweep` sees to both.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

import structlog

from cachd.errors import DiskFailed, InUse, NotFound
from cachd.model import File, Manifest, Snapshot, Wish, commit_of, snapshot_of
from cachd.store import catalog, durable
from cachd.store.content import ContentStore
from cachd.store.layout import Layout
from cachd.store.protection import Pins, is_open
from cachd.store.views import HubView, PlainView

log = structlog.get_logger(__name__)


class Snapshots:
    """The published snapshots of one root, by name."""

    def __init__(self, layout: Layout, content: ContentStore) -> None:
        self._layout, self._content = layout, content
        self._plain, self._hub = PlainView(layout, content), HubView(layout, content)
        self._pins = Pins(layout)
        self._changing = threading.Lock()  # one publish or withdraw at a time; readers never take it
        self._named = catalog.read_snapshots(layout)

    # --- reading ---

    def get(self, name: str) -> Snapshot | None:
        return self._named.get(name)

    def all(self) -> list[Snapshot]:
        return sorted(self._named.values(), key=lambda s: s.name)

    def manifest(self, snapshot: Snapshot) -> Manifest:
        """The files of a published snapshot. Raises NotFound when it was withdrawn meanwhile."""
        try:
            return catalog.read_manifest(self._layout, snapshot.manifest)
        except FileNotFoundError as error:
            raise NotFound(f"{snapshot.name} is not here any more") from error

    def is_in_use(self, snapshot: Snapshot) -> bool:
        """Whether a process on this node has one of its files open or mapped."""
        return self._is_open(self.manifest(snapshot))

    def is_pinned(self, name: str) -> bool:
        return self._pins.has(name)

    # --- changing ---

    def pin(self, name: str) -> None:
        """Keep the name until it is unpinned, ready or not yet."""
        self._pins.add(name)

    def unpin(self, name: str) -> None:
        self._pins.remove(name)

    def publish(self, wish: Wish, manifest: Manifest, *, now: float) -> Snapshot:
        """Show a manifest whose blobs are all here, then declare it ready. Raises NoSpace, DiskFailed.

        Publishing again what is published is how an interrupted publish is finished.
        """
        layout, snapshot = self._layout, snapshot_of(wish, manifest, now)
        with self._changing, durable.disk_errors(layout.root):
            replaced = self._named.get(wish.name)
            self._content.sync(f.blob for f in manifest.files)
            self._record(manifest, snapshot.hub_folder)
            self._plain.build(manifest)
            shown = self._shown(snapshot.hub_folder, snapshot.commit) | {f.path: f for f in manifest.files}
            self._hub.build(snapshot.hub_folder, snapshot.commit, shown)
            try:
                branches = _branches(snapshot.hub_folder, self._named.values())
                if snapshot.hub_revision:
                    branches[snapshot.hub_revision] = snapshot.commit
                self._hub.point(snapshot.hub_folder, branches)
                self._declare(snapshot)
            finally:
                for folder in {snapshot.hub_folder} | ({replaced.hub_folder} if replaced else set()):
                    self._mend_branches(folder, self._named.values())
        log.info("published", name=wish.name, manifest=manifest.id, size_bytes=manifest.size)
        return snapshot

    def withdraw(self, name: str, *, force: bool = False) -> int:
        """Take a name and, if it was the last of its snapshot, the snapshot away; bytes freed.

        Raises NotFound, or InUse when it is pinned or open, unless forced. Open files stay readable.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            snapshot = self._named.get(name)
            if snapshot is None:
                raise NotFound(
                    f"no model is named {name!r}", code="no_such_model", mend="cachd ls shows what is here"
                )
            if not force:
                self.check_unused(name)
            durable.remove(self._layout.ready_file(name))
            del self._named[name]
            self._pins.remove(name)
            self._mend_branches(snapshot.hub_folder, self._named.values())
            durable.remove(self._layout.model(name))
            freed = self._remove(snapshot.manifest)
        log.info("withdrawn", name=name, manifest=snapshot.manifest, freed_bytes=freed)
        return freed

    def sweep(self, *, keep: Collection[str] = ()) -> int:
        """Remove the snapshots that have no name and that nobody reads; bytes freed.

        Those of a ref base in `keep` stay: a pull is about to publish one.
        """
        freed = 0
        with self._changing, durable.disk_errors(self._layout.root):
            for path in self._unnamed():
                try:
                    manifest = self._manifest(path.stem)
                    if manifest.base not in keep and not self._is_open(manifest):
                        freed += self._remove(path.stem)
                except DiskFailed as error:
                    log.warning("snapshot not swept", manifest=path.stem, reason=error.detail)
        return freed

    def settle(self) -> None:
        """Remove the names and branches that are not ready: a publish or a withdrawal was cut off there."""
        for link in self._layout.models.iterdir():
            if link.is_symlink() and link.name not in self._named:
                durable.remove(link)
        folders: dict[str, list[Snapshot]] = {f: [] for p in self._unnamed() for f in catalog.read_shown(p)}
        for snapshot in self._named.values():
            folders.setdefault(snapshot.hub_folder, []).append(snapshot)
        for folder, named in folders.items():
            self._mend_branches(folder, named)

    def check_unused(self, name: str) -> None:
        """Raises InUse when the name is pinned, or its files are open and no other name shows them."""
        if self.is_pinned(name):
            raise InUse(f"{name} is pinned", code="pinned", mend=f"cachd unpin {name}, or force")
        snapshot = self._named.get(name)
        if snapshot is None:
            return
        shared = sum(s.manifest == snapshot.manifest for s in self._named.values()) > 1
        if not shared and self._is_open(self.manifest(snapshot)):
            raise InUse(
                f"files of {name} are open in a process on this node",
                mend="stop the pods that serve it, or force: what they have open stays readable",
            )

    # --- inside, under the lock ---

    def _used(self) -> set[str]:
        return {s.manifest for s in self._named.values()}

    def _unnamed(self) -> list[Path]:
        """The recorded manifests that no ready name uses."""
        used = self._used()
        return [p for p in self._layout.manifests.glob("[!.]*.json") if p.stem not in used]

    def _manifest(self, manifest: str) -> Manifest:
        return catalog.read_manifest(self._layout, manifest)

    def _is_open(self, manifest: Manifest) -> bool:
        return is_open(self._content.path(f.blob) for f in manifest.files)

    def _record(self, manifest: Manifest, hub_folder: str) -> None:
        """Keep the manifest, with every folder of the Hub view that ever showed it."""
        path = self._layout.manifest(manifest.id)
        shown = {hub_folder, *catalog.read_shown(path)}
        document = manifest.as_document() | {"shown": sorted(shown)}
        durable.write_file(path, json.dumps(document).encode())

    def _remove(self, manifest: str) -> int:
        """Remove a snapshot from both views and free its blobs, unless a name still uses it."""
        if manifest in self._used():
            return 0
        path = self._layout.manifest(manifest)
        try:
            gone = self._manifest(manifest)
        except DiskFailed as error:
            log.warning("blobs left behind", manifest=manifest, reason=error.detail)
            self._plain.remove(manifest)
            durable.remove(path)
            return 0
        commit = commit_of(gone)
        for folder in catalog.read_shown(path):
            self._hub.narrow(folder, commit, [f.path for f in gone.files], self._shown(folder, commit))
            self._mend_branches(folder, self._named.values())
        self._plain.remove(manifest)
        freed = self._content.free(gone)
        durable.remove(path)
        return freed

    def _shown(self, folder: str, commit: str) -> dict[str, File]:
        """The files that named snapshots show in one directory of the Hub view."""
        sharing = {s.manifest for s in self._named.values() if (s.hub_folder, s.commit) == (folder, commit)}
        return {f.path: f for manifest in sharing for f in self._manifest(manifest).files}

    def _mend_branches(self, folder: str, named: Iterable[Snapshot]) -> None:
        """Let the branches of a folder of the Hub view name what is ready, and no others be there.

        `named`: the ready snapshots, at least those of the folder.
        """
        try:
            self._hub.point(folder, _branches(folder, named))
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room to mend a branch", folder=folder)  # a full disk must open, to be freed

    def _declare(self, snapshot: Snapshot) -> None:
        """The last steps, all that could need room done before the first: the name, then the ready file."""
        layout, name = self._layout, snapshot.name
        link, told = layout.staging / f"{name}.link", layout.staging / f"{name}.json"
        document = json.dumps(catalog.ready_document(snapshot), indent=1) + "\n"
        try:
            durable.write_file(told, document.encode())
            durable.make_link(link, f".trees/{snapshot.manifest}")
        except BaseException:
            for staged in (told, link):
                durable.remove(staged)
            raise
        durable.remove(layout.ready_file(name))
        try:
            durable.move(link, layout.model(name))
            durable.sync_directory(layout.models)
            durable.move(told, layout.ready_file(name))
            durable.sync_directory(layout.ready)
        except BaseException:
            self._named.pop(name, None)  # the disk says so, too: its ready file is gone
            raise
        self._named[name] = snapshot


def _branches(folder: str, named: Iterable[Snapshot]) -> dict[str, str]:
    """The branches and tags of one folder of the Hub view: each names the commit published last."""
    return {
        s.hub_revision: s.commit
        for s in sorted((s for s in named if s.hub_folder == folder), key=lambda s: s.published_at)
        if s.hub_revision
    }
