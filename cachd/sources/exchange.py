"""Sends one request on a wire and parses its answer: the part of HTTP/1.1 (RFC 9112) that downloads need.

    HTTP/1.1 206 Partial Content      the head: a status line, header lines, an empty line
    Content-Length: 5

    bytes                             the body: `length` bytes, chunks, or all up to the connection's end

The head is received into a small buffer. Body bytes that arrive with it are copied from there, so a small
file takes one receive. The rest of the body is received directly into the caller's buffer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http.client import BadStatusLine, HTTPException, LineTooLong, RemoteDisconnected

from cachd.sources.answers import number
from cachd.sources.wire import LARGE_BYTES, Wire

LONGEST_HEAD_BYTES = LARGE_BYTES // 2  # below LARGE_BYTES, as a wire waits until such a buffer is full
_MOST_HEADERS = 100
_MOST_INTERIM = 20  # 1xx answers before the final one
_LONGEST_CHUNK_LINE = 1024
_FEW_CHUNKS = 10_000  # more of them must average _LEAST_CHUNK_BYTES: a chunk takes as long as some KiB
_LEAST_CHUNK_BYTES = 64
# A line may end with a bare line feed (RFC 9112, 2.2).
_END_OF_HEAD, _END_OF_LINE = re.compile(rb"\n\r?\n"), re.compile(rb"\n")
_STATUS = re.compile(r"HTTP/1\.([0-9]) +([1-9][0-9]{2})(?: ([^\r]*))?\r?")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, 5.6.2
_HEADER = re.compile(rf"^({_TOKEN.pattern}):(.*)$", re.MULTILINE)
_CHUNK = re.compile(r"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r?\n")
_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def request(method: str, path: str, host: str, headers: Mapping[str, str]) -> bytes:
    """A request's bytes, without a body. Raises ValueError for a character that cannot be sent."""
    for value in headers.values():
        if _UNSENDABLE.search(value):
            raise ValueError("a control character in a header")
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode("iso-8859-1")


class Incoming:
    """The bytes that a wire receives, in order. Those that came with a head wait in a buffer."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._held = bytearray(LONGEST_HEAD_BYTES)
        self._view = memoryview(self._held)
        self._start = self._stop = 0

    @property
    def is_empty(self) -> bool:
        """Whether the buffer is empty."""
        return self._start == self._stop

    def until(self, end: re.Pattern[bytes]) -> str:
        """Read up to the end of the first match of `end`, a pattern for three bytes at most.

        Raises OSError or HTTPException.
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
                raise RemoteDisconnected("the connection was closed without an answer")
            if not count:
                raise HTTPException("the connection was closed within the head of an answer")
            self._stop += count
        self._start = found.end()
        return str(self._view[: self._start], "iso-8859-1")

    def readinto(self, view: memoryview) -> int:
        """Read some of the next bytes and return their number; 0 at the connection's end. Raises OSError."""
        count = min(self._stop - self._start, len(view))
        if not count:
            return self.wire.recv_into(view)
        view[:count] = self._view[self._start : self._start + count]
        self._start += count
        return count


class Headers:
    """The headers of an answer. Names are case-insensitive; repeated ones are joined (RFC 9110, 5.2)."""

    def __init__(self, lines: str) -> None:
        """Raises HTTPException for a malformed line."""
        self._values = {name.lower(): value.strip() for name, value in _HEADER.findall(lines)}
        if len(self._values) != lines.count("\n"):
            self._values = _unusual(lines)

    def get(self, name: str, /) -> str | None:
        return self._values.get(name.lower())

    def items(self) -> list[tuple[str, str]]:
        """Names in lower case, with their values."""
        return list(self._values.items())


def _unusual(lines: str) -> dict[str, str]:
    """Parse header lines, folded and repeated ones too. Raises HTTPException for a malformed line."""
    values: dict[str, str] = {}
    name = ""
    for line in lines.split("\n")[:-1]:
        if name and line[0] in " \t":  # it continues the line before (RFC 9112, 5.2)
            values[name] = f"{values[name]} {line.strip()}".strip()
            continue
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise HTTPException(f"malformed header line {line[:40]!r}")
        name, value = name.lower(), value.strip()
        values[name] = f"{values[name]}, {value}" if name in values else value
    return values


class Answer:
    """The answer to one request. The constructor receives the head; the body is read afterwards."""

    def __init__(self, incoming: Incoming, method: str) -> None:
        """Receive the head. Raises OSError or HTTPException."""
        status_line, lines = _head(incoming)
        interim = 0
        while status_line[2][0] == "1":  # an interim answer (RFC 9110, 15.2)
            interim += 1
            if interim > _MOST_INTERIM:
                raise HTTPException(f"more than {_MOST_INTERIM} interim answers (1xx)")
            status_line, lines = _head(incoming)
        if lines.count("\n") > _MOST_HEADERS:
            raise HTTPException(f"more than {_MOST_HEADERS} header lines")
        self._incoming = incoming
        self.status, self.reason = int(status_line[2]), (status_line[3] or "").strip()
        self.headers = Headers(lines)
        bodiless = self.status in (204, 304) or method == "HEAD"
        chunked = (self.getheader("Transfer-Encoding") or "").lower() == "chunked"
        self._chunked = chunked and not bodiless
        self._chunk_left = self._chunks = self._chunked_bytes = 0
        self._begun = self._ended = not self._chunked
        # Bytes of the body; None where the last chunk or the connection's end marks its end (RFC 9112, 6.3).
        self.length = 0 if bodiless else None if chunked else number(self.getheader("Content-Length"))
        connection = (self.getheader("Connection") or "").lower()
        stays = "close" not in connection if status_line[1] != "0" else "keep-alive" in connection
        self._stays = stays and (self._chunked or self.length is not None)

    @property
    def is_over(self) -> bool:
        """Whether the connection can take the next request, once the caller has read `length` bytes."""
        return self._stays and self._ended and self._incoming.is_empty

    def getheader(self, name: str) -> str | None:
        return self.headers.get(name)

    def readinto(self, view: memoryview) -> int:
        """Read some of the body's next bytes and return their number; 0 at the end.

        The caller must stop after `length` bytes: what follows is the next answer. Raises OSError or
        HTTPException.
        """
        if not self._chunked:
            return self._incoming.readinto(view)
        if not self._chunk_left and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        count = self._incoming.readinto(view[: self._chunk_left])
        if not count:
            raise HTTPException("the connection was closed within a chunk")
        self._chunk_left -= count
        return count

    def _next_chunk(self) -> None:
        """Read the size of the next chunk, or what follows the last chunk (RFC 9112, 7.1)."""
        if self._begun and self._incoming.until(_END_OF_LINE) not in ("\r\n", "\n"):
            raise HTTPException("a chunk is longer than its stated size")
        self._begun = True
        line = self._incoming.until(_END_OF_LINE)
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
        while (line := self._incoming.until(_END_OF_LINE)) not in ("\r\n", "\n"):
            lines, size = lines + 1, size + len(line)
            if lines > _MOST_HEADERS or size > LONGEST_HEAD_BYTES:
                raise HTTPException(f"the trailers have at least {lines} lines and {size} bytes")


def _head(incoming: Incoming) -> tuple[re.Match[str], str]:
    """Receive a head: its parsed status line and its header lines. Raises OSError or HTTPException."""
    first, _, rest = incoming.until(_END_OF_HEAD).partition("\n")
    status_line = _STATUS.fullmatch(first)
    if not status_line:
        raise BadStatusLine(first[:40])
    return status_line, rest[: rest.rfind("\n", 0, -1) + 1]  # without the empty line at the end
