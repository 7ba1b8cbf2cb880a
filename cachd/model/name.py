"""What may name a model, and a file of a model."""

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
_MOST_PATTERNS = 1000
_LONGEST_PATTERNS = 32_768  # characters of all patterns of one request
_ORDINARY_PATH = re.compile(r"\w[\w.-]{0,99}(?:/\w[\w.-]{0,99}){0,9}", re.ASCII)  # as nearly all are


def is_name(name: str) -> bool:
    """Whether it can name a model in the views, the API and a URL."""
    return bool(_NAME.fullmatch(name)) and ".." not in name


def check_name(name: str) -> str:
    """`name` if it can name a model. Raises Invalid."""
    if not is_name(name):
        raise Invalid(
            f"model name {shown(name)} is not allowed",
            code="bad_name",
            hint=f"use 1 to 96 of letters, digits, '.', '_', '-', beginning with a letter or digit"
            f" and without '..' (pattern {NAME_PATTERN})",
        )
    return name


def check_patterns(patterns: Collection[str], what: str) -> None:
    """Raises Invalid unless these can be kept and shown: printable, and not too many or too long."""
    for pattern in patterns:
        if not 0 < len(pattern) <= _LONGEST_PATH or has_invisible(pattern):
            raise Invalid(
                f"{what} holds the pattern {pattern[:120]!a} of {len(pattern)} characters",
                code="bad_pattern",
                hint=f"use 1 to {_LONGEST_PATH} visible characters, such as '*.safetensors'",
            )
    total = sum(map(len, patterns))
    if len(patterns) > _MOST_PATTERNS or total > _LONGEST_PATTERNS:
        raise Invalid(
            f"{what} holds {len(patterns)} patterns of {total} characters in all,"
            f" and {_MOST_PATTERNS} of {_LONGEST_PATTERNS} are the most",
            code="bad_pattern",
            hint="write a few patterns that match many files: '*' crosses '/', and 'dir/' means all below",
        )


def check_path(path: str) -> str:
    """`path` if it stays inside a model's directory on every system that reads it. Raises Invalid."""
    if _ORDINARY_PATH.fullmatch(path):
        return path
    parts = path.split("/")
    reason = ""
    if not path or path.startswith("/") or not is_clean(parts) or re.match(r"[A-Za-z]:", path):
        reason = "it leaves the model's directory or is not relative"
    elif any(part.lower() == ".git" for part in parts):
        reason = "it lies in .git, where git finds what to run"
    elif has_invisible(path):
        reason = "it holds control or invisible characters"
    elif len(path.encode()) > _LONGEST_PATH or any(len(p.encode()) > _LONGEST_COMPONENT for p in parts):
        reason = f"it is longer than {_LONGEST_PATH} bytes, or a part of it than {_LONGEST_COMPONENT}"
    if reason:
        raise Invalid(
            f"file name {path[:120]!r} of the source is refused: {reason}",
            code="unsafe_path",
            hint="the whole model is refused; report the name to whoever keeps the source",
        )
    return path


def shown(text: str) -> str:
    """What was refused as an error may repeat it: no user, password, query or fragment, and not long."""
    head = re.split(r"[?#]", text, maxsplit=1)[0]
    return repr(re.sub(r"^((?:[A-Za-z][\w+.-]*:/+|/+)?)[^/]*@", r"\1", head)[:120])


def has_invisible(text: str) -> bool:
    """Whether it holds control characters, or ones that change how others look."""
    return not text.isprintable() and any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in text)


def is_clean(parts: Iterable[str]) -> bool:
    """Whether no part is empty, climbs, or holds what some system takes for a separator."""
    return all(part not in ("", ".", "..") and "\0" not in part and "\\" not in part for part in parts)


def quoted(path: str) -> str:
    """`path` as the path of a URL, '/' kept."""
    return quote(path, safe="/")
