"""Collects the names whose state has changed, for the one thread that writes the status files."""

from __future__ import annotations

import threading


class Changes:
    """The names marked since the last `take`. Any thread may mark; one thread takes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._names: set[str] = set()
        self._marked = self._taken = self._done = 0
        self._is_read = False

    def mark(self, name: str) -> None:
        """Say that the state of a name has changed."""
        with self._changed:
            self._names.add(name)
            self._marked += 1
            self._changed.notify_all()

    def wake(self) -> None:
        """Make `take` return now, even if no name is marked."""
        with self._changed:
            self._marked += 1
            self._changed.notify_all()

    def take(self, seconds: float | None) -> set[str]:
        """Wait for marked names and take them; empty after `seconds` (None: no limit).

        The call also reports that the names of the previous call have been handled.
        """
        with self._changed:
            self._is_read = True
            self._done = self._taken
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._marked > self._taken, seconds)
            self._taken = self._marked
            names, self._names = self._names, set()
            return names

    def settle(self, seconds: float) -> None:
        """Wait at most `seconds` until the names marked so far are handled. Does not wait if nobody takes."""
        with self._changed:
            wanted = self._marked
            self._changed.wait_for(lambda: self._done >= wanted or not self._is_read, seconds)

    def close(self) -> None:
        """Say that nobody will call `take` any more, so that `settle` does not wait."""
        with self._changed:
            self._is_read = False
            self._changed.notify_all()
