"""Files that are read whole: so long and no longer, whoever filled them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from cachd.errors import CachdError

# What comes of a document that is not what it should be, while it is read and made into values.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError),
    CachdError,
)
STATE_BYTES = 256 << 20  # more than the manifest of as many files as a model may have
_READ_BYTES = 64 << 10


class TooLong(OSError):
    """A file has more bytes than its reader takes; `size`: how many at least."""

    def __init__(self, at_most: int, size: int) -> None:
        super().__init__(f"longer than {at_most} bytes")
        self.size = size


def content(path: str | Path, *, at_most: int) -> bytes:
    """What a regular file holds. Raises OSError when there is none, TooLong when it is longer than `at_most`.

    It never waits: a pipe or a device under this name is refused before it is read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return whole(descriptor, at_most=at_most)
    finally:
        os.close(descriptor)


def whole(descriptor: int, *, at_most: int) -> bytes:
    """See `content`, of an open file. A file that takes no space on its disk is refused unread, too."""
    status = os.fstat(descriptor)
    check_regular(status)
    if status.st_size > at_most:
        raise TooLong(at_most, status.st_size)
    found = b""
    while piece := os.read(descriptor, max(status.st_size - len(found), _READ_BYTES)):
        found += piece
        if len(found) > at_most:
            raise TooLong(at_most, len(found))
    return found


def document(path: str | Path, *, at_most: int = STATE_BYTES) -> Any:
    """What a JSON file of cachd's own says. Raises OSError, ValueError or RecursionError.

    A disk that is broken may have filled it with anything.
    """
    return json.loads(content(path, at_most=at_most))


def check_regular(status: os.stat_result) -> None:
    """Raises OSError for a directory, a pipe or a device."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")


def reason(error: OSError) -> str:
    """Why a file cannot be read, in a few words."""
    return error.strerror or str(error)
