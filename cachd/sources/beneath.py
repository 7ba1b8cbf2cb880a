"""Opens a file of a shared volume by exactly the path that was checked.

Whoever can write to the volume can replace a file or a directory by a symbolic link at any moment, also
between the check of a path and its opening. So the caller resolves links first and checks the resolved path.
This module then opens that path one component at a time from the root and follows no link (O_NOFOLLOW,
open(2)). Either the checked file is opened, or none.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from cachd.errors import Changed, Invalid

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LAST = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC  # O_PATH: a pipe does not block, a device does not act
# O_NONBLOCK: do not wait while another process holds a lease (fcntl(2)).
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_IS_A_LINK_NOW = (errno.ELOOP, errno.ENOTDIR)


def open_file(path: Path) -> int:
    """A descriptor for reading the regular file at an absolute path without links. The caller closes it.

    Raises Changed when a component is a link, Invalid when it is not a regular file, BlockingIOError when a
    process holds a lease on it, else OSError as open(2) does.
    """
    found = _found(path)
    try:
        mode = os.fstat(found).st_mode
        if stat.S_ISLNK(mode):
            raise _replaced(path)
        if not stat.S_ISREG(mode):
            raise Invalid(f"{path} is neither a file nor a directory", code="unsafe_path")
        # This opens the file that was found, even if its name leads elsewhere now.
        return os.open(f"/proc/self/fd/{found}", _READ)
    finally:
        os.close(found)


def open_directory(path: Path) -> int:
    """A descriptor for listing the directory at an absolute path without links. The caller closes it.

    Raises Changed when a component is a link, else OSError as open(2) does.
    """
    found = _found(path)
    try:
        if stat.S_ISLNK(os.fstat(found).st_mode):
            raise _replaced(path)
        return os.open(f"/proc/self/fd/{found}", _READ | os.O_DIRECTORY)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(found)


def _found(path: Path) -> int:
    try:
        return _walk(path)
    except OSError as error:
        if error.errno in _IS_A_LINK_NOW:
            raise _replaced(path) from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def _walk(path: Path) -> int:
    """An O_PATH descriptor of the last component, reached without following a link. Raises OSError."""
    *folders, name = path.parts[1:]
    at = os.open(path.anchor, _STEP)
    try:
        for folder in folders:
            above, at = at, os.open(folder, _STEP, dir_fd=at)
            os.close(above)
        return os.open(name, _LAST, dir_fd=at)
    finally:
        os.close(at)


def _replaced(path: Path) -> Changed:
    return Changed(f"{path}: a component of the path was replaced by a symbolic link while it was opened")
