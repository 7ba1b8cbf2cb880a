"""A table of functions by the name of their row, which a decorator fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F")


class Rows(dict[str, F]):
    """The function of each row."""

    def row(self, name: str) -> Callable[[F], F]:
        """Registers a function as the one of this row."""

        def register(function: F) -> F:
            assert name not in self, name
            self[name] = function
            return function

        return register
