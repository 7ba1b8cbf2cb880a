"""Watches the directories of the views: the kernel reports at once where somebody changes or opens a file.

    change   somebody deleted, moved, replaced, wrote or chmod-ed something. An event only says where, and
             cachd's own changes cause events, too. So upkeep/presence.py checks the snapshots there
    open     somebody opened a file of a snapshot, through any mount, so the snapshot is in use. cachd itself
             opens blobs only by their paths below .cachd/blobs. Only for a client of the Hub endpoint, which
             uses the snapshot, it opens a file in a view

Each kind has its own inotify queue. A pod can flood the queue of opens, but it cannot change anything
through its read-only mount.

inotify does not report: bytes changed through a memory mapping, through a hard link that is not cachd's, or
by the disk itself (the scrub finds these); what another machine does on a network file system; events while
a queue is full.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from cachd.errors import CachdError
from cachd.kernel import inotify
from cachd.kernel.inotify import Event, Inotify
from cachd.model import Digest, File, Manifest, commit_of
from cachd.store.layout import Layout
from cachd.store.usage_log import UsageLog
from cachd.store.views import directories_of

_CHANGES = inotify.MODIFY | inotify.ATTRIB | inotify.MOVED_FROM | inotify.MOVED_TO | inotify.DELETE
_OPENS = inotify.OPEN
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


class _Kind(enum.Enum):
    """What the entries of a watched directory are."""

    VIEWS = enum.auto()  # the views, in the root
    LINKS = enum.auto()  # models/NAME
    READY = enum.auto()  # ready/NAME.json
    TREES = enum.auto()  # models/.trees/ID
    FOLDERS = enum.auto()  # hub/FOLDER
    FOLDER = enum.auto()  # refs, listings and commits in a folder of the Hub view
    FILES = enum.auto()  # files of a snapshot, in either view
    BLOBS = enum.auto()  # .cachd/blobs/ALGORITHM/HEX


@dataclass(slots=True)
class _Directory:
    """One watched directory.

    `folder`: its folder of the Hub view; for BLOBS, the digest algorithm. `below`: its path in the snapshot.
    `manifests`: the snapshots that need it; empty when all do.
    """

    path: str
    kind: _Kind
    folder: str = ""
    below: str = ""
    manifests: set[str] = field(default_factory=set)


@dataclass(slots=True)
class ViewChanges:
    """Where something changed since the last call.

    `names`, `manifests`, `folders` (of the Hub view): what to check. `written`: (manifest, path, place in a
    view) of each file that somebody wrote into. `blobs`: blobs that somebody wrote into. `everything`: check
    all snapshots, because the queue overflowed or an event does not say which snapshot it concerns.
    """

    names: set[str] = field(default_factory=set)
    manifests: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    written: set[tuple[str, str, str]] = field(default_factory=set)
    blobs: set[Digest] = field(default_factory=set)
    everything: bool = False

    def __bool__(self) -> bool:
        return self.everything or bool(
            self.names or self.manifests or self.folders or self.written or self.blobs
        )

    def files_written(self, manifests: Iterable[tuple[str, Manifest]], copies: Collection[str]) -> list[File]:
        """The files of `manifests`, each given with its id, that somebody wrote into: one for each blob.

        A write into one of the `copies`, which are places in the views, changes no blob; a check of the model
        notices it.
        """
        if not self.written and not self.blobs:
            return []
        written = {(each, path) for each, path, place in self.written if place not in copies}
        found = {
            f.blob: f
            for each, manifest in manifests
            for f in manifest.files
            if f.blob in self.blobs or (each, f.path) in written
        }
        return list(found.values())

    def add(self, directory: _Directory, event: Event) -> None:
        """Record one event of a directory."""
        name = event.name
        match directory.kind:
            case _Kind.BLOBS:
                with suppress(CachdError):  # other names are ignored: part hashes lie beside the blobs
                    self.blobs.add(Digest(directory.folder, name))
            case _Kind.FILES:
                self._add_file(directory, event)
            case _Kind.FOLDER:
                self.folders.add(directory.folder)
            case _ if not name or (name.startswith(".") and event.mask & inotify.IS_DIRECTORY):
                self.everything = True
            case _Kind.LINKS:
                self.names.add(name.partition("@")[0])
            case _Kind.READY:
                self.names.add(name.removesuffix(".json"))
            case _Kind.TREES:
                self.manifests.add(name)
            case _Kind.FOLDERS:
                self.folders.add(name)
            case _Kind.VIEWS:
                self.everything |= bool(event.mask & inotify.IS_DIRECTORY)

    def _add_file(self, directory: _Directory, event: Event) -> None:
        """Record an event of a directory that has files of snapshots."""
        self.manifests |= directory.manifests
        if event.name and event.mask & inotify.MODIFY:
            path = os.path.join(directory.below, event.name)
            place = f"{directory.path}/{event.name}"
            self.written |= {(each, path, place) for each in directory.manifests}


@dataclass(frozen=True, slots=True)
class Watched:
    """How many directories are watched, how many are not, and why not (empty when all are)."""

    directories: int
    unwatched: int
    reason: str


class _Queue:
    """One inotify queue that watches at most `most` directories for the events of `mask`."""

    def __init__(self, mask: int, most: int) -> None:
        self._inotify, self._mask, self._most = Inotify(), mask, most
        self._directories: dict[int, _Directory] = {}
        self._watches: dict[str, int] = {}

    @property
    def count(self) -> int:
        return len(self._watches)

    def close(self) -> None:
        self._inotify.close()

    def add(self, directory: _Directory) -> None:
        """Watch a directory. Watching it again is fine; a new directory at its path replaces it.

        Raises OSError.
        """
        path = directory.path
        if path not in self._watches and self.count >= self._most:
            raise OSError(errno.ENOSPC, f"cachd watches no more than {self._most} directories")
        mask = inotify.MODIFY if directory.kind is _Kind.BLOBS else self._mask
        watch = self._inotify.add(path, mask)
        if self._watches.get(path) != watch:
            self.remove(path)
        self._watches[path], self._directories[watch] = watch, directory

    def remove(self, path: str) -> None:
        watch = self._watches.pop(path, None)
        if watch is not None:
            self._directories.pop(watch, None)
            self._inotify.remove(watch)

    def read(self) -> Iterator[tuple[_Directory | None, Event]]:
        """Yields (directory, event) since the last call, and (None, event) if the kernel dropped events."""
        for event in self._inotify.read():
            if event.mask & inotify.OVERFLOW:
                yield None, event
            elif directory := self._directories.get(event.watch):
                if event.mask & inotify.IGNORED:  # it was deleted
                    self._watches.pop(directory.path, None)
                    del self._directories[event.watch]
                else:
                    yield directory, event


class Watch:
    """Watches the directories of one root, from `start` on. Safe from any thread."""

    def __init__(self, layout: Layout, usage_log: UsageLog) -> None:
        self._layout, self._usage_log = layout, usage_log
        self._lock = threading.Lock()
        self._started = False
        self._changes: _Queue | None = None
        self._opens: _Queue | None = None
        self._directories: dict[str, _Directory] = {}
        self._unwatched: set[str] = set()
        self._reason = ""
        self._lost_opens = False
        self._opened: set[str] = set()  # manifests that somebody opened since `note_opens`

    def start(self) -> None:
        """Begin to watch, as far as the kernel allows. Another call retries what the kernel refused."""
        with self._lock:
            self._started = True
            most = inotify.most_watches()  # shared with other processes of this user: as root, the kubelet
            try:
                if self._changes is None:
                    self._changes = _Queue(_CHANGES, most // 2)
                if self._opens is None:
                    self._opens = _Queue(_OPENS, most // 4)
            except OSError as error:
                self._reason = _reason_of(error)
            self._add_all(_of_root(self._layout))

    def close(self) -> None:
        """Stop watching, and close the queues."""
        with self._lock:
            for queue in (self._changes, self._opens):
                if queue is not None:
                    queue.close()
            self._started, self._changes, self._opens = False, None, None

    def cover(self, manifest: Manifest, folders: Iterable[str]) -> None:
        """Watch the directories of a snapshot: in the plain view and in these folders of the Hub view.

        A directory that is watched already stays watched.
        """
        with self._lock:
            if self._started:
                self._add_all([*_of_root(self._layout), *_of_snapshot(self._layout, manifest, folders)])

    def leave(self, manifest: str) -> None:
        """Stop watching a snapshot, because it is about to be removed."""
        with self._lock:
            for directory in [d for d in self._directories.values() if manifest in d.manifests]:
                self._keep(directory, directory.manifests - {manifest})

    def keep_only(self, manifests: Collection[str]) -> None:
        """Stop watching all snapshots but these."""
        with self._lock:
            for directory in [d for d in self._directories.values() if d.manifests]:
                self._keep(directory, directory.manifests.intersection(manifests))

    def watched(self) -> Watched:
        """How much is watched now."""
        with self._lock:
            count = self._changes.count if self._changes else 0
            return Watched(count, len(self._unwatched), self._reason if self._unwatched else "")

    def changes(self) -> ViewChanges:
        """What changed since the last call."""
        found = ViewChanges()
        with self._lock:
            for directory, event in self._changes.read() if self._changes else ():
                if directory is None:
                    found.everything = True
                else:
                    found.add(directory, event)
        return found

    # --- opens ---

    def note_opens(self, now: float) -> None:
        """Record in the usage log which snapshots somebody opened since the last call, as opened at `now`."""
        with self._lock:
            self._read_opens()
            opened, self._opened = self._opened, set()
        for manifest in opened:
            self._usage_log.opened(manifest, now)

    @contextmanager
    def own_opens(self, paths: Collection[str]) -> Iterator[None]:
        """Inside, opens of these files are cachd's own, and no use of a model.

        The caller opens them and reads nothing. Opens by others at the same moment are not noticed.
        """
        with self._lock:
            self._read_opens()
            try:
                yield
            finally:
                self._read_opens(but=paths)

    def opened_at(self, manifest: str, now: float) -> float | None:
        """When somebody last opened a file of a snapshot, opens of this moment included; None if unknown."""
        self.note_opens(now)
        return self._usage_log.opened_at(manifest)

    def lost_opens(self) -> bool:
        """Whether events of opens were lost since the last call, because too many came at once."""
        lost, self._lost_opens = self._lost_opens, False
        return lost

    def sees_all_opens(self) -> bool:
        """Whether all directories of published files are watched, so that no open goes unseen."""
        return self._opens is not None and not self._unwatched

    # --- private; the caller holds the lock ---

    def _read_opens(self, but: Collection[str] = ()) -> None:
        for directory, event in self._opens.read() if self._opens else ():
            if directory is None:
                self._lost_opens = True
            elif event.mask & inotify.IS_DIRECTORY:  # listing a directory is no use of a model
                continue
            elif f"{directory.path}/{event.name}" not in but:
                self._opened |= directory.manifests

    def _add_all(self, directories: Iterable[_Directory]) -> None:
        for directory in directories:
            known = self._directories.setdefault(directory.path, directory)
            known.manifests |= directory.manifests
            if self._changes is None or self._opens is None:
                self._unwatched.add(known.path)
                continue
            try:
                self._changes.add(known)
                if known.kind is _Kind.FILES:
                    self._opens.add(known)
                self._unwatched.discard(known.path)
            except OSError as error:
                if error.errno in _ABSENT:
                    self._forget(known.path)
                else:
                    self._unwatched.add(known.path)
                    self._reason = _reason_of(error)

    def _keep(self, directory: _Directory, manifests: set[str]) -> None:
        directory.manifests = manifests
        if not manifests:
            self._forget(directory.path)

    def _forget(self, path: str) -> None:
        for queue in (self._changes, self._opens):
            if queue is not None:
                queue.remove(path)
        del self._directories[path]
        self._unwatched.discard(path)


def _of_root(layout: Layout) -> Iterator[_Directory]:
    """The directories that all snapshots share."""
    yield _Directory(str(layout.root), _Kind.VIEWS)
    yield _Directory(str(layout.models), _Kind.LINKS)
    yield _Directory(str(layout.tree("")), _Kind.TREES)
    yield _Directory(str(layout.hub), _Kind.FOLDERS)
    yield _Directory(str(layout.ready), _Kind.READY)


def _of_snapshot(layout: Layout, manifest: Manifest, folders: Iterable[str]) -> Iterator[_Directory]:
    """The directories of one snapshot in the views, and those of its blobs."""
    for algorithm in {f.blob.algorithm for f in manifest.files}:
        yield _Directory(str(layout.blobs / algorithm), _Kind.BLOBS, algorithm)
    below = directories_of(f.path for f in manifest.files)
    tree = str(layout.tree(manifest.id))
    shown = [(tree + manifest.below, "")]
    if manifest.below:
        yield _Directory(tree, _Kind.FILES, manifests={manifest.id})
    for folder in folders:
        repo = layout.hub / folder
        shown.append((str(repo / "snapshots" / commit_of(manifest)), folder))
        for path in (repo, repo / "snapshots", repo / "trees", *(at for at, _, _ in os.walk(repo / "refs"))):
            yield _Directory(str(path), _Kind.FOLDER, folder, manifests={manifest.id})
    for top, folder in shown:
        for each in below:
            path = f"{top}/{each}" if each else top
            yield _Directory(path, _Kind.FILES, folder, each, {manifest.id})


def _reason_of(error: OSError) -> str:
    """Why the kernel refused a watch, with the sysctl that limits it, if one does."""
    limit = {errno.ENOSPC: "fs.inotify.max_user_watches", errno.EMFILE: "fs.inotify.max_user_instances"}
    name = limit.get(error.errno or 0, "")
    return f"{error.strerror or error}" + (f" (sysctl {name})" if name else "")
