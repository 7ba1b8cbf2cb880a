"""Keeps cachd's own reads of blobs apart from its questions to the kernel about open blobs.

The kernel's answer includes this process (store/protection.py): a scrub that held a blob open for minutes
would make its model look used. So cachd opens a blob for one short read at a time, and opens none during a
question.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PATIENCE_SECONDS = 0.25


class Reads:
    """Many threads may read at once, or one may ask the kernel. A waiting question holds back new reads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._reading = 0
        self._asking = 0
        self._answering = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Waits until no thread asks. Inside, the caller opens a blob, reads once and closes it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._asking)
            self._reading += 1
        try:
            yield
        finally:
            with self._changed:
                self._reading -= 1
                self._changed.notify_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Waits until cachd's reads have ended. Inside, none begins, and the caller asks the kernel.

        Waits for a quarter of a second at most. If a read hangs on the disk for longer, its blob looks used.
        """
        with self._changed:
            self._asking += 1
        try:
            with self._answering:
                deadline = self._clock() + _PATIENCE_SECONDS
                with self._changed:
                    while self._reading and (left := deadline - self._clock()) > 0:
                        self._changed.wait(left)
                yield
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()
