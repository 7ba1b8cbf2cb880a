"""Says why a pull waits, and until when."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """Why a pull waits.

    `slot`: the maximum number of pulls is running. `origin`: its origin failed or asked to wait, and will be
    asked again, or is being asked again now. `slow`: its origin hardly answers. `space`: the disk is full.
    """

    slot = "slot"
    origin = "origin"
    slow = "slow"
    space = "space"


@dataclass(frozen=True, slots=True)
class Waits:
    """A wait. `until`: seconds since the epoch, None if unknown. `detail`: the origin's error."""

    reason: Reason
    until: float | None = None
    detail: str = ""
