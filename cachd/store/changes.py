"""Which names have changed: marked by whoever changes one, taken by the one who keeps account of them."""

from __future__ import annotations

import threading


class Changes:
    """The names marked since they were last taken. Safe from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._names: set[str] = set()
        self._marked = self._taken = self._done = 0
        self._is_read = False

    def mark(self, name: str) -> None:
        with self._changed:
            self._names.add(name)
            self._marked += 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Let `take` return now."""
        with self._changed:
            self._marked += 1
            self._changed.notify_all()

    def take(self, seconds: float | None) -> set[str]:
        """The marked names, waited for at most `seconds`, None: for ever. What was taken before is done."""
        with self._changed:
            self._is_read = True
            self._done = self._taken
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._marked > self._taken, seconds)
            self._taken = self._marked
            names, self._names = self._names, set()
            return names

    def settle(self, seconds: float) -> None:
        """Wait until all that was marked so far is done, if anybody does it, and no longer than `seconds`."""
        with self._changed:
            wanted = self._marked
            self._changed.wait_for(lambda: self._done >= wanted or not self._is_read, seconds)

    def close(self) -> None:
        """Nobody takes any more."""
        with self._changed:
            self._is_read = False
            self._changed.notify_all()
