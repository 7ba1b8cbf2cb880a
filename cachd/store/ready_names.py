"""Finds the snapshots of the ready names by name, by manifest, or in order, however many there are."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from cachd.model import Snapshot


class ReadyNames:
    """The snapshot of each ready name.

    Any thread may read without a lock, because each change puts a new list in the place of the old one. One
    thread at a time may change it.
    """

    def __init__(self, snapshots: Iterable[Snapshot] = ()) -> None:
        self._by_name = {snapshot.name: snapshot for snapshot in snapshots}
        self._sorted = sorted(self._by_name)
        self._of_manifest: dict[str, tuple[str, ...]] = {}
        for name in self._sorted:
            self._add_to_manifest(self._by_name[name].manifest, name)

    def get(self, name: str) -> Snapshot | None:
        """The snapshot of a ready name; None if the name is not ready."""
        return self._by_name.get(name)

    def all(self) -> list[Snapshot]:
        """All of them, sorted by name."""
        return self._known(self._sorted)

    def of(self, manifest: str) -> list[Snapshot]:
        """Those of one manifest, sorted by name."""
        return [s for s in self._known(self._of_manifest.get(manifest, ())) if s.manifest == manifest]

    def after(self, name: str, count: int) -> list[str]:
        """The first `count` names that sort after `name`."""
        names = self._sorted
        begin = bisect_right(names, name)
        return names[begin : begin + count]

    def put(self, snapshot: Snapshot) -> None:
        """Let a name lead to this snapshot."""
        name, before = snapshot.name, self._by_name.get(snapshot.name)
        self._by_name[name] = snapshot
        if before is None:
            at = bisect_left(self._sorted, name)
            self._sorted = [*self._sorted[:at], name, *self._sorted[at:]]
        elif before.manifest != snapshot.manifest:
            self._remove_from_manifest(before.manifest, name)
        self._add_to_manifest(snapshot.manifest, name)

    def remove(self, name: str) -> None:
        """The name is not ready. Does nothing if it was not."""
        before = self._by_name.pop(name, None)
        if before is None:
            return
        at = bisect_left(self._sorted, name)
        self._sorted = [*self._sorted[:at], *self._sorted[at + 1 :]]
        self._remove_from_manifest(before.manifest, name)

    def _known(self, names: Iterable[str]) -> list[Snapshot]:
        """The snapshots of these names; without those that another thread removes meanwhile."""
        return [found for name in names if (found := self._by_name.get(name)) is not None]

    def _add_to_manifest(self, manifest: str, name: str) -> None:
        names = self._of_manifest.get(manifest, ())
        self._of_manifest[manifest] = tuple(sorted({*names, name}))

    def _remove_from_manifest(self, manifest: str, name: str) -> None:
        left = tuple(each for each in self._of_manifest.get(manifest, ()) if each != name)
        if left:
            self._of_manifest[manifest] = left
        else:
            self._of_manifest.pop(manifest, None)
