"""Says which file system a directory is on, and whether other machines may write to it, too."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LONG_ENOUGH = 256  # bytes of struct statfs; it has at most 120
# man 2 statfs, and include/uapi/linux/magic.h of the kernel; those of Lustre, GPFS and BeeGFS are of their
# own sources.
_NETWORK = {
    0x6969: "NFS",
    0x00C36400: "CephFS",
    0x0BD00BD0: "Lustre",
    0xFF534D42: "SMB",
    0xFE534D42: "SMB",
    0x517B: "SMB",
    0x5346414F: "AFS",
    0x6B414653: "AFS",
    0x47504653: "GPFS",
    0x19830326: "BeeGFS",
    0x7461636F: "OCFS2",
    0x01161970: "GFS2",
}
# Often of one machine alone: FUSE, and the 9P of minikube, WSL and other virtual machines.
_EITHER = {0x65735546: "FUSE", 0x01021997: "9P"}


@dataclass(frozen=True, slots=True)
class SharedFileSystem:
    """A file system that several machines may write to. `is_certain`: it exists only for that purpose."""

    name: str
    is_certain: bool


def shared_file_system(path: Path) -> SharedFileSystem | None:
    """The file system of a path, if other machines may write to it; None for one of this machine alone.

    FUSE and 9P may be either. Raises OSError.
    """
    number = _kind(path)
    if number in _NETWORK:
        return SharedFileSystem(_NETWORK[number], is_certain=True)
    return SharedFileSystem(_EITHER[number], is_certain=False) if number in _EITHER else None


def _kind(path: Path) -> int:
    """The field f_type of statfs(2). Raises OSError."""
    found = ctypes.create_string_buffer(_LONG_ENOUGH)
    if _LIBC.statfs(os.fsencode(path), found) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_long.from_buffer(found).value & 0xFFFFFFFF
