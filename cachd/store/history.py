"""Remembers the snapshots that each name led to before, so that `cachd rollback` can publish one again.

    previous/<name>.json   {"previous": [ready document, ...], "rolled_back_from": spec or null}
    rollbacks/<name>.json  {"to": ready document, "replaced": ready document or null,
                            "rolled_back_from": spec, "at": seconds since the epoch}

In `previous`, the newest snapshot is first. `rolled_back_from` is the spec that the last rollback replaced.
While it is set, models listed in the configuration do not bring that spec back by themselves
(upkeep/prewarm.py). A file in rollbacks/ is a rollback that has begun (rollbacks.py).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

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

    def as_document(self) -> dict[str, object]:
        """The JSON of a file in previous/."""
        return {
            "previous": [catalog.ready_document(s) for s in self.snapshots],
            "rolled_back_from": self.rolled_back_from.as_document() if self.rolled_back_from else None,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read the result of `as_document`. Raises one of UNREADABLE for anything else."""
        return cls(
            tuple(catalog.snapshot_from(each) for each in document["previous"]),
            ModelSpec.from_document(spec) if (spec := document["rolled_back_from"]) else None,
        )


@dataclass(frozen=True, slots=True)
class Rollback:
    """A rollback: the name of `to` shall lead to `to` again.

    `replaced`: the snapshot that was ready under the name; None if it was quarantined. `rolled_back_from`:
    the spec that had the name. `at`: when the rollback was asked for, in seconds since the epoch.
    """

    to: Snapshot
    replaced: Snapshot | None
    rolled_back_from: ModelSpec
    at: float

    def as_document(self) -> dict[str, object]:
        """The JSON of a file in rollbacks/."""
        return {
            "to": catalog.ready_document(self.to),
            "replaced": catalog.ready_document(self.replaced) if self.replaced else None,
            "rolled_back_from": self.rolled_back_from.as_document(),
            "at": self.at,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read the result of `as_document`. Raises one of UNREADABLE for anything else."""
        replaced, at = document["replaced"], float(document["at"])
        catalog.iso(at)  # refuses what is no date
        return cls(
            catalog.snapshot_from(document["to"]),
            catalog.snapshot_from(replaced) if replaced else None,
            ModelSpec.from_document(document["rolled_back_from"]),
            at,
        )


class Histories:
    """The last `keep` snapshots that each name led to before. Whoever changes them holds `Names.changing`."""

    def __init__(self, layout: Layout, keep: int) -> None:
        self._layout, self._keep = layout, keep
        self._histories = {path.stem: self._read(path.stem) for path in layout.previous.glob("[!.]*.json")}
        self._rollbacks = dict(self._read_rollbacks())
        self._before_rollback: dict[str, History] = {}

    def of(self, name: str) -> list[Snapshot]:
        """The previous snapshots of a name that are still on disk, the newest first."""
        history = self._histories.get(name, History())
        return [s for s in history.snapshots[: self._keep] if self._layout.manifest(s.manifest).exists()]

    def rolled_back_from(self, name: str) -> ModelSpec | None:
        """The spec that the last rollback of a name replaced; None if another spec was published since."""
        return self._histories.get(name, History()).rolled_back_from

    def manifests(self) -> set[str]:
        """The manifest ids of all snapshots that a later rollback, or one that has begun, may need."""
        begun = (s for each in self._rollbacks.values() for s in (each.to, each.replaced) if s)
        return {s.manifest for s in (*self.all(), *begun)}

    def all(self) -> list[Snapshot]:
        """The previous snapshots of all names."""
        return [s for name in list(self._histories) for s in self.of(name)]

    def replace(self, replaced: Snapshot | None, by: Snapshot, *, rolled_back_from: ModelSpec | None) -> None:
        """Remember `replaced` as the newest previous snapshot of the name that `by` is published under.

        On a full disk the history stays as it is, because a publish must not fail for its sake.
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

    def forget(self, name: str) -> Collection[str]:
        """Forget the history of a name. Returns the manifest ids that no other history has.

        Raises OSError.
        """
        history = self._histories.pop(name, History())
        durable.remove(self._layout.previous_file(name))
        return {s.manifest for s in history.snapshots} - self.manifests()

    def drop(self, manifest: str) -> None:
        """Remove a snapshot from the history of every name, so that no rollback can publish it.

        Raises OSError.
        """
        for name in [name for name, each in self._rollbacks.items() if each.to.manifest == manifest]:
            self.end_rollback(name)
        for name, history in list(self._histories.items()):
            kept = tuple(s for s in history.snapshots if s.manifest != manifest)
            if kept != history.snapshots:
                self._write(name, History(kept, history.rolled_back_from))

    # --- rollbacks that have begun ---

    def begin_rollback(self, rollback: Rollback) -> None:
        """Record a rollback, so that a restart completes it. Raises OSError."""
        name = rollback.to.name
        if self._rollbacks.get(name) == rollback:
            return  # a restart, or another request, completes it now
        document = json.dumps(rollback.as_document(), indent=1)
        durable.write_file(self._layout.rollback_file(name), document.encode())
        self._rollbacks[name] = rollback
        self._before_rollback[name] = self._histories.get(name, History())

    def end_rollback(self, name: str) -> None:
        """Something was published under the name, or the name was removed. Raises OSError."""
        if name in self._rollbacks:
            durable.remove(self._layout.rollback_file(name))
            del self._rollbacks[name]
            self._before_rollback.pop(name, None)

    def undo_rollback(self, name: str) -> None:
        """Restore the history and remove the record of a rollback that failed and left its name as it was.

        Does nothing if none has begun. If the disk fails, the record stays, and the next start completes the
        rollback.
        """
        if name not in self._before_rollback:
            return
        with suppress(OSError):
            if (before := self._before_rollback[name]) != self._histories.get(name, History()):
                self._write(name, before)
            self.end_rollback(name)

    def begun_rollback(self, name: str) -> Rollback | None:
        """The rollback of a name that has begun and not ended."""
        return self._rollbacks.get(name)

    def begun_rollbacks(self) -> list[Rollback]:
        """The rollbacks that have begun and not ended."""
        return list(self._rollbacks.values())

    # --- private ---

    def _write(self, name: str, history: History) -> None:
        document = json.dumps(history.as_document(), indent=1)
        durable.write_file(self._layout.previous_file(name), document.encode())
        self._histories[name] = history

    def _read(self, name: str) -> History:
        path = self._layout.previous_file(name)
        try:
            return History.from_document(durable.read_document(path))
        except files.UNREADABLE as error:
            catalog.check_passing(error, path)
            log.warning("unreadable history removed", name=name, reason=repr(error))
            path.unlink(missing_ok=True)
            return History()

    def _read_rollbacks(self) -> Iterator[tuple[str, Rollback]]:
        for path in sorted(self._layout.rollbacks.glob("[!.]*.json")):
            try:
                found = Rollback.from_document(durable.read_document(path))
                if path.stem != found.to.name:
                    raise ValueError(f"{path.name} is about {found.to.name}")
                yield path.stem, found
            except files.UNREADABLE as error:
                catalog.check_passing(error, path)
                log.warning("unreadable rollback removed", file=path.name, reason=repr(error))
                path.unlink(missing_ok=True)
