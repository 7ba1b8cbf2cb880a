"""Checks the names of models, and the paths and patterns of their files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from urllib.parse import quote

from cachd.errors import Invalid

LONGEST_NAME = 96
NAME_PATTERN = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}"

_NAME = re.compile(NAME_PATTERN)
_LONGEST_PATH = 1024
_LONGEST_COMPONENT = 255
_MAX_PATTERNS = 1000
_LONGEST_PATTERNS = 32_768  # characters of all `include` or `exclude` patterns together
_ORDINARY_PATH = re.compile(r"\w[\w.-]{0,99}(?:/\w[\w.-]{0,99}){0,9}", re.ASCII)  # nearly every path


def is_name(name: str) -> bool:
    """Whether `name` may be the name of a model, in the views, the API and URLs."""
    return bool(_NAME.fullmatch(name)) and ".." not in name


def check_name(name: str) -> str:
    """Returns `name` if it may be the name of a model. Raises Invalid otherwise."""
    if not is_name(name):
        raise Invalid(
            f"model name {shown(name)} is not allowed",
            code="bad_name",
            hint=f"use 1 to 96 letters, digits, '.', '_' or '-', a letter or digit first, and no '..'"
            f" (pattern {NAME_PATTERN})",
        )
    return name


def check_patterns(patterns: Collection[str], what: str) -> None:
    """Raises Invalid if a pattern is empty or not printable, or if they are too many or too long.

    `what` names the patterns in the error.
    """
    for pattern in patterns:
        if not 0 < len(pattern) <= _LONGEST_PATH or has_invisible(pattern):
            raise Invalid(
                f"{what} has the pattern {pattern[:120]!a} of {len(pattern)} characters",
                code="bad_pattern",
                hint=f"use 1 to {_LONGEST_PATH} visible characters, such as '*.safetensors'",
            )
    total = sum(map(len, patterns))
    if len(patterns) > _MAX_PATTERNS or total > _LONGEST_PATTERNS:
        raise Invalid(
            f"{what} has {len(patterns)} patterns of {total} characters in all,"
            f" and at most {_MAX_PATTERNS} of {_LONGEST_PATTERNS} are allowed",
            code="bad_pattern",
            hint="write fewer patterns that match many files: '*' matches '/', and 'dir/' all files below it",
        )


def check_path(path: str) -> str:
    """Returns `path` if it stays in the model's directory on every system. Raises Invalid otherwise."""
    if _ORDINARY_PATH.fullmatch(path):
        return path
    parts = path.split("/")
    reason = ""
    if not path or path.startswith("/") or not is_clean(parts) or re.match(r"[A-Za-z]:", path):
        reason = "it leaves the model's directory or is not relative"
    elif any(part.lower() == ".git" for part in parts):
        reason = "it is in .git, where git looks for programs to run"
    elif has_invisible(path):
        reason = "it contains control or invisible characters"
    elif len(path.encode()) > _LONGEST_PATH or any(len(p.encode()) > _LONGEST_COMPONENT for p in parts):
        reason = (
            f"it is longer than {_LONGEST_PATH} bytes, or a part of it is longer than {_LONGEST_COMPONENT}"
        )
    if reason:
        raise Invalid(
            f"file name {path[:120]!r} of the source is refused: {reason}",
            code="unsafe_path",
            hint="cachd refuses the complete model; report the name to the operator of the source",
        )
    return path


def shown(text: str) -> str:
    """A refused text as an error may show it: shortened, and without user, password, query or fragment."""
    head = re.split(r"[?#]", text, maxsplit=1)[0]
    return repr(re.sub(r"^((?:[A-Za-z][\w+.-]*:/+|/+)?)[^/]*@", r"\1", head)[:120])


def has_invisible(text: str) -> bool:
    """Whether `text` has control characters, or characters that change how others are shown."""
    return not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text)


def is_clean(parts: Iterable[str]) -> bool:
    """Whether no part of a path is empty, `.` or `..`, or contains a zero byte or a Windows separator."""
    return all(part not in ("", ".", "..") and "\0" not in part and "\\" not in part for part in parts)


def quoted(path: str) -> str:
    """`path` percent-encoded for a URL, with '/' unchanged."""
    return quote(path, safe="/")
