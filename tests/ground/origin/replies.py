"""A request as it was seen, and what a correct server says to it."""

from __future__ import annotations

import enum
import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from tests.ground.origin.content import Content, Memory

NOTHING = Memory(b"")


@dataclass(slots=True)
class Seen:
    """One request as the server saw it; `Server.requests` gives copies of them."""

    method: str
    target: str  # path as it came, percent-encoded
    path: str  # decoded
    query: str  # as it came
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b""
    extent: tuple[int, int] | None = None  # half-open, as asked; None when no single range of a file was
    status: int = 0  # 0 until answered
    peer: int = 0  # the client's port: one a connection
    sent: int = 0  # body bytes handed to the connection, a write being counted just before it happens


@dataclass(frozen=True, slots=True)
class File:
    """What a server holds at a path."""

    content: Content
    etag: str | None = None
    last_modified: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class Ending(enum.Enum):
    """What becomes of the connection when the bytes of a reply are out."""

    KEEP = enum.auto()
    CLOSE = enum.auto()
    RESET = enum.auto()
    STALL = enum.auto()


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes out: `content[start:stop]`, announced as `length` bytes (None: chunked)."""

    status: int
    headers: Mapping[str, str]
    content: Content = NOTHING
    start: int = 0
    stop: int = 0
    length: int | None = 0
    rate: float | None = None
    late: float = 0.0  # seconds before the first byte goes out
    ending: Ending = Ending.KEEP

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], body: bytes = b"") -> Self:
        """A reply with this very body."""
        return cls(status, headers, Memory(body), 0, len(body), len(body))

    def tagged(self, **headers: str | None) -> Reply:
        """The same with these headers, `Content_Range` for Content-Range; None takes one away."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        merged = {**self.headers, **named}
        return replace(self, headers={name: value for name, value in merged.items() if value is not None})

    def whole(self) -> Reply:
        """The same file from its first to its last byte with status 200, if bytes were asked for."""
        if self.status not in {200, 206, 416}:
            return self
        size = self.content.size
        unranged = self.tagged(Content_Range=None)
        return replace(unranged, status=200, start=0, stop=size, length=size)

    def cut(self, at: int, ending: Ending) -> Reply:
        """The same announcement, but `ending` after `at` body bytes."""
        return replace(self, stop=min(self.stop, self.start + at), ending=ending)

    def gzipped(self) -> Reply:
        """The whole file coded, chunked, with a weak ETag: what a compressing CDN makes of any range."""
        whole = self.whole()
        etag = whole.headers.get("ETag")
        weak = f"W/{etag}" if etag and not etag.startswith("W/") else etag
        coded = gzip.compress(whole.content.read(0, whole.stop), compresslevel=1)
        tagged = whole.tagged(Content_Encoding="gzip", Vary="Accept-Encoding", ETag=weak, Accept_Ranges=None)
        return replace(tagged, content=Memory(coded), stop=len(coded), length=None)


def quoted(etag: str) -> str:
    """`etag` as a header value; one that is quoted already, weak or not, stays as it is."""
    return etag if etag.endswith('"') else f'"{etag}"'


def extent_asked(value: str | None, size: int) -> tuple[int, int] | None:
    """Half-open extent of a Range header, open ends settled with `size`; None when it is no single range."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", value or "")
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        return max(0, size - int(last)), size
    if not last:
        return int(first), max(size, int(first))
    return (int(first), int(last) + 1) if int(first) <= int(last) else None


def answer(seen: Seen, file: File) -> Reply:
    """What a correct server says (RFC 9110, sections 13 and 14)."""
    size = file.content.size
    validators = {"ETag": file.etag, "Last-Modified": file.last_modified}
    always = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    headers = {**always, **{name: value for name, value in validators.items() if value}, **file.headers}
    none = Reply(412, headers, file.content)
    if "if-match" in seen.headers and not _matches(seen.headers["if-match"], file.etag, weakly=False):
        return none
    if "if-none-match" in seen.headers and _matches(seen.headers["if-none-match"], file.etag, weakly=True):
        return replace(none, status=304)
    whole = Reply(200, headers, file.content, 0, size, size)
    if seen.method != "GET" or seen.extent is None or not _in_range_of(seen.headers.get("if-range"), file):
        return whole
    start, stop = seen.extent[0], min(seen.extent[1], size)
    if start >= stop:
        return replace(none, status=416).tagged(Content_Range=f"bytes */{size}")
    part = replace(whole, status=206, start=start, stop=stop, length=stop - start)
    return part.tagged(Content_Range=f"bytes {start}-{stop - 1}/{size}")


def _matches(asked: str, etag: str | None, *, weakly: bool) -> bool:
    if asked.strip() == "*":
        return True
    tags = [tag.strip() for tag in asked.split(",")]
    if weakly:
        return etag is not None and etag.removeprefix("W/") in [tag.removeprefix("W/") for tag in tags]
    return etag is not None and not etag.startswith("W/") and etag in tags


def _in_range_of(asked: str | None, file: File) -> bool:
    if asked is None or asked == file.last_modified:
        return True
    return _matches(asked, file.etag, weakly=False)
