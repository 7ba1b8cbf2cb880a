"""A loopback HTTP server that serves files as RFC 9110 says, until a test installs a fault.

    request -> find: what stands at this path? -> a File, or a Reply that is no file (404, redirect)
            -> Fault.stored(file)               the file this server pretends to hold
            -> answer(seen, file)               what a correct server says: 200, 206, 304, 412 or 416
            -> Fault.reply(seen, reply)         what goes out instead
            -> holds, rate, ending              when it goes out, and how it stops

A new fault is one frozen dataclass below that overrides `stored` or `reply`. A new kind of server
overrides `Server.find`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import enum
import fcntl
import functools
import gzip
import hashlib
import ipaddress
import os
import random
import re
import socket
import ssl
import struct
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from email.utils import formatdate
from pathlib import Path
from typing import Literal, Protocol, Self
from urllib.parse import quote, unquote

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

WRITE_BYTES = 1 << 20
PACE_SECONDS = 0.01  # a paced response is written in pieces of about this long
ENDLESS = 1 << 62


# Bytes


class Content(Protocol):
    """Bytes that can be read from anywhere."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, stop: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Memory:
    """Content in memory."""

    held: bytes

    @property
    def size(self) -> int:
        return len(self.held)

    def read(self, start: int, stop: int) -> bytes:
        return self.held[start:stop]


@dataclass(frozen=True, slots=True)
class Disk:
    """Content in an open file, never in memory as a whole."""

    descriptor: int
    size: int

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self.descriptor, stop - start, start)


@dataclass(frozen=True, slots=True)
class Patched:
    """Other content with `patch` written over it at `offset`, which may be its end."""

    under: Content
    offset: int
    patch: bytes

    @property
    def size(self) -> int:
        return max(self.under.size, self.offset + len(self.patch))

    def read(self, start: int, stop: int) -> bytes:
        piece = bytearray(self.under.read(start, stop))
        first, last = max(start, self.offset), min(stop, self.offset + len(self.patch))
        if first < last:
            piece[first - start : last - start] = self.patch[first - self.offset : last - self.offset]
        return bytes(piece)


@dataclass(frozen=True, slots=True)
class Unending:
    """Other content, then noise for ever."""

    under: Content
    size: int = ENDLESS

    def read(self, start: int, stop: int) -> bytes:
        return self.under.read(start, stop) or noise(min(stop - start, WRITE_BYTES))


@functools.cache
def noise(length: int) -> bytes:
    """The same `length` random bytes every time."""
    return random.Random(length).randbytes(length)


# Requests and answers


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
    content: Content = Memory(b"")
    start: int = 0
    stop: int = 0
    length: int | None = 0
    rate: float | None = None
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


# Faults


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
class Flip(Fault):
    """The lowest bit of the file's byte at `offset` is wrong whenever it is sent."""

    offset: int

    def stored(self, file: File) -> File:
        (right,) = file.content.read(self.offset, self.offset + 1)
        return replace(file, content=Patched(file.content, self.offset, bytes([right ^ 1])))


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
class Trickle(Fault):
    """The correct reply, this slowly."""

    bytes_per_second: float

    def reply(self, seen: Seen, reply: Reply) -> Reply:
        return replace(reply, rate=self.bytes_per_second)


# Servers


def _always(seen: Seen) -> bool:
    return True


@dataclass(slots=True)
class _Planned:
    """A fault that waits for its requests."""

    path: str
    fault: Fault
    times: int | None
    when: Callable[[Seen], bool]
    methods: Collection[str]


class Hold:
    """Responses that wait after `after` body bytes. `reached` is set when one got there."""

    def __init__(self, path: str, after: int, loop: asyncio.AbstractEventLoop) -> None:
        self.path = path
        self.after = after
        self.reached = threading.Event()
        self._loop = loop
        self._released = asyncio.Event()

    def release(self) -> None:
        """Let all responses go on, those that come later too."""
        with contextlib.suppress(RuntimeError):  # the server has stopped: nobody waits
            self._loop.call_soon_threadsafe(self._released.set)

    async def wait(self) -> None:
        """Report the arrival, return when released."""
        self.reached.set()
        await self._released.wait()


