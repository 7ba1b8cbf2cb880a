"""Turns each fault in an option or a request field into one plain sentence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cachd.model import shown

# pydantic's type of a fault -> our words about the value. For other types, pydantic's own message is used.
_INTEGER, _NUMBER, _FLAG = "is not a whole number", "is not a number", "is neither true nor false"
_TEXT, _LIST, _MAPPING = "is not a string", "is not a list", "is not a mapping of keys to values"
_SAYS = {
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float", "int_parsing_size"), _INTEGER),
    **dict.fromkeys(("float_type", "float_parsing", "finite_number"), _NUMBER),
    **dict.fromkeys(("bool_type", "bool_parsing"), _FLAG),
    **dict.fromkeys(("string_type", "string_unicode", "path_type"), _TEXT),
    **dict.fromkeys(("tuple_type", "list_type"), _LIST),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), _MAPPING),
    "greater_than_equal": "is less than {ge:g}",
    "greater_than": "is not more than {gt:g}",
    "less_than_equal": "is more than {le:g}",
    "less_than": "is not less than {lt:g}",
    "literal_error": "is none of {expected}",
    "enum": "is none of {expected}",
    "too_long": "has more than {max_length} entries",
    "string_too_long": "is longer than {max_length} characters",
    "string_pattern_mismatch": "does not match {pattern}",
    "missing": "is missing",
    "json_invalid": "is not JSON",
}
# Prefixes of fault types whose value may be shown: a number, flag or word was expected, so it is no secret.
_SHOWN = ("int", "float", "finite", "bool", "greater", "less", "literal", "enum")
_LONGEST_KEY = 60


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a value was given: a file and line, an environment variable or a flag. Sorts by name and line."""

    name: str
    line: int = 0  # 0: no particular line

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.name and self.line else self.name


@dataclass(frozen=True, order=True, slots=True)
class Finding:
    """One fault: where it is, the key, and the reason."""

    place: Place
    key: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.place), self.key, self.reason) if part)


def sentence(fault: Mapping[str, Any], known: Iterable[str] = (), wanted: str = "") -> str:
    """One error of pydantic as a sentence about the value.

    `known` are the valid keys, from which a correction of an unknown key is suggested. `wanted` describes a
    valid number, such as "a whole number from 1 to 256".
    """
    kind, context = fault["type"], fault.get("ctx") or {}
    if kind == "value_error":
        return str(context["error"])
    if kind == "extra_forbidden":
        return f"no such key{did_you_mean(str(fault['loc'][-1]), known)}"
    says = _SAYS.get(kind)
    if says is None:
        return str(fault["msg"])
    if wanted and kind.startswith(("int", "greater", "less")):
        says = f"is not {wanted}"
    said = says.format(**context)
    return f"{_shown(fault)} {said}".strip() if kind not in ("missing", "json_invalid") else said


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """`; did you mean PREFIXword?` for the known word most similar to `word`; empty when none is similar."""
    plain = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1)
    return f"; did you mean {prefix}{plain[near[0]]}?" if near else ""


def key_of(loc: Sequence[str | int]) -> str:
    """`models[2].ref` for ("models", 2, "ref"). Unprintable keys are escaped and long ones shortened."""
    key = ""
    for step in loc:
        if isinstance(step, int):
            key += f"[{step}]"
        elif step != "[key]":
            word = step if step.isprintable() else ascii(step)
            key += f"{'.' if key else ''}{word[:_LONGEST_KEY]}"
    return key


def _shown(fault: Mapping[str, Any]) -> str:
    """The faulty value for the sentence; empty when it might be a secret."""
    return shown(fault["input"]) if fault["type"].startswith(_SHOWN) else ""
