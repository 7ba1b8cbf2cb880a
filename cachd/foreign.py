"""Documents that strangers write: their size, depth and number of tokens are bounded before they are parsed.

A parser makes more of a document than its bytes: `[[],[],` takes forty bytes of memory for each of its own.
So JSON is walked first, piece by piece, in constant memory; only what passed is made into objects.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cachd.errors import Invalid

_PIECE_BYTES = 64 << 10
_LONGEST_VALUE_BYTES = 1 << 20
_MOST_TAGS = 100_000  # of an XML document; a page of S3 has some 20,000
_OPENS, _CLOSES = ("start_map", "start_array"), ("end_map", "end_array")

Event = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Limit:
    """What one document may have: bytes, tokens (keys, values, ends of values), and values within values.

    A token costs its parser some eighty bytes of memory at most.
    """

    size_bytes: int = 4 << 20
    tokens: int = 300_000
    depth: int = 64


SMALL = Limit()


def too_large(shown: str, at_most: int, arrived: int | None = None, *, unit: str = "bytes") -> Invalid:
    """The error about a document that has more than `at_most`; `arrived`: how much, where that is known."""
    has = f"has {arrived} {unit}" if arrived is not None else f"goes on after {at_most} {unit}"
    return Invalid(
        f"{shown} {has}, and {at_most} {unit} are the most",
        code="document_too_large",
        hint="report it to whoever keeps the source; for a model of very many files ask for a part of it",
    )


def load_json(content: bytes, shown: str, limit: Limit = SMALL) -> Any:
    """What a JSON document says. Raises ValueError for what is none, Invalid for what is beyond `limit`."""
    check_json(content, shown, limit)
    return json.loads(content)


def check_json(content: bytes, shown: str, limit: Limit = SMALL) -> None:
    """Raises as `load_json`."""
    if len(content) > limit.size_bytes:
        raise too_large(shown, limit.size_bytes, len(content))
    view = memoryview(content)
    pieces = (bytes(view[at : at + _PIECE_BYTES]) for at in range(0, len(view), _PIECE_BYTES))
    for _ in walk_json(pieces, shown, limit):
        pass


def walk_json(pieces: Iterable[bytes], shown: str, limit: Limit = SMALL) -> Iterator[list[Event]]:
    """The events of a JSON document as ijson names them, a few at a time, in memory of some pieces' size.

    Raises as `load_json`, but for `limit.size_bytes`: the caller decides how many pieces there are.
    """
    import ijson

    events = ijson.sendable_list()
    walker = ijson.basic_parse_coro(events)
    tokens = depth = unfinished = 0
    try:
        for piece in pieces:
            walker.send(piece)
            unfinished = 0 if events else unfinished + len(piece)
            if unfinished > _LONGEST_VALUE_BYTES:
                raise too_large(f"a value of {shown}", _LONGEST_VALUE_BYTES)
            tokens += len(events)
            if tokens > limit.tokens:
                raise too_large(shown, limit.tokens, unit="tokens")
            for event, _ in events:
                if event in _OPENS:
                    depth += 1
                    if depth > limit.depth:
                        raise _too_deep(shown, limit.depth)
                elif event in _CLOSES:
                    depth -= 1
            yield list(events)
            events.clear()
        walker.close()
        yield list(events)
    except (ijson.JSONError, ArithmeticError, SystemError, ValueError) as error:  # the last: a number's
        raise ValueError(f"{shown} is no JSON") from error


def _too_deep(shown: str, depth: int) -> Invalid:
    return Invalid(
        f"{shown} has values nested deeper than {depth} levels, which are the most",
        code="document_too_deep",
        hint="report it to whoever keeps the source",
    )


def check_xml(content: bytes, shown: str, *, at_most: int = SMALL.size_bytes) -> None:
    """Raises Invalid for an XML document that its parser would make too much of.

    Tags and attributes are counted, in whatever encoding; no document may declare its type, and so entities.
    """
    if len(content) > at_most:
        raise too_large(shown, at_most, len(content))
    tags = content.count(b"<") + content.count(b"=")
    if tags > _MOST_TAGS:
        raise too_large(shown, _MOST_TAGS, tags, unit="tags and attributes")
    if b"<!DOCTYPE" in content.replace(b"\0", b""):
        raise Invalid(
            f"{shown} declares a document type, which could make it endless",
            code="document_refused",
            hint="report it to whoever keeps the source",
        )
