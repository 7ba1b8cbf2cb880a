"""Finds the shards that an index names and its model lacks.

{"metadata": {...}, "weight_map": {"TENSOR": "SHARD.safetensors", ...}}
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from posixpath import basename, dirname, join, normpath

from cachd.foreign import Limit, walk_json

_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(?:\.[\w-]+)?\.json", re.A | re.I)
_ADAPTER = re.compile(r"adapter_|optimizer|training_args", re.I)
MAX_SHOWN = 1000
_LONGEST_SHOWN = 1000
_LIMIT = Limit(tokens=8_000_000)  # two for each tensor; the largest models have some 200,000 tensors


@dataclass(frozen=True, slots=True)
class Named:
    """The shards that an index names.

    `absent`: those that the model lacks, sorted, at most MAX_SHOWN of them; each is a path in the model,
    unless it leaves the model. `present`: how many the model has.
    """

    absent: tuple[str, ...] = ()
    present: int = 0


def is_index(path: str) -> bool:
    """Whether a file is an index of shards, such as `model.safetensors.index.json`."""
    return bool(_INDEX.search(basename(path)))


def named(index: str, pieces: Iterable[bytes], paths: Container[str]) -> Named:
    """The shards that an index names.

    `index` is the path of the index, `pieces` its content of any length. Names are relative to the folder of
    the index; one that leaves the model (`../other.bin`) is always absent. A file that is not an index names
    nothing: refusing it is left to the engine. Raises Invalid when the index is nested too deeply, or has
    more tokens than any index.
    """
    absent: set[str] = set()
    present: set[str] = set()
    folder = dirname(index)
    try:
        for name in _shards(pieces, index):
            if (path := normpath(join(folder, name))) in paths:
                present.add(path)
            elif len(absent) < MAX_SHOWN:
                absent.add(path[:_LONGEST_SHOWN])
    except ValueError:
        return Named()
    return Named(tuple(sorted(absent)), len(present))


def others(index: str, paths: Iterable[str]) -> list[str]:
    """The weights in the folder and format of an index, sorted. An adapter is not among them."""
    found = _INDEX.search(basename(index))
    suffix = f".{found[1].lower()}" if found else ""
    return sorted(
        path
        for path in paths
        if suffix
        and path.lower().endswith(suffix)
        and dirname(path) == dirname(index)
        and not _ADAPTER.match(basename(path))
    )


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
