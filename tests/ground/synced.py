"""Notes which files and directories are synced, by the calls of `os` that do it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def synced() -> Iterator[list[str]]:
    """The paths that any thread syncs in the block, in order."""
    paths: list[str] = []
    really: dict[str, Callable[[Any], None]] = {"fsync": os.fsync, "fdatasync": os.fdatasync}

    def noting(sync: Callable[[Any], None]) -> Callable[[Any], None]:
        def noted(fd: Any) -> None:
            sync(fd)
            paths.append(os.readlink(f"/proc/self/fd/{fd}"))

        return noted

    for name, sync in really.items():
        setattr(os, name, noting(sync))
    try:
        yield paths
    finally:
        for name, sync in really.items():
            setattr(os, name, sync)
