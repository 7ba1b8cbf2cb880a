"""Publishes and withdraws snapshots in such an order that a ready file never promises a missing file.

    publish     blobs durable -> manifest -> hold file -> plain tree -> Hub files -> address -> Hub branch
                -> old ready file removed -> name swapped -> ready file
    quarantine  quarantine file -> ready file removed -> Hub branch removed -> name removed
                -> damaged blob moved away -> its links in the views removed
    withdraw    removed in this order: ready file, hold file, Hub branch, name, Hub files, address,
                plain tree, blobs, manifest

A recorded manifest that no name uses belongs to a snapshot that a newer one replaced, to one that is kept for
a rollback, or to a withdrawal that a crash interrupted. `sweep` removes it once nothing needs it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import structlog

from cachd.errors import CachdError, DiskFailed, InUse, Leased, NotFound
from cachd.kernel import durable
from cachd.kernel.leases import is_open
from cachd.model import Digest, File, Manifest, ModelSpec, Snapshot, commit_of, snapshot_of
from cachd.policy.eviction import OPENED_SECONDS, opened_lately
from cachd.store import catalog
from cachd.store.addresses import MARK, Addresses
from cachd.store.catalog import Quarantine
from cachd.store.changes import Changes
from cachd.store.content import ContentStore
from cachd.store.holds import Holds
from cachd.store.layout import PUBLIC, Layout
from cachd.store.permit import Permit
from cachd.store.previous import Previous
from cachd.store.protection import InUseBy, Leases, Pins
from cachd.store.scrub import Replaced
from cachd.store.views import HubView, PlainView
from cachd.store.watch import ViewChanges, Watch

log = structlog.get_logger(__name__)

_MOST_EVICTED = 1000  # evicted names to remember; the oldest is forgotten first
_TICK_SECONDS = 1e-6  # the resolution of `published_at` in a ready file
_Check = Callable[[Sequence[Snapshot], Manifest | None], None]  # raises InUse


class Snapshots:
    """The published snapshots of one root, by name."""

    def __init__(
        self,
        layout: Layout,
        content: ContentStore,
        watch: Watch,
        *,
        keep_previous: int = 0,
        keep_opened_seconds: float = OPENED_SECONDS,
    ) -> None:
        self._layout, self._content, self._watch = layout, content, watch
        self.changes = Changes()
        self._evicted: dict[str, None] = {}  # in the order of eviction
        self._keep_opened_seconds = keep_opened_seconds
        self._plain, self._hub = PlainView(layout, content), HubView(layout, content)
        self._pins, self.leases = Pins(layout), Leases(layout)
        self._holds, self._addresses = Holds(layout), Addresses(layout)
        self._changing = threading.Lock()  # one publish or withdrawal at a time; readers never take it
        self.reads = content.reads
        self._named = catalog.read_snapshots(layout)
        self.previous = Previous(layout, keep_previous)
        self._quarantined = catalog.read_quarantined(layout, self._named)
        self._bases: dict[str, str] = {}  # by manifest, for the manifests read so far

    # --- reading ---

    def get(self, name: str) -> Snapshot | None:
        return self._named.get(name)

    def all(self) -> list[Snapshot]:
        return sorted(self._named.values(), key=lambda s: s.name)

    def manifest(self, snapshot: Snapshot) -> Manifest:
        """The files of a published snapshot.

        Raises NotFound if the snapshot was withdrawn meanwhile, DiskFailed if its manifest is unreadable.
        """
        try:
            return catalog.read_manifest(self._layout, snapshot.manifest)
        except FileNotFoundError as error:
            raise NotFound(f"{snapshot.name} was withdrawn and is no longer here") from error

    def is_in_use(self, snapshot: Snapshot) -> bool:
        """Whether a pod holds the snapshot, or a process on this node has one of its files open or mapped."""
        return self.is_open(self.manifest(snapshot))

    def is_pinned(self, name: str) -> bool:
        return self._pins.has(name)

    def ready(self, name: str) -> Snapshot:
        """The snapshot that a name leads to. Raises NotFound if the name is not ready."""
        found = self.get(name)
        if found is None:
            raise NotFound(
                f"no model named {name!r:.120} is ready",
                code="no_such_model",
                hint="cachd ls lists the models",
            )
        return found

    def has(self, name: str) -> bool:
        """Whether the name is ready or quarantined."""
        return name in self._named or name in self._quarantined

    def owner(self, name: str) -> ModelSpec | None:
        """The spec of the ready or quarantined snapshot of a name; None if the name is free."""
        known = self._known(name)
        return known.spec if known else None

    def check_hub_folder(self, spec: ModelSpec) -> None:
        """Raises InUse if pods could not find the spec's model by its folder and branch of the Hub view.

        That is so if the folder shows a model of another source, or has a branch that cannot exist beside the
        spec's own (`main` and `main/x`: a file and a directory).
        """
        for other in self._leading():
            if other.name == spec.name or other.hub_folder != spec.hub_folder:
                continue
            if other.spec.ref.base != spec.ref.base:
                raise InUse(
                    f"hub/{spec.hub_folder} already shows {other.name}, which is {other.spec.ref.base}",
                    code="hub_id_taken",
                    hint="choose another hub_id" if spec.hub_id else f"choose another name than {spec.name}",
                )
            if _exclude_each_other(spec.hub_revision, other.hub_revision):
                raise InUse(
                    f"hub/{spec.hub_folder} has the branch {other.hub_revision} for {other.name}, and cannot"
                    f" have the branch {spec.hub_revision}, too: one is a file where the other is a folder",
                    code="branch_taken",
                    hint=f"delete {other.name} first, or pull a commit: @ and its 40 hex digits",
                )

    def was_evicted(self, name: str) -> bool:
        """Whether the name is absent because it was evicted for space since the daemon started."""
        return name in self._evicted and not self.has(name)

    def forget_eviction(self, name: str) -> None:
        """Stop reporting that a name was evicted for space."""
        if self._evicted.pop(name, "") is None:
            self.changes.mark(name)

    def quarantine(self, name: str) -> Quarantine | None:
        """Why a name waits for its repair; None if it is not quarantined."""
        return self._quarantined.get(name)

    def quarantined(self) -> list[Quarantine]:
        return sorted(self._quarantined.values(), key=lambda each: each.snapshot.name)

    def to_repair(self, spec: ModelSpec) -> Manifest | None:
        """The files that a quarantined spec had, which its repair must bring back.

        None if the spec is not quarantined, or its manifest cannot be read.
        """
        found = self._quarantined.get(spec.name)
        if found is None or found.snapshot.spec != spec:
            return None
        try:
            return self._manifest(found.snapshot.manifest)
        except (FileNotFoundError, DiskFailed):
            return None

    def as_kept(self, manifest: Manifest) -> Manifest:
        """The manifest, with what this node knows of its files: which blob has the content, and its sha256.

        `manifest` is as its source lists it. `File.kept` is set where that blob is not named after the file,
        `File.sha256` where cachd computed it. Recorded manifests of the same base say both. For a file with a
        stated sha256, any blob that was found to hash to it is used, too.
        """
        known: dict[tuple[Digest, int], File] = {}
        for recorded in self._of_base(manifest.base):
            for file in recorded.files:
                if file.kept and self._content.has(file):
                    known[file.stated, file.size] = file
                elif file.sha256:
                    known.setdefault((file.stated, file.size), replace(file, kept=None))

        def annotated(file: File) -> File:
            found = known.get((file.stated, file.size))
            kept, sha256 = (found.kept, found.sha256) if found else (self._content.alike(file), None)
            is_same = (file.kept, file.sha256) == (kept, sha256)
            return file if is_same else replace(file, kept=kept, sha256=sha256)

        files = tuple([annotated(file) for file in manifest.files])
        is_same = all(a is b for a, b in zip(files, manifest.files, strict=True))
        return manifest if is_same else replace(manifest, files=files)

    def owned(self, base: str) -> set[Digest]:
        """The blobs of every recorded snapshot of one base (a ref without its revision)."""
        return {f.blob for manifest in self._of_base(base) for f in manifest.files}

    def _of_base(self, base: str) -> Iterator[Manifest]:
        """The recorded manifests of one base. Unreadable ones are skipped."""
        for path in self._recorded():
            if self._bases.get(path.stem, base) == base:
                with suppress(FileNotFoundError, DiskFailed, Leased):
                    manifest = self._manifest(path.stem)
                    self._bases[path.stem] = manifest.base
                    if manifest.base == base:
                        yield manifest

    def recorded(self) -> Iterator[tuple[Manifest, list[Snapshot]]]:
        """Every recorded snapshot with its ready names; without names if a newer snapshot replaced it.

        Quarantined snapshots are left out: a repair will either restore or remove them.
        """
        damaged = {each.snapshot.manifest for each in self.quarantined()}
        for path in sorted(self._recorded()):
            if path.stem in damaged:
                continue
            try:
                manifest = self._manifest(path.stem)
            except FileNotFoundError:
                continue
            except (DiskFailed, Leased) as error:
                log.warning("unreadable snapshot skipped", manifest=path.stem, reason=error.detail)
                continue
            yield manifest, [s for s in self.all() if s.manifest == manifest.id]

    def is_open(self, manifest: Manifest) -> bool:
        """Whether a pod holds the snapshot, or a process on this node has one of its files open or mapped."""
        return self.in_use_by(manifest) is not None

    def in_use_by(self, manifest: Manifest) -> InUseBy | None:
        """Who uses a snapshot now; None if nobody does."""
        with self.reads.paused():
            if self._holds.is_held(manifest.id):
                return InUseBy.POD
            is_read = is_open([self._content.path(f.blob) for f in manifest.files])
        return InUseBy.PROCESS if is_read else None

    def opened_lately(self, manifest: str) -> str:
        """`opened 40 s ago` if a process opened a file of it within `keep_opened_seconds`, otherwise empty.

        A process that opened one file so lately may be about to open the others.
        """
        now = time.time()
        return opened_lately(self._watch.opened_at(manifest, now), now, within=self._keep_opened_seconds)

    # --- changing ---

    def pin(self, name: str) -> None:
        """Protect the name until it is unpinned. The name need not be ready yet."""
        self._pins.add(name)

    def unpin(self, name: str) -> None:
        self._pins.remove(name)

    def publish(
        self,
        spec: ModelSpec,
        manifest: Manifest,
        *,
        now: float,
        rolled_back_from: ModelSpec | None = None,
        permit: Permit | None = None,
    ) -> Snapshot:
        """Show a manifest in both views, then declare it ready under the spec's name.

        All its blobs must be in the store. Publishing a snapshot again completes an interrupted publish.
        `rolled_back_from`: for a rollback, the spec that the name had until now. `permit`: checked before
        anything changes; None for a rollback.

        Raises NoSpace, DiskFailed, what `Permit.use` raises, and InUse as `check_hub_folder` does.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            if permit:
                elsewhere = self._is_pinned_elsewhere(spec, manifest)
                # From here on `revoke` returns False: the pull that replaces this one publishes after it.
                permit.use(self.owner(spec.name), spec, is_pinned_elsewhere=elsewhere)
            snapshot = self._addresses.chosen(self._after_others(snapshot_of(spec, manifest, now)))
            self.check_hub_folder(spec)
            replaced = self._named.get(spec.name)
            self._content.sync(f.blob for f in manifest.files)
            self._record(manifest, snapshot.hub_folder)
            self._holds.make(manifest.id)
            self._plain.build(manifest)
            shown = self._shown(snapshot.hub_folder, snapshot.commit) | {f.path: f for f in manifest.files}
            self._hub.build(snapshot.hub_folder, snapshot.commit, shown)
            self._addresses.make(snapshot)
            try:
                branches = _branches(snapshot.hub_folder, self._named.values())
                for branch in [b for b in branches if _exclude_each_other(b, snapshot.hub_revision)]:
                    del branches[branch]  # this name's old branch: `check_hub_folder` refuses any other
                if snapshot.hub_revision:
                    branches[snapshot.hub_revision] = snapshot.commit
                self._hub.point(snapshot.hub_folder, branches)
                self.previous.replace(replaced, snapshot, rolled_back_from=rolled_back_from)
                self._watch.cover(manifest, [snapshot.hub_folder])  # before pods may open it
                self._declare(snapshot)
                self._end_quarantine(spec.name)
            finally:
                for folder in {snapshot.hub_folder} | ({replaced.hub_folder} if replaced else set()):
                    self._repair_branches(folder, self._named.values())
        log.info("published", name=spec.name, manifest=manifest.id, size_bytes=manifest.size)
        return snapshot

    def rollback(self, name: str, *, now: float) -> Snapshot:
        """Publish again the snapshot that a name led to before. Nothing is fetched from its source.

        Raises NotFound if no previous snapshot is kept, DiskFailed if some of its blobs are missing, and as
        `publish` does.
        """
        current = self._known(name)
        before = next(iter(self.previous.of(name)), None)
        if current is None or before is None:
            raise NotFound(
                f"no previous snapshot of {name!r} is kept",
                code="no_previous",
                hint="pull the wanted revision; the option keep_previous sets how many snapshots are kept",
            )
        manifest = self.manifest(before)
        with self._content.claim(manifest):
            if missing := self._content.missing(manifest):
                raise DiskFailed(
                    f"{name}: {len(missing)} files of revision {before.revision} are no longer here",
                    code="previous_incomplete",
                    hint="pull that revision: cachd then fetches the missing files",
                )
            published = self.publish(before.spec, manifest, now=now, rolled_back_from=current.spec)
        log.info("rolled back", name=name, revision=before.revision, rolled_back_from=current.revision)
        return published

    def withdraw(self, name: str, *, force: bool = False) -> int:
        """Remove a name, and its snapshot if it has no other name. Returns the bytes freed.

        Snapshots that were kept only for a rollback of the name are removed, too. Raises NotFound if the name
        is unknown and, unless `force`, InUse if it is pinned or leased, or if it is the only name of a
        snapshot that is held or open. Files that a process has open stay readable for it.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            snapshot = self._known(name)
            if snapshot is None:
                raise no_such_model(name)
            check = None if force else self._check_unused
            trashed = self._withdraw([snapshot], check)
            for before in self.previous.forget(name):
                trashed |= self._remove_unused(before)
        return self._content.trash.empty(trashed)

    def evict(self, manifest: str) -> int:
        """Remove a snapshot and all its names. Returns the bytes freed.

        Raises NotFound if the snapshot is gone, InUse if one of its names is pinned or leased, or if it is
        held, open, or was opened lately.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            named = [s for s in self._named.values() if s.manifest == manifest]
            if not named and not self._layout.manifest(manifest).exists():
                raise NotFound(f"snapshot {manifest} is no longer here", code="no_such_snapshot")
            trashed = (
                self._withdraw(named, self._check_unopened, evicted=True) if named else self._drop(manifest)
            )
            for snapshot in named:
                for before in self.previous.forget(snapshot.name):
                    trashed |= self._remove_unused(before)
        return self._content.trash.empty(trashed)

    def withdraw_refused(
        self, is_refused: Callable[[Manifest], bool], *, among: Collection[str] | None = None
    ) -> tuple[list[tuple[Snapshot, Manifest]], set[str]]:
        """Withdraw every name of every refused snapshot, even if pinned, leased or in use.

        Returns the withdrawn names (each as its snapshot and manifest), and the ids of the refused manifests
        whose files stay because somebody uses them. No name, address or rollback leads to those any more.
        Call this again with them as `among` to remove the ones that nobody uses by then. `among`: the
        manifest ids to consider; None considers all.
        """
        withdrawn, trashed, held = [], dict[Path, int](), set[str]()
        with self._changing, durable.disk_errors(self._layout.root):
            for name, manifest in list(self._readable(among)):
                if not is_refused(manifest):
                    continue
                self.previous.drop(name)
                named = [s for s in self._leading() if s.manifest == name]
                for snapshot in named:
                    trashed |= self._withdraw([snapshot], None, remove=lambda _manifest, _names: {})
                withdrawn += [(snapshot, manifest) for snapshot in named]
                self._addresses.remove(name, manifest.revision)
                if self.in_use_by(manifest) or not self._is_taken(name):
                    held.add(name)
                else:
                    trashed |= self._remove(name)
        self._content.trash.empty(trashed)
        return withdrawn, held

    def _withdraw(
        self,
        named: Sequence[Snapshot],
        check: _Check | None,
        *,
        evicted: bool = False,
        remove: Callable[[str, Collection[str]], dict[Path, int]] | None = None,
    ) -> dict[Path, int]:
        """Remove names of one snapshot, and the snapshot if they were its last names.

        `check` is None if the removal is forced. `remove` is called instead of `_remove` at the end.
        Returns the paths now in the trash, each with its bytes. The caller deletes them without the lock.

        The ready files are hidden before anything else. A pod that read one just before has opened the files
        by now, or will fail to open them. So `check` runs a second time, and the ready files are put back if
        it raises. Then the hold file is unlinked under a kernel lease, which proves that no pod holds it.
        """
        manifest = self.manifest(named[0]) if check else None
        if check:
            check(named, manifest)
        moves = [(self._layout.ready_file(s.name), self._layout.staging / f"{s.name}.json") for s in named]
        for ready, hidden in moves:
            with suppress(FileNotFoundError):  # an operator may have deleted it
                durable.move(ready, hidden)
        durable.sync_directory(self._layout.ready)
        try:
            if check:
                check(named, manifest)
                self._take_hold(named)
        except BaseException:
            for ready, hidden in moves:
                with suppress(FileNotFoundError):
                    durable.move(hidden, ready)
            durable.sync_directory(self._layout.ready)
            raise
        # point of no return
        for snapshot, (_, hidden) in zip(named, moves, strict=True):
            durable.remove(hidden)
            if evicted:
                self._note_eviction(snapshot.name)
            self._named.pop(snapshot.name, None)
            self.changes.mark(snapshot.name)
            self._end_quarantine(snapshot.name)
            self._pins.remove(snapshot.name)
            self.leases.release_all(snapshot.name)
            self._repair_branches(snapshot.hub_folder, self._named.values())
            durable.remove(self._layout.model(snapshot.name))
            log.info("withdrawn", name=snapshot.name, manifest=snapshot.manifest)
        return (remove or self._remove)(named[0].manifest, [s.name for s in named])

    def _note_eviction(self, name: str) -> None:
        self._evicted[name] = None
        while len(self._evicted) > _MOST_EVICTED:
            oldest = next(iter(self._evicted))
            del self._evicted[oldest]
            self.changes.mark(oldest)

    def _drop(self, manifest: str) -> dict[Path, int]:
        """Remove a snapshot that has no name. Returns the paths now in the trash, each with its bytes.

        Raises InUse if it is held, open, or was opened lately.
        """
        if by := self.in_use_by(self._manifest(manifest)):
            raise _in_use(f"snapshot {manifest}", by)
        if lately := self.opened_lately(manifest):
            raise InUse(f"a file of snapshot {manifest} was {lately}", code="opened_lately")
        if not self._is_taken(manifest):
            raise _in_use(f"snapshot {manifest}", InUseBy.POD)
        return self._remove(manifest)

    def damaged(self, file: File, wrong: str, inode: int, *, now: float) -> list[str]:
        """Quarantine every name that uses a damaged blob, and move the blob away. Returns the names.

        `wrong`: what is wrong with the blob, for people. `inode`: its inode when the damage was found, 0 if
        the blob was missing. A process that has the file open keeps it. Raises Replaced if the blob has
        another inode by now, if no snapshot uses it, or if it is missing and no ready name uses it.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            using = [(name, m) for name, m in self._readable() if any(f.blob == file.blob for f in m.files)]
            manifests = {name for name, _ in using}
            names = [s.name for s in self._named.values() if s.manifest in manifests]
            if self._content.inode(file.blob) != inode or not using or not (names or inode):
                raise Replaced
            inodes = {file.blob: inode} if inode else {}
            for name in names:
                self._quarantine(name, f"{file.path}: {wrong}", inodes, now)
            for each in self.quarantined():
                if each.snapshot.name not in names and each.snapshot.manifest in manifests:
                    self._record_quarantine(replace(each, inodes={**each.inodes, **inodes}))
            self._content.damaged.keep(file.blob, inode)
            for name, manifest in using:
                paths = [f.path for f in manifest.files if f.blob == file.blob]
                self._plain.hide(name, paths)
                for folder in catalog.read_shown(self._layout.manifest(name)):
                    self._hub.hide(folder, commit_of(manifest), paths)
        return names

    def look(self, name: str, *, now: float) -> str:
        """Check that pods find the files of a ready name in both views; quarantine the name if they do not.

        Returns what is wrong, for people; empty if nothing is. If a view has another file than the blob,
        either of them may be the wrong one, so the blob is treated as damaged.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            snapshot = self._named.get(name)
            if snapshot is None:
                return ""
            inodes: dict[Digest, int] = {}
            try:
                wrong = self._wrong(snapshot, inodes)
            except (FileNotFoundError, DiskFailed) as error:
                wrong = f"its manifest cannot be read: {error}"
            if wrong:
                self._quarantine(name, wrong, inodes, now)
                for blob, inode in inodes.items():
                    self._content.damaged.keep(blob, inode)
            else:
                self._let_hold(snapshot)
            return wrong

    def written(self, changes: ViewChanges) -> list[File]:
        """The files that somebody wrote into, one file for each blob."""
        manifests = {manifest for manifest, _ in changes.written}
        if not manifests and not changes.blobs:
            return []
        found = {
            f.blob: f
            for name, manifest in self._readable()
            if changes.blobs or name in manifests
            for f in manifest.files
            if f.blob in changes.blobs or (name, f.path) in changes.written
        }
        return list(found.values())

    def unnamed(self, *, keep: Collection[str] = ()) -> list[tuple[str, int]]:
        """The snapshots that nothing needs: (manifest id, bytes of the blobs that no other manifest has).

        No name leads to them, none is kept for a rollback, and nobody uses them. Snapshots whose base is in
        `keep` are left out: a running pull may be about to publish one of them.
        """
        unnamed = {path.stem for path in self._unnamed()}
        if not unnamed:
            return []
        manifests = dict(self._readable())
        kept = self.previous.manifests()
        needed = Counter(blob for manifest in manifests.values() for blob in _sizes(manifest))
        return [
            (name, sum(size for blob, size in _sizes(manifest).items() if needed[blob] == 1))
            for name, manifest in manifests.items()
            if name in unnamed - kept and manifest.base not in keep and not self._is_read(manifest)
        ]

    def drop(self, manifest: str) -> int:
        """Remove a snapshot unless a name, a rollback or a process needs it. Returns the bytes freed."""
        with self._changing, durable.disk_errors(self._layout.root):
            trashed = {} if manifest in self.previous.manifests() else self._remove_unused(manifest)
        return self._content.trash.empty(trashed)

    def sweep(self, *, keep: Collection[str] = ()) -> int:
        """Remove the snapshots that `unnamed` lists. Returns the bytes freed."""
        return sum(self.drop(manifest) for manifest, _ in self.unnamed(keep=keep))

    def blobs(self) -> set[Digest]:
        """The blobs of every recorded snapshot, named or not. Raises DiskFailed if one is unreadable."""
        found: set[Digest] = set()
        for path in self._recorded():
            with suppress(FileNotFoundError):  # removed meanwhile
                found.update(_sizes(self._manifest(path.stem)))
        return found

    def settle(self) -> None:
        """At start, remove the names and Hub branches that an interrupted publish or withdrawal left.

        Every recorded snapshot gets its hold file back. Every name, and every snapshot that is kept for a
        rollback, gets its address back.
        """
        for each in self.quarantined():
            durable.remove(self._layout.ready_file(each.snapshot.name))
            self._named.pop(each.snapshot.name, None)
            for blob, inode in each.inodes.items():
                self._content.damaged.keep(blob, inode)
        for link in self._layout.models.iterdir():
            if link.name not in self._named and MARK not in link.name and link.is_symlink():
                durable.remove(link)
        recorded = {path.stem for path in self._recorded()}
        self._holds.settle(recorded)
        self._addresses.settle([*self.previous.all(), *self._leading()], recorded)
        folders: dict[str, list[Snapshot]] = {f: [] for p in self._unnamed() for f in catalog.read_shown(p)}
        folders |= {each.snapshot.hub_folder: [] for each in self.quarantined()}
        for snapshot in self._named.values():
            folders.setdefault(snapshot.hub_folder, []).append(snapshot)
        for folder, named in folders.items():
            self._repair_branches(folder, named)

    def watch_all(self) -> dict[Digest, File]:
        """Watch the views of every recorded snapshot and no other. Returns one file for each of its blobs."""
        self._watch.start()
        files: dict[Digest, File] = {}
        for name, manifest in self._readable():
            self._watch.cover(manifest, catalog.read_shown(self._layout.manifest(name)))
            files |= {f.blob: f for f in manifest.files}
            for file in manifest.files:
                self._content.hashes.read(file)
        self._watch.keep_only({path.stem for path in self._recorded()})
        return files

    def record_hashes(self) -> None:
        """Add newly computed sha256 of blobs to the recorded manifests. Raises NoSpace, DiskFailed."""
        if not (found := self._content.hashes.unrecorded()):
            return
        # If a write below fails, a later publish of the file writes its sha256, or a scrub after a restart of
        # the daemon computes it again.
        self._content.hashes.recorded(found)
        with self._changing, durable.disk_errors(self._layout.root):
            for _, manifest in self._readable():
                if any(f.blob in found and f.sha256 is None for f in manifest.files):
                    self._record(manifest)

    def check_unused(self, name: str) -> None:
        """Raises InUse if the name is pinned or leased, or is the only name of a snapshot that is in use."""
        self._check_kept(name)
        snapshot = self._known(name)
        if snapshot is not None:
            self._check_unused([snapshot], self.manifest(snapshot))

    # --- private; whatever changes something is called with `_changing` held ---

    def _is_pinned_elsewhere(self, spec: ModelSpec, manifest: Manifest) -> bool:
        """Whether the name is pinned and has another snapshot, ready or quarantined, or another spec."""
        known = self._known(spec.name)
        if known is None or (known.spec, known.manifest) == (spec, manifest.id):
            return False
        return self.is_pinned(spec.name)

    def _after_others(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot, published later than all others of its Hub folder even if the clock was set back.

        A Hub branch names the snapshot that was published last.
        """
        others = [s.published_at for s in self._named.values() if s.hub_folder == snapshot.hub_folder]
        return replace(
            snapshot, published_at=max([snapshot.published_at, *(t + _TICK_SECONDS for t in others)])
        )

    def _check_kept(self, name: str) -> None:
        """Raises InUse if the name is pinned or leased."""
        if self.is_pinned(name):
            raise InUse(f"{name} is pinned", code="pinned", hint=f"run cachd unpin {name}, or use force")
        if held := self.leases.of(name, time.time()):
            raise InUse(
                f"{name} is leased by {held[-1].holder or 'an unnamed holder'} (leases: {len(held)})",
                code="leased",
                hint="wait until the leases are released or expire, or use force",
            )

    def _check_unused(self, named: Sequence[Snapshot], manifest: Manifest | None) -> None:
        """Raises InUse if one of these names of a snapshot is pinned or leased, or if the snapshot is in use
        and has no other name."""
        for snapshot in named:
            self._check_kept(snapshot.name)
        if manifest is not None and not self._has_others(named) and (by := self.in_use_by(manifest)):
            raise _in_use(named[0].name, by)

    def _has_others(self, named: Sequence[Snapshot]) -> bool:
        """Whether the snapshot of these names has other names, ready or quarantined."""
        names = {snapshot.name for snapshot in named}
        return any(s.manifest == named[0].manifest and s.name not in names for s in self._leading())

    def _take_hold(self, named: Sequence[Snapshot]) -> None:
        """Unlink the hold file if these are all the names of the snapshot. Raises InUse if a pod holds it."""
        if not self._has_others(named) and not self._is_taken(named[0].manifest):
            raise _in_use(named[0].name, InUseBy.POD)

    def _is_taken(self, manifest: str) -> bool:
        """Unlink the hold file, so that no pod can hold the snapshot any more; False if one holds it now."""
        with self.reads.paused():
            return self._holds.take(manifest)

    def _check_unopened(self, named: Sequence[Snapshot], manifest: Manifest | None) -> None:
        """As `_check_unused`; raises InUse also if a process opened one of the files lately.

        A starting engine opens its files one after another, and may have none open in between.
        """
        self._check_unused(named, manifest)
        if lately := self.opened_lately(named[0].manifest):
            raise InUse(f"a file of {named[0].name} was {lately}", code="opened_lately")

    def _used(self) -> set[str]:
        """The manifest ids of all names, ready or quarantined."""
        return {snapshot.manifest for snapshot in self._leading()}

    def _leading(self) -> list[Snapshot]:
        """The snapshots of all names, ready or quarantined."""
        return [*(each.snapshot for each in self._quarantined.values()), *self._named.values()]

    def _let_hold(self, snapshot: Snapshot) -> None:
        """Restore the hold file and the address of a ready snapshot if somebody deleted them."""
        try:
            self._holds.make(snapshot.manifest)
            self._addresses.make(snapshot)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("disk full: hold file or address not restored", name=snapshot.name)

    def _known(self, name: str) -> Snapshot | None:
        quarantined = self._quarantined.get(name)
        return self._named.get(name) or (quarantined.snapshot if quarantined else None)

    def _quarantine(self, name: str, reason: str, inodes: Mapping[Digest, int], now: float) -> None:
        """Make a name not ready until it is published again. Its snapshot stays."""
        snapshot = self._named[name]
        self._record_quarantine(Quarantine(snapshot, now, reason, inodes))
        durable.remove(self._layout.ready_file(name))
        del self._named[name]
        self.changes.mark(name)
        self._repair_branches(snapshot.hub_folder, self._named.values())
        durable.remove(self._layout.model(name))
        log.warning("readiness withdrawn", name=name, manifest=snapshot.manifest, reason=reason)

    def _record_quarantine(self, quarantine: Quarantine) -> None:
        name = quarantine.snapshot.name
        document = json.dumps(quarantine.as_document(), indent=1)
        try:
            durable.write_file(self._layout.quarantine_file(name), document.encode())
        except OSError as error:
            # On a full disk the name stops being ready all the same, but a restart forgets the quarantine.
            if error.errno not in durable.FULL:
                raise
        self._quarantined[name] = quarantine

    def _end_quarantine(self, name: str) -> None:
        if self._quarantined.pop(name, None) is not None:
            durable.remove(self._layout.quarantine_file(name))

    def _wrong(self, snapshot: Snapshot, inodes: dict[Digest, int]) -> str:
        """How the views differ from what `publish` left, if at all. Adds doubtful blobs to `inodes`."""
        layout, manifest = self._layout, self._manifest(snapshot.manifest)
        files = {f.path: f for f in manifest.files}
        try:
            self._repair_views(snapshot)
        except (OSError, CachdError) as error:  # such as a full or a read-only disk
            log.warning("views not repaired", name=snapshot.name, reason=str(error))
        link = layout.model(snapshot.name)
        if not (link.is_symlink() and str(link.readlink()) == f".trees/{manifest.id}"):
            return f"models/{snapshot.name} is not a link to its snapshot"
        if not durable.is_regular(layout.ready_file(snapshot.name)):
            return f"ready/{snapshot.name}.json is gone"
        with suppress(Leased):  # unreadable for now; the next check reads it
            if not catalog.is_ready_file_of(layout.ready_file(snapshot.name), snapshot):
                return f"ready/{snapshot.name}.json was changed"
        places = {
            f"models/{snapshot.name}": self._plain.wrong(manifest),
            f"hub/{snapshot.hub_folder}": self._hub.wrong(snapshot.hub_folder, snapshot.commit, files),
        }
        reasons = []
        for place, wrong in places.items():
            for path, is_other in wrong.items():
                inode = self._content.inode(files[path].blob)
                if is_other and inode:
                    inodes[files[path].blob] = inode
                reasons.append(f"{place}/{path} is {'another file' if is_other else 'gone'}")
        return f"{len(reasons)} wrong files; the first: {reasons[0]}" if reasons else ""

    def _repair_views(self, snapshot: Snapshot) -> None:
        """Repair what needs no blob: directories, modes, the Hub view's branches and lists of files."""
        for name in PUBLIC:
            durable.keep_directory(self._layout.root / name, 0o755)
        durable.keep_mode(str(self._layout.ready_file(snapshot.name)), 0o644)
        folder, commit = snapshot.hub_folder, snapshot.commit
        self._repair_branches(folder, self._named.values())
        self._hub.repair(folder, commit, self._shown(folder, commit))

    def _recorded(self) -> list[Path]:
        return list(self._layout.manifests.glob("[!.]*.json"))

    def _unnamed(self) -> list[Path]:
        """The recorded manifests that no name uses, neither a ready nor a quarantined one."""
        used = self._used()
        return [p for p in self._recorded() if p.stem not in used]

    def _readable(self, among: Collection[str] | None = None) -> Iterator[tuple[str, Manifest]]:
        """The recorded manifests that can be read, each with its id. None: among all."""
        for path in self._recorded():
            if among is not None and path.stem not in among:
                continue
            try:
                yield path.stem, self._manifest(path.stem)
            except FileNotFoundError:  # removed meanwhile
                continue
            except (DiskFailed, Leased) as error:
                log.warning("unreadable snapshot skipped", manifest=path.stem, reason=error.detail)

    def _manifest(self, manifest: str) -> Manifest:
        return catalog.read_manifest(self._layout, manifest)

    def _is_read(self, manifest: Manifest) -> bool:
        """Whether a snapshot is in use, or one of its files was opened lately."""
        return bool(self.opened_lately(manifest.id)) or self.is_open(manifest)

    def _record(self, manifest: Manifest, *folders: str) -> None:
        """Write the manifest to disk, with every folder of the Hub view that ever showed it."""
        path = self._layout.manifest(manifest.id)
        shown = {*folders, *catalog.read_shown(path)}
        hashes = {f.path: sha256 for f in manifest.files if (sha256 := self._content.hashes.of(f))}
        document = manifest.as_document(hashes) | {"shown": sorted(shown)}
        durable.write_file(path, json.dumps(document).encode())
        self._content.hashes.recorded({f.blob for f in manifest.files})

    def _remove_unused(self, manifest: str) -> dict[Path, int]:
        """As `_drop`, but does nothing if a name leads to the snapshot, if it is in use, or if it is gone."""
        if manifest in self._used():
            return {}
        try:
            return self._drop(manifest)
        except (FileNotFoundError, InUse):
            return {}

    def _remove(self, manifest: str, names: Collection[str] = ()) -> dict[Path, int]:
        """Remove a snapshot from both views and move its blobs to the trash, unless a name still uses it.

        Partial downloads of the same blobs by pulls of `names` go to the trash, too. Returns the paths now in
        the trash, each with its bytes.
        """
        if manifest in self._used():
            return {}
        path = self._layout.manifest(manifest)
        self._bases.pop(manifest, None)
        self._holds.remove(manifest)
        try:
            gone = self._manifest(manifest)
        except DiskFailed as error:
            log.warning("manifest unreadable: blobs not removed", manifest=manifest, reason=error.detail)
            self._addresses.remove(manifest)
            self._plain.remove(manifest)
            durable.remove(path)
            return {}
        commit = commit_of(gone)
        self._watch.leave(manifest)
        for folder in catalog.read_shown(path):
            left = self._shown(folder, commit) | self._shown_unnamed(folder, commit, but=manifest)
            self._hub.narrow(folder, commit, [f.path for f in gone.files], left)
            self._repair_branches(folder, self._named.values())
        self._addresses.remove(manifest, gone.revision)
        self._plain.remove(manifest)
        trashed = self._content.removal.discard(gone, names)
        durable.remove(path)
        return trashed

    def _shown(self, folder: str, commit: str) -> dict[str, File]:
        """The files that ready snapshots show in the directory of one commit in the Hub view, by path."""
        sharing = {s.manifest for s in self._named.values() if (s.hub_folder, s.commit) == (folder, commit)}
        return {f.path: f for manifest in sharing for f in self._manifest(manifest).files}

    def _shown_unnamed(self, folder: str, commit: str, *, but: str) -> dict[str, File]:
        """The files that snapshots without a name show in the same directory, but for the manifest `but`.

        Such snapshots are in use, or kept for a rollback. One without a plain tree is being removed.
        """
        found: dict[str, File] = {}
        for path in self._unnamed():
            if (
                path.stem != but
                and folder in catalog.read_shown(path)
                and self._layout.tree(path.stem).exists()
            ):
                with suppress(FileNotFoundError, DiskFailed):
                    manifest = self._manifest(path.stem)
                    found |= {f.path: f for f in manifest.files if commit_of(manifest) == commit}
        return found

    def _repair_branches(self, folder: str, named: Iterable[Snapshot]) -> None:
        """Make the branches of a folder of the Hub view name exactly its ready snapshots.

        `named`: ready snapshots, at least those of the folder.
        """
        try:
            self._hub.point(folder, _branches(folder, named))
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            # The store must open on a full disk too: only then can it free space.
            log.warning("disk full: Hub branch not repaired", folder=folder)

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
            durable.remove(layout.ready_file(name))
            durable.move(link, layout.model(name))
            durable.sync_directory(layout.models)
            durable.move(ready, layout.ready_file(name))
            self._named[name] = snapshot
            self._evicted.pop(name, None)
            durable.sync_directory(layout.ready)
        except BaseException:
            if not layout.ready_file(name).exists():
                self._named.pop(name, None)  # memory follows the disk, which pods see
            raise
        finally:
            self.changes.mark(name)


def _in_use(what: str, by: InUseBy) -> InUse:
    return InUse(
        f"{what} is {by}",
        hint="stop the pods that use it, or use force: files that they have open stay readable",
    )


def no_such_model(name: str) -> NotFound:
    return NotFound(f"no model is named {name!r}", code="no_such_model", hint="cachd ls lists the models")


def _branches(folder: str, named: Iterable[Snapshot]) -> dict[str, str]:
    """The branches and tags of one folder of the Hub view: each names the commit published last."""
    return {
        s.hub_revision: s.commit
        for s in sorted((s for s in named if s.hub_folder == folder), key=lambda s: s.published_at)
        if s.hub_revision
    }


def _exclude_each_other(branch: str | None, other: str | None) -> bool:
    """Whether one branch needs a directory where the other is a file, such as `main/x` and `main`."""
    if not branch or not other:
        return False
    return branch.startswith(f"{other}/") or other.startswith(f"{branch}/")


def _sizes(manifest: Manifest) -> dict[Digest, int]:
    """Bytes of each blob of a manifest."""
    return {f.blob: f.size for f in manifest.files}
