"""Defines the classes of reports: the values that the API answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, dataclass_transform

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False)
def report(kind: type[T]) -> type[T]:
    """Make a class a dataclass whose fields are given by name and are not changed afterwards.

    mypy refuses a change. The class itself does not, and has no `==`: Python would compile four functions for
    that, for each of sixty classes, at each start of the daemon.
    """
    return dataclass(kw_only=True, slots=True, eq=False)(kind)
