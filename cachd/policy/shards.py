"""Which shards a safetensors index names that its model lacks."""

from __future__ import annotations

import json
from collections.abc import Container
from posixpath import dirname, join

INDEX = ".safetensors.index.json"
LONGEST_INDEX_BYTES = 64 << 20


def missing(index: str, content: bytes, paths: Container[str]) -> list[str]:
    """The names in the index at path `index`, relative to its folder, that are not among `paths`, sorted.

    A name that climbs (`../other.bin`) is never among them. What is no index is the engine's to refuse.
    """
    try:
        named = set(json.loads(content)["weight_map"].values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return sorted(str(name) for name in named if join(dirname(index), str(name)) not in paths)
