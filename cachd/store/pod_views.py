"""Builds and removes what pods see of a snapshot, except its name and its ready file.

    show    builds the hold file -> plain tree -> Hub files -> address
    point   sets the branches and tags of the Hub view, right before the snapshot is declared ready
    repair  restores what needs no blob: directories, modes, branches, lists of files
    hide    removes the links to a damaged blob, and nothing else
    remove  removes the hold file -> Hub files -> branches -> address -> plain tree

Every step may run again: it completes what a crash interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog

from cachd.errors import DiskFailed
from cachd.kernel import durable
from cachd.model import Digest, File, Manifest, Snapshot, commit_of
from cachd.store.addresses import MARK, Addresses
from cachd.store.holds import Holds
from cachd.store.index import Index
from cachd.store.layout import PUBLIC
from cachd.store.names import exclude_each_other
from cachd.store.views import HubView, PlainView, Shown, placed

log = structlog.get_logger(__name__)


class PodViews:
    """The views, hold files and addresses of one root. The caller holds `Names.changing`.

    Every method may raise OSError.
    """

    def __init__(self, index: Index, holds: Holds) -> None:
        self._layout, self._copies = index.layout, index.copies
        self._names, self._manifests, self._holds = index.names, index.manifests, holds
        self._plain = PlainView(index.layout, index.content, index.copies)
        self._hub = HubView(index.layout, index.content, index.copies)
        self._addresses = Addresses(index.layout)

    # --- building ---

    def with_address(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with the first of its possible addresses that is free."""
        return self._addresses.chosen(snapshot)

    def with_main(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot, with `is_main` as it will be when the snapshot is published."""
        is_main = snapshot.hub_revision is None
        is_main = is_main and self._next_branches(snapshot).get("main") == snapshot.commit
        return replace(snapshot, is_main=is_main)

    def show(self, snapshot: Snapshot, manifest: Manifest) -> None:
        """Make everything that leads to the files of a snapshot, but its branch and its name."""
        folder, commit = snapshot.hub_folder, snapshot.commit
        self._holds.make(manifest.id)
        self._copies.record(manifest, folder)
        self._plain.build(manifest)
        self._hub.build(folder, commit, _shown([*self._sharing(folder, commit), manifest]))
        if snapshot.hub_alias:
            self._hub.alias(snapshot.hub_alias, snapshot.hub_folder)
        self._addresses.make(snapshot)

    def point(self, snapshot: Snapshot) -> None:
        """Make its branch in the Hub view name its commit. Remove a branch that cannot exist beside it."""
        next_branches = self._next_branches(snapshot)
        branches = _branches(self._names.in_hub_folder(snapshot.hub_folder))
        for branch in [b for b in branches for other in next_branches if exclude_each_other(b, other)]:
            branches.pop(branch, None)  # this name's old branch: `Names.check_hub_folder` refuses any other
        self._hub.point(snapshot.hub_folder, branches | next_branches)

    def repair_branches(self, folder: str) -> None:
        """Make the branches of a folder of the Hub view name exactly its ready snapshots.

        Does nothing on a full disk: the store must open there too, because only then can it free space.
        Raises InUse if this process may no longer write to the root.
        """
        self._names.check()
        self._repair_branches(folder, self._names.in_hub_folder(folder))

    def _repair_branches(self, folder: str, named: Iterable[Snapshot]) -> None:
        try:
            self._hub.point(folder, _with_main(named, self._hub.main(folder)))
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("disk full: Hub branch not repaired", folder=folder)

    # --- checking ---

    def repair(self, snapshot: Snapshot) -> None:
        """Repair what needs no blob: directories, modes, the Hub view's branches and lists of files."""
        for name in PUBLIC:
            durable.keep_directory(self._layout.root / name, 0o755)
        durable.keep_mode(str(self._layout.ready_file(snapshot.name)), 0o644)
        folder, commit = snapshot.hub_folder, snapshot.commit
        self.repair_branches(folder)
        self._hub.repair(folder, commit, _shown(self._sharing(folder, commit)))

    def repair_hold(self, snapshot: Snapshot) -> None:
        """Restore the hold file and the address of a ready snapshot if somebody deleted them."""
        try:
            self._holds.make(snapshot.manifest)
            self._addresses.make(snapshot)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("disk full: hold file or address not restored", name=snapshot.name)

    def wrong(self, snapshot: Snapshot, manifest: Manifest) -> list[tuple[str, File, bool]]:
        """The files that pods do not find: (place below the root, file, whether another file is there)."""
        name, folder = snapshot.name, snapshot.hub_folder
        views = (
            (f"models/{name}", placed(manifest), self._plain.wrong(manifest)),
            (f"hub/{folder}", {f.path: f for f in manifest.files}, self._hub.wrong(folder, manifest)),
        )
        return [
            (f"{place}/{path}", files[path], is_other)
            for place, files, wrong in views
            for path, is_other in wrong.items()
        ]

    # --- removing ---

    def hide(self, blob: Digest, using: Iterable[tuple[str, Manifest]]) -> None:
        """Remove the links to a damaged blob from the views of these snapshots. `show` brings them back."""
        for each, manifest in using:
            paths = [f.path for f in manifest.files if f.blob == blob]
            self._copies.forget_blob(each, blob)
            self._plain.hide(each, map(manifest.place_of, paths))
            for folder in self._manifests.shown_in(each):
                self._hub.hide(folder, commit_of(manifest), paths)

    def close_addresses(self, manifest: str, revision: str) -> None:
        """Let no address lead to a snapshot any more. Whoever has its files open keeps them."""
        self._addresses.remove(manifest, revision)

    def discard_copies(self, manifest: str) -> dict[Path, int]:
        """Before `remove`: move the copies of a snapshot to the trash, which is quick for any size.

        Another snapshot of the same commit that shows such a file gets a link to its blob. Returns the paths
        now in the trash, each with its bytes.
        """
        if self._copies.of(manifest):
            with suppress(FileNotFoundError, DiskFailed):
                self._link_what_others_show(self._manifests.read(manifest))
        return self._copies.discard(manifest)

    def remove(self, manifest: str) -> Manifest | None:
        """Remove everything that shows a snapshot without a name. Returns its manifest.

        None if the manifest is unreadable: then the Hub view and the blobs stay.
        """
        self._holds.remove(manifest)
        try:
            gone = self._manifests.read(manifest)
        except DiskFailed as error:
            log.warning("manifest unreadable: blobs not removed", manifest=manifest, reason=error.detail)
            self._addresses.remove(manifest)
            self._plain.remove(manifest)
            return None
        commit = commit_of(gone)
        for folder in self._manifests.shown_in(manifest):
            left = self._shown_without(gone, folder, commit).files
            self._hub.narrow(folder, commit, [f.path for f in gone.files], left)
            self.repair_branches(folder)
        self._addresses.remove(manifest, gone.revision)
        self._plain.remove(manifest)
        return gone

    # --- at start ---

    def settle(self, kept: Iterable[Snapshot]) -> None:
        """Remove the names and Hub branches that an interrupted publish or withdrawal left.

        Every recorded snapshot gets its hold file back. `kept` ones and those with a name get their address.
        """
        for link in self._layout.models.iterdir():
            if not self._names.get(link.name) and MARK not in link.name and link.is_symlink():
                durable.remove(link)
        recorded = set(self._manifests.ids())
        self._holds.settle(recorded)
        self._copies.settle(recorded)
        self._addresses.settle([*kept, *self._names.all_known()], recorded)
        folders: dict[str, list[Snapshot]] = {
            folder: [] for each in self._manifests.unnamed() for folder in self._manifests.shown_in(each)
        }
        folders |= {each.snapshot.hub_folder: [] for each in self._names.quarantined()}
        for snapshot in self._names.all():
            folders.setdefault(snapshot.hub_folder, []).append(snapshot)
        for folder, named in folders.items():
            self._repair_branches(folder, named)

    # --- private ---

    def _link_what_others_show(self, gone: Manifest) -> None:
        """Replace copies of a snapshot that goes by links where another snapshot shows the file."""
        commit = commit_of(gone)
        for folder in self._manifests.shown_in(gone.id):
            left = self._shown_without(gone, folder, commit)
            linked = {p: left.files[p] for p in gone.copied if p in left.files and p not in left.copied}
            self._hub.show_links(folder, commit, linked)

    def _shown_without(self, gone: Manifest, folder: str, commit: str) -> Shown:
        """The content of a commit's directory without a snapshot that has no name and goes."""
        left = _shown(self._sharing(folder, commit))
        return replace(left, files={**left.files, **self._shown_unnamed(folder, commit, but=gone.id)})

    def _next_branches(self, snapshot: Snapshot) -> dict[str, str]:
        """The branches of its folder once this snapshot is ready under its name."""
        named = self._names.in_hub_folder(snapshot.hub_folder)
        after = [*(s for s in named if s.name != snapshot.name), snapshot]
        return _with_main(after, self._hub.main(snapshot.hub_folder))

    def _sharing(self, folder: str, commit: str) -> list[Manifest]:
        """The manifests of the ready snapshots that share the directory of one commit in the Hub view."""
        sharing = {s.manifest for s in self._names.in_hub_folder(folder) if s.commit == commit}
        return [self._manifests.read(manifest) for manifest in sharing]

    def _shown_unnamed(self, folder: str, commit: str, *, but: str) -> dict[str, File]:
        """The files that snapshots without a name show in the same directory, but for the manifest `but`.

        Such snapshots are in use, or kept for a rollback. One without a plain tree is being removed.
        """
        found: dict[str, File] = {}
        for each in self._manifests.unnamed():
            is_shown = each != but and folder in self._manifests.shown_in(each)
            if is_shown and self._layout.tree(each).exists():
                with suppress(FileNotFoundError, DiskFailed):
                    manifest = self._manifests.read(each)
                    found |= {f.path: f for f in manifest.files if commit_of(manifest) == commit}
        return found


def _shown(sharing: Iterable[Manifest]) -> Shown:
    """The content of the directory of one commit.

    The last of `sharing` wins. A file that patterns left out is in neither, unless another snapshot has it.
    """
    files: dict[str, File] = {}
    absent: set[str] = set()
    copied: set[str] = set()
    for manifest in sharing:
        files |= {f.path: f for f in manifest.files}
        absent |= set(manifest.absent)
        copied |= set(manifest.copied)
    return Shown(files, copied, absent - files.keys())


def _branches(named: Iterable[Snapshot]) -> dict[str, str]:
    """The branches and tags of the ready snapshots of one folder: each names the commit published last."""
    newest_last = sorted(named, key=lambda s: s.published_at)
    return {s.hub_revision: s.commit for s in newest_last if s.hub_revision}


def _with_main(named: Iterable[Snapshot], main: str | None) -> dict[str, str]:
    """As `_branches`, with a branch `main` for clients that ask for no revision.

    If nothing was pulled from `main`, it names a snapshot that was pulled by its commit: the one that it
    names now (`main`), as long as that is ready, or else the one published last.
    """
    named = list(named)
    branches = _branches(named)
    pinned = [s for s in named if s.hub_revision is None]
    if not pinned or "main" in branches or any(exclude_each_other(b, "main") for b in branches):
        return branches
    newest = max(pinned, key=lambda s: s.published_at).commit
    return branches | {"main": main if main in {s.commit for s in pinned} else newest}
