"""One request and its answer on a wire: as much of HTTP/1.1 (RFC 9112) as asking for files takes.

The head of an answer is parsed where it was received. What came with it is taken as the body's beginning, so
that a small file costs one receive; what the body takes then goes straight to where it is wanted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http.client import BadStatusLine, HTTPException, LineTooLong, RemoteDisconnected

from cachd.sources.answers import number
from cachd.sources.wire import LARGE_BYTES, Wire

LONGEST_HEAD_BYTES = LARGE_BYTES // 2  # a wire waits until a larger buffer is full
_MOST_HEADERS = 100
_MOST_INTERIM = 20  # answers on the way to the answer
_LONGEST_CHUNK_LINE = 1024
_FEW_CHUNKS = 10_000  # beyond, they have _LEAST_CHUNK_BYTES on average: each costs the time of some KiB
_LEAST_CHUNK_BYTES = 64
_END_OF_HEAD, _END_OF_LINE = re.compile(rb"\n\r?\n"), re.compile(rb"\n")
_STATUS = re.compile(r"HTTP/1\.([0-9]) +([1-9][0-9]{2})(?: ([^\r]*))?\r?")
_TOKEN = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110 5.6.2
_HEADER = re.compile(rf"^({_TOKEN.pattern}):(.*)$", re.MULTILINE)
_CHUNK = re.compile(r"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?\r?\n")
_UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def request(method: str, path: str, host: str, headers: Mapping[str, str]) -> bytes:
    """The bytes that ask for `path`. Raises ValueError for a header that cannot be sent."""
    for value in headers.values():
        if _UNSENDABLE.search(value):
            raise ValueError("a control character in a header")
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    return f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{lines}\r\n".encode("iso-8859-1")


class Incoming:
    """What a wire brings, in order; some of it is held until it is taken."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self._held = bytearray(LONGEST_HEAD_BYTES)
        self._view = memoryview(self._held)
        self._start = self._stop = 0

    @property
    def is_empty(self) -> bool:
        """Whether everything that was received has been taken."""
        return self._start == self._stop

    def until(self, end: re.Pattern[bytes]) -> str:
        """Everything up to and with `end`, of three bytes at most. Raises OSError or HTTPException."""
        if self._start:
            rest = self._stop - self._start
            self._view[:rest] = self._view[self._start : self._stop]
            self._start, self._stop = 0, rest
        looked = 0
        while not (found := end.search(self._held, looked, self._stop)):
            looked = max(self._stop - 2, 0)
            if self._stop == len(self._held):
                raise LineTooLong("head")
            count = self.wire.recv_into(self._view[self._stop :])
            if not count and self.is_empty:
                raise RemoteDisconnected("closed without an answer")
            if not count:
                raise HTTPException("closed within an answer's head")
            self._stop += count
        self._start = found.end()
        return str(self._view[: self._start], "iso-8859-1")

    def readinto(self, view: memoryview) -> int:
        """Some of what comes next, 0 at the end. Raises OSError."""
        count = min(self._stop - self._start, len(view))
        if not count:
            return self.wire.recv_into(view)
        view[:count] = self._view[self._start : self._start + count]
        self._start += count
        return count


class Headers:
    """The headers of an answer. Names in any case; what came more than once is joined by commas."""

    def __init__(self, lines: str) -> None:
        """Raises HTTPException for a line that is no header."""
        self._values = {name.lower(): value.strip() for name, value in _HEADER.findall(lines)}
        if len(self._values) != lines.count("\n"):
            self._values = _unusual(lines)

    def get(self, name: str, /) -> str | None:
        return self._values.get(name.lower())

    def items(self) -> list[tuple[str, str]]:
        """Names in lower case, with their values."""
        return list(self._values.items())


def _unusual(lines: str) -> dict[str, str]:
    """Headers of which some are folded, come more than once, or are none: those raise HTTPException."""
    values: dict[str, str] = {}
    name = ""
    for line in lines.split("\n")[:-1]:
        if name and line[0] in " \t":  # the one before goes on (RFC 9112 5.2)
            values[name] = f"{values[name]} {line.strip()}".strip()
            continue
        name, colon, value = line.partition(":")
        if not colon or not _TOKEN.fullmatch(name):
            raise HTTPException(f"a header line is {line[:40]!r}")
        name, value = name.lower(), value.strip()
        values[name] = f"{values[name]}, {value}" if name in values else value
    return values


