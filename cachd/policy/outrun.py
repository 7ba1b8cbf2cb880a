"""Decides when a source or a connection is so slow that another one should send the rest of its parts."""

from __future__ import annotations

SLOW_BYTES_PER_SECOND = 64 << 10
_TIMES_SLOWER = 4
_LONG_SECONDS = 5.0
_TIMES_LATER = 4
_GRACE_SECONDS, _FIRST_BYTE_SECONDS = 1.0, 3.0


def is_slow(pace: float) -> bool:
    """Whether a request at `pace` bytes per second receives next to nothing."""
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


def is_far_behind(rest: int, pace: float, usual: float, *, taken: int) -> bool:
    """Whether the last `rest` bytes of a part would come much earlier over another connection.

    `pace` and `usual`: bytes per second of this request, and of the others of its pull. `taken`: how often
    the part was taken over before. With each time, the advantage must be twice as large.
    """
    if not usual:
        return False
    return rest > pace * (_GRACE_SECONDS + (_TIMES_LATER << taken) * rest / usual)


def answers_late(rest: int, waited: float, usual: float, *, taken: int) -> bool:
    """As `is_far_behind`, for a request that was sent `waited` seconds ago and has received no byte yet."""
    return usual > 0 and waited > max(_FIRST_BYTE_SECONDS, _TIMES_LATER * rest / usual) * (1 << taken)
