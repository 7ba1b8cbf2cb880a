"""Finds and removes what no model and no pull needs any more.

    snapshot   recorded, but no name leads to it, no rollback needs it, and nobody uses it
    blob       in no recorded manifest, linked to by no view, claimed by no pull
    ingest     the partial download of a pull that ended; no snapshot and no other pull needs it
    damaged    a blob with wrong bytes whose model was removed before it was repaired

The trash is emptied by content/trash.py. Files with names that cachd never gives are left alone.
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
from cachd.store.content.blobs import freed_by
from cachd.store.index import Index
from cachd.store.withdrawals import Withdrawals

log = structlog.get_logger(__name__)

KINDS = ("snapshot", "blob", "ingest", "damaged")


@dataclass(frozen=True, slots=True)
class Leftover:
    """One thing to remove.

    `kind`: one of KINDS. `size`: bytes on disk that its removal frees. `changed_at`: seconds since the epoch.
    `remove`: removes it unless something needs it by then, and returns the bytes freed.
    """

    kind: str
    name: str
    size: int
    changed_at: float
    remove: Callable[[], int]

    def as_document(self) -> dict[str, object]:
        """What the API shows of it."""
        return {"kind": self.kind, "name": self.name, "changed_at": iso(self.changed_at)}


class Sweep:
    """The leftovers of one root."""

    def __init__(self, index: Index, withdrawals: Withdrawals) -> None:
        self._layout, self._content = index.layout, index.content
        self._manifests, self._withdrawals = index.manifests, withdrawals

    def leftovers(
        self, *, before: float, keep: Collection[str] = (), pulls_known: bool = True
    ) -> Iterator[Leftover]:
        """All unneeded snapshots, and the other leftovers that changed last before `before`.

        `keep`: bases (refs without their revision) of running pulls, whose unnamed snapshots are left out.
        `pulls_known`: whether every running pull has claimed its blobs; if not, only snapshots are listed.
        """
        for manifest, size in self._withdrawals.unneeded(keep=keep):
            changed_at = _changed_at(self._layout.manifest(manifest))
            yield Leftover("snapshot", manifest, size, changed_at, partial(self._withdrawals.drop, manifest))
        if pulls_known:
            with suppress(CachdError):  # a manifest that cannot be read may need any of the blobs
                needed = self._manifests.blobs()
                yield from (found for found in self._unneeded(needed) if found.changed_at < before)

    def _unneeded(self, needed: Collection[Digest]) -> Iterator[Leftover]:
        content = self._content
        for path in self._layout.blobs.glob("*/*"):
            blob = _digest(path.parent.name, path.name)
            if blob and blob not in needed and content.removal.is_free(blob):
                size, changed_at = freed_by(path), _changed_at(path)
                yield Leftover("blob", str(blob), size, changed_at, partial(content.removal.drop, blob))
        yield from self._ingests(needed)
        for path, blob in self._unclaimed(self._layout.damaged_blobs, needed):
            drop = partial(content.damaged.forget, blob)
            yield Leftover("damaged", str(blob), freed_by(path), _changed_at(path), drop)

    def partial_downloads(self) -> list[Leftover]:
        """The ingests that ended pulls left behind, the oldest first. They are evicted before any model."""
        with suppress(CachdError):  # a manifest that cannot be read may need any of the blobs
            return sorted(self._ingests(self._manifests.blobs()), key=lambda found: found.changed_at)
        return []

    def _ingests(self, needed: Collection[Digest]) -> Iterator[Leftover]:
        for path, blob in self._unclaimed(self._layout.ingests, needed, has_size=True):
            if not self._content.owners.is_expected(blob, path):
                changed_at = max(map(_changed_at, (path, path / "data", path / "journal")))
                drop = partial(self._content.removal.drop_ingest, blob)
                yield Leftover("ingest", str(blob), freed_by(path), changed_at, drop)

    def _unclaimed(
        self, directory: Path, needed: Collection[Digest], *, has_size: bool = False
    ) -> Iterator[tuple[Path, Digest]]:
        """The entries of `directory` named ALGORITHM-HEX after a blob that no snapshot and no pull needs.

        `has_size`: the size of the blob follows the name, as ALGORITHM-HEX-SIZE.
        """
        for path in directory.iterdir():
            name, _, size = path.name.rpartition("-") if has_size else (path.name, "", "0")
            algorithm, _, digits = name.rpartition("-")
            blob = _digest(algorithm, digits) if size.isdecimal() else None
            if blob and blob not in needed and not self._content.claims.is_claimed(blob):
                yield path, blob


def remove(found: Leftover) -> int:
    """Remove one leftover unless something needs it by now. Returns the bytes freed; logs a failure."""
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
    """When the inode of a file last changed, in seconds since the epoch; 0 if it is not there."""
    try:
        return os.lstat(path).st_ctime
    except OSError:
        return 0.0
