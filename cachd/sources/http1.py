"""Speaks the part of HTTP/1.1 (RFC 9112) that downloads need: one request, and the response to it.

    HTTP/1.1 206 Partial Content      the head: a status line, header lines, an empty line
    Content-Length: 5

    bytes                             the body: `length` bytes, chunks, or all up to the connection's end

The head is received into a small buffer and parsed by httptools. Body bytes that arrive with it are copied
from there, so a small file takes one receive. The rest of the body is received directly into the caller's
buffer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http.client import HTTPException, LineTooLong, RemoteDisconnected
from urllib.parse import SplitResult

import httptools

from cachd.sources.wire import LARGE_BYTES, Wire

LONGEST_HEAD_BYTES = LARGE_BYTES // 2  # below LARGE_BYTES, as a wire waits until such a buffer is full
_MAX_HEADERS = 100
_REMEMBERED = 64  # names of headers in their form as keys
_MAX_INTERIM = 20  # 1xx responses before the final one
_LONGEST_CHUNK_LINE = 1024
_FEW_CHUNKS = 10_000  # more of them must average _LEAST_CHUNK_BYTES: a chunk takes as long as some KiB
_LEAST_CHUNK_BYTES = 64
_END_OF_HEAD, _END_OF_LINE = re.compile(rb"\n\r?\n"), re.compile(rb"\n")
_LINE_END, _FOLD = re.compile(rb"\r?\n"), re.compile(rb"\r?\n[ \t]+")
_VERSIONS = {"1.0": False, "1.1": True}  # version -> whether a connection stays open unless a header says no
_CHUNK = re.compile(r"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r?\n")
_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NUMBER = re.compile(r"[0-9]{1,18}")
_LENGTH_LINE = re.compile(rb"\nContent-Length[ \t]*:([^\r\n]*)\r?(?=\n)", re.IGNORECASE)
_CODINGS = ("", "identity", "chunked")  # of Transfer-Encoding


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `headers` has all but Host; their values may be secret."""

    method: str
    url: SplitResult
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(default=b"", repr=False)

    def as_bytes(self, host: str) -> bytes:
        """What is sent to the origin `host`. Raises ValueError for a character that cannot be sent."""
        path = (self.url.path or "/") + (f"?{self.url.query}" if self.url.query else "")
        return head_of_request(self.method, path, host, self.headers) + self.body


def head_of_request(method: str, target: str, host: str, headers: Mapping[str, str]) -> bytes:
    """The head of a request. Raises ValueError for a character that cannot be sent."""
    if _UNSENDABLE.search("".join(headers.values())):
        raise ValueError("a control character in a header")
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode("iso-8859-1")


def number(text: str | None) -> int | None:
    """The decimal number in a header; None for anything else."""
    return int(text) if text and _NUMBER.fullmatch(text) else None


class ReceiveBuffer:
    """The bytes that a wire receives, in order. Those that came with a head wait in a buffer."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._held = bytearray(LONGEST_HEAD_BYTES)
        self._view = memoryview(self._held)
        self._start = self._stop = 0

    @property
    def is_empty(self) -> bool:
        """Whether all received bytes were read."""
        return self._start == self._stop

    def until(self, end: re.Pattern[bytes]) -> memoryview:
        """The bytes up to the end of the first match of `end`, a pattern for three bytes at most.

        They are valid until the next call. Raises OSError or HTTPException.
        """
        if self._start:
            rest = self._stop - self._start
            self._view[:rest] = self._view[self._start : self._stop]
            self._start, self._stop = 0, rest
        searched = 0
        while not (found := end.search(self._held, searched, self._stop)):
            searched = max(self._stop - 2, 0)
            if self._stop == len(self._held):
                raise LineTooLong("head")
            count = self.wire.recv_into(self._view[self._stop :])
            if not count and self.is_empty:
                raise RemoteDisconnected("the connection was closed without a response")
            if not count:
                raise HTTPException("the connection was closed within the head of a response")
            self._stop += count
        self._start = found.end()
        return self._view[: self._start]

    def readinto(self, view: memoryview) -> int:
        """Read some of the next bytes and return their number; 0 at the connection's end. Raises OSError."""
        count = min(self._stop - self._start, len(view))
        if not count:
            return self.wire.recv_into(view)
        view[:count] = self._view[self._start : self._start + count]
        self._start += count
        return count


