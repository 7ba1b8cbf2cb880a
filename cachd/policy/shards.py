"""Finds the shards that a safetensors index names and its model lacks.

{"metadata": {...}, "weight_map": {"TENSOR": "SHARD.safetensors", ...}}
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from posixpath import dirname, join

from cachd.foreign import Limit, walk_json

INDEX = ".safetensors.index.json"
MAX_SHOWN = 1000
_LONGEST_SHOWN = 1000
_LIMIT = Limit(tokens=8_000_000)  # two for each tensor; the largest models have some 200,000 tensors


def missing(index: str, pieces: Iterable[bytes], paths: Container[str]) -> list[str]:
    """The names in the index that are not among `paths`, sorted; at most MAX_SHOWN of them.

    `index` is the path of the index, `pieces` its content of any length. Names are relative to the folder of
    the index; one that leaves the model (`../other.bin`) is always missing. A file that is not an index gives
    an empty list: refusing it is left to the engine. Raises Invalid when the index is nested too deeply, or
    has more tokens than any index.
    """
    found: set[str] = set()
    try:
        for name in _shards(pieces, index):
            if name not in found and join(dirname(index), name) not in paths and len(found) < MAX_SHOWN:
                found.add(name[:_LONGEST_SHOWN])
    except ValueError:
        return []
    return sorted(found)


def _shards(pieces: Iterable[bytes], index: str) -> Iterator[str]:
    """Yields the values of `weight_map`. Raises as `walk_json`, and ValueError if this is not an index."""
    depth, key, is_index = 0, "", False
    for events in walk_json(pieces, index, _LIMIT):
        for event, value in events:
            inside = depth == 2 and key == "weight_map"
            if event in ("start_map", "start_array"):
                if inside or (depth == 1 and key == "weight_map" and event == "start_array"):
                    raise ValueError("its weight_map is not a mapping of names")
                is_index = is_index or (depth == 1 and key == "weight_map")
                depth += 1
            elif event in ("end_map", "end_array"):
                depth -= 1
            elif event == "map_key":
                key = value if depth == 1 else key
            elif inside:
                yield str(value)
    if not is_index:
        raise ValueError("it has no weight_map")
