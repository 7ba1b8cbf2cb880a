"""Snapshots: published under a name in an order that never lies, withdrawn in the reverse.

    publish   blobs durable -> manifest -> hold file -> plain tree -> Hub files -> address -> Hub branch
              -> old ready file removed -> name swapped -> ready file
    suspend   quarantine -> ready file removed -> Hub branch -> name -> damaged blob -> its files in the views
    withdraw  ready file removed -> hold file -> Hub branch -> name -> Hub files -> address -> plain tree
              -> blobs -> manifest

A manifest on disk that no ready name uses is a withdrawal to be finished, or a snapshot that a newer one
replaced while pods still read it; `sweep` sees to both.
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
from cachd.model import Digest, File, Manifest, ModelSpec, Snapshot, commit_of, snapshot_of
from cachd.policy.eviction import OPENED_SECONDS, opened_lately
from cachd.store import catalog, durable
from cachd.store.addresses import MARK, Addresses
from cachd.store.catalog import Quarantine
from cachd.store.changes import Changes
from cachd.store.content import ContentStore
from cachd.store.holds import Holds
from cachd.store.layout import PUBLIC, Layout
from cachd.store.permit import Permit
from cachd.store.previous import Previous
from cachd.store.protection import InUseBy, Leases, Pins, is_open
from cachd.store.scrub import Moved
from cachd.store.views import HubView, PlainView
from cachd.store.watch import ViewChanges, Watch

log = structlog.get_logger(__name__)

_MOST_EVICTED = 1000  # names that are still told of, the oldest forgotten first
_TICK_SECONDS = 1e-6  # as fine as a ready file tells time
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
        self._evicted: dict[str, None] = {}  # the last stands last
        self._keep_opened_seconds = keep_opened_seconds
        self._plain, self._hub = PlainView(layout, content), HubView(layout, content)
        self._pins, self.leases = Pins(layout), Leases(layout)
        self._holds, self._addresses = Holds(layout), Addresses(layout)
        self._changing = threading.Lock()  # one publish or withdraw at a time; readers never take it
        self.reads = content.reads
        self._named = catalog.read_snapshots(layout)
        self.previous = Previous(layout, keep_previous)
        self._quarantined = catalog.read_quarantined(layout, self._named)
        self._bases: dict[str, str] = {}  # of recorded manifests, as far as one was read

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
        """Whether a pod holds it, or a process on this node has one of its files open or mapped."""
        return self.is_open(self.manifest(snapshot))

    def is_pinned(self, name: str) -> bool:
        return self._pins.has(name)

    def ready(self, name: str) -> Snapshot:
        """What a name leads to. Raises NotFound."""
        found = self.get(name)
        if found is None:
            raise NotFound(
                f"no model named {name!r:.120} is ready",
                code="no_such_model",
                hint="cachd ls shows what is here",
            )
        return found

    def has(self, name: str) -> bool:
        """Whether the name is ready, or was until damage was found."""
        return name in self._named or name in self._quarantined

    def owner(self, name: str) -> ModelSpec | None:
        """The spec that a name is ready with, or was until damage was found; None when it is free."""
        known = self._known(name)
        return known.spec if known else None

    def check_hub_folder(self, spec: ModelSpec) -> None:
        """Raises InUse when the spec's folder of the Hub view shows another source, or has a branch in the
        place of the spec's own: pods ask for models by both."""
        for other in self._leading():
            if other.name == spec.name or other.hub_folder != spec.hub_folder:
                continue
            if other.spec.ref.base != spec.ref.base:
                raise InUse(
                    f"hub/{spec.hub_folder} shows {other.name}, which is {other.spec.ref.base}",
                    code="hub_id_taken",
                    hint="take another hub_id" if spec.hub_id else f"take another name than {spec.name}",
                )
            if _exclude_each_other(spec.hub_revision, other.hub_revision):
                raise InUse(
                    f"{other.name} is the branch {other.hub_revision}, and no branch {spec.hub_revision}"
                    f" stands beside it in hub/{spec.hub_folder}: each branch is a file",
                    code="branch_taken",
                    hint=f"delete {other.name} first, or ask for the commit: @ and its 40 digits",
                )

    def was_evicted(self, name: str) -> bool:
        """Whether a name that is not here was taken for space, by this life of the daemon."""
        return name in self._evicted and not self.has(name)

    def forget_eviction(self, name: str) -> None:
        """Tell no more that a name was taken for space."""
        if self._evicted.pop(name, "") is None:
            self.changes.mark(name)

    def quarantine(self, name: str) -> Quarantine | None:
        """Why a name that was ready waits for its repair."""
        return self._quarantined.get(name)

    def quarantined(self) -> list[Quarantine]:
        return sorted(self._quarantined.values(), key=lambda each: each.snapshot.name)

    def to_repair(self, spec: ModelSpec) -> Manifest | None:
        """What makes a spec true again whose model was damaged: the very files it had; None for any other."""
        found = self._quarantined.get(spec.name)
        if found is None or found.snapshot.spec != spec:
            return None
        try:
            return self._manifest(found.snapshot.manifest)
        except (FileNotFoundError, DiskFailed):
            return None

    def as_kept(self, manifest: Manifest) -> Manifest:
        """A manifest as its source lists it, with what is known here of the files: which blob has the content
        of one, where that is not named after it, and its sha256. Models of the same source tell, and
        what was hashed here for the files that state a sha256."""
        known: dict[tuple[Digest, int], File] = {}
        for recorded in self._of_base(manifest.base):
            for file in recorded.files:
                if file.kept and self._content.has(file):
                    known[file.stated, file.size] = file
                elif file.sha256:
                    known.setdefault((file.stated, file.size), replace(file, kept=None))

        def told(file: File) -> File:
            found = known.get((file.stated, file.size))
            kept, sha256 = (found.kept, found.sha256) if found else (self._content.alike(file), None)
            is_so = (file.kept, file.sha256) == (kept, sha256)
            return file if is_so else replace(file, kept=kept, sha256=sha256)

        files = tuple([told(file) for file in manifest.files])
        is_so = all(a is b for a, b in zip(files, manifest.files, strict=True))
        return manifest if is_so else replace(manifest, files=files)

    def owned(self, base: str) -> set[Digest]:
        """The blobs of every recorded snapshot of one source."""
        return {f.blob for manifest in self._of_base(base) for f in manifest.files}

    def _of_base(self, base: str) -> Iterator[Manifest]:
        """The recorded manifests of one source."""
        for path in self._recorded():
            if self._bases.get(path.stem, base) == base:
                with suppress(FileNotFoundError, DiskFailed, Leased):
                    manifest = self._manifest(path.stem)
                    self._bases[path.stem] = manifest.base
                    if manifest.base == base:
                        yield manifest

    def recorded(self) -> Iterator[tuple[Manifest, list[Snapshot]]]:
        """Every snapshot on disk with its names: none when a newer one took its place.

        A damaged one is left out: it is what it was before, or gone, when its repair has ended.
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
                log.warning("snapshot passed over", manifest=path.stem, reason=error.detail)
                continue
            yield manifest, [s for s in self.all() if s.manifest == manifest.id]

    def is_open(self, manifest: Manifest) -> bool:
        """Whether a pod holds it, or a process on this node has one of its files open or mapped."""
        return self.in_use_by(manifest) is not None

    def in_use_by(self, manifest: Manifest) -> InUseBy | None:
        """Who needs a snapshot now; None when nobody does."""
        with self.reads.aside():
            if self._holds.is_held(manifest.id):
                return InUseBy.POD
            is_read = is_open(self._content.path(f.blob) for f in manifest.files)
        return InUseBy.PROCESS if is_read else None

    def opened_lately(self, manifest: str) -> str:
        """Empty, or how long ago a process opened a file of a snapshot: so lately that it may open more."""
        now = time.time()
        return opened_lately(self._watch.opened_at(manifest, now), now, within=self._keep_opened_seconds)

    # --- changing ---

    def pin(self, name: str) -> None:
        """Keep the name until it is unpinned, ready or not yet."""
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
        """Show a manifest whose blobs are all here, then declare it ready.

        Raises NoSpace, DiskFailed, or InUse when its folder of the Hub view shows another source.

        Publishing a snapshot again finishes a publish that was interrupted. `rolled_back_from`: the spec that
        this one replaces for good. `permit` may raise InUse when it was revoked; a rollback needs none.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            if permit:
                elsewhere = self._is_pinned_elsewhere(spec, manifest)
                permit.use(
                    self.owner(spec.name), spec, is_pinned_elsewhere=elsewhere
                )  # whoever revokes it later publishes after this
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
                    del branches[branch]  # the name's own until now
                if snapshot.hub_revision:
                    branches[snapshot.hub_revision] = snapshot.commit
                self._hub.point(snapshot.hub_folder, branches)
                self.previous.replace(replaced, snapshot, rolled_back_from=rolled_back_from)
                self._watch.cover(manifest, [snapshot.hub_folder])  # first: a pod opens what is ready at once
                self._declare(snapshot)
                self._end_quarantine(spec.name)
            finally:
                for folder in {snapshot.hub_folder} | ({replaced.hub_folder} if replaced else set()):
                    self._repair_branches(folder, self._named.values())
        log.info("published", name=spec.name, manifest=manifest.id, size_bytes=manifest.size)
        return snapshot

    def rollback(self, name: str, *, now: float) -> Snapshot:
        """Let a name lead to what it led to before: publish that again, which needs no byte of its source.

        Raises NotFound when nothing of that is here, DiskFailed when some of it is not.
        """
        current = self._known(name)
        before = next(iter(self.previous.of(name)), None)
        if current is None or before is None:
            raise NotFound(
                f"nothing is kept of what {name!r} led to before",
                code="no_previous",
                hint="ask for the revision itself; keep_previous says how many snapshots are kept",
            )
        manifest = self.manifest(before)
        with self._content.claim(manifest):
            if missing := self._content.missing(manifest):
                raise DiskFailed(
                    f"{name}: {len(missing)} files of revision {before.revision} are not here any more",
                    code="previous_incomplete",
                    hint="ask for that revision itself: what is missing is fetched",
                )
            published = self.publish(before.spec, manifest, now=now, rolled_back_from=current.spec)
        log.info("rolled back", name=name, revision=before.revision, gave_up=current.revision)
        return published

    def withdraw(self, name: str, *, force: bool = False) -> int:
        """Take a name and, if it was the last of its snapshot, the snapshot away; bytes freed.

        Raises NotFound, or InUse when it is pinned, leased, held or open, unless forced. Open files stay
        readable.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            snapshot = self._known(name)
            if snapshot is None:
                raise no_such_model(name)
            check = None if force else self._check_unused
            moved = self._withdraw([snapshot], check)
            for before in self.previous.forget(name):
                moved |= self._remove_unused(before)
        return self._content.empty(moved)

    def evict(self, manifest: str) -> int:
        """Take a snapshot away under all its names; bytes freed.

        Raises NotFound, or InUse when one of its names is pinned or leased, or it is held, open or was opened
        lately.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            named = [s for s in self._named.values() if s.manifest == manifest]
            if not named and not self._layout.manifest(manifest).exists():
                raise NotFound(f"snapshot {manifest} is not here any more", code="no_such_snapshot")
            moved = (
                self._withdraw(named, self._check_unopened, evicted=True) if named else self._drop(manifest)
            )
            for snapshot in named:
                for before in self.previous.forget(snapshot.name):
                    moved |= self._remove_unused(before)
        return self._content.empty(moved)

    def withdraw_refused(
        self, is_refused: Callable[[Manifest], bool], *, among: Collection[str] | None = None
    ) -> tuple[list[tuple[Snapshot, Manifest]], set[str]]:
        """Take every name of a refused snapshot away, whoever protects it; the names with what they led to,
        and the snapshots that stay for the pods that hold them.

        Nothing leads to these any more, or back; called again, `among` them, this removes what nobody holds
        now. None: among all.
        """
        withdrawn, moved, held = [], dict[Path, int](), set[str]()
        with self._changing, durable.disk_errors(self._layout.root):
            for name, manifest in list(self._readable(among)):
                if not is_refused(manifest):
                    continue
                self.previous.drop(name)
                named = [s for s in self._leading() if s.manifest == name]
                for snapshot in named:
                    moved |= self._withdraw([snapshot], None, remove=lambda _manifest, _names: {})
                withdrawn += [(snapshot, manifest) for snapshot in named]
                self._addresses.remove(name, manifest.revision)
                if self.in_use_by(manifest) or not self._is_taken(name):
                    held.add(name)
                else:
                    moved |= self._remove(name)
        self._content.empty(moved)
        return withdrawn, held

    def _withdraw(
        self,
        named: Sequence[Snapshot],
        check: _Check | None,
        *,
        evicted: bool = False,
        remove: Callable[[str, Collection[str]], dict[Path, int]] | None = None,
    ) -> dict[Path, int]:
        """Take names of one snapshot away; what is in the trash then, to be emptied without the lock.

        Whoever looks for a ready file finds none before anything else goes. A pod that found one just before
        has the files open by now, or fails to open them; so it is looked once more, and the ready files come
        back when somebody has. The hold file goes next, in one step with the last look at who holds it.
        """
        manifest = self.manifest(named[0]) if check else None
        if check:
            check(named, manifest)
        hidden = [(self._layout.ready_file(s.name), self._layout.staging / f"{s.name}.json") for s in named]
        for ready, aside in hidden:
            with suppress(FileNotFoundError):  # an operator's rm
                durable.move(ready, aside)
        durable.sync_directory(self._layout.ready)
        try:
            if check:
                check(named, manifest)
                self._take_hold(named)
        except BaseException:
            for ready, aside in hidden:
                with suppress(FileNotFoundError):
                    durable.move(aside, ready)
            durable.sync_directory(self._layout.ready)
            raise
        for snapshot, (_, aside) in zip(named, hidden, strict=True):
            durable.remove(aside)
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
        """Remove a snapshot that has no name. Raises InUse when it is held, open or was opened lately."""
        if by := self.in_use_by(self._manifest(manifest)):
            raise _in_use(f"snapshot {manifest}", by)
        if lately := self.opened_lately(manifest):
            raise InUse(f"a file of snapshot {manifest} was {lately}", code="opened_lately")
        if not self._is_taken(manifest):
            raise _in_use(f"snapshot {manifest}", InUseBy.POD)
        return self._remove(manifest)

    def damaged(self, file: File, wrong: str, inode: int, *, now: float) -> list[str]:
        """Take a blob with wrong bytes away, and the readiness of every snapshot that uses it; their names.

        `inode` is the file that was found wrong, 0 when there is none. Whoever has it open keeps it. Raises
        Moved when another one has taken its place, or no snapshot misses it.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            using = [(name, m) for name, m in self._readable() if any(f.blob == file.blob for f in m.files)]
            manifests = {name for name, _ in using}
            names = [s.name for s in self._named.values() if s.manifest in manifests]
            if self._content.inode(file.blob) != inode or not using or not (names or inode):
                raise Moved
            inodes = {file.blob: inode} if inode else {}
            for name in names:
                self._quarantine(name, f"{file.path}: {wrong}", inodes, now)
            for each in self.quarantined():
                if each.snapshot.name not in names and each.snapshot.manifest in manifests:
                    self._record_quarantine(replace(each, inodes={**each.inodes, **inodes}))
            self._content.set_aside(file.blob, inode)
            for name, manifest in using:
                paths = [f.path for f in manifest.files if f.blob == file.blob]
                self._plain.hide(name, paths)
                for folder in catalog.read_shown(self._layout.manifest(name)):
                    self._hub.hide(folder, commit_of(manifest), paths)
        return names

    def look(self, name: str, *, now: float) -> str:
        """See that a ready name's files are where pods look for them; if not, take its readiness away.

        What was wrong with the views, empty when nothing is. Where a view and a blob are two files, either
        may be the wrong one: the blob is taken for damaged.
        """
        with self._changing, durable.disk_errors(self._layout.root):
            snapshot = self._named.get(name)
            if snapshot is None:
                return ""
            inodes: dict[Digest, int] = {}
            try:
                wrong = self._wrong(snapshot, inodes)
            except (FileNotFoundError, DiskFailed) as error:
                wrong = f"its manifest: {error}"
            if wrong:
                self._quarantine(name, wrong, inodes, now)
                for blob, inode in inodes.items():
                    self._content.set_aside(blob, inode)
            else:
                self._let_hold(snapshot)
            return wrong

    def written(self, changes: ViewChanges) -> list[File]:
        """The files into which somebody wrote, one for each blob."""
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
        """The snapshots that no name leads or led to and nobody reads: (manifest, bytes it alone holds).

        Those of a ref base in `keep` are left out: a pull is about to publish one.
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
        """Remove a snapshot, if it still has no name, is kept for none, and nobody reads it; bytes freed."""
        with self._changing, durable.disk_errors(self._layout.root):
            moved = {} if manifest in self.previous.manifests() else self._remove_unused(manifest)
        return self._content.empty(moved)

    def sweep(self, *, keep: Collection[str] = ()) -> int:
        """Remove the snapshots that `unnamed` lists; bytes freed."""
        return sum(self.drop(manifest) for manifest, _ in self.unnamed(keep=keep))

    def blobs(self) -> set[Digest]:
        """The blobs of every recorded snapshot, named or not. Raises DiskFailed when one cannot be read."""
        found: set[Digest] = set()
        for path in self._recorded():
            with suppress(FileNotFoundError):  # swept meanwhile
                found.update(_sizes(self._manifest(path.stem)))
        return found

    def settle(self) -> None:
        """Remove the names and branches that are not ready: a publish or a withdrawal was cut off there.

        Every snapshot that is here gets what pods hold it by, and every name its addresses.
        """
        for each in self.quarantined():
            durable.remove(self._layout.ready_file(each.snapshot.name))
            self._named.pop(each.snapshot.name, None)
            for blob, inode in each.inodes.items():
                self._content.set_aside(blob, inode)
        for link in self._layout.models.iterdir():
            if link.name not in self._named and MARK not in link.name and link.is_symlink():
                durable.remove(link)
        recorded = {path.stem for path in self._recorded()}
        self._holds.settle(recorded)
        self._addresses.settle([*self.previous.all(), *self._leading()], recorded)
        folders: dict[str, list[Snapshot]] = {f: [] for p in self._unnamed() for f in catalog.read_shown(p)}
        for snapshot in self._named.values():
            folders.setdefault(snapshot.hub_folder, []).append(snapshot)
        for folder, named in folders.items():
            self._repair_branches(folder, named)

    def watch_all(self) -> dict[Digest, File]:
        """Watch every recorded snapshot, and no other; a file of each blob that they need."""
        self._watch.start()
        files: dict[Digest, File] = {}
        for name, manifest in self._readable():
            self._watch.cover(manifest, catalog.read_shown(self._layout.manifest(name)))
            files |= {f.blob: f for f in manifest.files}
            for file in manifest.files:
                self._content.hashes.read(file)
        self._watch.keep_only({path.stem for path in self._recorded()})
        return files

    def check_unused(self, name: str) -> None:
        """Raises InUse when the name is pinned or leased, or open and the only one of its snapshot."""
        self._check_kept(name)
        snapshot = self._known(name)
        if snapshot is not None:
            self._check_unused([snapshot], self.manifest(snapshot))

    # --- inside, under the lock ---

    def _is_pinned_elsewhere(self, spec: ModelSpec, manifest: Manifest) -> bool:
        """Whether a name is pinned, and leads or led to another snapshot, or was asked for otherwise."""
        known = self._known(spec.name)
        if known is None or (known.spec, known.manifest) == (spec, manifest.id):
            return False
        return self.is_pinned(spec.name)

    def _after_others(self, snapshot: Snapshot) -> Snapshot:
        """Published last, though the clock went back: its branch names what was published last."""
        told = [s.published_at for s in self._named.values() if s.hub_folder == snapshot.hub_folder]
        return replace(
            snapshot, published_at=max([snapshot.published_at, *(t + _TICK_SECONDS for t in told)])
        )

    def _check_kept(self, name: str) -> None:
        if self.is_pinned(name):
            raise InUse(f"{name} is pinned", code="pinned", hint=f"cachd unpin {name}, or force")
        if held := self.leases.of(name, time.time()):
            raise InUse(
                f"{name} is leased by {held[-1].holder or 'somebody'}, {len(held)} leases in all",
                code="leased",
                hint="wait until they are released or expire, or force",
            )

    def _check_unused(self, named: Sequence[Snapshot], manifest: Manifest | None) -> None:
        """Raises InUse when one of these names of a snapshot is kept, or it is in use and these are all its
        names."""
        for snapshot in named:
            self._check_kept(snapshot.name)
        if manifest is not None and not self._has_others(named) and (by := self.in_use_by(manifest)):
            raise _in_use(named[0].name, by)

    def _has_others(self, named: Sequence[Snapshot]) -> bool:
        """Whether other names than these lead to their snapshot, or will when it is repaired."""
        names = {snapshot.name for snapshot in named}
        return any(s.manifest == named[0].manifest and s.name not in names for s in self._leading())

    def _take_hold(self, named: Sequence[Snapshot]) -> None:
        """Let no pod hold a snapshot from here on, if these are all its names. Raises InUse when one does."""
        if not self._has_others(named) and not self._is_taken(named[0].manifest):
            raise _in_use(named[0].name, InUseBy.POD)

    def _is_taken(self, manifest: str) -> bool:
        """Let no pod hold a snapshot from here on; False when one does."""
        with self.reads.aside():
            return self._holds.take(manifest)

    def _check_unopened(self, named: Sequence[Snapshot], manifest: Manifest | None) -> None:
        """As `_check_unused`, and raises InUse when somebody opened one of its files lately: an engine that
        starts has none open between two of them."""
        self._check_unused(named, manifest)
        if lately := self.opened_lately(named[0].manifest):
            raise InUse(f"a file of {named[0].name} was {lately}", code="opened_lately")

    def _used(self) -> set[str]:
        """The manifests that a name is ready with, or will be when it is repaired."""
        return {snapshot.manifest for snapshot in self._leading()}

    def _leading(self) -> list[Snapshot]:
        """What names are ready with, or will be when it is repaired."""
        return [*(each.snapshot for each in self._quarantined.values()), *self._named.values()]

    def _let_hold(self, snapshot: Snapshot) -> None:
        """Make anew what pods hold a ready snapshot by, where somebody deleted it."""
        try:
            self._holds.make(snapshot.manifest)
            self._addresses.make(snapshot)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room to let pods hold it", name=snapshot.name)

    def _known(self, name: str) -> Snapshot | None:
        quarantined = self._quarantined.get(name)
        return self._named.get(name) or (quarantined.snapshot if quarantined else None)

    def _quarantine(self, name: str, reason: str, inodes: Mapping[Digest, int], now: float) -> None:
        """Take a name's readiness away until it is published again; all but the name stays."""
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
            if error.errno not in durable.FULL:
                raise  # on a full disk readiness goes all the same; a restart knows nothing of the repair
        self._quarantined[name] = quarantine

    def _end_quarantine(self, name: str) -> None:
        if self._quarantined.pop(name, None) is not None:
            durable.remove(self._layout.quarantine_file(name))

    def _wrong(self, snapshot: Snapshot, inodes: dict[Digest, int]) -> str:
        """What is not as `publish` left it; empty when all is. The blobs in doubt are added to `inodes`."""
        layout, manifest = self._layout, self._manifest(snapshot.manifest)
        files = {f.path: f for f in manifest.files}
        try:
            self._repair_views(snapshot)
        except (OSError, CachdError) as error:  # it may need room, or a disk that writes
            log.warning("not put right", name=snapshot.name, reason=str(error))
        link = layout.model(snapshot.name)
        if not (link.is_symlink() and str(link.readlink()) == f".trees/{manifest.id}"):
            return f"models/{snapshot.name} does not lead to it"
        if not durable.is_regular(layout.ready_file(snapshot.name)):
            return f"ready/{snapshot.name}.json is gone"
        with suppress(Leased):  # it is read again at the next look
            if not catalog.tells(layout.ready_file(snapshot.name), snapshot):
                return f"ready/{snapshot.name}.json says something else"
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
        return f"{len(reasons)} files, the first: {reasons[0]}" if reasons else ""

    def _repair_views(self, snapshot: Snapshot) -> None:
        """Put right what needs no blob: directories, modes, the Hub view's branches and list of files."""
        for name in PUBLIC:
            durable.keep_directory(self._layout.root / name, 0o755)
        durable.keep_mode(str(self._layout.ready_file(snapshot.name)), 0o644)
        folder, commit = snapshot.hub_folder, snapshot.commit
        self._repair_branches(folder, self._named.values())
        self._hub.repair(folder, commit, self._shown(folder, commit))

    def _recorded(self) -> list[Path]:
        return list(self._layout.manifests.glob("[!.]*.json"))

    def _unnamed(self) -> list[Path]:
        """The recorded manifests that no ready name uses."""
        used = self._used()
        return [p for p in self._recorded() if p.stem not in used]

    def _readable(self, among: Collection[str] | None = None) -> Iterator[tuple[str, Manifest]]:
        for path in self._recorded():
            if among is not None and path.stem not in among:
                continue
            try:
                yield path.stem, self._manifest(path.stem)
            except FileNotFoundError:  # swept meanwhile
                continue
            except (DiskFailed, Leased) as error:
                log.warning("snapshot not swept", manifest=path.stem, reason=error.detail)

    def _manifest(self, manifest: str) -> Manifest:
        return catalog.read_manifest(self._layout, manifest)

    def _is_read(self, manifest: Manifest) -> bool:
        """Whether somebody needs a snapshot, or had one of its files open lately."""
        return bool(self.opened_lately(manifest.id)) or self.is_open(manifest)

    def record_hashes(self) -> None:
        """Add to the recorded manifests what blobs were found to hash to. Raises NoSpace, DiskFailed."""
        if not (found := self._content.hashes.unrecorded()):
            return
        self._content.hashes.recorded(found)  # what fails below is found out again by the next scrub
        with self._changing, durable.disk_errors(self._layout.root):
            for _, manifest in self._readable():
                if any(f.blob in found and f.sha256 is None for f in manifest.files):
                    self._record(manifest)

    def _record(self, manifest: Manifest, *folders: str) -> None:
        """Keep the manifest, with every folder of the Hub view that ever showed it."""
        path = self._layout.manifest(manifest.id)
        shown = {*folders, *catalog.read_shown(path)}
        hashes = {f.path: sha256 for f in manifest.files if (sha256 := self._content.hashes.of(f))}
        document = manifest.as_document(hashes) | {"shown": sorted(shown)}
        durable.write_file(path, json.dumps(document).encode())
        self._content.hashes.recorded({f.blob for f in manifest.files})

    def _remove_unused(self, manifest: str) -> dict[Path, int]:
        """Remove a snapshot that no name leads to, unless it is in use."""
        if manifest in self._used():
            return {}
        try:
            return self._drop(manifest)
        except (FileNotFoundError, InUse):
            return {}

    def _remove(self, manifest: str, names: Collection[str] = ()) -> dict[Path, int]:
        """Take a snapshot out of both views and its blobs to the trash, unless a name still uses it; and what
        interrupted pulls of these names left of them."""
        if manifest in self._used():
            return {}
        path = self._layout.manifest(manifest)
        self._bases.pop(manifest, None)
        self._holds.remove(manifest)
        try:
            gone = self._manifest(manifest)
        except DiskFailed as error:
            log.warning("blobs left behind", manifest=manifest, reason=error.detail)
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
        moved = self._content.discard(gone, names)
        durable.remove(path)
        return moved

    def _shown(self, folder: str, commit: str) -> dict[str, File]:
        """The files that named snapshots show in one directory of the Hub view."""
        sharing = {s.manifest for s in self._named.values() if (s.hub_folder, s.commit) == (folder, commit)}
        return {f.path: f for manifest in sharing for f in self._manifest(manifest).files}

    def _shown_unnamed(self, folder: str, commit: str, *, but: str) -> dict[str, File]:
        """The files that snapshots without a name show there: some are held, some are kept for a way back.

        One whose tree is gone is being removed.
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
        """Let the branches of a folder of the Hub view name what is ready, and no others be there.

        `named`: the ready snapshots, at least those of the folder.
        """
        try:
            self._hub.point(folder, _branches(folder, named))
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room to hint a branch", folder=folder)  # a full disk must open, to be freed

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
        try:
            durable.remove(layout.ready_file(name))
            durable.move(link, layout.model(name))
            durable.sync_directory(layout.models)
            durable.move(told, layout.ready_file(name))
            self._named[name] = snapshot
            self._evicted.pop(name, None)
            durable.sync_directory(layout.ready)
        except BaseException:
            if not layout.ready_file(name).exists():
                self._named.pop(name, None)  # what pods see decides
            raise
        finally:
            self.changes.mark(name)


def _in_use(what: str, by: InUseBy) -> InUse:
    return InUse(
        f"{what} is {by}",
        hint="stop the pods that serve it, or force: what they have open stays readable",
    )


def no_such_model(name: str) -> NotFound:
    return NotFound(f"no model is named {name!r}", code="no_such_model", hint="cachd ls shows what is here")


def _branches(folder: str, named: Iterable[Snapshot]) -> dict[str, str]:
    """The branches and tags of one folder of the Hub view: each names the commit published last."""
    return {
        s.hub_revision: s.commit
        for s in sorted((s for s in named if s.hub_folder == folder), key=lambda s: s.published_at)
        if s.hub_revision
    }


def _exclude_each_other(branch: str | None, other: str | None) -> bool:
    """Whether one is a directory where the other is a file, as `main/x` and `main`."""
    if not branch or not other:
        return False
    return branch.startswith(f"{other}/") or other.startswith(f"{branch}/")


def _sizes(manifest: Manifest) -> dict[Digest, int]:
    """Bytes of each blob of a manifest."""
    return {f.blob: f.size for f in manifest.files}
