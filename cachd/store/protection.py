"""What must not be removed: models that are pinned, and blobs that some process has open."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from cachd.store import durable
from cachd.store.layout import Layout


class Pins:
    """The names an operator wants kept, one empty file each."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def add(self, name: str) -> None:
        with durable.disk_errors(self._layout.pin(name)):
            durable.write_file(self._layout.pin(name), b"")

    def remove(self, name: str) -> None:
        with durable.disk_errors(self._layout.pin(name)):
            durable.remove(self._layout.pin(name))

    def has(self, name: str) -> bool:
        return self._layout.pin(name).exists()


def is_open(paths: Iterable[Path]) -> bool:
    """Whether any process on this node has one of the files open or mapped.

    Asked of the kernel: a write lease is refused with EAGAIN while anybody else has the inode open, through
    whatever link, mount or container (man 2 fcntl, "Leases"). False where the file system has no leases.
    """
    return any(_is_open(path) for path in paths)


def _is_open(path: Path) -> bool:
    with suppress(FileNotFoundError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            # Somebody opening the file meanwhile gets us a signal; SIGURG is one that ends nobody.
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except OSError as error:
            return error.errno in (errno.EAGAIN, errno.EBUSY)
        finally:
            os.close(fd)
    return False