class Headers:
    """The headers of a response. Names are case-insensitive; repeated ones are joined (RFC 9110, 5.2)."""

    __slots__ = ("_values",)

    def __init__(self, values: Mapping[bytes, bytes]) -> None:
        """`values` has the names in lower case."""
        self._values = values

    def get(self, name: str, /) -> str | None:
        """The value of a header, without space around it; None without the header."""
        value = self._values.get(_key(name))
        return None if value is None else str(value, "iso-8859-1").strip()

    def items(self) -> list[tuple[str, str]]:
        """Names in lower case, with their values."""
        return [
            (str(name, "iso-8859-1"), str(value, "iso-8859-1").strip())
            for name, value in self._values.items()
        ]


@lru_cache(maxsize=_REMEMBERED)
def _key(name: str) -> bytes:
    return name.lower().encode("iso-8859-1")


@dataclass(frozen=True, slots=True)
class Head:
    """The parsed head of a response. `stays_open`: the origin will take another request afterwards."""

    status: int
    reason: str
    headers: Headers
    stays_open: bool


def receive_head(received: ReceiveBuffer) -> Head:
    """The head of the final response; interim ones (RFC 9110, 15.2) are skipped.

    Raises OSError or HTTPException.
    """
    for _ in range(_MAX_INTERIM + 1):
        head = _parsed(bytes(received.until(_END_OF_HEAD)))
        if head.status >= 200:
            return head
    raise HTTPException(f"more than {_MAX_INTERIM} interim responses (1xx)")


class _Callbacks:
    """What httptools calls while it parses: functions of C, as a call of Python for each header is slow."""

    __slots__ = ("on_header", "on_status")

    def __init__(
        self, on_header: Callable[[bytes, bytes], object], on_status: Callable[[bytes], object]
    ) -> None:
        self.on_header, self.on_status = on_header, on_status


def _parsed(head: bytes) -> Head:
    """Parse a head. Raises HTTPException."""
    found: dict[bytes, bytes] = {}
    reason: list[bytes] = []
    try:
        status, version = _parse(head, _Callbacks(found.__setitem__, reason.append))
    except HTTPException:
        if (plain := _with_one_length(_in_plain_lines(head))) == head:
            raise
        return _parsed(plain)
    lines = head.count(b"\r\n") - 2
    if lines > _MAX_HEADERS:
        raise HTTPException(f"more than {_MAX_HEADERS} header lines")
    values = dict(zip(map(bytes.lower, found), found.values(), strict=True))  # all in C
    if len(values) != lines:
        values = _joined(head)
    headers = Headers(values)
    connection = (headers.get("Connection") or "").lower()
    stays_open = "close" not in connection if _VERSIONS[version] else "keep-alive" in connection
    return Head(status, str(b"".join(reason), "iso-8859-1").strip(), headers, stays_open)


def _parse(head: bytes, callbacks: _Callbacks) -> tuple[int, str]:
    """The status and the version of a head. Raises HTTPException.

    It refuses what httptools lets pass: other protocols and versions, and a status below 100.
    """
    parser = httptools.HttpResponseParser(callbacks)
    # Transfer-Encoding overrides Content-Length (RFC 9112, 6.3).
    parser.set_dangerous_leniencies(lenient_chunked_length=True)
    try:
        parser.feed_data(head)
    except httptools.HttpParserError as error:
        raise HTTPException(f"malformed head: {error}") from error
    except httptools.HttpParserUpgrade as error:
        raise HTTPException("the origin switches to another protocol") from error
    status, version = parser.get_status_code(), parser.get_http_version()
    if not head.startswith(b"HTTP/1.") or version not in _VERSIONS or status < 100:
        raise HTTPException(f"malformed status line {head[:40]!r}")
    return status, version


def _in_plain_lines(head: bytes) -> bytes:
    """A head whose lines end with CRLF and are not folded, as httptools demands.

    A line may end with a bare line feed (RFC 9112, 2.2), and a header may continue in the next line (5.2).
    """
    first, _, rest = head.partition(b"\n")
    return _LINE_END.sub(b"\r\n", first + b"\n" + _FOLD.sub(b" ", rest))


