"""Defines the ref: the address of a model at its source, and what it may contain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from cachd.errors import Invalid
from cachd.model.digest import Digest
from cachd.model.hub import COMMIT, written
from cachd.model.name import has_invisible, shown
from cachd.model.scheme import SCHEMES


@dataclass(frozen=True, slots=True)
class Ref:
    """The address of a model or a file at its source. Its revision may be one that moves, such as a branch.

    `hf://org/model[@revision]`, `s3://bucket/prefix/`, `https://host/file[#sha256=HEX]`, `https://host/dir/`
    or `file:///path[@revision]`. `location` is the text between `://` and the revision or fragment. Users may
    type more forms: see `Typed`.
    """

    scheme: str
    location: str
    revision: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` of a ref returned. Raises Invalid with a hint that shows the right form."""
        scheme, separator, rest = text.partition("://")
        if not separator or scheme not in SCHEMES:
            *examples, last = (example for each in SCHEMES.values() for example in each.examples)
            raise Invalid(
                f"ref {shown(text)} has no scheme that cachd knows",
                code="unknown_scheme",
                hint=f"use {', '.join(examples)} or {last}",
            )
        check_characters(text)
        return cls(scheme, *SCHEMES[scheme].grammar.parse(text, rest))

    def __str__(self) -> str:
        revision = f"@{written(self.revision)}" if self.revision else ""
        fragment = f"#{self.digest.algorithm}={self.digest.hex}" if self.digest else ""
        return f"{self.base}{revision}{fragment}"

    @property
    def base(self) -> str:
        """The ref without its revision and fragment: the same for all revisions of a model."""
        return f"{self.scheme}://{self.location}"

    @property
    def is_pinned(self) -> bool:
        """Whether the ref names one revision that never moves: a Hub commit."""
        return self.scheme == "hf" and bool(self.revision and COMMIT.fullmatch(self.revision))


def check_characters(text: str) -> None:
    """Raises Invalid if `text` has characters that no ref may have, or is too long."""
    if len(text) > 2048 or "\\" in text or has_invisible(text):
        raise Invalid(
            f"ref {shown(text)} has characters that no ref may have, or more than 2048 characters",
            code="bad_ref",
            hint="write it in plain characters, percent-encoded if it is a URL",
        )
