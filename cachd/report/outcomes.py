"""Maps each class of error to its outcome: the HTTP status, and whether waiting is pointless."""

from __future__ import annotations

from dataclasses import dataclass

from cachd import errors


@dataclass(frozen=True, slots=True)
class Outcome:
    """The HTTP status of an error, and whether it is final.

    `is_final`: the same pull would fail again until somebody changes the request, a permission, the source or
    the node. After an error that is not final, the same request may succeed later.
    """

    status: int
    is_final: bool


OUTCOMES: dict[type[errors.CachdError], Outcome] = {
    errors.CachdError: Outcome(500, is_final=True),
    errors.Invalid: Outcome(400, is_final=True),
    errors.Unauthorized: Outcome(401, is_final=True),
    errors.Forbidden: Outcome(403, is_final=True),
    errors.UnsafeRoot: Outcome(403, is_final=True),
    errors.NotFound: Outcome(404, is_final=True),
    errors.InUse: Outcome(409, is_final=False),
    errors.Cancelled: Outcome(409, is_final=False),
    errors.TooBig: Outcome(413, is_final=True),
    errors.DaemonDied: Outcome(500, is_final=True),
    errors.DiskFailed: Outcome(500, is_final=True),
    errors.Changed: Outcome(502, is_final=True),  # the source changed again during the second attempt
    errors.Corrupt: Outcome(502, is_final=True),
    errors.Unavailable: Outcome(503, is_final=False),
    errors.Leased: Outcome(503, is_final=False),
    errors.Busy: Outcome(503, is_final=False),
    errors.NoSpace: Outcome(507, is_final=False),  # it may succeed after an eviction or deletion
}


def outcome_of(error: errors.CachdError) -> Outcome:
    """The outcome of the nearest listed class of an error."""
    return next(OUTCOMES[kind] for kind in type(error).__mro__ if kind in OUTCOMES)
