"""Knows which blobs the running pulls need."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from cachd.model import Digest


class Claims:
    """The claims of all running pulls. A claimed blob is not removed. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[Digest, list[str]] = {}  # the names of the pulls that need a blob, one per pull

    @contextmanager
    def claimed(self, blobs: Collection[Digest], name: str) -> Iterator[None]:
        """Inside, the pull of `name` claims these blobs, which need not be here."""
        with self._lock:
            for blob in blobs:
                self._names.setdefault(blob, []).append(name)
        try:
            yield
        finally:
            with self._lock:
                for blob in blobs:
                    self._names[blob].remove(name)
                    if not self._names[blob]:
                        del self._names[blob]

    @contextmanager
    def paused(self) -> Iterator[Collection[Digest]]:
        """Inside, no claim begins or ends. Yields the claimed blobs.

        Whoever removes a blob does it inside: a pull that claims it later finds it gone.
        """
        with self._lock:
            yield self._names.keys()

    def is_claimed(self, blob: Digest) -> bool:
        """Whether a running pull claims the blob, which need not be here."""
        with self._lock:
            return blob in self._names

    def blobs(self) -> set[Digest]:
        """The blobs that running pulls claim."""
        with self._lock:
            return set(self._names)

    def names(self, blob: Digest) -> set[str]:
        """The names whose pulls claim the blob."""
        with self._lock:
            return set(self._names.get(blob, ()))
