"""Checks the size, depth and number of tokens of documents from strangers before a parser builds objects.

Parsed objects need more memory than the document: some forty bytes for each byte of `[[],[],`. So JSON is
first walked piece by piece, in constant memory, and only a document that passes is parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from cachd.errors import Invalid

_PIECE_BYTES = 4 << 10  # the parser keeps the interpreter for a piece: of `[[[[`, a millisecond
_READ_BYTES = 1 << 20
_LONGEST_VALUE_BYTES = 1 << 20
_MAX_TAGS = 100_000  # tags and attributes of an XML document; one page of an S3 listing has some 20,000
_OPENS, _CLOSES = ("start_map", "start_array"), ("end_map", "end_array")

Event = tuple[str, Any]


@dataclass(frozen=True, slots=True)
class Limit:
    """The most bytes, tokens (keys, values, ends of values) and levels of nesting that a document may have.

    A token costs the parser some eighty bytes of memory at most.
    """

    size_bytes: int = 4 << 20
    tokens: int = 300_000
    depth: int = 64


SMALL = Limit()


def too_large(shown: str, at_most: int, arrived: int | None = None, *, unit: str = "bytes") -> Invalid:
    """The error for a document of more than `at_most` units; `arrived` is its real number, where known."""
    has = f"has {arrived} {unit}" if arrived is not None else f"has more than {at_most} {unit}"
    return Invalid(
        f"{shown} {has}; the limit is {at_most} {unit}",
        code="document_too_large",
        hint="report it to the operator of the source; if the model has very many files, pull a part of it",
    )


def load_json(content: bytes, shown: str, limit: Limit = SMALL) -> Any:
    """The value of a JSON document. Raises ValueError if it is not JSON, Invalid if it exceeds `limit`."""
    check_json(content, shown, limit)
    return json.loads(content)


def check_json(content: bytes, shown: str, limit: Limit = SMALL) -> None:
    """Check a JSON document and keep nothing of it. Raises as `load_json` does."""
    if len(content) > limit.size_bytes:
        raise too_large(shown, limit.size_bytes, len(content))
    for _ in walk_json([content], shown, limit):
        pass


def pieces_of(opened: BinaryIO, length: int) -> Iterator[bytes]:
    """Yields the next `length` bytes of a file, a MiB at a time; fewer if the file ends before.

    Each read releases the interpreter for a moment. A thread that waits for the interpreter, and does not get
    it in this moment, begins its wait anew. With a read for each 64 KiB, probes waited for a second.
    """
    while length and (content := opened.read(min(length, _READ_BYTES))):
        length -= len(content)
        yield content


def _short(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Divides pieces into short ones, so that the parser gives the interpreter back soon."""
    for content in pieces:
        view = memoryview(content)
        for at in range(0, len(view), _PIECE_BYTES):
            yield bytes(view[at : at + _PIECE_BYTES])


def walk_json(pieces: Iterable[bytes], shown: str, limit: Limit = SMALL) -> Iterator[list[Event]]:
    """Yields the ijson events of a JSON document in small batches. `pieces` are its bytes, of any length.

    Raises as `load_json` does, but ignores `limit.size_bytes`: the caller bounds the number of pieces.
    """
    import ijson

    events = ijson.sendable_list()
    walker = ijson.basic_parse_coro(events)
    tokens = depth = unfinished = 0
    try:
        for piece in _short(pieces):
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
    except (ijson.JSONError, ArithmeticError, SystemError, ValueError) as error:  # ValueError: a bad number
        raise ValueError(f"{shown} is not JSON") from error


def _too_deep(shown: str, depth: int) -> Invalid:
    return Invalid(
        f"{shown} has values nested deeper than the limit of {depth} levels",
        code="document_too_deep",
        hint="report it to the operator of the source",
    )


def check_xml(content: bytes, shown: str, *, at_most: int = SMALL.size_bytes) -> None:
    """Raises Invalid for an XML document that has too many bytes or tags, or a DOCTYPE.

    A DOCTYPE may declare entities (XML 1.0, section 4), and these can expand to any size. The checks work on
    bytes, so they hold for UTF-8 and UTF-16 alike.
    """
    if len(content) > at_most:
        raise too_large(shown, at_most, len(content))
    tags = content.count(b"<") + content.count(b"=")
    if tags > _MAX_TAGS:
        raise too_large(shown, _MAX_TAGS, tags, unit="tags and attributes")
    if b"<!DOCTYPE" in content.replace(b"\0", b""):
        raise Invalid(
            f"{shown} has a DOCTYPE, whose entities could expand to any size",
            code="document_refused",
            hint="report it to the operator of the source",
        )
