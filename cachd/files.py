"""Small files that others write: read whole, or refused."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def content(path: Path, *, at_most: int) -> bytes:
    """What a regular file holds. Raises OSError when there is none, and when it is longer than `at_most`.

    It never waits: a pipe or a device under this name is refused before it is read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check_regular(os.fstat(descriptor))
        with open(descriptor, "rb", closefd=False) as opened:
            found = opened.read(at_most + 1)
    finally:
        os.close(descriptor)
    if len(found) > at_most:
        raise OSError(f"longer than {at_most} bytes")
    return found


def check_regular(status: os.stat_result) -> None:
    """Raises OSError for a directory, a pipe or a device."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")


def reason(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    return error.strerror or str(error)
