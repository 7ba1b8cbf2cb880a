"""Defines limits: of the bandwidth from sources, and of the disk space for models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cachd.errors import Invalid
from cachd.model.scheme import SCHEMES


@dataclass(frozen=True, slots=True)
class Limits:
    """The bandwidth limits: for all sources together (None: no limit), and for each scheme of sources."""

    bytes_per_second: int | None = None
    sources: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(rate is not None and rate < 1 for rate in (self.bytes_per_second, *self.sources.values())):
            raise Invalid("a limit must be at least one byte a second", code="bad_limit")
        if not self.sources.keys() <= set(SCHEMES):
            raise Invalid(f"a source must be one of {', '.join(SCHEMES)}", code="bad_limit")

    @classmethod
    def of(cls, bytes_per_second: int | None, sources: Iterable[tuple[str, int | None]]) -> Limits:
        """Limits as users write them: both 0 and None mean no limit."""
        return cls(bytes_per_second or None, {source: rate for source, rate in sources if rate})


@dataclass(frozen=True, slots=True)
class Percentage:
    """A percentage from 0% to 100%, written `20%`."""

    percent: float

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ValueError("a percentage must be from 0% to 100%")

    def __str__(self) -> str:
        return f"{self.percent:g}%"

    def of(self, total: int) -> int:
        """So many percent of `total`, rounded down."""
        return int(total * self.percent / 100)


SizeOrPercent = int | Percentage


def amount_in(total: int, space: SizeOrPercent) -> int:
    """A bound as a number of bytes or inodes. `total`: how many the file system has."""
    return space.of(total) if isinstance(space, Percentage) else space
