"""Remembers the snapshots that each name led to before, so that `cachd rollback` can publish one again.

    previous/<name>.json   {"previous": [ready document, ...], "rolled_back_from": spec or null}

The newest snapshot is first. `rolled_back_from` is the spec that the last rollback replaced. While it is set,
models listed in the configuration do not bring that spec back by themselves (upkeep/prewarm.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from cachd import files
from cachd.kernel import durable
from cachd.model import ModelSpec, Snapshot
from cachd.store import catalog
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """The previous snapshots of one name, the newest first, and the spec that its last rollback replaced."""

    snapshots: tuple[Snapshot, ...] = ()
    rolled_back_from: ModelSpec | None = None


class Previous:
    """The last `keep` snapshots that each name led to before. Snapshots holds its lock for every change."""

    def __init__(self, layout: Layout, keep: int) -> None:
        self._layout, self._keep = layout, keep
        self._histories = {path.stem: self._read(path.stem) for path in layout.previous.glob("[!.]*.json")}

    def of(self, name: str) -> list[Snapshot]:
        """The previous snapshots of a name that are still on disk, the newest first."""
        history = self._histories.get(name, History())
        return [s for s in history.snapshots[: self._keep] if self._layout.manifest(s.manifest).exists()]

    def rolled_back_from(self, name: str) -> ModelSpec | None:
        """The spec that the last rollback of a name replaced; None if another spec was published since."""
        return self._histories.get(name, History()).rolled_back_from

    def manifests(self) -> set[str]:
        """The manifest ids of the snapshots that are kept for a rollback."""
        return {s.manifest for s in self.all()}

    def all(self) -> list[Snapshot]:
        """The previous snapshots of all names."""
        return [s for name in list(self._histories) for s in self.of(name)]

    def replace(self, replaced: Snapshot | None, by: Snapshot, *, rolled_back_from: ModelSpec | None) -> None:
        """Remember `replaced` as the newest previous snapshot of the name that `by` is published under.

        On a full disk the history keeps its old state: a publish must not fail for it.
        """
        older = self.of(by.name)
        kept = [s for s in (replaced, *older) if s is not None and s.manifest != by.manifest]
        once = {s.manifest: s for s in reversed(kept)}
        if rolled_back_from is None and (replaced is None or replaced.spec == by.spec):
            # A repair or a refresh of the same spec does not end the effect of a rollback.
            rolled_back_from = self.rolled_back_from(by.name)
        history = History(tuple(list(reversed(once.values()))[: self._keep]), rolled_back_from)
        if history == self._histories.get(by.name, History()):
            return
        try:
            self._write(by.name, history)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("disk full: previous snapshot not remembered", name=by.name)

    def forget(self, name: str) -> Iterable[str]:
        """Forget the history of a name. Returns the manifest ids that no other history has."""
        history = self._histories.pop(name, History())
        durable.remove(self._layout.previous_file(name))
        return {s.manifest for s in history.snapshots} - self.manifests()

    def drop(self, manifest: str) -> None:
        """Remove a snapshot from the history of every name, so that no rollback can publish it."""
        for name, history in list(self._histories.items()):
            kept = tuple(s for s in history.snapshots if s.manifest != manifest)
            if kept != history.snapshots:
                self._write(name, History(kept, history.rolled_back_from))

    def _write(self, name: str, history: History) -> None:
        document = {
            "previous": [catalog.ready_document(s) for s in history.snapshots],
            "rolled_back_from": history.rolled_back_from.as_document() if history.rolled_back_from else None,
        }
        durable.write_file(self._layout.previous_file(name), json.dumps(document, indent=1).encode())
        self._histories[name] = history

    def _read(self, name: str) -> History:
        path = self._layout.previous_file(name)
        try:
            document = durable.read_document(path)
            return History(
                tuple(catalog.snapshot_from(each) for each in document["previous"]),
                ModelSpec.from_document(spec) if (spec := document["rolled_back_from"]) else None,
            )
        except files.UNREADABLE as error:
            catalog.check_passing(error, path)
            log.warning("unreadable history removed", name=name, reason=repr(error))
            path.unlink(missing_ok=True)
            return History()
