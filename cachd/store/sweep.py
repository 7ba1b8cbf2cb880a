"""What no model and no pull needs any more: found, then removed.

    snapshot   recorded without a name, and nobody reads it
    blob       in no recorded manifest, linked to by no view, claimed by no pull
    ingest     of a pull that ended before it was whole, claimed by no other
    damaged    a blob with wrong bytes whose model went before it was repaired

The trash is emptied apart from this (content.py).
A name in these directories that cachd never gives is not cachd's, and is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from cachd.errors import CachdError
from cachd.model import Digest
from cachd.store.catalog import iso
from cachd.store.content import ContentStore
from cachd.store.layout import Layout
from cachd.store.snapshots import Snapshots

log = structlog.get_logger(__name__)

KINDS = ("snapshot", "blob", "ingest", "damaged")


@dataclass(frozen=True, slots=True)
class Leftover:
    """One thing to remove: its kind, its name, the bytes of disk it takes, when it last changed (epoch)."""

    kind: str
    name: str
    size: int
    changed_at: float
    remove: Callable[[], int]

    def as_document(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "name": self.name,
            "changed_at": iso(self.changed_at),
        }


class Sweep:
    """The leftovers of one root."""

    def __init__(self, layout: Layout, content: ContentStore, snapshots: Snapshots) -> None:
        self._layout, self._content, self._snapshots = layout, content, snapshots

    def leftovers(
        self, *, before: float, keep: Collection[str] = (), pulls_known: bool = True
    ) -> Iterator[Leftover]:
        """What can go now: snapshots, and the blobs and ingests that changed last before `before`.

        `keep`: bases of refs whose unnamed snapshots stay, a pull is about to publish one. Blobs and ingests
        stay as long as not every running pull is known to have claimed what it needs.
        """
        for manifest, size in self._snapshots.unnamed(keep=keep):
            changed_at = _changed_at(self._layout.manifest(manifest))
            yield Leftover("snapshot", manifest, size, changed_at, partial(self._snapshots.drop, manifest))
        if pulls_known:
            with suppress(CachdError):  # a manifest that cannot be read may need any of the blobs
                needed = self._snapshots.blobs()
                yield from (found for found in self._unneeded(needed) if found.changed_at < before)

    def _unneeded(self, needed: Collection[Digest]) -> Iterator[Leftover]:
        content = self._content
        for path in self._layout.blobs.glob("*/*"):
            blob = _digest(path.parent.name, path.name)
            if blob and blob not in needed and content.is_free(blob):
                size, changed_at = _size_of(path), _changed_at(path)
                yield Leftover("blob", str(blob), size, changed_at, partial(content.drop, blob))
        yield from self._ingests(needed)
        for path, blob in self._unclaimed(self._layout.damaged_blobs, needed):
            drop = partial(content.forget_damaged, blob)
            yield Leftover("damaged", str(blob), _size_of(path), _changed_at(path), drop)

    def partial_downloads(self) -> list[Leftover]:
        """What ended pulls left behind unfinished, the oldest first: what may go before any model does."""
        with suppress(CachdError):  # a manifest that cannot be read may need any of the blobs
            return sorted(self._ingests(self._snapshots.blobs()), key=lambda found: found.changed_at)
        return []

    def _ingests(self, needed: Collection[Digest]) -> Iterator[Leftover]:
        for path, blob in self._unclaimed(self._layout.ingests, needed):
            if not self._content.is_expected(blob):
                changed_at = max(map(_changed_at, (path, path / "data", path / "journal")))
                drop = partial(self._content.drop_ingest, blob)
                yield Leftover("ingest", str(blob), _size_of(path), changed_at, drop)

    def _unclaimed(self, directory: Path, needed: Collection[Digest]) -> Iterator[tuple[Path, Digest]]:
        """What `directory` holds of blobs, each named ALGORITHM-HEX, that no snapshot and no pull needs."""
        for path in directory.iterdir():
            algorithm, _, digits = path.name.rpartition("-")
            blob = _digest(algorithm, digits)
            if blob and blob not in needed and not self._content.is_claimed(blob):
                yield path, blob


def remove(found: Leftover) -> int:
    """Remove one leftover, if nobody has come to need it meanwhile; bytes freed."""
    try:
        freed = found.remove()
    except (CachdError, OSError) as error:
        log.warning("leftover not removed", kind=found.kind, name=found.name, reason=str(error))
        return 0
    if freed:
        log.info("swept", kind=found.kind, name=found.name, freed_bytes=freed)
    return freed


def _digest(algorithm: str, digits: str) -> Digest | None:
    with suppress(CachdError):
        return Digest(algorithm, digits)
    return None


def _changed_at(path: Path) -> float:
    """When the file got its last byte or link; long ago when it is not there."""
    try:
        return os.lstat(path).st_ctime
    except OSError:
        return 0.0


def _size_of(path: Path) -> int:
    """Bytes of disk below a path that go when it goes: what other links keep is not counted."""
    total = 0
    for at in (path, *path.rglob("*")) if path.is_dir() and not path.is_symlink() else (path,):
        with suppress(FileNotFoundError):
            status = os.lstat(at)
            total += status.st_blocks * 512 if status.st_nlink == 1 else 0
    return total
