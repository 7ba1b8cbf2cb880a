"""Finds the snapshots of the ready names: by name, manifest or Hub folder, or in the order of their names."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable

from cachd.model import Snapshot


class ReadyNames:
    """The snapshot of each ready name.

    One thread at a time may change it. Any thread may read without a lock, because lists are replaced and
    never changed, and a name is in its groups before it leads to its snapshot.
    """

    def __init__(self, snapshots: Iterable[Snapshot] = ()) -> None:
        self._by_name = {snapshot.name: snapshot for snapshot in snapshots}
        self._sorted = sorted(self._by_name)
        groups = defaultdict[str, list[str]](list)
        for name in self._sorted:
            for key in _keys(self._by_name[name]):
                groups[key].append(name)
        self._groups = {key: tuple(names) for key, names in groups.items()}  # each sorted

    def get(self, name: str) -> Snapshot | None:
        """The snapshot of a ready name; None if the name is not ready."""
        return self._by_name.get(name)

    def all(self) -> list[Snapshot]:
        """All of them, sorted by name."""
        return self._known(self._sorted)

    def of(self, manifest: str) -> list[Snapshot]:
        """Those of one manifest, sorted by name."""
        return [s for s in self._known(self._groups.get(manifest, ())) if s.manifest == manifest]

    def in_hub_folder(self, folder: str) -> list[Snapshot]:
        """Those of one folder of the Hub view, sorted by name."""
        return [s for s in self._known(self._groups.get(f"hub/{folder}", ())) if s.hub_folder == folder]

    def after(self, name: str, count: int) -> list[str]:
        """The first `count` names that sort after `name`."""
        names = self._sorted
        begin = bisect_right(names, name)
        return names[begin : begin + count]

    def put(self, snapshot: Snapshot) -> None:
        """Let a name lead to this snapshot."""
        name, before = snapshot.name, self._by_name.get(snapshot.name)
        self._add(name, _keys(snapshot))
        if before is None:
            at = bisect_left(self._sorted, name)
            self._sorted = [*self._sorted[:at], name, *self._sorted[at:]]
        self._by_name[name] = snapshot  # from here on, readers find it, in all its groups
        if before is not None:
            self._remove(name, _keys(before) - _keys(snapshot))

    def remove(self, name: str) -> None:
        """The name is not ready. Does nothing if it was not."""
        before = self._by_name.pop(name, None)
        if before is None:
            return
        at = bisect_left(self._sorted, name)
        self._sorted = [*self._sorted[:at], *self._sorted[at + 1 :]]
        self._remove(name, _keys(before))

    def _known(self, names: Iterable[str]) -> list[Snapshot]:
        """The snapshots of these names; without those that another thread removes meanwhile."""
        return [found for name in names if (found := self._by_name.get(name)) is not None]

    def _add(self, name: str, keys: Iterable[str]) -> None:
        for key in keys:
            names = self._groups.get(key, ())
            at = bisect_left(names, name)
            if names[at : at + 1] != (name,):
                self._groups[key] = (*names[:at], name, *names[at:])

    def _remove(self, name: str, keys: Iterable[str]) -> None:
        for key in keys:
            left = tuple(each for each in self._groups.get(key, ()) if each != name)
            if left:
                self._groups[key] = left
            else:
                self._groups.pop(key, None)


def _keys(snapshot: Snapshot) -> set[str]:
    """The groups that the name of a snapshot is in."""
    return {snapshot.manifest, f"hub/{snapshot.hub_folder}"}
