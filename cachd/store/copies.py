"""Keeps the files of the views that are copies of their blobs, because a client refuses several hard links.

    .cachd/copies/<manifest>/places.json        the directories that show the snapshot, and the copies there
    .cachd/copies/<manifest>/<algorithm>-<hex>  a hard link to the blob, which the snapshot needs as before

A copy is made in staging, synced, verified by its digest and then renamed into the view. A pull makes its
copies before it publishes and pays for them; only what is missing after a crash is made during a publish.

    absent --stage--> staged --place--> in a view --discard--> in the trash

On a file system with reflinks (ioctl FICLONE), a copy shares the disk blocks of its blob and takes none.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import structlog

from cachd.errors import CachdError, Corrupt
from cachd.files import UNREADABLE
from cachd.kernel import durable
from cachd.kernel.clones import can_clone, clone
from cachd.kernel.leases import is_open
from cachd.model import Digest, File, Manifest, commit_of
from cachd.store.content import ContentStore
from cachd.store.content.blobs import blocks_of
from cachd.store.ingest.part_lines import parts_of
from cachd.store.layout import Layout
from cachd.store.scrub import Replaced, verify_blob

log = structlog.get_logger(__name__)

_VIEWS = 2  # each has a copy of its own
_STEP_BYTES = 8 << 20
_NO_PLACES: Mapping[str, Digest] = {}
# Called with the bytes that come next: inside its context, they may get disk blocks.
Pay = Callable[[int], AbstractContextManager[object]]


class Copies:
    """The copies of one root. Any thread may ask; whoever changes the views holds `Names.changing`.

    Methods may raise OSError, or NoSpace, DiskFailed, Leased and Unavailable. `own_opens`: the context in
    which an open of these paths does not count as a use (`Watch.own_opens`).
    """

    def __init__(
        self,
        layout: Layout,
        content: ContentStore,
        own_opens: Callable[[Collection[str]], AbstractContextManager[object]],
    ) -> None:
        self._layout, self._content, self._own_opens = layout, content, own_opens
        self._lock = threading.Lock()
        self._staged: dict[Digest, list[str]] = defaultdict(list)
        self._count = 0
        self._tops: dict[str, list[str]] = {}
        self._places: dict[str, Mapping[str, Digest]] = {}
        self._read()
        self._can_clone: bool | None = None

    # --- asking ---

    @property
    def shares_blocks(self) -> bool:
        """Whether copies take no disk blocks: tried at the first call; no while a full disk hides it."""
        with self._lock:
            if self._can_clone is None:
                self._can_clone = can_clone(self._layout.staging / "clone")
            return self._can_clone or False

    def places(self) -> list[str]:
        """The paths of all copies that take disk blocks of their own."""
        return list(self.all_places()) if self._places and not self.shares_blocks else []

    def all_places(self) -> set[str]:
        """The paths of all copies. They need not be there."""
        return {place for places in list(self._places.values()) for place in places}

    def of(self, manifest: str) -> Mapping[str, Digest]:
        """The paths of the copies of a snapshot, each with its blob. They need not be there."""
        return self._places.get(manifest, _NO_PLACES)

    def of_blob(self, blob: Digest) -> list[str]:
        """The paths of all copies of a blob."""
        found = {p for places in list(self._places.values()) for p, each in places.items() if each == blob}
        return sorted(found)

    def lacking(self, manifest: Manifest) -> int:
        """Bytes of disk that the copies of a manifest still need. Both views count."""
        if not manifest.copied or self.shares_blocks:
            return 0
        tops = self._tops.get(manifest.id, [])
        unknown = max(_VIEWS - len(tops), 0)
        return sum(f.size * (unknown + self._count_missing(f, tops)) for f in _copied(manifest))

    def all_of(self, manifest: Manifest) -> int:
        """Bytes of disk that all copies of a manifest take, if there are none yet."""
        files = _copied(manifest)
        return sum(f.size for f in files) * _VIEWS if files and not self.shares_blocks else 0

    def taken(self, manifest: str) -> int:
        """Bytes of disk that the copies of a snapshot take now."""
        places = self.of(manifest)
        return sum(map(blocks_of, places)) if places and not self.shares_blocks else 0

    def read_by_pods(self, manifest: Manifest) -> dict[str, int]:
        """The files whose pages pods use, with their sizes: blobs, and copies of the plain view."""
        tree, copied = self._layout.tree(manifest.id), set(manifest.copied)
        return {
            f"{tree}/{manifest.place_of(f.path)}" if f.path in copied else self._content.at(f.blob): f.size
            for f in manifest.files
        }

    def opening(self, path: str) -> AbstractContextManager[object]:
        """The context in which cachd opens a file of `read_by_pods`, so that this is no use of a model."""
        is_copy = path.startswith(f"{self._layout.trees}/")  # nobody hears of an open of a blob
        return self._own_opens([path]) if is_copy else nullcontext()

    def is_intact(self, file: File, place: str) -> bool:
        """Whether a copy is in place, without reading it. Restores its mode.

        The time of a copy is that of its blob, and any write changes it.
        """
        try:
            status, blob = os.lstat(place), os.lstat(self._content.at(file.blob))
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            return False
        is_copy = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == file.size
        if not is_copy or status.st_mtime_ns != blob.st_mtime_ns:
            return False
        durable.keep_mode(place, durable.SEALED, status)
        return True

    def is_open(self, manifest: str) -> bool:
        """Whether a process has a copy of the snapshot open. The caller has paused cachd's own reads."""
        places = self.of(manifest)
        if not places:
            return False
        with self._own_opens(places):
            return is_open(places)

    def wrong(self, file: File, place: str, took: Callable[[int], None]) -> str | None:
        """Read a copy completely. Returns what is wrong; None if nothing is, or if it is no longer there."""
        try:
            return _verified(self._content, file, Path(place), took, lambda: self._own_opens([place]))
        except Replaced:
            return None

    def distrust(self, place: str) -> None:
        """Reset the time of a damaged copy, so that it never counts as intact again, even after a crash."""
        if _is_single(place):
            with durable.disk_errors(place), self._own_opens([place]):
                fd = durable.open_file(place, os.O_RDONLY)
                try:
                    durable.seal(fd, 0)
                finally:
                    os.close(fd)

    # --- making ---

    @contextmanager
    def staged(self, manifest: Manifest, folder: str, pay: Pay) -> Iterator[None]:
        """Make the copies that a publish needs to show a manifest in this folder of the Hub view, too.

        Those that it does not take are removed. `pay` may raise Cancelled or NoSpace. Raises Corrupt if a
        blob turns out to be damaged.
        """
        made: list[str] = []
        tops = _shown_in(self._layout, manifest, folder)
        try:
            for file in _copied(manifest):
                for _ in range(self._count_missing(file, tops)):
                    made.append(self._make(file, pay))
                    with self._lock:
                        self._staged[file.blob].append(made[-1])
            yield
        finally:
            with self._lock:
                for blob, paths in list(self._staged.items()):
                    self._staged[blob] = [path for path in paths if path not in made]
                    if not self._staged[blob]:
                        del self._staged[blob]
            for path in made:
                durable.unlink(path)

    def place(self, file: File, path: str) -> None:
        """Put a copy of a file's blob at a path of a view, unless an intact one is there."""
        if self.is_intact(file, path):
            return
        with self._lock:
            staged = self._staged[file.blob].pop() if self._staged.get(file.blob) else None
        durable.move(staged or self._make(file, lambda _: nullcontext()), path)

    # --- which snapshot has which ---

    def record(self, manifest: Manifest, folder: str) -> None:
        """Record the copies of a snapshot durably, before the first is placed.

        It is shown in this folder of the Hub view, in the plain view, and where it was shown before.
        """
        if not manifest.copied:
            return
        directory, files = self._layout.copies_of(manifest.id), _copied(manifest)
        durable.make_directories(directory)
        for blob in {file.blob for file in files}:
            link = directory / _name(blob)
            durable.link(self._content.at(blob), link, beside=self._layout.staging / "link")
        tops = sorted({*_shown_in(self._layout, manifest, folder), *self._tops.get(manifest.id, [])})
        shown = [top.removeprefix(f"{self._layout.root}/") for top in tops]
        document = {"shown": shown, "files": {file.path: str(file.blob) for file in files}}
        durable.write_file(directory / "places.json", json.dumps(document).encode())
        self._know(manifest.id, tops, {file.path: file.blob for file in files})

    def forget_blob(self, manifest: str, blob: Digest) -> None:
        """Remove the snapshot's link to a damaged blob. The next `record` links to the repaired one."""
        if manifest in self._places:
            durable.remove(self._layout.copies_of(manifest) / _name(blob))

    def discard(self, manifest: str) -> dict[Path, int]:
        """Move the copies of a snapshot to the trash, but those that another snapshot shows, too.

        Returns the paths now in the trash, each with its bytes.
        """
        trashed: dict[Path, int] = {}
        others = {place for each, places in self._places.items() if each != manifest for place in places}
        for place, blob in self.of(manifest).items():
            if place in others or not _is_single(place):
                continue
            size, trash = blocks_of(place), self._content.trash.new_path(blob)
            with writable(Path(place).parent):
                durable.take_away(Path(place), trash)
            trashed[trash] = 0 if self.shares_blocks else size
        durable.remove_tree(self._layout.copies_of(manifest))
        self._forget(manifest)
        return trashed

    def settle(self, recorded: Collection[str]) -> None:
        """At start, remove what belongs to snapshots that are not recorded any more."""
        for each in os.listdir(self._layout.copies):
            if each not in recorded:
                durable.remove_tree(self._layout.copies_of(each))
                self._forget(each)

    # --- private ---

    def _read(self) -> None:
        for each in os.listdir(self._layout.copies):
            try:
                found = durable.read_document(self._layout.copies_of(each) / "places.json")
                blobs = {path: Digest.parse(str(blob)) for path, blob in found["files"].items()}
                self._know(each, [f"{self._layout.root}/{top}" for top in found["shown"]], blobs)
            except FileNotFoundError:  # a crash came before the first copy
                continue
            except (CachdError, *UNREADABLE) as error:
                log.warning("list of copies unreadable", manifest=each, reason=repr(error))

    def _know(self, manifest: str, tops: list[str], blobs: Mapping[str, Digest]) -> None:
        self._tops[manifest] = tops
        self._places[manifest] = {f"{top}/{path}": blob for top in tops for path, blob in blobs.items()}

    def _forget(self, manifest: str) -> None:
        self._tops.pop(manifest, None)
        self._places.pop(manifest, None)

    def _count_missing(self, file: File, tops: Iterable[str]) -> int:
        return sum(not self.is_intact(file, f"{top}/{file.path}") for top in tops)

    def _make(self, file: File, pay: Pay) -> str:
        """Make a durable, verified copy in staging. Returns its path."""
        with self._lock:
            self._count += 1
            path = f"{self._layout.staging}/copy-{self._count}"
        blob = self._content.path(file.blob)
        try:
            with durable.disk_errors(path), self._content.reads.reading():
                is_clone = self.shares_blocks and clone(blob, path)
            if not is_clone:
                _fill(self._content, file, path, pay)
                wrong = _verified(self._content, file, Path(path), lambda _: None, nullcontext)
                if wrong:
                    raise Corrupt(
                        f"{file.path}: the copy for the views differs from its blob: {wrong}",
                        hint="the next scrub examines the blob; look at the node's kernel log",
                    )
        except BaseException:
            durable.unlink(path)
            raise
        return path


