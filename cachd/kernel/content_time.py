"""Derives the modification time of a published file from its content alone.

A blob is one inode for all models that contain it, and some engines key their caches on the time of a file.
So the time must be the same on every node and after every pull, and another content must have another time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

_FIRST_SECOND = 315_619_200  # 2 January 1980 UTC: formats such as zip know no earlier year
_SECONDS = 1 << 30  # the last is in 2014: no file is from the future
_COMPLETE_BYTES = 1 << 20  # a file up to this size is read completely
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def content_time(size: int, read: Callable[[int, int], bytes | memoryview]) -> int:
    """The time of a content, in seconds since the epoch.

    `read(offset, count)` gives bytes of the content. Of a large file, 64 samples of 4 KiB are read, among
    them the first and the last bytes.
    """
    digest = hashlib.sha256(b"%d\n" % size)
    if size <= _COMPLETE_BYTES:
        digest.update(read(0, size))
    else:
        last = size - _SAMPLE_BYTES
        for number in range(_SAMPLES):
            digest.update(read(last * number // (_SAMPLES - 1), _SAMPLE_BYTES))
    return time_of(digest.hexdigest())


def time_of(digest: str) -> int:
    """The time that hex digits stand for, in seconds since the epoch."""
    return _FIRST_SECOND + int(digest[:8], 16) % _SECONDS
