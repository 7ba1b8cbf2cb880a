"""Bounds how many requests wait for bytes or listings, so that threads are left for what is ready."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cachd.errors import Unavailable

_RETRY_SECONDS = 5.0


class Waits:
    """The requests that wait for a source: at most `most` at a time. Safe from any thread."""

    def __init__(self, most: int) -> None:
        self._places = threading.BoundedSemaphore(most)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Count one more during the block. Raises Unavailable when there are too many."""
        if not self._places.acquire(blocking=False):
            raise Unavailable("too many clients wait for models that are pulled", retry_after=_RETRY_SECONDS)
        try:
            yield
        finally:
            self._places.release()
