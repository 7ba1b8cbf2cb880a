"""When each blob was last known to be whole: remembered, so that a restart does not begin the scrub anew."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import structlog

from cachd import files
from cachd.errors import CachdError
from cachd.model import Digest
from cachd.store import durable

log = structlog.get_logger(__name__)

_SAVE_SECONDS = 10.0


class ScrubLog:
    """When each blob was last known to be whole; across restarts. Safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._at: dict[Digest, float] = {}
        self._saved = time.monotonic()
        self._changed = False
        try:
            told = durable.read_document(self._path)
            self._at = {Digest.parse(blob): min(float(at), time.time()) for blob, at in told.items()}
        except FileNotFoundError:
            pass
        except files.UNREADABLE as error:
            log.warning("times of verification not read", reason=repr(error))

    def know(self, blobs: Iterable[Digest]) -> None:
        """These are the blobs there are; one not known yet was hashed when it came, just now."""
        with self._lock:
            known = {blob: self._at.get(blob, time.time()) for blob in blobs}
            self._changed |= known != self._at
            self._at = known

    def ages(self) -> list[tuple[Digest, float]]:
        with self._lock:
            return list(self._at.items())

    def oldest(self, blobs: Iterable[Digest], *, since: float = 0.0) -> float | None:
        """When the one of them was whole that was read the longest ago; `since` for those not known yet."""
        with self._lock:
            times = [self._at.get(blob, since) for blob in blobs]
        return min(times, default=None)

    def is_whole(self, blob: Digest) -> None:
        with self._lock:
            self._at[blob] = time.time()
            self._changed = True
            is_due = time.monotonic() - self._saved > _SAVE_SECONDS
        if is_due:
            self.save()

    def forget(self, blob: Digest) -> None:
        with self._lock:
            self._at.pop(blob, None)
            self._changed = True

    def save(self) -> None:
        with self._lock:
            if not self._changed:
                return
            document = json.dumps({str(blob): at for blob, at in self._at.items()})
            self._changed, self._saved = False, time.monotonic()
        try:
            with durable.disk_errors(self._path):
                if document == "{}":
                    durable.remove(self._path)
                else:
                    durable.write_file(self._path, document.encode(), mode=0o600)
        except CachdError as error:
            log.warning("times of verification not written", reason=error.detail)
