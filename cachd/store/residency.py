"""The pages of a blob, or of its copy in a view, in memory: counts and loads them."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

from cachd.errors import Leased
from cachd.kernel import durable
from cachd.kernel.calls import resident_bytes
from cachd.model import Extent
from cachd.store.reads import Reads

Opening = Callable[[], AbstractContextManager[object]]
STEP_BYTES = 8 << 20  # the kernel reads no more ahead for one request, however large


def resident(blob: Path | str, reads: Reads, opening: Opening = nullcontext) -> int:
    """Bytes of a blob that are in memory; 0 when the blob is gone or the kernel does not say.

    `opening`: the context of the open.
    """
    with suppress(OSError, Leased), reads.reading():
        with opening():
            fd = durable.open_file(blob, os.O_RDONLY)
        try:
            return resident_bytes(fd, 0, os.fstat(fd).st_size)
        finally:
            os.close(fd)
    return 0


def load(blob: Path | str, extent: Extent, reads: Reads, opening: Opening = nullcontext) -> int:
    """Load an extent of a blob into the page cache, and wait for it. Returns the bytes that were not there.

    Raises DiskFailed, Leased or Unavailable. The kernel's readahead loads the pages without copying them to
    this process; pages that it leaves out are read.
    """
    with durable.disk_errors(blob), reads.reading():
        with opening():
            fd = durable.open_file(blob, os.O_RDONLY)
        try:
            missing = extent.size - resident_bytes(fd, extent.start, extent.stop)
            if missing:
                os.posix_fadvise(fd, extent.start, extent.size, os.POSIX_FADV_WILLNEED)
                os.pread(fd, 1, extent.stop - 1)  # waits for the readahead, which ends with this byte
                if resident_bytes(fd, extent.start, extent.stop) < extent.size:
                    os.pread(fd, extent.size, extent.start)
            return missing
        finally:
            os.close(fd)
