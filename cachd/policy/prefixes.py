"""Decides which prefixes cover a ref or a URL, by comparing complete steps in a normal form.

    hf://org/model              steps: org, model
    hf://datasets/org/name      steps: datasets, org, name
    s3://bucket/a/b             steps: bucket, a, b
    https://host/a/b            steps: host:443, a, b
    file:///a/b                 steps: a, b

So `hf://org` does not cover `hf://orgother`, and `https://host` does not cover `https://host.evil`.

An organisation has repositories of every kind, so `hf://org` and `hf://datasets` both cover
`hf://datasets/org/name`, and `hf://datasets/org` is longer than both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Self, TypeVar

from cachd.model import SCHEMES, Steps, not_a_prefix

T = TypeVar("T")

_ODD_TEXT = re.compile(r"[^ -~]|[ \\*?]")
_LONGEST = 1024


@dataclass(frozen=True, slots=True)
class Prefix:
    """A scheme and the steps that must follow it; no steps for everything of the scheme.

    `text` is the prefix in its normal form, for people.
    """

    scheme: str
    steps: Steps
    text: str = field(compare=False)

    @classmethod
    def parse(cls, typed: str) -> Self:
        """Read a prefix that an operator wrote. Raises Invalid with the right form."""
        scheme, separator, rest = typed.partition("://")
        scheme = scheme.lower()
        if not separator or scheme not in SCHEMES:
            raise not_a_prefix(typed, f"begin it with {', '.join(f'{each}://' for each in SCHEMES)}")
        grammar = SCHEMES[scheme].grammar
        if len(typed) > _LONGEST or (not grammar.has_host and _ODD_TEXT.search(typed)):
            raise not_a_prefix(typed, "write plain characters, no patterns, 1024 at most")
        if not rest or rest == "/":
            return cls(scheme, (), f"{scheme}://{grammar.root}")
        return cls(scheme, *grammar.prefix(typed, rest))

    def __str__(self) -> str:
        return self.text


class Prefixes(Generic[T]):
    """Values by prefix, looked up for a ref or a URL."""

    def __init__(self, values: Mapping[Prefix, T]) -> None:
        self._values = {(prefix.scheme, prefix.steps): (prefix, value) for prefix, value in values.items()}
        self._authorities = {
            (prefix.scheme, *prefix.steps[:1]) for prefix in values if _has_path(prefix.scheme, prefix.steps)
        }

    def covering(self, url: str) -> list[tuple[Prefix, T]]:
        """The prefixes that cover `url`, with their values, the longest first.

        Two may be equally long, a kind of repositories and their owner. The owner comes first.
        `url` is a ref's base, a file's origin or a URL. Raises Forbidden for a path that servers read in
        different ways, if any prefix names a path of that host.
        """
        if not self._values:
            return []
        scheme, steps = steps_of(url, is_strict=self._is_strict)
        found = (self._values.get((scheme, each)) for each in _covering(scheme, steps))
        return [each for each in found if each is not None]

    def are_below(self, url: str) -> bool:
        """Whether a prefix is below `url`, so that it covers a part of what is there and not all."""
        scheme, steps = steps_of(url, is_strict=self._is_strict)
        return any(
            key[0] == scheme and len(key[1]) > len(steps) and key[1][: len(steps)] == steps
            for key in self._values
        )

    def _is_strict(self, scheme: str, authority: Steps) -> bool:
        return (scheme, *authority) in self._authorities


def _covering(scheme: str, steps: Steps) -> Iterator[Steps]:
    """The steps of every prefix that covers these steps, the longest first."""
    kinds = SCHEMES[scheme].grammar.kinds if scheme in SCHEMES else ()
    for count in range(len(steps), -1, -1):
        if count == 1 and len(steps) > 1 and steps[0] in kinds:
            yield steps[1:2]
        yield steps[:count]


def steps_of(
    url: str, *, is_strict: Callable[[str, Steps], bool] = lambda _scheme, _host: True
) -> tuple[str, Steps]:
    """The scheme and the steps of a ref's base, a file's origin or a URL; no steps for an unknown scheme.

    `is_strict` says for a scheme and a host whether to refuse a path that servers read in different ways.
    Raises Forbidden for such a path, and Invalid when `url` is not a URL.
    """
    scheme = url.partition("://")[0]
    if scheme not in SCHEMES:
        return scheme, ()
    return scheme, SCHEMES[scheme].grammar.steps(url, lambda host: is_strict(scheme, host))


def _has_path(scheme: str, steps: Steps) -> bool:
    return SCHEMES[scheme].grammar.has_host and len(steps) > 1
