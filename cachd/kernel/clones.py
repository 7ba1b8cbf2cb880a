"""Copies files without copying bytes, on file systems that let two files share blocks (reflinks)."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from cachd.kernel import durable

_FICLONE = 0x40049409  # the kernel's include/uapi/linux/fs.h; Python names it from 3.12 on


def clone(source: Path | str, target: Path | str) -> bool:
    """Make `target` a sealed, durable file that shares the disk blocks of `source`, with its time.

    Returns False, and leaves nothing, where the file system cannot do this (man 2 ioctl_ficlone). Raises
    Leased, and OSError if the disk is full.
    """
    fd = durable.open_file(source, os.O_RDONLY)
    try:
        with durable.new_file(target) as new:
            fcntl.ioctl(new, _FICLONE, fd)
            durable.seal(new, os.fstat(fd).st_mtime_ns)
    except OSError as error:
        durable.unlink(str(target))
        if error.errno in durable.FULL:
            raise
        return False
    finally:
        os.close(fd)
    return True


def can_clone(probe: Path) -> bool | None:
    """Whether the file system of the unused path `probe` can share the blocks of two files.

    None if nobody can say, because the disk is full.
    """
    source, target = f"{probe}.source", f"{probe}.target"
    try:
        with durable.new_file(source) as fd:
            durable.write_at(fd, memoryview(bytes(4096)), 0)
        return clone(source, target)
    except OSError as error:
        return None if error.errno in durable.FULL else False
    finally:
        for path in (source, target):
            with suppress(OSError):
                durable.unlink(path)
