"""Selects files of a source by patterns, and describes what a pull leaves out or cannot use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

from cachd.errors import CachdError


def matches(path: str, patterns: tuple[str, ...]) -> bool:
    """Whether a path matches one of the patterns, as `Manifest.select` reads them."""
    return any(fnmatchcase(path, p + "*" if p.endswith("/") else p) for p in patterns)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Counts the files that patterns and weights left out, and their bytes.

    `weights`: the forms of weights among these files, such as `bin` and `gguf:Q8_0`.
    """

    files: int
    bytes: int
    weights: tuple[str, ...] = ()

    def as_document(self) -> dict[str, object]:
        """The JSON of ready files, manifests and the API."""
        return {"files": self.files, "bytes": self.bytes, "weights": list(self.weights)}

    @classmethod
    def from_document(cls, document: Mapping[str, Any] | None) -> Self | None:
        """Read the result of `as_document`; None for None. Raises KeyError, ValueError or TypeError."""
        if document is None:
            return None
        weights = tuple(str(each) for each in document["weights"])
        return cls(int(document["files"]), int(document["bytes"]), weights)


@dataclass(frozen=True, slots=True)
class Unusable:
    """An entry of the source that cannot be a file of a model. A pull that does not leave it out fails.

    `path`: its path in the model; it ends with '/' if it is a directory that cannot be listed. `error`: the
    error of such a pull.
    """

    path: str
    error: CachdError

    def check(self, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
        """Raises `error` if the patterns may select this entry, or a file below it."""
        if matches(self.path, exclude):
            return
        if (
            not include
            or matches(self.path, include)
            or (self.path.endswith("/") and self._may_hold(include))
        ):
            raise self.error

    def _may_hold(self, include: tuple[str, ...]) -> bool:
        """Whether a file below this directory may match a pattern, by the text before its first wildcard."""
        begins = [re.split(r"[*?[]", pattern)[0] for pattern in include]
        return any(each.startswith(self.path) or self.path.startswith(each) for each in begins)
