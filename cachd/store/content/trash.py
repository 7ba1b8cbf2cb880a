"""Deletes what is large without holding a lock: a rename into trash/ first, the deletion later."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path

import structlog

from cachd import files
from cachd.kernel import durable
from cachd.kernel.leases import is_open
from cachd.model import Digest
from cachd.store.layout import Layout

log = structlog.get_logger(__name__)


class Trash:
    """The directory trash/ of one root. Methods raise Unavailable or DiskFailed."""

    def __init__(self, layout: Layout, *, unique: Callable[[], str] = lambda: secrets.token_hex(4)) -> None:
        self._directory, self._unique = layout.trash, unique

    def new_path(self, blob: Digest) -> Path:
        """An unused path in the trash, for what belongs to a blob."""
        return self._directory / f"{blob.hex}.{self._unique()}"

    def empty(self, trashed: Mapping[Path, int]) -> int:
        """Delete trash entries, given with their bytes of disk. Returns the bytes freed.

        The caller should hold no lock, because deleting a large file takes long. A file that a process has
        open stays in the trash until it is closed: its bytes are still taken, and so they are still counted.
        """
        freed = 0
        for path, size in trashed.items():
            with durable.disk_errors(path):
                if path.is_dir() and not path.is_symlink():
                    durable.remove_tree(path)
                elif files.is_regular(path) and is_open([path]):
                    log.info("deleted file still open", file=path.name, held_bytes=size)
                    continue
                else:
                    durable.remove(path)
            freed += size
        return freed

    def empty_all(self) -> None:
        """Delete what is in the trash since an earlier run of the daemon, or because it was still open."""
        self.empty(dict.fromkeys(self._directory.iterdir(), 0))
