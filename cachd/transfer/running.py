"""Holds the pulls that have not ended."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cachd.transfer.request import Pull


class RunningPulls:
    """The pulls that have not ended, at most one for each name. Safe from any thread.

    While a thread holds `changing`, no other adds or removes a pull.
    """

    def __init__(self) -> None:
        self.changing = threading.RLock()
        self.is_closed = False
        self._by_name: dict[str, Pull] = {}
        self._unrepaired: Counter[str] = Counter()  # names that are being deleted or rolled back

    def __len__(self) -> int:
        return len(self._by_name)

    def of(self, name: str) -> Pull | None:
        """The running pull of a name, if any."""
        return self._by_name.get(name)

    def all(self) -> list[Pull]:
        """Every running pull."""
        with self.changing:
            return list(self._by_name.values())

    def add(self, pull: Pull) -> None:
        """Add a pull. The caller holds `changing`, and has found no pull of its name."""
        self._by_name[pull.spec.name] = pull

    def remove(self, pull: Pull) -> None:
        """Remove a pull, unless a newer one has its name."""
        with self.changing:
            if self._by_name.get(pull.spec.name) is pull:
                del self._by_name[pull.spec.name]

    @contextmanager
    def without_repairs(self, name: str) -> Iterator[None]:
        """Inside, `may_repair` returns False: a repair would bring back what the caller removes."""
        with self.changing:
            self._unrepaired[name] += 1
        try:
            yield
        finally:
            with self.changing:
                self._unrepaired -= Counter([name])  # which also drops a count of 0

    def may_repair(self, name: str) -> bool:
        """Whether a repair of the name may start. The caller holds `changing` until the pull is added."""
        return not self._unrepaired[name]

    def close(self) -> list[Pull]:
        """Note that the daemon is stopping its pulls. Returns those that are still running."""
        with self.changing:
            self.is_closed = True
            return self.all()
