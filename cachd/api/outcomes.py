"""What each class of error means to who asks: the status of the answer, and whether waiting is in vain."""

from __future__ import annotations

from dataclasses import dataclass

from cachd import errors


@dataclass(frozen=True, slots=True)
class Outcome:
    """`is_final`: a pull that failed so fails again, until somebody changes the request, a permission, the
    source or the node. One that is not final may come true when it is asked for again."""

    status: int
    is_final: bool


OUTCOMES: dict[type[errors.CachdError], Outcome] = {
    errors.CachdError: Outcome(500, is_final=True),
    errors.Invalid: Outcome(400, is_final=True),
    errors.Unauthorized: Outcome(401, is_final=True),
    errors.Forbidden: Outcome(403, is_final=True),
    errors.NotFound: Outcome(404, is_final=True),
    errors.InUse: Outcome(409, is_final=False),
    errors.Cancelled: Outcome(409, is_final=False),
    errors.TooBig: Outcome(413, is_final=True),
    errors.DiskFailed: Outcome(500, is_final=True),
    errors.Changed: Outcome(502, is_final=True),  # it changed again while it was pulled anew
    errors.Corrupt: Outcome(502, is_final=True),
    errors.Unavailable: Outcome(503, is_final=False),
    errors.Leased: Outcome(503, is_final=False),
    errors.NoSpace: Outcome(507, is_final=False),  # until something is evicted or removed
}


def outcome_of(error: errors.CachdError) -> Outcome:
    return next(OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES)
