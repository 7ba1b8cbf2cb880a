"""Reads from the header of a GGUF file how long the file is at least (GGUF specification, versions 2 and 3).

    "GGUF" | u32 version | u64 tensors | u64 pairs
    pairs      string key | u32 type | value; an array is u32 type, u64 count, values
    tensors    string name | u32 dimensions | u64 for each | u32 type | u64 offset
    data       begins at a multiple of `general.alignment`; each offset counts from there

A string is u64 bytes, UTF-8.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

_HEAD = struct.Struct("<4sIQQ")
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a value, by type
_STRING, _ARRAY = 8, 9
_ALIGNMENT, _DEFAULT_ALIGNMENT = b"general.alignment", 32
_MAX_ITEMS = 4_000_000  # pairs, tensors and elements of arrays; the largest vocabularies have 300,000 entries
_MAX_DIMENSIONS = 16
_LONGEST_ALIGNMENT = 1 << 20
_U16 = struct.Struct("<H")
_ARCHITECTURE, _SPLIT, _SPLITS = b"general.architecture", b"split.no", b"split.count"
_KINDS = {_ARCHITECTURE: _STRING, _SPLIT: 2, _SPLITS: 2}  # keys whose values are kept, and their types


@dataclass(frozen=True, slots=True)
class Header:
    """What the header of a GGUF says.

    `least_size`: as the function. `data_begin`: where the tensors begin. `split`: the number of this file,
    from 0, and how many there are; None if it says neither. `items`: how many pairs, tensors and elements
    were read.
    """

    least_size: int
    data_begin: int
    tensors: int
    architecture: str
    split: tuple[int, int] | None
    items: int


def header(opened: BinaryIO, most_items: int) -> Header:
    """The header of a GGUF. Raises ValueError with the reason, and OSError.

    Raises OverflowError if it has more than `most_items` items.
    """
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    found = _Header(opened, size, min(most_items, _MAX_ITEMS))
    try:
        least_size = found.least_size()
    except _EndedError as error:
        raise ValueError(f"it ends within its header, after {size} bytes") from error
    except _MalformedError as error:
        raise ValueError("its header is malformed") from error
    except _TooManyError as error:
        raise OverflowError from error
    split = (found.kept.get(_SPLIT), found.kept.get(_SPLITS))
    name = found.kept.get(_ARCHITECTURE, b"")
    return Header(
        least_size,
        found.data_begin,
        found.tensors,
        name.decode(errors="replace") if isinstance(name, bytes) else "",
        (split[0], split[1]) if isinstance(split[0], int) and isinstance(split[1], int) else None,
        found.items,
    )


def least_size(opened: BinaryIO) -> int | None:
    """The least number of bytes of a file that begins so; None if it is no GGUF, or a malformed one.

    A file that ends within its header needs one byte more than it has. Raises OSError.
    """
    size = opened.seek(0, os.SEEK_END)
    opened.seek(0)
    try:
        return _Header(opened, size).least_size()
    except _EndedError:
        return size + 1
    except (_MalformedError, _TooManyError):
        return None


class _EndedError(Exception):
    """The file ends within its header."""


class _MalformedError(Exception):
    """It is no GGUF."""


class _TooManyError(Exception):
    """The header has more items than the caller allows."""


class _Header:
    def __init__(self, opened: BinaryIO, size: int, most_items: int = _MAX_ITEMS) -> None:
        self._opened, self._size, self._most_items = opened, size, most_items
        self._alignment = _DEFAULT_ALIGNMENT
        self.items = self.tensors = self.data_begin = 0
        self.kept: dict[bytes, int | bytes] = {}

    def least_size(self) -> int:
        first = self._opened.read(_HEAD.size)
        if not first.startswith(b"GGUF"):
            raise _MalformedError
        if len(first) < _HEAD.size:
            raise _EndedError
        _, version, tensors, pairs = _HEAD.unpack(first)
        if version not in (2, 3):
            raise _MalformedError
        self._count(pairs)
        for _ in range(pairs):
            self._pair()
        self._count(tensors)
        offsets = [self._tensor() for _ in range(tensors)]
        begin = -(-self._opened.tell() // self._alignment) * self._alignment
        self.tensors, self.data_begin = tensors, min(begin, self._size)
        return begin + max(offsets) + 1 if offsets else self._opened.tell()

    def _pair(self) -> None:
        key, kind = self._string(), self._number(_U32)
        if key == _ALIGNMENT and kind == 4:
            self._alignment = self._number(_U32)
            if not 0 < self._alignment <= _LONGEST_ALIGNMENT:
                raise _MalformedError
        elif _KINDS.get(key) == kind:
            self.kept[key] = self._string() if kind == _STRING else self._number(_U16)
        else:
            self._skip_values(kind, 1)

    def _skip_values(self, kind: int, count: int) -> None:
        if kind in _SIZES:
            self._skip(_SIZES[kind] * count)
        elif kind == _STRING:
            self._count(count)
            for _ in range(count):
                self._skip(self._number(_U64))
        elif kind == _ARRAY and count == 1:  # an array of arrays is none that anybody writes
            of = self._number(_U32)
            self._skip_values(of, self._number(_U64) if of != _ARRAY else 0)
        else:
            raise _MalformedError

    def _tensor(self) -> int:
        self._string()
        dimensions = self._number(_U32)
        if dimensions > _MAX_DIMENSIONS:
            raise _MalformedError
        self._skip(dimensions * _U64.size + _U32.size)
        return self._number(_U64)

    def _string(self) -> bytes:
        length = self._number(_U64)
        if length > 1 << 16:
            raise _MalformedError
        return self._read(length)

    def _number(self, form: struct.Struct) -> int:
        return int(form.unpack(self._read(form.size))[0])

    def _count(self, items: int) -> None:
        self.items += items
        if self.items > self._most_items:
            raise _TooManyError

    def _skip(self, count: int) -> None:
        if self._opened.tell() + count > self._size:
            raise _EndedError
        self._opened.seek(count, os.SEEK_CUR)

    def _read(self, count: int) -> bytes:
        found = self._opened.read(count)
        if len(found) < count:
            raise _EndedError
        return found
