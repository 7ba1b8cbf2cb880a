"""What a token allows: a role says what may be done, namespaces say with which models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Self

from cachd.errors import Forbidden

_HUB = "hf://"
_NAMES = re.compile(r"[A-Za-z0-9._*?-]{1,200}")
_REPOSITORIES = re.compile(r"hf://[A-Za-z0-9._/*?-]{1,200}")


class Role(IntEnum):
    """Each role includes those before it. The numbers leave room for roles between them."""

    read = 10
    lease = 20
    pull = 30
    admin = 40


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The names of models that a token may change, as patterns such as `team-a-*`.

    `hf://org/` (or a pattern, `hf://org/m*`) adds repositories of the Hub whose folder in the Hub view may be
    changed, too. A pattern of names covers the folders of the names it covers: `Qwen--*` covers `hf://Qwen/`.
    """

    patterns: tuple[str, ...] = ("*",)

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """Raises ValueError, which repeats no entry: one may be a secret in the wrong place."""
        patterns = tuple(entries)
        if not patterns or not all(_NAMES.fullmatch(p) or _REPOSITORIES.fullmatch(p) for p in patterns):
            raise ValueError(
                "write patterns of names, such as team-a-*, or of repositories, such as hf://org/"
            )
        return cls(patterns)

    @property
    def are_all(self) -> bool:
        return "*" in self.patterns

    def covers(self, name: str) -> bool:
        """Whether models may be changed under this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns if not pattern.startswith(_HUB))

    def covers_repository(self, repository: str) -> bool:
        """Whether the folder of `org/model` in the Hub view may be changed."""
        if self.covers(repository.replace("/", "--")):
            return True
        prefixes = (pattern.removeprefix(_HUB) for pattern in self.patterns if pattern.startswith(_HUB))
        return any(fnmatchcase(repository, p + "*" if p.endswith("/") else p) for p in prefixes)

    def __str__(self) -> str:
        return ", ".join(self.patterns)


@dataclass(frozen=True, slots=True)
class Grant:
    """Who somebody is and what they may do. `name` is the token's, never its text."""

    name: str
    role: Role
    namespaces: Namespaces = Namespaces()

    def check_role(self, needed: Role) -> None:
        """Raises Forbidden when the role is too low."""
        if self.role < needed:
            raise Forbidden(
                f"this needs the role {needed.name}, and {self.name} has {self.role.name}",
                code="role_too_low",
                hint=f"use a token with the role {needed.name}",
                role_needed=needed.name,
                role=self.role.name,
            )

    def check_name(self, name: str) -> None:
        """Raises Forbidden when models may not be changed under this name."""
        if not self.namespaces.covers(name):
            raise self._outside(f"the name {name!r:.120}", "take a name that one of them covers")

    def check_repository(self, repository: str) -> None:
        """Raises Forbidden when the folder of `org/model` in the Hub view may not be changed."""
        if not self.namespaces.covers_repository(repository):
            owner = repository.partition("/")[0]
            raise self._outside(
                f"hub/models--{repository.replace('/', '--')}, which pods of all teams may read",
                f"an admin adds {_HUB}{owner}/ to the token's namespaces if that is meant",
            )

    def check_everywhere(self) -> None:
        """Raises Forbidden unless the namespaces are all there are: the call concerns the whole node."""
        if not self.namespaces.are_all:
            raise self._outside("the whole node", "use a token without namespaces")

    def _outside(self, thing: str, hint: str) -> Forbidden:
        detail = f"{self.name} may change {self.namespaces}, and this would change {thing}"
        return Forbidden(detail, code="outside_namespaces", hint=hint)
