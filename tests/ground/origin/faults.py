"""Ways to misbehave, each one dataclass that overrides `stored` or `reply`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.ground.origin.content import ENDLESS, Memory, Patched, Unending, noise
from tests.ground.origin.replies import Ending, File, Reply, Seen, quoted


class Fault:
    """A way to misbehave. Correct as it stands: override what goes wrong."""

    def stored(self, file: File) -> File:
        """The file the server pretends to hold."""
        return file

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        """What goes out instead of the correct reply."""
        return reply


@dataclass(frozen=True)
class Status(Fault):
    """Another status, with these headers and this body."""

    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return Reply.of(self.code, self.headers, self.body)


@dataclass(frozen=True)
class Redirect(Fault):
    """A redirect to the path or URL `to`."""

    to: str
    code: int = 302

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return Reply.of(self.code, {"Location": self.to, "Content-Type": "text/plain"}, b"Found")


@dataclass(frozen=True)
class Saying(Fault):
    """The correct reply but for these headers; None takes one away."""

    headers: Mapping[str, str | None]

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.tagged(**self.headers)


@dataclass(frozen=True)
class LoginPage(Fault):
    """200 and a page of HTML, as a captive portal says."""

    page: bytes = b"<!doctype html><title>Sign in</title><form><input name=user><input name=word></form>\n"

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return Reply.of(200, {"Content-Type": "text/html; charset=utf-8"}, self.page)


@dataclass(frozen=True)
class ChangeETag(Fault):
    """The file has the ETag `to`, and `content` if given: what it is when someone overwrote it."""

    to: str
    content: bytes | None = None

    def stored(self, file: File) -> File:
        content = file.content if self.content is None else Memory(self.content)
        return replace(file, etag=quoted(self.to), content=content)


@dataclass(frozen=True)
class RestlessETag(Fault):
    """The file has another ETag in each answer."""

    numbers: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

    def stored(self, file: File) -> File:
        return replace(file, etag=quoted(f"restless-{next(self.numbers)}"))


@dataclass(frozen=True)
class Flip(Fault):
    """The lowest bit of the file's byte at `offset` is wrong whenever it is sent."""

    offset: int

    def stored(self, file: File) -> File:
        (right,) = file.content.read(self.offset, self.offset + 1)
        return replace(file, content=Patched(file.content, self.offset, bytes([right ^ 1])))


@dataclass(frozen=True)
class Zeroed(Fault):
    """The file's `length` bytes at `offset` are zeros, as of a block that was never written."""

    offset: int
    length: int = 4096

    def stored(self, file: File) -> File:
        return replace(file, content=Patched(file.content, self.offset, bytes(self.length)))


@dataclass(frozen=True)
class Swap(Fault):
    """The `length` bytes at file offsets `a` and `b` have changed places."""

    a: int
    b: int
    length: int

    def stored(self, file: File) -> File:
        at_a = file.content.read(self.a, self.a + self.length)
        at_b = file.content.read(self.b, self.b + self.length)
        return replace(file, content=Patched(Patched(file.content, self.a, at_b), self.b, at_a))


@dataclass(frozen=True)
class IgnoreRange(Fault):
    """200 and the whole file, whatever range was asked for."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.whole().tagged(Accept_Ranges=None)


@dataclass(frozen=True)
class Chunked(Fault):
    """200 and the whole file without Content-Length."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply.whole(), length=None)


@dataclass(frozen=True)
class Endless(Fault):
    """200 and, without Content-Length, the file and then noise that never ends."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply.whole(), content=Unending(reply.content), stop=ENDLESS, length=None)


@dataclass(frozen=True)
class Gzip(Fault):
    """200 and the whole file with Content-Encoding: gzip, whatever was accepted."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.gzipped()


@dataclass(frozen=True)
class WrongRange(Fault):
    """206 with the bytes, and the Content-Range, of a stretch `shift` bytes from the one asked for."""

    shift: int = 1

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        if reply.status != 206:
            return reply
        size = reply.content.size
        start = min(max(reply.start + self.shift, 0), size - 1)
        stop = min(max(reply.stop + self.shift, start + 1), size)
        moved = replace(reply, start=start, stop=stop, length=stop - start)
        return moved.tagged(Content_Range=f"bytes {start}-{stop - 1}/{size}")


@dataclass(frozen=True)
class NoContentRange(Fault):
    """206 that does not say which bytes it holds."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.tagged(Content_Range=None)


@dataclass(frozen=True)
class WrongTotal(Fault):
    """206 whose Content-Range says the file is one byte longer than it is."""

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        if reply.status != 206:
            return reply
        said = f"bytes {reply.start}-{reply.stop - 1}/{reply.content.size + 1}"
        return reply.tagged(Content_Range=said)


@dataclass(frozen=True)
class ContentRange(Fault):
    """The right bytes with this Content-Range, where {start}, {last} and {size} stand for the true ones."""

    said: str

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        true = {"start": reply.start, "last": reply.stop - 1, "size": reply.content.size}
        return replace(reply.tagged(Content_Range=self.said.format(**true)), status=206)


@dataclass(frozen=True)
class TooLong(Fault):
    """`extra` more bytes than asked for: Content-Length counts them, or there is none (`length="absent"`)."""

    extra: int
    length: Literal["longer", "absent"] = "longer"

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        stop = reply.stop + self.extra
        beyond = stop - reply.content.size
        content = Patched(reply.content, reply.content.size, noise(beyond)) if beyond > 0 else reply.content
        length = stop - reply.start if self.length == "longer" else None
        return replace(reply, content=content, stop=stop, length=length)


@dataclass(frozen=True)
class Short(Fault):
    """The full length is promised, the connection closes after `at` body bytes."""

    at: int

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.cut(self.at, Ending.CLOSE)


@dataclass(frozen=True)
class Reset(Fault):
    """The connection is reset once `at` body bytes have reached the client's machine."""

    at: int

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.cut(self.at, Ending.RESET)


@dataclass(frozen=True)
class Stall(Fault):
    """Nothing comes after `at` body bytes, until the client goes or the server stops."""

    at: int

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return reply.cut(self.at, Ending.STALL)


@dataclass(frozen=True)
class Late(Fault):
    """The correct reply, but nothing of it for so many seconds."""

    seconds: float = 3600.0

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply, late=self.seconds)


@dataclass(frozen=True)
class Trickle(Fault):
    """The correct reply, this slowly."""

    bytes_per_second: float

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply, rate=self.bytes_per_second)
