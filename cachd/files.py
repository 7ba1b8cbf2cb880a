"""Reads complete files of bounded size, whatever they contain."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from cachd.errors import CachdError

# The exceptions that reading and interpreting a damaged document may raise.
UNREADABLE = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError),
    CachdError,
)
STATE_BYTES = 256 << 20  # larger than any manifest
_READ_BYTES = 64 << 10


class TooLong(OSError):
    """A file is longer than its reader accepts. It has at least `size` bytes."""

    def __init__(self, at_most: int, size: int) -> None:
        super().__init__(f"longer than {at_most} bytes")
        self.size = size


def content(path: str | Path, *, at_most: int) -> bytes:
    """The content of a regular file of at most `at_most` bytes. Raises OSError; TooLong for a longer file.

    A pipe or a device raises OSError and is not read, so the call never blocks on one.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return content_of(descriptor, at_most=at_most)
    finally:
        os.close(descriptor)


def content_of(descriptor: int, *, at_most: int) -> bytes:
    """As `content`, for an open file. A longer file is refused unread, even one that takes no disk space."""
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
    """The parsed content of a JSON file that cachd wrote. Raises OSError, ValueError or RecursionError.

    A failing disk may have damaged it, so the result can be any JSON value.
    """
    return json.loads(content(path, at_most=at_most))


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file. A symbolic link is not followed, and is none."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def check_regular(status: os.stat_result) -> None:
    """Raises OSError for a directory, a pipe or a device."""
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not a regular file")


def reason(error: OSError) -> str:
    """The text of an OSError without its number and path."""
    return error.strerror or str(error)
