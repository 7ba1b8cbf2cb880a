"""The scrub log: when each blob was last verified, so that a restart continues the scrub."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import CachdError
from cachd.kernel import durable
from cachd.model import Digest

log = structlog.get_logger(__name__)

_SAVE_SECONDS = 10.0


class ScrubLog:
    """When each blob was last verified (seconds since the epoch), kept across restarts. Safe from any thread.

    A blob counts as verified when it has been hashed as it arrived, or read and found intact. `now`: seconds
    since the epoch. `clock`: seconds that only go forward, for the time between two saves.
    """

    def __init__(
        self,
        path: Path,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._now, self._clock = path, now, clock
        self._lock = threading.Lock()
        self._at: dict[Digest, float] = {}
        self._saved = self._clock()
        self._changed = False
        try:
            document = durable.read_document(self._path)
            self._at = {Digest.parse(blob): min(float(at), self._now()) for blob, at in document.items()}
        except FileNotFoundError:
            pass
        except files.UNREADABLE as error:
            log.warning("scrub log not read", reason=repr(error))

    def know(self, blobs: Iterable[Digest]) -> None:
        """Keep the times of these blobs and forget all others. A new blob counts as verified now."""
        with self._lock:
            known = {blob: self._at.get(blob, self._now()) for blob in blobs}
            self._changed |= known != self._at
            self._at = known

    def times(self) -> list[tuple[Digest, float]]:
        """Each known blob, with the time when it was last verified."""
        with self._lock:
            return list(self._at.items())

    def oldest(self, blobs: Iterable[Digest], *, since: float = 0.0) -> float | None:
        """The oldest verification of any of these blobs; None when `blobs` is empty.

        A blob that is not known yet counts as verified at `since`.
        """
        with self._lock:
            times = [self._at.get(blob, since) for blob in blobs]
        return min(times, default=None)

    def verified(self, blob: Digest) -> None:
        """Record that a blob was verified just now. Saves the log if it was not saved lately."""
        with self._lock:
            self._at[blob] = self._now()
            self._changed = True
            is_due = self._clock() - self._saved > _SAVE_SECONDS
        if is_due:
            self.save()

    def forget(self, blob: Digest) -> None:
        """Drop the time of a blob that is removed or damaged."""
        with self._lock:
            self._at.pop(blob, None)
            self._changed = True

    def save(self) -> None:
        """Write the log if it has changed. A failure is only logged."""
        with self._lock:
            if not self._changed:
                return
            document = json.dumps({str(blob): at for blob, at in self._at.items()})
            self._changed, self._saved = False, self._clock()
        try:
            with durable.disk_errors(self._path):
                if document == "{}":
                    durable.remove(self._path)
                else:
                    durable.write_file(self._path, document.encode(), mode=0o600)
        except CachdError as error:
            log.warning("scrub log not written", reason=error.detail)
