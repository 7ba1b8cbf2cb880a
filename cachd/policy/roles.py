"""Decides what a token allows: its role says which calls, its namespaces say for which models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from fnmatch import fnmatchcase
from typing import Self

from cachd.errors import Forbidden
from cachd.model import folder_of, kind_and_repo

_HUB = "hf://"
_NAMES = re.compile(r"[A-Za-z0-9._*?-]{1,200}")
_REPOSITORIES = re.compile(r"hf://[A-Za-z0-9._/*?-]{1,200}")


class Role(IntEnum):
    """Each role includes the lower ones. The gaps between the numbers are for later roles."""

    read = 10
    lease = 20
    pull = 30
    admin = 40


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The models that a token may change, as patterns of names such as `team-a-*`.

    To change a model, a token must also cover the model's folder in the Hub view. `hf://org/` covers the
    folders of an organisation's repositories of every kind; a pattern such as `hf://org/m*`, those that it
    matches. A pattern of names covers the folders of those names, too: `Qwen--*` covers the folders of all
    models of `hf://Qwen/`.
    """

    patterns: tuple[str, ...] = ("*",)

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """Read the entries. Raises ValueError without their text: one may be a misplaced secret."""
        patterns = tuple(entries)
        if not patterns or not all(_NAMES.fullmatch(p) or _REPOSITORIES.fullmatch(p) for p in patterns):
            raise ValueError(
                "write patterns of names, such as team-a-*, or of repositories, such as hf://org/"
            )
        return cls(patterns)

    @property
    def are_all(self) -> bool:
        """Whether the token may change every model."""
        return "*" in self.patterns

    def covers(self, name: str) -> bool:
        """Whether the token may change the model of this name."""
        return any(fnmatchcase(name, pattern) for pattern in self.patterns if not pattern.startswith(_HUB))

    def covers_repository(self, repository: str) -> bool:
        """Whether the token may change the folder of `org/model`, or `KIND/org/name`, in the Hub view."""
        if self.covers(repository.replace("/", "--")):
            return True
        _, owned = kind_and_repo(repository)
        patterns = [pattern.removeprefix(_HUB) for pattern in self.patterns if pattern.startswith(_HUB)]
        return any(
            fnmatchcase(repository, pattern)
            or (
                pattern.endswith("/")
                and any(fnmatchcase(each, f"{pattern}*") for each in (repository, owned))
            )
            for pattern in patterns
        )

    def __str__(self) -> str:
        return ", ".join(self.patterns)


@dataclass(frozen=True, slots=True)
class Grant:
    """What the caller with a token may do. `name` is the token's name, never its text."""

    name: str
    role: Role
    namespaces: Namespaces = Namespaces()

    def check_role(self, needed: Role) -> None:
        """Raises Forbidden when the grant's role is lower than `needed`."""
        if self.role < needed:
            raise Forbidden(
                f"this call needs the role {needed.name}, and {self.name} has {self.role.name}",
                code="role_too_low",
                hint=f"use a token with the role {needed.name}",
                role_needed=needed.name,
                role=self.role.name,
            )

    def check_name(self, name: str) -> None:
        """Raises Forbidden when the token may not change the model of this name."""
        if not self.namespaces.covers(name):
            raise self._outside(f"the model {name!r:.120}", "use a name that one of these patterns covers")

    def check_repository(self, repository: str) -> None:
        """Raises Forbidden when the token may not change the folder of `org/model` in the Hub view."""
        if not self.namespaces.covers_repository(repository):
            owner = repository.rpartition("/")[0]
            raise self._outside(
                f"hub/{folder_of(repository)}, which pods of all teams read",
                f"if the token may do this, let an admin add {_HUB}{owner}/ to its namespaces",
            )

    def check_everywhere(self) -> None:
        """Raises Forbidden unless the token may change all models: the call concerns the whole node."""
        if not self.namespaces.are_all:
            raise self._outside("the whole node", "use a token without namespaces")

    def _outside(self, thing: str, hint: str) -> Forbidden:
        detail = f"{self.name} may change only {self.namespaces}, and this would change {thing}"
        return Forbidden(detail, code="outside_namespaces", hint=hint)
