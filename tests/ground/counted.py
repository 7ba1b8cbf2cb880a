"""Counts how often each thread takes a lock, so that a test sees that a step is guarded."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CountedLock:
    """A lock around another one. `taken`: how often, by thread."""

    def __init__(self, lock: Any) -> None:
        self._lock, self.taken = lock, Counter[int]()

    @property
    def here(self) -> int:
        """How often the calling thread took it."""
        return self.taken[threading.get_ident()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)

    def __enter__(self) -> None:
        self._lock.__enter__()
        self.taken[threading.get_ident()] += 1

    def __exit__(self, *exception: object) -> None:
        self._lock.__exit__(*exception)


@contextmanager
def counted(owner: object, name: str = "_lock") -> Iterator[CountedLock]:
    """Counts, inside the block, how often each thread takes the lock `name` of an object."""
    lock = getattr(owner, name)
    counts = CountedLock(lock)
    setattr(owner, name, counts)
    try:
        yield counts
    finally:
        setattr(owner, name, lock)