def _verified(
    content: ContentStore,
    file: File,
    path: Path,
    took: Callable[[int], None],
    opening: Callable[[], AbstractContextManager[object]],
) -> str | None:
    parts = parts_of(content.path(file.blob))
    return verify_blob(path, file, content.reads, took, parts=parts, opening=opening)


def _fill(content: ContentStore, file: File, path: str, pay: Pay) -> None:
    """Copy the bytes of a blob to a new file, and make it durable with the blob's mode and time."""
    with durable.disk_errors(path), durable.new_file(path) as fd:
        start = 0
        while start < file.size:
            count = min(_STEP_BYTES, file.size - start)
            with pay(count):
                durable.preallocate(fd, start, count)
            with content.reads.reading(), content.opened(file) as opened:
                opened.seek(start)
                durable.write_at(fd, memoryview(opened.read(count)), start)
            start += count
        durable.seal(fd, os.lstat(content.at(file.blob)).st_mtime_ns)


def _copied(manifest: Manifest) -> list[File]:
    paths = set(manifest.copied)
    return [file for file in manifest.files if file.path in paths]


def _name(blob: Digest) -> str:
    return f"{blob.algorithm}-{blob.hex}"


def _shown_in(layout: Layout, manifest: Manifest, folder: str) -> list[str]:
    """The directories of both views below which a manifest's copies have their own paths."""
    return [f"{layout.tree(manifest.id)}{manifest.below}", str(layout.commit(folder, commit_of(manifest)))]


def _is_single(place: str) -> bool:
    """Whether a place is a regular file with one link."""
    try:
        status = os.lstat(place)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1


@contextmanager
def writable(directory: Path) -> Iterator[None]:
    """Inside, names in a read-only directory can be changed by its owner. Raises OSError."""
    mode = stat.S_IMODE(os.stat(directory).st_mode)
    os.chmod(directory, mode | 0o200)
    try:
        yield
    finally:
        os.chmod(directory, mode)
