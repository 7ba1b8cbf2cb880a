"""Limits: how many bytes a second may come from the sources, how much of the disk models may take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cachd.errors import Invalid
from cachd.model.ref import SCHEMES


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes a second from all sources together, and from single ones, by scheme. None is no limit."""

    bytes_per_second: int | None = None
    sources: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(rate is not None and rate < 1 for rate in (self.bytes_per_second, *self.sources.values())):
            raise Invalid("a limit is one byte a second or more", code="bad_limit")
        if not self.sources.keys() <= set(SCHEMES):
            raise Invalid(f"a source is one of {', '.join(SCHEMES)}", code="bad_limit")

    @classmethod
    def of(cls, bytes_per_second: int | None, sources: Iterable[tuple[str, int | None]]) -> Limits:
        """As users write them: 0, too, is no limit."""
        return cls(bytes_per_second or None, {source: rate for source, rate in sources if rate})


@dataclass(frozen=True, slots=True)
class Percentage:
    """A part of a whole, written `20%`."""

    percent: float

    def __post_init__(self) -> None:
        if not 0 <= self.percent <= 100:
            raise ValueError("a share is 0% to 100%")

    def __str__(self) -> str:
        return f"{self.percent:g}%"

    def of(self, total: int) -> int:
        return int(total * self.percent / 100)


SizeOrPercent = int | Percentage


def bytes_in(total: int, space: SizeOrPercent) -> int:
    """The room in units of `total`: bytes of a file system, or its inodes."""
    return space.of(total) if isinstance(space, Percentage) else space
