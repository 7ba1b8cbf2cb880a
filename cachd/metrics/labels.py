"""Defines the values of labels: small closed sets. No URL, file or request id is ever one of them."""

from __future__ import annotations

from enum import StrEnum

from cachd.policy.roles import Role

MODEL_STATES = (
    "queued",
    "resolving",
    "waiting",
    "downloading",
    "publishing",
    "ready",
    "failed",
    "cancelled",
    "damaged",
    "refused",
)
CALLERS = ("anonymous", *Role.__members__)
VERDICTS = ("accepted", "refused", "failed")
EVICTION_REASONS = ("pull", "pressure", "unused", "asked")
CODE_CLASSES = ("4xx", "5xx", "broken")  # of failures; an origin may answer others
MAX_ORIGINS = 20  # origins with series of their own; the others share those of OTHER_ORIGINS
OTHER_ORIGINS = "other"
SIGNAL_FAILURES = ("unreachable", "forbidden", "conflict", "limited", "refused")
SEEN: tuple[str, ...] = ()  # the values are those of the caller: a series begins with its first event
_SIZE_CLASSES = ((1e9, "<1GB"), (1e10, "1-10GB"), (1e11, "10-100GB"), (float("inf"), ">100GB"))


class Signal(StrEnum):
    """A signal about its node that cachd writes to Kubernetes."""

    labels = "labels"
    condition = "condition"
    taint = "taint"
    event = "event"


def size_class(size: int) -> str:
    """The value of the label `size_class` for a model of `size` bytes."""
    return next(label for limit, label in _SIZE_CLASSES if size < limit)
