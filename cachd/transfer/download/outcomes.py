"""What one pull waits for: the ends of all its downloads."""

from __future__ import annotations

import threading

from cachd.errors import CachdError


class Outcomes:
    """Counts the downloads of one pull that have not ended, and keeps the first error. Safe from any thread.

    One object serves all downloads of a pull: a future for each small file would take as long as its bytes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._unfinished = 0
        self._error: CachdError | None = None

    def expect(self) -> None:
        """Count a download that begins."""
        with self._lock:
            self._unfinished += 1

    def note(self, error: CachdError | None) -> None:
        """Count the end of a download: its blob is here, or it failed with `error`."""
        with self._lock:
            self._unfinished -= 1
            self._error = self._error or error
            if error or not self._unfinished:
                self._changed.notify_all()

    def wait(self, seconds: float) -> bool:
        """Wait for the end of all downloads. Returns whether it came; raises the first error at once."""
        with self._lock:
            self._changed.wait_for(lambda: self._error or not self._unfinished, seconds)
            if self._error:
                raise self._error
            return not self._unfinished

    def wait_for_all(self) -> None:
        """Wait until every download has ended, whether or not one of them failed."""
        with self._lock:
            self._changed.wait_for(lambda: not self._unfinished)
