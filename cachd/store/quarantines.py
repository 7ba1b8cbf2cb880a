"""Withdraws the readiness of models with damaged files until they are repaired.

    quarantine file -> [point of no return] ready file removed -> Hub branch removed -> name removed
        -> damaged blob moved away -> its links in the views removed

The quarantine file comes first, so a restart never forgets a repair that is due. While it exists, the name is
not ready, even if a crash left the ready file. A repair is a pull that publishes the same files again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace

import structlog

from cachd import files
from cachd.errors import CachdError, DiskFailed, Leased
from cachd.kernel import durable
from cachd.model import Digest, File, Manifest, ModelSpec, Snapshot
from cachd.store import catalog
from cachd.store.catalog import Quarantine
from cachd.store.content.blobs import inode_of
from cachd.store.index import Index
from cachd.store.pod_views import PodViews
from cachd.store.scrub import Replaced

log = structlog.get_logger(__name__)


class Quarantines:
    """Finds damage in the published snapshots of one root, and quarantines their names."""

    def __init__(self, index: Index, views: PodViews) -> None:
        self._layout, self._content, self._copies = index.layout, index.content, index.copies
        self._names, self._manifests, self._views = index.names, index.manifests, views

    def to_repair(self, spec: ModelSpec) -> Manifest | None:
        """The files that a quarantined spec had, which its repair must bring back.

        None if the spec is not quarantined, or its manifest cannot be read.
        """
        found = self._names.quarantine_of(spec.name)
        if found is None or found.snapshot.spec != spec:
            return None
        try:
            return self._manifests.read(found.snapshot.manifest)
        except (FileNotFoundError, DiskFailed):
            return None

    def quarantine(self, file: File, wrong: str, inode: int, *, now: float) -> list[str]:
        """Quarantine every name that uses a damaged blob, and move the blob away. Returns the names.

        `wrong`: what is wrong with the blob, for people. `inode`: its inode when the damage was found, 0 if
        the blob was missing. A process that has the file open keeps it. Raises Replaced if the blob has
        another inode by now, if no snapshot uses it, or if it is missing and no ready name uses it.
        May raise DiskFailed.
        """
        with self._names.changing():
            using = [
                (each, m)
                for each, m in self._manifests.readable()
                if any(f.blob == file.blob for f in m.files)
            ]
            manifests = {each for each, _ in using}
            names = [s.name for s in self._names.all() if s.manifest in manifests]
            if self._content.inode(file.blob) != inode or not using or not (names or inode):
                raise Replaced
            inodes = {file.blob: inode} if inode else {}
            for name in names:
                self._quarantine(name, f"{file.path}: {wrong}", inodes, now)
            for each in self._names.quarantined():
                if each.snapshot.name not in names and each.snapshot.manifest in manifests:
                    self._names.record_quarantine(replace(each, inodes={**each.inodes, **inodes}))
            self._content.damaged.keep(file.blob, inode)
            self._views.hide(file.blob, using)
        return names

    def quarantine_copy(self, file: File, place: str, wrong: str, inode: int, *, now: float) -> list[str]:
        """Quarantine every name that shows copies of an intact blob of which one, at `place`, is damaged.

        Removes all copies of the blob from the views; the repair makes new ones. Returns the names. Raises
        Replaced if another inode than the damaged one, `inode`, is there by now.
        """
        with self._names.changing():
            if inode_of(place) != inode:
                raise Replaced
            using = [
                (each, m)
                for each, m in self._manifests.readable()
                if any(f.blob == file.blob and f.path in m.copied for f in m.files)
            ]
            manifests = {each for each, _ in using}
            names = [s.name for s in self._names.all() if s.manifest in manifests]
            self._copies.distrust(place)  # first: a crash may come before `hide`
            for name in names:
                self._quarantine(name, f"a copy of {file.path}: {wrong}", {}, now)
            self._views.hide(file.blob, using)
        return names

    def check(self, name: str, *, now: float) -> str | None:
        """Check that pods find the files of a ready name in both views; quarantine the name if they do not.

        Returns what is wrong, for people; None if nothing is. If a view has another file than the blob,
        either of them may be the wrong one, so the blob is treated as damaged. Raises DiskFailed.
        """
        with self._names.changing():
            snapshot = self._names.get(name)
            if snapshot is None:
                return None
            inodes: dict[Digest, int] = {}
            wrong: str | None
            try:
                wrong = self._wrong(snapshot, inodes)
            except (FileNotFoundError, DiskFailed) as error:
                wrong = f"its manifest cannot be read: {error}"
            if wrong:
                self._quarantine(name, wrong, inodes, now)
                for blob, inode in inodes.items():
                    self._content.damaged.keep(blob, inode)
            else:
                self._views.repair_hold(snapshot)
            return wrong

    def settle(self) -> None:
        """At start, make sure that quarantined names are not ready and that their bad blobs are away."""
        for each in self._names.quarantined():
            durable.remove(self._layout.ready_file(each.snapshot.name))
            self._names.undeclared(each.snapshot.name)
            for blob, inode in each.inodes.items():
                self._content.damaged.keep(blob, inode)

    # --- private ---

    def _quarantine(self, name: str, reason: str, inodes: Mapping[Digest, int], now: float) -> None:
        """Make a name not ready until it is published again. Its snapshot stays."""
        snapshot = self._names.ready(name)
        self._names.record_quarantine(Quarantine(snapshot, now, reason, inodes))
        # point of no return
        durable.remove(self._layout.ready_file(name))
        self._names.undeclared(name)
        self._views.repair_branches(snapshot.hub_folder)
        durable.remove(self._layout.model(name))
        log.warning(
            "readiness withdrawn",
            name=name,
            manifest=snapshot.manifest,
            revision=snapshot.revision,
            reason=reason,
        )

    def _wrong(self, snapshot: Snapshot, inodes: dict[Digest, int]) -> str | None:
        """How the views differ from what `publish` left; None if they do not.

        Adds doubtful blobs to `inodes`.
        """
        manifest = self._manifests.read(snapshot.manifest)
        try:
            self._views.repair(snapshot)
        except (OSError, CachdError) as error:  # such as a full or a read-only disk
            log.warning("views not repaired", name=snapshot.name, reason=str(error))
        if wrong := self._wrong_name(snapshot, manifest):
            return wrong
        reasons = []
        for place, file, is_other in self._views.wrong(snapshot, manifest):
            inode = self._content.inode(file.blob)
            if is_other and inode and file.path not in manifest.copied:  # a copy says nothing of the blob
                inodes[file.blob] = inode
            reasons.append(f"{place} is {'another file' if is_other else 'gone'}")
        if len(reasons) < 2:
            return reasons[0] if reasons else None
        return f"{len(reasons)} wrong files; the first: {reasons[0]}"

    def _wrong_name(self, snapshot: Snapshot, manifest: Manifest) -> str | None:
        """How the link of the name or its ready file differ from what `publish` left; None if they do not."""
        layout, name = self._layout, snapshot.name
        link = layout.model(name)
        if not (link.is_symlink() and str(link.readlink()) == f".trees/{manifest.id}"):
            return f"models/{name} is not a link to its snapshot"
        if not files.is_regular(layout.ready_file(name)):
            return f"ready/{name}.json is gone"
        with suppress(Leased):  # unreadable for now; the next check reads it
            if not catalog.is_ready_file_of(layout.ready_file(name), snapshot):
                return f"ready/{name}.json was changed"
        return None
