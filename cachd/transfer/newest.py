"""Remembers the newest pull of each name, also after its end."""

from __future__ import annotations

import threading

from cachd.store.store import Store
from cachd.transfer.progress import State
from cachd.transfer.request import Pull

MAX_REMEMBERED = 1000  # ended pulls that the API still shows; the oldest is forgotten first
MAX_REMEMBERED_BYTES = 16 << 20  # estimated memory that these may take together
_PULL_BYTES, _FILE_BYTES = 4000, 1000  # estimated memory of an ended pull, and of each file of its manifest


class NewestPulls:
    """The newest pull of each name, running or ended. Safe from any thread.

    Ended pulls are forgotten, the oldest first, when they are more than the bounds.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.RLock()
        self._by_name: dict[str, Pull] = {}
        self._ended_bytes: dict[str, int] = {}  # estimated memory of each ended pull, by name, oldest first

    def of(self, name: str) -> Pull | None:
        """The newest pull of a name, if it is remembered."""
        return self._by_name.get(name)

    def unfinished(self, name: str) -> Pull | None:
        """Like `of`, but None if the pull has ended."""
        found = self._by_name.get(name)
        return None if found is None or found.done.done() else found

    def awaited(self, name: str, now: float) -> Pull | None:
        """Like `unfinished`, and notes that somebody waits for it. `now`: monotonic seconds."""
        found = self.unfinished(name)
        if found is not None and found.awaited_since is None:
            found.awaited_since = now
        return found

    def shown(self, name: str) -> Pull | None:
        """Like `of`, but None if the pull was successful and its snapshot is no longer ready."""
        found = self._by_name.get(name)
        return None if found is None or self._is_undone(found) else found

    def all_shown(self) -> list[Pull]:
        """The pulls that `shown` returns, in the order of their names."""
        with self._lock:
            newest = sorted(self._by_name.items())
        return [pull for _, pull in newest if not self._is_undone(pull)]

    def add(self, pull: Pull) -> None:
        """Remember a pull in place of an earlier one of its name."""
        with self._lock:
            self.drop(pull.spec.name)
            self._by_name[pull.spec.name] = pull

    def drop(self, name: str) -> None:
        """Forget the newest pull of a name, if there is one."""
        with self._lock:
            self._by_name.pop(name, None)
            self._ended_bytes.pop(name, None)

    def drop_if_newest(self, pull: Pull) -> None:
        """Forget a pull, unless a newer one has its name."""
        with self._lock:
            if self._by_name.get(pull.spec.name) is pull:
                self.drop(pull.spec.name)

    def count_ended(self, ended: Pull) -> list[str]:
        """Count a pull that has ended, and forget the oldest ones over the bounds. Returns their names."""
        name, forgotten = ended.spec.name, list[str]()
        with self._lock:
            if self._by_name.get(name) is not ended:
                return forgotten
            self._ended_bytes[name] = self._ended_bytes.pop(name, 0) or _memory_of(ended)
            while self._are_too_many():
                oldest = next(iter(self._ended_bytes))
                self.drop(oldest)
                self._store.changes.mark(oldest)
                forgotten.append(oldest)
        return forgotten

    def _is_undone(self, ended: Pull) -> bool:
        """Whether the snapshot of a successful pull was deleted, evicted or quarantined."""
        return ended.progress.state is State.ready and self._store.names.get(ended.spec.name) is None

    def _are_too_many(self) -> bool:
        sizes = self._ended_bytes
        return len(sizes) > MAX_REMEMBERED or (sum(sizes.values()) > MAX_REMEMBERED_BYTES and len(sizes) > 1)


def _memory_of(ended: Pull) -> int:
    """The estimated memory of an ended pull, in bytes."""
    spec, manifest, error = ended.spec, ended.progress.manifest, ended.error
    texts = (*spec.include, *spec.exclude, str(error or ""), str(error and error.facts))
    files = len(manifest.files) if manifest else 0
    return _PULL_BYTES + files * _FILE_BYTES + 4 * sum(map(len, texts))
