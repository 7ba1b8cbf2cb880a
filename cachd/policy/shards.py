"""Which shards a safetensors index names that its model lacks."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from posixpath import dirname, join

from cachd.foreign import Limit, walk_json

INDEX = ".safetensors.index.json"
MOST_TOLD = 1000
_LONGEST_TOLD = 1000
_LIMIT = Limit(tokens=8_000_000)  # two a tensor: the largest models of today have some 200,000 tensors


def missing(index: str, pieces: Iterable[bytes], paths: Container[str]) -> list[str]:
    """The names in the index at path `index`, relative to its folder, that are not among `paths`, sorted.

    `pieces` are its content, which may be of any length: only so many names as MOST_TOLD are kept. A name
    that climbs (`../other.bin`) is never among `paths`. What is no index is the engine's to refuse. Raises
    Invalid when the index is nested too deep, or has more tokens than any index.
    """
    found: set[str] = set()
    try:
        for name in _shards(pieces, index):
            if name not in found and join(dirname(index), name) not in paths and len(found) < MOST_TOLD:
                found.add(name[:_LONGEST_TOLD])
    except ValueError:
        return []
    return sorted(found)


def _shards(pieces: Iterable[bytes], index: str) -> Iterator[str]:
    """The values of the mapping `weight_map`. Raises as `walk_json`, and ValueError for what is no index."""
    depth, key, is_index = 0, "", False
    for events in walk_json(pieces, index, _LIMIT):
        for event, value in events:
            inside = depth == 2 and key == "weight_map"
            if event in ("start_map", "start_array"):
                if inside or (depth == 1 and key == "weight_map" and event == "start_array"):
                    raise ValueError("its weight_map is no mapping of names")
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
