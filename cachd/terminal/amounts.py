"""Spells sizes, rates and times as the command line prints them everywhere: 6.3 MB, 1.2 GB/s, 2m05s."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from rich.filesize import decimal

_UNITS = (("d", 86400), ("h", 3600), ("m", 60))


def size_text(size_bytes: float) -> str:
    """A size in decimal units, which `cachd` also reads as an argument."""
    return decimal(int(size_bytes)) if size_bytes >= 0 else f"-{decimal(-int(size_bytes))}"


def rate_text(bytes_per_second: float) -> str:
    """A rate in decimal units."""
    return f"{decimal(int(bytes_per_second))}/s"


def duration_text(seconds: float) -> str:
    """A time in its two largest units: 45s, 2m05s, 3h20m, 4d06h. Below ten seconds, with one digit more."""
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f}s"
    rounded = round(seconds)
    for number, (unit, length) in enumerate(_UNITS):
        if rounded >= length:
            smaller, its_length = (*_UNITS, ("s", 1))[number + 1]
            return f"{rounded // length}{unit}{rounded % length // its_length:02d}{smaller}"
    return f"{rounded}s"


def age_text(since: str, now: Callable[[], float] = time.time) -> str:
    """The time since a moment in ISO 8601, in one unit: 90s, 5m, 3h, 2d."""
    seconds = int(now() - moment_of(since))
    for unit, length in _UNITS:
        if seconds >= 2 * length:
            return f"{seconds // length}{unit}"
    return f"{max(seconds, 0)}s"


def moment_of(text: str) -> float:
    """The Unix time of a moment in ISO 8601."""
    return datetime.fromisoformat(text).timestamp()
