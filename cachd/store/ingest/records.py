"""The files of streamed/, which remember the attempts that readers got bytes of: a bounded number of them.

The directory is listed once; then the names are known in memory.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from cachd.kernel import durable

MAX_RECORDS = 10_000


class Records:
    """The records in one directory. When there are too many, the oldest are forgotten. Safe from any thread.

    Methods raise OSError.
    """

    def __init__(self, directory: Path, at_most: int = MAX_RECORDS) -> None:
        self._directory, self._at_most = directory, at_most
        self._lock = threading.Lock()
        self._names: dict[str, None] | None = None  # the oldest first

    def write(self, record: Path, text: str) -> None:
        """Write a record durably, as the newest."""
        with self._lock:
            names = self._known()
            names.pop(record.name, None)
            while len(names) >= self._at_most:
                oldest = next(iter(names))
                durable.remove(self._directory / oldest)
                del names[oldest]
            durable.write_file(record, text.encode(), mode=0o600)
            names[record.name] = None

    def remove(self, record: Path) -> None:
        """Remove a record durably. A missing one is fine."""
        with self._lock:
            durable.remove(record)
            self._known().pop(record.name, None)

    def _known(self) -> dict[str, None]:
        if self._names is None:
            found: list[tuple[int, str]] = []
            with suppress(FileNotFoundError), os.scandir(self._directory) as entries:
                found = sorted((entry.stat().st_mtime_ns, entry.name) for entry in entries)
            self._names = dict.fromkeys(name for _, name in found)
        return self._names
