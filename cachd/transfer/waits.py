"""Why a pull waits, and until when."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """`slot`: as many pulls are at work as may be. `origin`: its origin failed, or asked to be left alone,
    and is asked again later. `slow`: its origin is asked and hardly answers. `space`: the disk is full."""

    slot = "slot"
    origin = "origin"
    slow = "slow"
    space = "space"


@dataclass(frozen=True, slots=True)
class Waits:
    """`until`: seconds since the epoch, None where nobody knows. `detail`: what the origin said."""

    reason: Reason
    until: float | None = None
    detail: str = ""
