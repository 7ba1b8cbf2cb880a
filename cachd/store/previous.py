"""What a name led to before: kept for a way back, until newer ones take the place.

previous/<name>.json holds the ready documents, the newest first, and the spec that was given up by a
rollback: whoever keeps names as listed leaves such a name alone until something else is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from cachd import files
from cachd.model import ModelSpec, Snapshot
from cachd.store import catalog, durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class History:
    """Of one name: the snapshots before, the newest first, and what was given up for one of them."""

    snapshots: tuple[Snapshot, ...] = ()
    rolled_back_from: ModelSpec | None = None


class Previous:
    """The `keep` snapshots that each name led to before. Changed under the lock of Snapshots."""

    def __init__(self, layout: Layout, keep: int) -> None:
        self._layout, self._keep = layout, keep
        self._histories = {path.stem: self._read(path.stem) for path in layout.previous.glob("[!.]*.json")}

    def of(self, name: str) -> list[Snapshot]:
        """Those that are still here, the newest first."""
        history = self._histories.get(name, History())
        return [s for s in history.snapshots[: self._keep] if self._layout.manifest(s.manifest).exists()]

    def rolled_back_from(self, name: str) -> ModelSpec | None:
        """The spec that the last rollback of a name took back, if nothing was published there since."""
        return self._histories.get(name, History()).rolled_back_from

    def manifests(self) -> set[str]:
        """The snapshots kept for a way back."""
        return {s.manifest for s in self.all()}

    def all(self) -> list[Snapshot]:
        """Those of every name."""
        return [s for name in list(self._histories) for s in self.of(name)]

    def replace(self, replaced: Snapshot | None, by: Snapshot, *, rolled_back_from: ModelSpec | None) -> None:
        """Remember what a name led to until now. A full disk forgets it: the new one is what counts."""
        older = self.of(by.name)
        kept = [s for s in (replaced, *older) if s is not None and s.manifest != by.manifest]
        once = {s.manifest: s for s in reversed(kept)}
        if rolled_back_from is None and (replaced is None or replaced.spec == by.spec):
            rolled_back_from = self.rolled_back_from(
                by.name
            )  # repaired or refreshed: no other choice was made
        history = History(tuple(list(reversed(once.values()))[: self._keep]), rolled_back_from)
        if history == self._histories.get(by.name, History()):
            return
        try:
            self._write(by.name, history)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room to remember what was before", name=by.name)

    def forget(self, name: str) -> Iterable[str]:
        """Keep nothing of a name any more; the snapshots that nothing keeps now."""
        history = self._histories.pop(name, History())
        durable.remove(self._layout.previous_file(name))
        return {s.manifest for s in history.snapshots} - self.manifests()

    def drop(self, manifest: str) -> None:
        """Lead no name back to a snapshot."""
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
            told = durable.read_document(path)
            return History(
                tuple(catalog.snapshot_from(each) for each in told["previous"]),
                ModelSpec.from_document(told["rolled_back_from"]) if told["rolled_back_from"] else None,
            )
        except files.UNREADABLE as error:
            catalog.check_passing(error, path)
            log.warning("what was before is forgotten", name=name, reason=repr(error))
            path.unlink(missing_ok=True)
            return History()
