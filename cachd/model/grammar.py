"""The interface of grammars: how the locations of a scheme are written, and which steps they consist of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from cachd.errors import Invalid
from cachd.model.digest import Digest
from cachd.model.name import shown

Steps = tuple[str, ...]


class Located(NamedTuple):
    """The parts of a ref after its scheme."""

    location: str
    revision: str | None = None
    digest: Digest | None = None


class Grammar(Protocol):
    """How the locations of one scheme are written.

    `has_host`: whether a location begins with a host. `root`: what every location begins with, such as `/`;
    may be empty. `is_address`: whether a prefix of locations is a URL or a path that the address policy can
    allow. `kinds`: first steps that name a kind of repositories; the second step is their owner, and the
    prefix of an owner covers its repositories of each kind.
    """

    @property
    def kinds(self) -> tuple[str, ...]:
        """See the class."""
        ...

    @property
    def has_host(self) -> bool:
        """See the class."""
        ...

    @property
    def root(self) -> str:
        """See the class."""
        ...

    @property
    def is_address(self) -> bool:
        """See the class."""
        ...

    def parse(self, text: str, rest: str) -> Located:
        """Read `rest`, a ref without its scheme. Raises Invalid, quoting `text`, the complete ref."""
        ...

    def prefix(self, typed: str, rest: str) -> tuple[Steps, str]:
        """The steps of a prefix, and its text in normal form. Raises Invalid; the error quotes `typed`.

        `rest` is the prefix that an operator wrote, without its scheme. It is neither empty nor `/`.
        """
        ...

    def steps(self, url: str, is_strict: Callable[[Steps], bool]) -> Steps:
        """The steps of a ref's base, a file's origin or a URL.

        Servers read some paths in different ways. `is_strict`, called with the first step of a URL with a
        path, returns whether to refuse such a path; it then raises Forbidden. Raises Invalid when `url` is
        malformed.
        """
        ...


def not_a_prefix(typed: str, hint: str) -> Invalid:
    """The error for a text that is not a prefix of refs."""
    plain = typed.partition("?")[0].partition("#")[0].rpartition("@")[2]
    return Invalid(f"{shown(plain)} is not a prefix of refs: {hint}", code="bad_option")