def _with_one_length(head: bytes) -> bytes:
    """A head that states one Content-Length once, if it repeats the same value (RFC 9110, 8.6)."""
    stated = {value.strip() for line in _LENGTH_LINE.findall(head) for value in line.split(b",")}
    if len(stated) != 1:
        return head
    return b"%b\r\nContent-Length: %b\r\n\r\n" % (_LENGTH_LINE.sub(b"", head)[:-4], stated.pop())


def _joined(head: bytes) -> dict[bytes, bytes]:
    """The headers of a valid head in which some are repeated. One that repeats its value counts once."""
    values: dict[bytes, bytes] = {}

    def add(name: bytes, value: bytes) -> None:
        before = values.get(name.lower())
        values[name.lower()] = value if before in (None, value) else before + b", " + value

    _parse(head, _Callbacks(add, bytes))
    return values


class FramedBody:
    """The body of one response. Its framing says where it ends (RFC 9112, 6.3).

    Raises HTTPException for a Transfer-Encoding other than chunked: none is asked for (TE).
    """

    def __init__(self, received: ReceiveBuffer, head: Head, method: str) -> None:
        self._received = received
        bodiless = head.status in (204, 304) or method == "HEAD"
        coding = (head.headers.get("Transfer-Encoding") or "").lower()
        if coding not in _CODINGS and not bodiless:
            raise HTTPException(f"Transfer-Encoding is {coding:.40}")
        chunked = coding == "chunked"
        self._chunked = chunked and not bodiless
        self._chunk_left = self._chunks = self._chunked_bytes = 0
        self._begun = self._ended = not self._chunked
        # Chunks override a Content-Length. With both, the connection takes no other request: where the body
        # ends is in doubt, and bytes after it may pass for the next response (RFC 9112, 6.3 and 11.1).
        stated = head.headers.get("Content-Length")
        self.stated_length = None if self._chunked else stated
        # Bytes of the body; None where the last chunk or the connection's end marks its end.
        self.length = 0 if bodiless else None if chunked else number(self.stated_length)
        has_end = stated is None if self._chunked else self.length is not None
        self._stays_open = head.stays_open and has_end

    @property
    def is_over(self) -> bool:
        """Whether the connection can take the next request, once the caller has read `length` bytes."""
        return self._stays_open and self._ended and self._received.is_empty

    def readinto(self, view: memoryview) -> int:
        """Read some of the next bytes and return their number; 0 at the end.

        The caller must stop after `length` bytes: the next response follows. Raises OSError or HTTPException.
        """
        if not self._chunked:
            return self._received.readinto(view)
        if not self._chunk_left and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        count = self._received.readinto(view[: self._chunk_left])
        if not count:
            raise HTTPException("the connection was closed within a chunk")
        self._chunk_left -= count
        return count

    def _next_chunk(self) -> None:
        """Read the size of the next chunk, or what follows the last chunk (RFC 9112, 7.1)."""
        if self._begun and self._line() not in ("\r\n", "\n"):
            raise HTTPException("a chunk is longer than its stated size")
        self._begun = True
        line = self._line()
        parsed = _CHUNK.fullmatch(line)
        if len(line) > _LONGEST_CHUNK_LINE or not parsed:
            raise HTTPException(f"malformed chunk size {line[:40]!r}")
        self._chunk_left = int(parsed[1], 16)
        self._chunks, self._chunked_bytes = self._chunks + 1, self._chunked_bytes + self._chunk_left
        if (self._chunks - _FEW_CHUNKS) * _LEAST_CHUNK_BYTES > self._chunked_bytes:
            raise HTTPException(f"{self._chunks} chunks for {self._chunked_bytes} bytes")
        if not self._chunk_left:
            self._skip_trailers()
            self._ended = True

    def _skip_trailers(self) -> None:
        lines = size = 0
        while (line := self._line()) not in ("\r\n", "\n"):
            lines, size = lines + 1, size + len(line)
            if lines > _MAX_HEADERS or size > LONGEST_HEAD_BYTES:
                raise HTTPException(f"the trailers have at least {lines} lines and {size} bytes")

    def _line(self) -> str:
        return str(self._received.until(_END_OF_LINE), "iso-8859-1")
