"""The clock inside a peer's process: seconds and CPU of its work alone, told as one line of JSON."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def clocked() -> Iterator[None]:
    """Print what the block took: `{"seconds": .., "cpu_seconds": ..}`, children that ended included."""
    before = _cpu_seconds()
    began = time.perf_counter()
    yield
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "cpu_seconds": _cpu_seconds() - before}), flush=True)


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)
