"""System calls that Python does not wrap: pages in memory, I/O priority, the current core.

Source of the numbers: the kernel's include/uapi/asm-generic/unistd.h and
arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform

_LIBC = ctypes.CDLL(None, use_errno=True)
_CACHESTAT = 451  # on all architectures, since Linux 6.5
_CACHESTAT_NUMBERS = 5  # of struct cachestat; the first is the pages in memory
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "s390x": 282, "ppc64le": 273}
_WHO_PROCESS, _CLASS_IDLE = 1, 3 << 13  # man 2 ioprio_set

_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def read_when_idle() -> bool:
    """Give the calling thread the idle I/O class: the disk serves its reads after everybody else's.

    Returns whether the kernel accepted it (man 2 ioprio_set).
    """
    number = _IOPRIO_SET.get(platform.machine())
    return number is not None and _LIBC.syscall(number, _WHO_PROCESS, 0, _CLASS_IDLE) == 0


def resident_bytes(fd: int, start: int, stop: int) -> int:
    """Bytes of `[start, stop)` of a file that are in memory, counted by pages. Raises OSError.

    Uses cachestat(2), or mincore(2) where the kernel lacks cachestat or a sandbox forbids it.
    """
    stop = min(stop, os.fstat(fd).st_size)
    if stop <= start:
        return 0
    pages = _cachestat(fd, start, stop - start)
    if pages is None:
        pages = _mincore(fd, start, stop - start)
    return min(pages * mmap.PAGESIZE, stop - start)


def _cachestat(fd: int, start: int, size: int) -> int | None:
    """The pages in memory; None when cachestat(2) fails."""
    extent, found = (ctypes.c_uint64 * 2)(start, size), (ctypes.c_uint64 * _CACHESTAT_NUMBERS)()
    return int(found[0]) if _LIBC.syscall(_CACHESTAT, fd, extent, found, 0) == 0 else None


def _mincore(fd: int, start: int, size: int) -> int:
    begin = start // mmap.PAGESIZE * mmap.PAGESIZE
    size += start - begin
    address = _LIBC.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, begin)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        pages = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
        if _LIBC.mincore(address, size, pages) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return sum(byte & 1 for byte in pages.raw)
    finally:
        _LIBC.munmap(address, size)
