"""The directories of the views, watched: the kernel says at once where somebody changes or opens something.

    change   somebody deleted, moved, replaced, wrote or chmod-ed something: which snapshots to look at.
             An event says only where, and cachd's own changes make events, too: the look decides
    open     somebody opened a file of a snapshot, through whatever mount: it is in use.
             cachd itself opens blobs by their own names, never a file of a snapshot in a view

Each has its own queue: a pod can fill the one for opens, but changes nothing through its read-only mount.

Not seen: bytes changed through a mapping, through a hard link that is not cachd's, or by the disk itself (the
scrub finds those); what another machine does on a network file system; an open while its queue was full.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from cachd.errors import CachdError
from cachd.model import Digest, Manifest, commit_of
from cachd.store import inotify
from cachd.store.inotify import Event, Inotify
from cachd.store.layout import Layout
from cachd.store.usage_log import UsageLog
from cachd.store.views import directories_of

_CHANGES = inotify.MODIFY | inotify.ATTRIB | inotify.MOVED_FROM | inotify.MOVED_TO | inotify.DELETE
_OPENS = inotify.OPEN
_ABSENT = (errno.ENOENT, errno.ENOTDIR)


class _Kind(enum.Enum):
    """What the entries of a directory are."""

    VIEWS = enum.auto()  # of the root
    LINKS = enum.auto()  # models/NAME
    READY = enum.auto()  # ready/NAME.json
    TREES = enum.auto()  # models/.trees/ID
    FOLDERS = enum.auto()  # hub/FOLDER
    FOLDER = enum.auto()  # what a folder of the Hub view keeps beside snapshots
    FILES = enum.auto()  # of a snapshot, in either view
    BLOBS = enum.auto()


@dataclass(slots=True)
class _Directory:
    """One watched directory. `folder`: of the Hub view, or the algorithm of blobs; `below`: its path in its
    snapshot; `manifests`: the snapshots that need it, empty when it is there for all."""

    path: str
    kind: _Kind
    folder: str = ""
    below: str = ""
    manifests: set[str] = field(default_factory=set)


@dataclass(slots=True)
class ViewChanges:
    """Where something changed since the last time: names, manifests and folders of the Hub view to look at;
    `written`: manifest and path of each file that somebody wrote into; `blobs`: the same by blob;
    `everything`: look at all, more changed than the queue holds."""

    names: set[str] = field(default_factory=set)
    manifests: set[str] = field(default_factory=set)
    folders: set[str] = field(default_factory=set)
    written: set[tuple[str, str]] = field(default_factory=set)
    blobs: set[Digest] = field(default_factory=set)
    everything: bool = False

    def __bool__(self) -> bool:
        return self.everything or bool(
            self.names or self.manifests or self.folders or self.written or self.blobs
        )

    def add(self, directory: _Directory, event: Event) -> None:
        """Take note of one event in a directory."""
        name = event.name
        match directory.kind:
            case _Kind.BLOBS:
                with suppress(CachdError):  # the hashes of its parts lie beside a blob
                    self.blobs.add(Digest(directory.folder, name))
            case _Kind.FILES:
                self.manifests |= directory.manifests
                if name and event.mask & inotify.MODIFY:
                    path = os.path.join(directory.below, name)
                    self.written |= {(each, path) for each in directory.manifests}
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


@dataclass(frozen=True, slots=True)
class Watched:
    """How many directories of the views are watched, how many are not, and why not."""

    directories: int
    unwatched: int
    reason: str


class _Queue:
    """Directories that one queue of the kernel watches, `most` of them."""

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
        """Watch a directory, or the one that took its place. Raises OSError."""
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
        """The events since the last time, each with its directory; with None when some were lost."""
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
    """The watched directories of one root. Safe from any thread. Nothing is watched before `start`."""

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

    def start(self) -> None:
        """Begin to watch, as far as the kernel lets us; called again, try again what it refused."""
        with self._lock:
            self._started = True
            most = inotify.most_watches()  # what else this user runs needs some, too: the kubelet, when root
            try:
                if self._changes is None:
                    self._changes = _Queue(_CHANGES, most // 2)
                if self._opens is None:
                    self._opens = _Queue(_OPENS, most // 4)
            except OSError as error:
                self._reason = _told(error)
            self._add_all(_of_root(self._layout))

    def close(self) -> None:
        with self._lock:
            for queue in (self._changes, self._opens):
                if queue is not None:
                    queue.close()
            self._started, self._changes, self._opens = False, None, None

    def cover(self, manifest: Manifest, folders: Iterable[str]) -> None:
        """Watch what shows a snapshot, in these folders of the Hub view; watched already is fine."""
        with self._lock:
            if self._started:
                self._add_all([*_of_root(self._layout), *_of_snapshot(self._layout, manifest, folders)])

    def leave(self, manifest: str) -> None:
        """Watch a snapshot no more: it is about to be removed."""
        with self._lock:
            for directory in [d for d in self._directories.values() if manifest in d.manifests]:
                self._keep(directory, directory.manifests - {manifest})

    def keep_only(self, manifests: Collection[str]) -> None:
        """Watch no other snapshots than these."""
        with self._lock:
            for directory in [d for d in self._directories.values() if d.manifests]:
                self._keep(directory, directory.manifests.intersection(manifests))

    def watched(self) -> Watched:
        with self._lock:
            count = self._changes.count if self._changes else 0
            return Watched(count, len(self._unwatched), self._reason if self._unwatched else "")

    def changes(self) -> ViewChanges:
        """What changed since the last time."""
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
        """Let `usage_log` know which snapshots somebody opened until now."""
        opened: set[str] = set()
        with self._lock:
            for directory, event in self._opens.read() if self._opens else ():
                if directory is None:
                    self._lost_opens = True
                elif not event.mask & inotify.IS_DIRECTORY:  # who lists a directory loads no model
                    opened |= directory.manifests
        for manifest in opened:
            self._usage_log.opened(manifest, now)

    def opened_at(self, manifest: str, now: float) -> float | None:
        """When somebody last opened a file of a snapshot, as far as is known at this very moment."""
        self.note_opens(now)
        return self._usage_log.opened_at(manifest)

    def lost_opens(self) -> bool:
        """Whether opens were lost since the last time, because too many came at once."""
        lost, self._lost_opens = self._lost_opens, False
        return lost

    def tells_opens(self) -> bool:
        """Whether every open of a published file is seen."""
        return self._opens is not None and not self._unwatched

    # --- inside, under the lock ---

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
                    self._reason = _told(error)

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
    """What is there for all snapshots."""
    yield _Directory(str(layout.root), _Kind.VIEWS)
    yield _Directory(str(layout.models), _Kind.LINKS)
    yield _Directory(str(layout.tree("")), _Kind.TREES)
    yield _Directory(str(layout.hub), _Kind.FOLDERS)
    yield _Directory(str(layout.ready), _Kind.READY)


def _of_snapshot(layout: Layout, manifest: Manifest, folders: Iterable[str]) -> Iterator[_Directory]:
    """What shows one snapshot, and where its blobs are."""
    for algorithm in {f.blob.algorithm for f in manifest.files}:
        yield _Directory(str(layout.blobs / algorithm), _Kind.BLOBS, algorithm)
    below = directories_of(f.path for f in manifest.files)
    shown = [(layout.tree(manifest.id), "")]
    for folder in folders:
        repo = layout.hub / folder
        shown.append((repo / "snapshots" / commit_of(manifest), folder))
        for path in (repo, repo / "snapshots", repo / "trees", *(at for at, _, _ in os.walk(repo / "refs"))):
            yield _Directory(str(path), _Kind.FOLDER, folder, manifests={manifest.id})
    for top, folder in shown:
        for each in below:
            path = f"{top}/{each}" if each else str(top)
            yield _Directory(path, _Kind.FILES, folder, each, {manifest.id})


def _told(error: OSError) -> str:
    """Why the kernel watches no more, and the setting that says so."""
    limit = {errno.ENOSPC: "fs.inotify.max_user_watches", errno.EMFILE: "fs.inotify.max_user_instances"}
    name = limit.get(error.errno or 0, "")
    return f"{error.strerror or error}" + (f" (sysctl {name})" if name else "")
