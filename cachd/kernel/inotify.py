"""inotify (man 7 inotify): events about the entries of watched directories.

The kernel queues an event whichever mount or container the file was reached through. A queue holds at most
`fs.inotify.max_queued_events`; further events are dropped, and one OVERFLOW event says so.

Why no library: inotify-simple starts a process to find libc, and decodes every event. A pod that opens files
in a loop causes a hundred thousand events a second, nearly all of them equal. This module decodes equal
events once.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import struct
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODIFY, ATTRIB, OPEN = 0x02, 0x04, 0x20
MOVED_FROM, MOVED_TO, DELETE = 0x40, 0x80, 0x200
OVERFLOW, IGNORED, IS_DIRECTORY = 0x4000, 0x8000, 0x40000000
_WATCH_FLAGS = 0x01000000 | 0x02000000 | 0x04000000  # IN_ONLYDIR, IN_DONT_FOLLOW, IN_EXCL_UNLINK

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_HEAD = struct.Struct("iIII")  # watch, mask, cookie, length of the name field with its padding
_MAX_WATCHES = Path("/proc/sys/fs/inotify/max_user_watches")
_LOWEST_DEFAULT_WATCHES = 8192  # of the kernel


class Event(NamedTuple):
    """What happened to the entry `name` of a watched directory; to the directory if `name` is empty.

    OVERFLOW concerns the whole queue: its `watch` is -1.
    """

    watch: int
    mask: int
    name: str


class Inotify:
    """One queue of events. Not thread-safe. Raises OSError when the kernel allows no further queue."""

    def __init__(self) -> None:
        self._fd = _checked(_LIBC.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK))

    def close(self) -> None:
        """End all watches."""
        os.close(self._fd)

    def add(self, directory: str, mask: int) -> int:
        """Watch a directory and return its watch number. Raises OSError.

        A directory that is watched already keeps its number; the new mask replaces the old one.
        """
        return _checked(_LIBC.inotify_add_watch(self._fd, os.fsencode(directory), mask | _WATCH_FLAGS))

    def remove(self, watch: int) -> None:
        """End a watch. The kernel then queues an IGNORED event, as it does for a deleted directory.

        An error is ignored: the watch may have ended already.
        """
        _LIBC.inotify_rm_watch(self._fd, watch)

    def read(self) -> Iterator[Event]:
        """The events queued until now. Of equal events, only the first is returned. Raises OSError."""
        ready = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, ready)
        return _events(os.read(self._fd, ready[0])) if ready[0] else iter(())


def most_watches() -> int:
    """How many directories all processes of one user together may watch."""
    try:
        return int(_MAX_WATCHES.read_text())
    except (OSError, ValueError):
        return _LOWEST_DEFAULT_WATCHES


def _events(queued: bytes) -> Iterator[Event]:
    raw: dict[bytes, None] = {}
    at = 0
    while at < len(queued):
        end = at + _HEAD.size + _HEAD.unpack_from(queued, at)[3]
        raw[queued[at:end]] = None
        at = end
    for event in raw:
        watch, mask, _, _ = _HEAD.unpack_from(event)
        yield Event(watch, mask, os.fsdecode(event[_HEAD.size :].rstrip(b"\0")))


def _checked(result: int) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
