"""Defines what a preflight finds out about a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

_LONGEST = 500


class Level(StrEnum):
    """How bad a finding is: `refused` if an engine would refuse to load the model, or load it wrongly."""

    ok = "ok"
    warning = "warning"
    refused = "refused"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: the code of the check, its level, what was found, and what to do about it.

    `file`: the path in the model, empty if it concerns no single file. `numbers`: sizes and counts by name.
    Texts are cut to 500 characters, because parts of them come from the model.
    """

    code: str
    level: Level
    detail: str
    file: str = ""
    hint: str = ""
    numbers: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for field in ("detail", "file", "hint"):
            object.__setattr__(self, field, getattr(self, field)[:_LONGEST])

    def as_document(self) -> dict[str, object]:
        """The finding as JSON, for `from_document`."""
        return {
            "code": self.code,
            "level": self.level.value,
            "detail": self.detail,
            **({"file": self.file} if self.file else {}),
            **({"hint": self.hint} if self.hint else {}),
            **({"numbers": dict(self.numbers)} if self.numbers else {}),
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read the result of `as_document`. Raises ValueError, KeyError, TypeError or AttributeError."""
        numbers = document.get("numbers", {})
        return cls(
            str(document["code"]),
            Level(document["level"]),
            str(document["detail"]),
            str(document.get("file", "")),
            str(document.get("hint", "")),
            tuple((str(name), int(number)) for name, number in numbers.items()),
        )


def worst(findings: Iterable[Finding]) -> Level:
    """The level of the worst finding; ok without any."""
    return max((each.level for each in findings), key=list(Level).index, default=Level.ok)


def findings_of(document: Mapping[str, Any]) -> tuple[Finding, ...]:
    """The member `preflight` of a document that cachd wrote; older versions wrote none. Raises as above."""
    return tuple(Finding.from_document(each) for each in document.get("preflight", ()))
