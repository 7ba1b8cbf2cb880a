"""Knows which names own an ingest, so that it stays while a pull of one of them may resume it.

    ingest/<algorithm>-<hex>-<size>/owners     one name a line

Pulls of these names began the ingest, or needed it later. The file is not synced: it survives a crash of the
daemon, but perhaps not one of the node.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from cachd.errors import CachdError, Leased
from cachd.kernel import durable
from cachd.model import Digest
from cachd.store.content.claims import Claims

_MAX_NAMES = 1000  # per ingest; later names are not recorded, so they do not keep the ingest


class Owners:
    """The owners of all ingests of one root. Safe from any thread."""

    def __init__(self, claims: Claims) -> None:
        self._claims = claims
        self._lock = threading.Lock()  # guards `_expected`
        self._writing = threading.Lock()  # guards the files of all ingests
        self._expected: Counter[str] = Counter()  # how many pulls of each name have not ended

    def expect(self, name: str) -> None:
        """Keep the ingests that `name` owns: a pull of it has begun, and has not claimed its blobs yet."""
        with self._lock:
            self._expected[name] += 1

    def expect_no_more(self, name: str) -> None:
        """Undo one `expect`: a pull of the name has ended."""
        with self._lock:
            self._expected[name] -= 1
            self._expected = +self._expected

    def is_expected(self, blob: Digest, ingest: Path) -> bool:
        """Whether a pull claims the blob, or a waiting or running pull may resume its `ingest`."""
        if self._claims.is_claimed(blob):
            return True
        with self._lock:
            expected = set(self._expected)
        return bool(expected and expected & self.names(ingest))

    def names(self, ingest: Path) -> set[str]:
        """The names that own an ingest; none if their file cannot be read."""
        try:
            return set(durable.read_file(_path(ingest)).decode(errors="replace").split())
        except (OSError, Leased):
            return set()

    def add(self, ingest: Path, names: set[str]) -> None:
        """Add owners to an ingest. A failure is ignored."""
        path = _path(ingest)
        with self._writing:
            owners = self.names(ingest)
            for name in sorted(names - owners - {""})[: max(_MAX_NAMES - len(owners), 0)]:
                with suppress(CachdError), durable.disk_errors(path):
                    durable.append_note(path, f"{name}\n")

    def remove(self, ingest: Path, names: Collection[str]) -> bool:
        """Remove owners. Returns True, and writes nothing, when no other owner is left. Raises OSError."""
        with self._writing:
            owners = self.names(ingest)
            left = owners.difference(names)
            if left and left != owners:
                content = "".join(f"{name}\n" for name in sorted(left))
                durable.write_note(_path(ingest), content.encode())
            return not left


def _path(ingest: Path) -> Path:
    return ingest / "owners"