class Server:
    """A loopback server in a thread of its own; leaving its context stops and joins all of it."""

    def __init__(self, *, tls: bool = False) -> None:
        self.rate: float | None = None  # body bytes per second and connection; None is unlimited
        self.ca_file: Path | None = None  # with tls: a PEM of the authority behind its certificate
        self._tls = tls
        self._log: list[Seen] = []
        self._faults: list[_Planned] = []
        self._holds: list[Hold] = []
        self._resources = contextlib.ExitStack()

    def find(self, seen: Seen) -> File | Reply:
        """What stands at the path asked for; runs in the server's thread."""
        raise NotImplementedError

    def answer(self, seen: Seen, file: File) -> Reply:
        """The correct reply for `file`; runs in the server's thread."""
        return answer(seen, file)

    # what a test asks

    @property
    def requests(self) -> list[Seen]:
        """All requests since the start or the last `forget`, in order of arrival."""
        return [replace(seen) for seen in list(self._log)]

    def forget(self) -> None:
        """Empty the log of requests."""
        self._log = []

    def bytes_sent(self, path: str | None = None) -> int:
        """Body bytes sent to GETs, of `path` or all."""
        gets = (seen for seen in list(self._log) if seen.method == "GET")
        return sum(seen.sent for seen in gets if path in {None, seen.path})

    def fault(
        self,
        path: str,
        fault: Fault,
        times: int | None = None,
        when: Callable[[Seen], bool] = _always,
        methods: Collection[str] = ("GET",),
    ) -> None:
        """Spoil the next `times` requests (None: all) for `path` ("*": any) that `when` says yes to.

        A request meets one fault at most: the oldest that fits and has times left.
        """
        self._faults.append(_Planned(path, fault, times, when, methods))

    def clear(self) -> None:
        """Take all faults away; holds stay."""
        self._faults = []

    def hold(self, path: str, after: int) -> Hold:
        """Make GETs of `path` ("*": any) that come from now on wait after `after` bytes of their body."""
        hold = Hold(path, after, self._loop)
        self._holds.append(hold)
        return hold

    # life

    def __enter__(self) -> Self:
        context = self._certified() if self._tls else None
        listening = self._resources.enter_context(socket.create_server(("127.0.0.1", 0), backlog=1024))
        scheme = "https" if context else "http"
        self.url = f"{scheme}://127.0.0.1:{listening.getsockname()[1]}"
        started: concurrent.futures.Future[None] = concurrent.futures.Future()
        running = self._run(listening, context, started)
        self._thread = threading.Thread(target=asyncio.run, args=(running,), name=self.url)
        self._thread.start()
        started.result()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Cut all connections and stop listening; once is enough, twice does no harm."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopped.set)
            self._thread.join()
        self._resources.close()

    def _certified(self) -> ssl.SSLContext:
        directory = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="origin-tls-")))
        self.ca_file = directory / "ca.pem"
        certify(self.ca_file)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.ca_file)
        return context

    async def _run(
        self,
        listening: socket.socket,
        context: ssl.SSLContext | None,
        started: concurrent.futures.Future[None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopped = asyncio.Event()
        # cancelling on disconnect is what ends a stalled or held response whose client has gone
        server = web.Server(self._serve, handler_cancellation=True, access_log=None)
        runner = web.ServerRunner(server, shutdown_timeout=0.05)
        try:
            await runner.setup()
            await web.SockSite(runner, listening, ssl_context=context).start()
        except BaseException as error:
            started.set_exception(error)
            raise
        started.set_result(None)
        await self._stopped.wait()
        await runner.cleanup()

    # one request

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        target, _, query = request.raw_path.partition("?")
        headers = {name.lower(): value for name, value in request.headers.items()}
        seen = Seen(request.method, target, unquote(target), query, headers, await request.read())
        self._log.append(seen)
        reply = self._reply(seen)
        seen.status = reply.status
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.content_length = reply.length
        assert request.transport is not None
        # so that drained means handed to the kernel; 0 would never resume a TLS connection
        request.transport.set_write_buffer_limits(high=1)
        writer = await response.prepare(request)
        if request.method == "HEAD" or writer is None:
            return response
        await self._send(seen, reply, response, writer)
        await self._end(reply.ending, request.transport, writer)
        return response

    def _reply(self, seen: Seen) -> Reply:
        found = self.find(seen)
        if isinstance(found, File):
            seen.extent = extent_asked(seen.headers.get("range"), found.content.size)
        fault = self._next_fault(seen)
        correct = self.answer(seen, fault.stored(found)) if isinstance(found, File) else found
        return fault.reply(seen, correct)

    def _next_fault(self, seen: Seen) -> Fault:
        for planned in list(self._faults):
            fits = planned.path in {"*", seen.path} and seen.method in planned.methods
            if fits and planned.times != 0 and planned.when(replace(seen)):
                planned.times = None if planned.times is None else planned.times - 1
                return planned.fault
        return Fault()

    async def _send(
        self, seen: Seen, reply: Reply, response: web.StreamResponse, writer: AbstractStreamWriter
    ) -> None:
        at = reply.start
        holds = [hold for hold in list(self._holds) if hold.path in {"*", seen.path}]
        for hold in sorted(holds, key=lambda hold: hold.after):
            stop = reply.start + hold.after
            if seen.method != "GET" or stop > reply.stop:
                break
            await self._write(seen, replace(reply, start=at, stop=stop), response)
            await writer.drain()
            await hold.wait()
            at = stop
        await self._write(seen, replace(reply, start=at), response)

    async def _write(self, seen: Seen, reply: Reply, response: web.StreamResponse) -> None:
        """Send `reply.content[start:stop]` at the reply's rate, else at the server's as it is just then."""
        at, due = reply.start, time.monotonic()
        while at < reply.stop:
            rate = reply.rate or self.rate
            step = WRITE_BYTES if rate is None else max(1, int(rate * PACE_SECONDS))
            piece = reply.content.read(at, min(reply.stop, at + step))
            if not piece:
                raise EOFError(f"{seen.path}: nothing to read at {at} of {reply.stop} bytes")
            at += len(piece)
            seen.sent += len(piece)  # before the write: a client that has the bytes finds them counted
            await response.write(piece)
            if rate is not None:
                due = max(due + len(piece) / rate, time.monotonic() - PACE_SECONDS)
                await asyncio.sleep(due - time.monotonic())

    async def _end(self, ending: Ending, transport: asyncio.Transport, writer: AbstractStreamWriter) -> None:
        if ending is Ending.KEEP:
            return
        await writer.drain()
        if ending is Ending.STALL:
            await asyncio.Event().wait()
        if ending is Ending.RESET:
            connection = transport.get_extra_info("socket")
            # a reset throws away what is still on its way, and no event tells when that has arrived
            while _unacknowledged(connection):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        transport.close()


def _unacknowledged(connection: socket.socket) -> int:
    """Bytes written to `connection` that its peer has not taken."""
    return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), "little")


