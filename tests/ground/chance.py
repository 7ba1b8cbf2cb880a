"""With how many examples properties are tried, and how many of many cases are.

A run takes few, the same each time, so that it ends soon. FUZZ_FACTOR=20 takes twenty times as many, other
ones each time: `FUZZ_FACTOR=20 python -m tests -k fuzz`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import TypeVar

from hypothesis import HealthCheck, settings

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
T = TypeVar("T")


def examples(count: int = 40, *, slowest: timedelta | None = None) -> settings:
    """Settings for `count` examples, times the factor. Fails an example that takes longer than `slowest`."""
    return settings(
        deadline=slowest,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
        max_examples=count * FACTOR,
    )


def some(cases: Sequence[T], every: int) -> Sequence[T]:
    """Each `every`-th case, and the last; every case where the factor is as large."""
    chosen = cases[:: max(1, every // FACTOR)]
    return chosen if not cases or cases[-1] in chosen else [*chosen, cases[-1]]