class Answer:
    """The answer to one request; its head is here, its body is still to be read."""

    def __init__(self, incoming: Incoming, method: str) -> None:
        """Receive the head. Raises OSError or HTTPException."""
        told, lines = _head(incoming)
        interim = 0
        while told[2][0] == "1":  # on the way to an answer (RFC 9110 15.2)
            interim += 1
            if interim > _MOST_INTERIM:
                raise HTTPException(f"more than {_MOST_INTERIM} answers with 1xx")
            told, lines = _head(incoming)
        if lines.count("\n") > _MOST_HEADERS:
            raise HTTPException(f"more than {_MOST_HEADERS} header lines")
        self._incoming = incoming
        self.status, self.reason, self.headers = int(told[2]), (told[3] or "").strip(), Headers(lines)
        bodiless = self.status in (204, 304) or method == "HEAD"
        chunked = (self.getheader("Transfer-Encoding") or "").lower() == "chunked"
        self._chunked = chunked and not bodiless
        self._chunk_left = self._chunks = self._chunked_bytes = 0
        self._begun = self._ended = not self._chunked
        # Of the body, in bytes; None when only its end tells.
        self.length = 0 if bodiless else None if chunked else number(self.getheader("Content-Length"))
        connection = (self.getheader("Connection") or "").lower()
        stays = "close" not in connection if told[1] != "0" else "keep-alive" in connection
        self._stays = stays and (self._chunked or self.length is not None)

    @property
    def is_over(self) -> bool:
        """Whether the wire stands where a next answer would begin, once the caller has had `length` bytes."""
        return self._stays and self._ended and self._incoming.is_empty

    def getheader(self, name: str) -> str | None:
        return self.headers.get(name)

    def readinto(self, view: memoryview) -> int:
        """Some of the body's next bytes; 0 when there are no more, or the connection ended.

        An answer with a length does not end by itself. Raises OSError or HTTPException.
        """
        if not self._chunked:
            return self._incoming.readinto(view)
        if not self._chunk_left and not self._ended:
            self._next_chunk()
        if self._ended:
            return 0
        count = self._incoming.readinto(view[: self._chunk_left])
        if not count:
            raise HTTPException("closed within a chunk")
        self._chunk_left -= count
        return count

    def _next_chunk(self) -> None:
        """Read up to the next chunk's bytes, or past the last one (RFC 9112 7.1)."""
        if self._begun and self._incoming.until(_END_OF_LINE) not in ("\r\n", "\n"):
            raise HTTPException("a chunk is longer than it said")
        self._begun = True
        line = self._incoming.until(_END_OF_LINE)
        told = _CHUNK.fullmatch(line)
        if len(line) > _LONGEST_CHUNK_LINE or not told:
            raise HTTPException(f"a chunk's size is {line[:40]!r}")
        self._chunk_left = int(told[1], 16)
        self._chunks, self._chunked_bytes = self._chunks + 1, self._chunked_bytes + self._chunk_left
        if (self._chunks - _FEW_CHUNKS) * _LEAST_CHUNK_BYTES > self._chunked_bytes:
            raise HTTPException(f"{self._chunks} chunks of {self._chunked_bytes} bytes in all")
        if not self._chunk_left:
            self._pass_trailers()
            self._ended = True

    def _pass_trailers(self) -> None:
        lines = size = 0
        while (line := self._incoming.until(_END_OF_LINE)) not in ("\r\n", "\n"):
            lines, size = lines + 1, size + len(line)
            if lines > _MOST_HEADERS or size > LONGEST_HEAD_BYTES:
                raise HTTPException(f"trailers of {lines} lines or more and {size} bytes or more")


def _head(incoming: Incoming) -> tuple[re.Match[str], str]:
    """The status line of a head, and its other lines. Raises OSError or HTTPException."""
    first, _, rest = incoming.until(_END_OF_HEAD).partition("\n")
    told = _STATUS.fullmatch(first)
    if not told:
        raise BadStatusLine(first[:40])
    return told, rest[: rest.rfind("\n", 0, -1) + 1]  # less the empty line
