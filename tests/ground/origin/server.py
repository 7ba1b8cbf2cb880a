"""The server itself: in a thread of its own, with a log of what was asked, faults and holds."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import hashlib
import socket
import ssl
import struct
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from email.utils import formatdate
from pathlib import Path
from typing import Self
from urllib.parse import quote, unquote

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from tests.ground.checksums import sha256sums
from tests.ground.origin.certificates import Tls, certify
from tests.ground.origin.content import WRITE_BYTES, Content, Disk, Memory
from tests.ground.origin.faults import Fault
from tests.ground.origin.replies import Ending, File, Reply, Seen, answer, extent_asked, quoted

PACE_SECONDS = 0.01  # a paced response is written in pieces of about this long


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

    host = "127.0.0.1"

    def __init__(self, *, tls: bool | Tls = False) -> None:
        self.rate: float | None = None  # body bytes per second and connection; None is unlimited
        self.ca_file: Path | None = None  # with tls: a PEM of the authority behind its certificate
        self._tls = Tls() if tls is True else tls or None
        self._context: ssl.SSLContext | None = None
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

    def certify_anew(self) -> None:
        """Change the key, the certificate and the authority behind it, which `ca_file` holds then."""
        assert self._context is not None
        assert self.ca_file is not None
        certify(self.ca_file, self._tls)
        self._context.load_cert_chain(self.ca_file)

    # life

    def __enter__(self) -> Self:
        context = self._context = self._certified(self._tls) if self._tls else None
        listening = self._resources.enter_context(socket.create_server((self.host, 0), backlog=1024))
        scheme = "https" if context else "http"
        self.url = f"{scheme}://{self.host}:{listening.getsockname()[1]}"
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

    def _certified(self, tls: Tls) -> ssl.SSLContext:
        directory = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="origin-tls-")))
        self.ca_file = directory / "ca.pem"
        return tls.context(self.ca_file)

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
        assert request.transport is not None
        seen.peer = request.transport.get_extra_info("peername")[1]
        self._log.append(seen)
        reply = self._reply(seen)
        await asyncio.sleep(reply.late)
        seen.status = reply.status
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.content_length = reply.length
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
            # a reset throws away what is still on its way
            while _unacknowledged(connection):  # noqa: ASYNC110 no event tells when that has arrived
                await asyncio.sleep(0.001)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        transport.close()


def _unacknowledged(connection: socket.socket) -> int:
    """Bytes written to `connection` that its peer has not taken."""
    return int.from_bytes(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)), "little")


class Origin(Server):
    """A server of files a test has put there."""

    def __init__(self, *, tls: bool | Tls = False) -> None:
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

    def add_model(self, name: str, files: Mapping[str, bytes]) -> str:
        """Hold a directory that publishes its files' sums; its URL, a ref that is called `name`."""
        for path, content in {**files, "SHA256SUMS": sha256sums(files)}.items():
            self.add(f"/{name}/{path}", content)
        return f"{self.url}/{name}/"

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
