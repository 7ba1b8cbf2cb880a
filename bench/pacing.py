"""An origin that holds back: so much a connection, so much in all, and every answer late.

python -m bench.pacing DIRECTORY [--connection-mb 40] [--link-mb 400] [--late-ms 20] [--loss 0 --crowd 8]

It prints its URL and serves the files until it is ended. GET /.record is what it has seen: a line for every
20th of a second, [monotonic seconds, connections that are being answered, body bytes sent so far]. With a
loss, each connection at work beyond `crowd` makes the whole link smaller by that share.

A connection sends slices by sendfile, each followed by the pause that its rate asks for; the rate is looked
at anew for every slice, so that nothing needs to be shared out and 400 MB/s cost a tenth of a core.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote

from tests.ground.nginx import prefer_congestion_control
from tests.ground.origin import Disk, File, Reply, Seen, answer, extent_asked, quoted

MB = 1e6
SLICE_SECONDS = 0.01  # at the full rate of a connection
CATCH_UP_SECONDS = 0.03  # a slice that was late by more is lost, as on a link
SAMPLE_SECONDS = 0.05
RECORD = "/.record"


@dataclass(frozen=True, slots=True)
class Pace:
    """What an origin gives: rates in bytes a second, the first byte of each answer late."""

    connection: float = 40 * MB
    link: float = 400 * MB
    late_seconds: float = 0.02
    crowd: int = 8
    loss: float = 0.0

    def total(self, connections: int) -> float:
        """What `connections` at work get together."""
        link = self.link * (1 - self.loss) ** max(0, connections - self.crowd)
        return min(connections * self.connection, link)

    @property
    def best(self) -> float:
        """The most that any number of connections gets."""
        return max(self.total(n) for n in range(1, 257))


@dataclass(frozen=True, slots=True)
class Sample:
    """What the origin was doing at a moment: connections at work, bytes sent until then."""

    seconds: float
    connections: int
    sent: int


@dataclass(frozen=True, slots=True)
class Paced:
    """A running origin. `ca_file` is what peers ask of any origin."""

    url: str
    pid: int
    ca_file: None = None

    def record(self) -> list[Sample]:
        with urllib.request.urlopen(self.url + RECORD) as told:
            return [Sample(*line) for line in json.load(told)]


@contextmanager
def paced(directory: Path, pace: Pace) -> Iterator[Paced]:
    """The origin over `directory`, in a process of its own."""
    words = {
        "--connection-mb": pace.connection / MB,
        "--link-mb": pace.link / MB,
        "--late-ms": pace.late_seconds * 1000,
        "--crowd": pace.crowd,
        "--loss": pace.loss,
    }
    line = [str(word) for option in words.items() for word in option]
    project = Path(__file__).parent.parent
    with subprocess.Popen(
        [sys.executable, "-m", "bench.pacing", str(directory), *line],
        stdout=subprocess.PIPE,
        text=True,
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(project)},
    ) as process:
        try:
            assert process.stdout
            yield Paced(process.stdout.readline().strip(), process.pid)
        finally:
            process.terminate()


class Origin:
    """The server: every connection a task, all of them under one pace."""

    def __init__(self, directory: Path, pace: Pace) -> None:
        self._directory, self._pace = directory, pace
        self._at_work = 0
        self._sent = 0
        self._record: list[tuple[float, int, int]] = []

    async def serve(self, port: int) -> None:
        listening = socket.create_server(("127.0.0.1", port), backlog=511)
        # bbr, where it is the default, paces loopback by itself
        prefer_congestion_control(listening, "cubic")
        server = await asyncio.start_server(self._connected, sock=listening)
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        async with server:
            while True:
                self._record.append((time.monotonic(), self._at_work, self._sent))
                await asyncio.sleep(SAMPLE_SECONDS)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while True:
                asked = _parsed(await reader.readuntil(b"\r\n\r\n"))
                if asked.path == RECORD:
                    body = json.dumps(self._record).encode()
                    writer.write(_head(Reply.of(200, {"Content-Type": "application/json"}, body)) + body)
                    continue
                self._at_work += 1
                try:
                    await self._answer(asked, writer)
                finally:
                    self._at_work -= 1

    async def _answer(self, asked: Seen, writer: asyncio.StreamWriter) -> None:
        path = self._directory / asked.path.lstrip("/")
        if not path.is_file():
            writer.write(_head(Reply.of(404, {})))
            return
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            etag = quoted(f"{found.st_size:x}-{found.st_mtime_ns:x}")
            asked.extent = extent_asked(asked.headers.get("range"), found.st_size)
            reply = answer(asked, File(Disk(file.fileno(), found.st_size), etag))
            await asyncio.sleep(self._pace.late_seconds)
            writer.write(_head(reply))
            if asked.method != "GET":
                return
            loop, at, due = asyncio.get_running_loop(), reply.start, time.monotonic()
            while at < reply.stop and not writer.is_closing():
                count = min(int(self._pace.connection * SLICE_SECONDS), reply.stop - at)
                await loop.sendfile(writer.transport, file, at, count)
                at += count
                self._sent += count
                rate = self._pace.total(self._at_work) / self._at_work
                due = max(due + count / rate, time.monotonic() - CATCH_UP_SECONDS)
                await asyncio.sleep(due - time.monotonic())


def _parsed(head: bytes) -> Seen:
    first, *lines = head.decode("latin-1").splitlines()
    method, target, _ = first.split(" ", 2)
    named = (line.partition(":") for line in lines if line)
    headers = {name.lower(): value.strip() for name, _, value in named}
    path, _, query = target.partition("?")
    return Seen(method, target, unquote(path), query, headers)


def _head(reply: Reply) -> bytes:
    headers = {**reply.headers, "Content-Length": reply.length}
    lines = [f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def main() -> None:
    about, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser("python -m bench.pacing", description=about)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--connection-mb", type=float, default=40)
    parser.add_argument("--link-mb", type=float, default=400)
    parser.add_argument("--late-ms", type=float, default=20)
    parser.add_argument("--crowd", type=int, default=8)
    parser.add_argument("--loss", type=float, default=0)
    parser.add_argument("--port", type=int, default=0)
    asked = parser.parse_args()
    pace = Pace(asked.connection_mb * MB, asked.link_mb * MB, asked.late_ms / 1000, asked.crowd, asked.loss)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Origin(asked.directory, pace).serve(asked.port))


if __name__ == "__main__":
    main()
