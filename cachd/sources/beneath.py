"""Opens a file of a share by exactly the path that was checked.

A writer on the share can swap a file or a directory for a symbolic link at any moment, also between the
check of a path and its opening. So links are resolved first, the resolved path is checked, and then it is
opened one component at a time from the root, following no link (open(2), O_NOFOLLOW). What is opened is
what was checked, or nothing.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from cachd.errors import Changed, Invalid

_STEP = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LAST = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC  # opens nothing yet: no pipe waits, no device wakes
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC  # it waits for no lease of the file's owner
_IS_A_LINK_NOW = (errno.ELOOP, errno.ENOTDIR)


def open_file(path: Path) -> int:
    """A descriptor of the regular file at an absolute path that holds no link.

    Raises Changed when a component is a link, Invalid when it is no regular file, OSError as open(2) does,
    BlockingIOError when somebody holds a lease on the file.
    """
    try:
        found = _walk(path)
    except OSError as error:
        if error.errno in _IS_A_LINK_NOW:
            raise _replaced(path) from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        mode = os.fstat(found).st_mode
        if stat.S_ISLNK(mode):
            raise _replaced(path)
        if not stat.S_ISREG(mode):
            raise Invalid(f"{path} is neither a file nor a directory", code="unsafe_path")
        return os.open(f"/proc/self/fd/{found}", _READ)  # the same file, whatever its name leads to now
    finally:
        os.close(found)


def _walk(path: Path) -> int:
    """A descriptor that names the last component, reached through no link. Raises OSError."""
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
    return Changed(f"{path}: a part of the path was replaced by a link while it was opened")
