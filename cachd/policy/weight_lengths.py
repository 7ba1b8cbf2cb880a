"""Finds files of weights that are shorter than their own format says: a copy or an upload that broke off.

    safetensors    u64 n | n bytes of JSON: {"TENSOR": {"data_offsets": [start, stop]}} | the tensors
    GGUF           a header that says where each tensor begins, see gguf.py
    PyTorch, npz   a ZIP archive, whose directory is at its end

A file that is none of these, or malformed in another way, is not refused here: that is left to the engine.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from cachd.errors import Invalid
from cachd.foreign import Limit, pieces_of, walk_json
from cachd.policy import gguf

_LONGEST_HEADER_BYTES = 100_000_000  # what the safetensors library takes
_LIMIT = Limit(tokens=20_000_000)  # twelve for each tensor
_ZIP, _END_OF_ZIP = b"PK\x03\x04", b"PK\x05\x06"
_LONGEST_END_BYTES = 22 + 65_535  # the end record of a ZIP archive, with its comment
_WITH_HEADER, _ZEROS = (".safetensors", ".gguf"), 16  # a real header has a byte other than zero among so many
_ZIPS = (".bin", ".pt", ".pth", ".ckpt", ".npz")


def shortage(path: str, size: int, opened: BinaryIO) -> str | None:
    """What shows that a file of weights is too short, in words; None if nothing does.

    `opened`: the file, from its begin. Raises OSError.
    """
    name = path.lower()
    if name.endswith(_WITH_HEADER):
        if not any(opened.read(_ZEROS)):
            return "its header is missing or has only zeros"
        opened.seek(0)
    if name.endswith(".safetensors"):
        needed = _of_safetensors(size, opened)
        return f"its header describes {needed}" if needed is not None and needed > size else None
    if name.endswith(".gguf"):
        needed = gguf.least_size(opened)
        return f"its header describes {needed} or more" if needed is not None and needed > size else None
    if name.endswith(_ZIPS):
        return (
            None if _is_complete_zip(size, opened) else "the directory at the end of its archive is missing"
        )
    return None


def _of_safetensors(size: int, opened: BinaryIO) -> int | None:
    """How many bytes the file needs at least; None if it is no safetensors."""
    first = opened.read(8)
    if len(first) < 8:
        return 9
    (length,) = struct.unpack("<Q", first)
    if not 2 <= length <= _LONGEST_HEADER_BYTES:
        return None
    if 8 + length > size:
        return 8 + int(length)
    try:
        return 8 + int(length) + max(_stops(opened, length), default=0)
    except (ValueError, Invalid):
        return None


def _stops(opened: BinaryIO, length: int) -> Iterator[int]:
    """Yields the end of each tensor. Raises ValueError or Invalid."""
    depth, key, number = 0, "", 0
    for events in walk_json(pieces_of(opened, length), "the header", _LIMIT):
        for event, value in events:
            if event in ("start_map", "start_array"):
                depth, number = depth + 1, 0
            elif event in ("end_map", "end_array"):
                depth -= 1
            elif event == "map_key":
                key = value
            elif event == "number" and depth == 3 and key == "data_offsets":
                number += 1
                if number == 2:
                    yield int(value)


def _is_complete_zip(size: int, opened: BinaryIO) -> bool:
    """Whether a file ends as a ZIP archive does, if it begins as one."""
    if opened.read(len(_ZIP)) != _ZIP:
        return True
    opened.seek(max(0, size - _LONGEST_END_BYTES))
    return _END_OF_ZIP in opened.read(_LONGEST_END_BYTES)
