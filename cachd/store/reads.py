"""Our own reading of blobs, which steps aside while the kernel is asked who has them open.

The kernel counts this process, too (store/protection.py): a scrub that holds a blob open for minutes would
make its model look used. So a blob is open for one short read at a time, and none while somebody asks.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_SECONDS = 0.25


class Reads:
    """Reads by many threads at once, or one question. Questions go first."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._reading = 0
        self._asking = 0
        self._answering = threading.Lock()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Open, read and close inside: as short as one read takes."""
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
    def aside(self) -> Iterator[None]:
        """None of our reads is open inside; but one that the disk holds up is not waited for, and is seen."""
        with self._changed:
            self._asking += 1
        try:
            with self._answering:
                deadline = time.monotonic() + _PATIENCE_SECONDS
                with self._changed:
                    while self._reading and (left := deadline - time.monotonic()) > 0:
                        self._changed.wait(left)
                yield
        finally:
            with self._changed:
                self._asking -= 1
                self._changed.notify_all()
