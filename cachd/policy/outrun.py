"""Decides when a source is so slow that another one should send its parts of a file."""

from __future__ import annotations

SLOW_BYTES_PER_SECOND = 64 << 10
_TIMES_SLOWER = 4
_LONG_SECONDS = 5.0


def is_slow(pace: float) -> bool:
    """Whether a request at `pace` bytes per second brings next to nothing."""
    return pace < SLOW_BYTES_PER_SECOND


def is_outrun(pace: float, best: float | None, *, another_is_new: bool) -> bool:
    """Whether a source should send nothing while the others do.

    `pace`: bytes per second of one of its requests; `best`: that of the fastest other source, None if
    unknown. `another_is_new`: the pace of another source was never measured, so it may be faster.
    """
    if best is not None and pace * _TIMES_SLOWER < best:
        return True
    return another_is_new and is_slow(pace)


def takes_long(size: int, pace: float) -> bool:
    """Whether `size` bytes take so long at `pace` that a source of unknown pace may try them."""
    return size > _LONG_SECONDS * pace