class Origin(Server):
    """A server of files a test has put there."""

    def __init__(self, *, tls: bool = False) -> None:
        super().__init__(tls=tls)
        self._files: dict[str, File] = {}

    def add(
        self,
        path: str,
        content: bytes | Path,
        *,
        etag: str | None = "",
        last_modified: bool = True,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Hold `content` at `path` (decoded, with its leading slash) and give its URL.

        An empty `etag` stands for a strong one made from the content, None sends none, and any other goes out
        quoted unless it is already. A Path is opened now, and read through only to make that etag.
        """
        held = self._opened(content) if isinstance(content, Path) else Memory(content)
        if etag == "":
            etag = _digest(held)
        said = formatdate(time.time(), usegmt=True) if last_modified else None
        self._files[path] = File(held, quoted(etag) if etag else None, said, headers or {})
        return self.url + quote(path)

    def remove(self, path: str) -> None:
        """Answer 404 for `path` from now on."""
        del self._files[path]

    def find(self, seen: Seen) -> File | Reply:
        if seen.method not in {"GET", "HEAD"}:
            return Reply.of(405, {"Allow": "GET, HEAD"})
        return self._files.get(seen.path) or Reply.of(404, {"Content-Type": "text/plain"}, b"Not Found\n")

    def _opened(self, path: Path) -> Disk:
        opened = self._resources.enter_context(path.open("rb"))
        return Disk(opened.fileno(), path.stat().st_size)


def _digest(content: Content) -> str:
    digest = hashlib.sha256()
    for at in range(0, content.size, WRITE_BYTES):
        digest.update(content.read(at, at + WRITE_BYTES))
    return digest.hexdigest()[:32]


def certify(pem_file: Path) -> None:
    """Write a new key and its certificate for loopback, which is its own authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    loopback = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    now = datetime.datetime.now(datetime.UTC)
    signs_and_serves = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(loopback), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(signs_and_serves, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    pem_file.write_bytes(private + certificate.public_bytes(pem))
