"""Derives the default name of a model from its ref and its patterns.

hf://org/model                    org--model
s3://bucket/a/v1/                 bucket--a--v1
file:///x/llama/main/             x--llama--main
https://host:8080/dir/m.gguf      host-8080--dir--m.gguf
with one include, file.gguf       org--model--file.gguf
with the weights gguf:Q4_K_M      org--model--gguf-Q4_K_M
with any other patterns           org--model-1a2b3c4d

The name also ends with digits of a hash if it does not spell the ref exactly, because a character was
replaced or its beginning was cut off. The scheme and the revision are not part of the name: all revisions of
a model have the same name.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from urllib.parse import unquote

from cachd.model.name import LONGEST_NAME, check_name, is_name
from cachd.model.ref import Ref
from cachd.model.scheme import SCHEMES
from cachd.model.weights import ALL

_DIGITS = 8
_PORT = re.compile(r":(\d+)$")


def default_name(
    ref: Ref, include: Sequence[str] = (), exclude: Sequence[str] = (), weights: str = ALL
) -> str:
    """The default name for the files of `ref` that the patterns and the weights select."""
    parts = ref.location.strip("/").split("/")
    if SCHEMES[ref.scheme].grammar.has_host:
        parts[0] = _PORT.sub(r"-\1", parts[0])
    is_one_file = len(include) == 1 and not exclude and not re.search(r"[*?[]|/$", include[0])
    if is_one_file:
        parts += include[0].split("/")
    if weights != ALL:
        parts.append(weights.replace(":", "-"))
    readable = "--".join(_readable(part) for part in parts)
    is_exact = is_name(readable) and readable.split("--") == parts
    if is_exact and (is_one_file or not (include or exclude)):
        return readable
    tail = readable[_DIGITS + 1 - LONGEST_NAME :].lstrip("-._")
    return check_name(f"{tail}-{_hashed(ref, include, exclude, weights)}".lstrip("-"))


def _readable(part: str) -> str:
    """A part of a location, with `-` for all characters that a name may not have."""
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", unquote(part))
    return re.sub(r"\.{2,}", ".", plain).strip("-")


def _hashed(ref: Ref, include: Collection[str], exclude: Collection[str], weights: str) -> str:
    chosen = [weights] if weights != ALL else []
    selection = json.dumps([ref.base, sorted(set(include)), sorted(set(exclude)), *chosen])
    return hashlib.sha256(selection.encode()).hexdigest()[:_DIGITS]
