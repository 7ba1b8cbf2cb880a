"""How much of a blob is in memory, and bringing it there."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from cachd.errors import Leased
from cachd.model import Extent
from cachd.store import durable
from cachd.store.kernel import resident_bytes
from cachd.store.reads import Reads

STEP_BYTES = 8 << 20  # the kernel reads no more ahead at once, however much it is asked for


def resident(blob: Path, reads: Reads) -> int:
    """Bytes of a blob that are in memory; none of one that is gone or that nobody can tell of."""
    with suppress(OSError, Leased), reads.reading():
        fd = durable.open_file(blob, os.O_RDONLY)
        try:
            return resident_bytes(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
    return 0


def load(blob: Path, extent: Extent, reads: Reads) -> int:
    """Bring a step of a blob into memory and wait for it; bytes that were not there.

    Raises DiskFailed, Leased.

    The kernel reads ahead without copying; where it does not, the bytes are read.
    """
    with durable.disk_errors(blob), reads.reading():
        fd = durable.open_file(blob, os.O_RDONLY)
        try:
            missing = extent.size - resident_bytes(fd, extent.start, extent.stop)
            if missing:
                os.posix_fadvise(fd, extent.start, extent.size, os.POSIX_FADV_WILLNEED)
                os.pread(fd, 1, extent.stop - 1)  # the last to come
                if resident_bytes(fd, extent.start, extent.stop) < extent.size:
                    os.pread(fd, extent.size, extent.start)
            return missing
        finally:
            os.close(fd)
