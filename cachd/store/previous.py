"""What a name led to before: kept for a way back, until newer ones take the place.

previous/<name>.json holds the ready documents, the newest first, and the wish that was given up by a
rollback: whoever keeps names as listed leaves such a name alone until something else is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import structlog

from cachd import files
from cachd.model import Snapshot, Wish
from cachd.store import catalog, durable
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Past:
    """Of one name: the snapshots before, the newest first, and what was given up for one of them."""

    snapshots: tuple[Snapshot, ...] = ()
    given_up: Wish | None = None


class Previous:
    """The `keep` snapshots that each name led to before. Changed under the lock of Snapshots."""

    def __init__(self, layout: Layout, keep: int) -> None:
        self._layout, self._keep = layout, keep
        self._pasts = {path.stem: self._read(path.stem) for path in layout.previous.glob("[!.]*.json")}

    def of(self, name: str) -> list[Snapshot]:
        """Those that are still here, the newest first."""
        past = self._pasts.get(name, Past())
        return [s for s in past.snapshots[: self._keep] if self._layout.manifest(s.manifest).exists()]

    def given_up(self, name: str) -> Wish | None:
        """The wish that the last rollback of a name took back, if nothing was published there since."""
        return self._pasts.get(name, Past()).given_up

    def manifests(self) -> set[str]:
        """The snapshots kept for a way back."""
        return {s.manifest for s in self.all()}

    def all(self) -> list[Snapshot]:
        """Those of every name."""
        return [s for name in list(self._pasts) for s in self.of(name)]

    def replace(self, replaced: Snapshot | None, by: Snapshot, *, given_up: Wish | None) -> None:
        """Remember what a name led to until now. A full disk forgets it: the new one is what counts."""
        older = self.of(by.name)
        kept = [s for s in (replaced, *older) if s is not None and s.manifest != by.manifest]
        once = {s.manifest: s for s in reversed(kept)}
        if given_up is None and (replaced is None or replaced.wish == by.wish):
            given_up = self.given_up(by.name)  # repaired or refreshed: no other choice was made
        past = Past(tuple(list(reversed(once.values()))[: self._keep]), given_up)
        if past == self._pasts.get(by.name, Past()):
            return
        try:
            self._write(by.name, past)
        except OSError as error:
            if error.errno not in durable.FULL:
                raise
            log.warning("no room to remember what was before", name=by.name)

    def forget(self, name: str) -> Iterable[str]:
        """Keep nothing of a name any more; the snapshots that nothing keeps now."""
        past = self._pasts.pop(name, Past())
        durable.remove(self._layout.previous_file(name))
        return {s.manifest for s in past.snapshots} - self.manifests()

    def drop(self, manifest: str) -> None:
        """Lead no name back to a snapshot."""
        for name, past in list(self._pasts.items()):
            kept = tuple(s for s in past.snapshots if s.manifest != manifest)
            if kept != past.snapshots:
                self._write(name, Past(kept, past.given_up))

    def _write(self, name: str, past: Past) -> None:
        document = {
            "previous": [catalog.ready_document(s) for s in past.snapshots],
            "given_up": past.given_up.as_document() if past.given_up else None,
        }
        durable.write_file(self._layout.previous_file(name), json.dumps(document, indent=1).encode())
        self._pasts[name] = past

    def _read(self, name: str) -> Past:
        path = self._layout.previous_file(name)
        try:
            told = durable.read_document(path)
            return Past(
                tuple(catalog.snapshot_from(each) for each in told["previous"]),
                Wish.from_document(told["given_up"]) if told["given_up"] else None,
            )
        except files.UNREADABLE as error:
            catalog.check_passing(error, path)
            log.warning("what was before is forgotten", name=name, reason=repr(error))
            path.unlink(missing_ok=True)
            return Past()
