"""Reads the header of a safetensors file, and checks that it describes the file exactly.

    u64 n | n bytes of JSON | tensors
    {"__metadata__": {...}, "TENSOR": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [start, stop]}}

The tensors follow one another without a gap, and end where the file ends (safetensors, `Metadata::validate`).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from cachd.errors import Invalid
from cachd.foreign import Limit, pieces_of, walk_json

LONGEST_BYTES = 100_000_000  # what the safetensors library takes
_MAX_DIMENSIONS, _LARGEST = 64, 1 << 63
_DEPTH = 8
_METADATA = "__metadata__"
BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True, slots=True)
class Tensors:
    """What a header describes: how many tensors, and the bytes of each type. `tokens`: of the header."""

    count: int
    by_type: Mapping[str, int]
    tokens: int


class BadHeaderError(ValueError):
    """A header that the safetensors library refuses. Its text says why, with the numbers."""


def length_of(opened: BinaryIO, size: int) -> int:
    """The bytes of the header of a file of `size` bytes. Raises BadHeaderError."""
    first = opened.read(8)
    if len(first) < 8:
        raise BadHeaderError(f"the file has {size} bytes, and the length of a header takes 8")
    (length,) = struct.unpack("<Q", first)
    if length > LONGEST_BYTES:
        raise BadHeaderError(f"its header has {length} bytes, and at most {LONGEST_BYTES} are allowed")
    if 8 + length > size:
        raise BadHeaderError(f"its header has {length} bytes, and the file {size}")
    return int(length)


def read(opened: BinaryIO, size: int, length: int, most_tokens: int) -> Tensors:
    """Check a header of `length` bytes, from where `length_of` ended.

    Raises BadHeaderError, and Invalid if it has more tokens than allowed.
    """
    reader, limit = _Reader(), Limit(tokens=most_tokens, depth=_DEPTH)
    try:
        for events in walk_json(pieces_of(opened, length), "its header", limit):
            reader.tokens += len(events)
            for event, value in events:
                reader.take(event, value)
    except BadHeaderError:
        raise
    except ValueError as error:
        raise BadHeaderError("its header is not JSON") from error
    except Invalid as error:
        if error.code != "document_too_deep":
            raise
        raise BadHeaderError(f"its header is nested deeper than {_DEPTH} levels") from error
    return reader.finish(size - 8 - length)


class _Reader:
    """Follows the events of the JSON, and keeps the offsets of each tensor."""

    def __init__(self) -> None:
        self.tokens = 0
        self._depth, self._tensor, self._key = 0, "", ""
        self._type: object = None
        self._shape: list[int] = []
        self._offsets: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._by_type: Counter[str] = Counter()

    def take(self, event: str, value: Any) -> None:
        if event == "map_key":
            if self._depth == 1:
                self._tensor, self._key = value, ""
                self._type, self._shape, self._offsets = None, [], []
            elif self._depth == 2:
                self._key = value
        elif event in ("start_map", "start_array"):
            self._depth += 1
            if self._depth == 1 and event == "start_array":
                raise BadHeaderError("its header is not a JSON object")
        elif event in ("end_map", "end_array"):
            self._depth -= 1
            if self._depth == 1 and self._tensor != _METADATA:
                self._end_tensor()
        elif self._tensor != _METADATA or self._depth < 2:
            self._take_value(event, value)

    def _take_value(self, event: str, value: Any) -> None:
        if self._depth == 2 and self._key == "dtype":
            self._type = value
            return
        if self._depth == 3 and self._key in ("shape", "data_offsets"):
            numbers = self._shape if self._key == "shape" else self._offsets
            is_number = event in ("number", "integer") and isinstance(value, int) and 0 <= value < _LARGEST
            if not is_number or len(numbers) >= _MAX_DIMENSIONS:
                raise self._bad(f"has a {self._key} that is no list of at most {_MAX_DIMENSIONS} sizes")
            numbers.append(value)
        elif self._depth < 2:
            raise BadHeaderError("its header has a tensor that is not a JSON object")

    def _end_tensor(self) -> None:
        if not isinstance(self._type, str) or self._type not in BITS:
            raise self._bad(f"has the type {self._type!r:.40}, which safetensors does not know")
        if len(self._offsets) != 2 or self._offsets[0] > self._offsets[1]:
            raise self._bad(f"has the offsets {self._offsets!r:.60}")
        start, stop = self._offsets
        bits = math.prod(self._shape) * BITS[self._type]
        if bits != 8 * (stop - start):
            shape = f"{self._type} {self._shape!r:.80}"
            raise self._bad(f"has {stop - start} bytes, and {shape} takes {-(-bits // 8)}")
        self._spans.append((start, stop))
        self._by_type[self._type] += stop - start

    def finish(self, data_bytes: int) -> Tensors:
        """What was read, if the tensors cover `data_bytes` exactly. Raises BadHeaderError."""
        end = 0
        for start, stop in sorted(self._spans):
            if start != end:
                what = "overlap" if start < end else "leave a gap"
                raise BadHeaderError(f"its tensors {what}: one ends at {end}, and the next begins at {start}")
            end = stop
        if end != data_bytes:
            raise BadHeaderError(f"its tensors take {end} bytes, and {data_bytes} follow the header")
        return Tensors(len(self._spans), dict(self._by_type), self.tokens)

    def _bad(self, what: str) -> BadHeaderError:
        return BadHeaderError(f"its tensor {self._tensor!r:.120} {what}")
