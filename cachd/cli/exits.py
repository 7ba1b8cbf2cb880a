"""Defines the exit code of each class of error."""

from __future__ import annotations

from cachd import errors

EXIT_CODES = {
    0: "done",
    1: "any other failure",
    2: "wrong command line, option or ref",
    3: "model, revision or file not found",
    4: "not ready in time",
    5: "refused: token, permission or policy",
    6: "no daemon answers",
    7: "no space",
    8: "bytes do not match their digest",
    9: "in use, pinned or busy",
    10: "the source is unavailable or breaks its protocol",
    11: "model not known on this node",
    130: "interrupted",
}
EXIT_BY_ERROR: dict[type, int] = {
    errors.Invalid: 2,
    errors.NotFound: 3,
    errors.NotKnown: 11,
    errors.WaitTimeout: 4,
    errors.Forbidden: 5,
    errors.Unreachable: 6,
    errors.NoSpace: 7,
    errors.TooBig: 7,
    errors.Corrupt: 8,
    errors.InUse: 9,
    errors.Leased: 9,
    errors.Busy: 9,
    errors.Changed: 10,
    errors.Unavailable: 10,
}


def exit_code(error: errors.CachdError) -> int:
    """The exit code of the closest class of the error that has one, else 1."""
    return next((EXIT_BY_ERROR[kind] for kind in type(error).__mro__ if kind in EXIT_BY_ERROR), 1)
