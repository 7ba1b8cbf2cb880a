"""A server whose answers are bytes: for heads that no HTTP library sends. Many connections at once.

with RawServer(lambda asked: reply(asked, "200 OK", "ETag: unquoted", body=b"x")) as origin:
    ...pull(f"{origin.url}/x")
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. `headers` has lower-case names. `request` and `connection` count from 1."""

    method: str
    target: str
    headers: dict[str, str]
    request: int
    connection: int

    def extent(self, size: int) -> tuple[int, int] | None:
        """The half-open range that is asked for, of a file of this size; None for the complete file."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return (int(found[1]), min(int(found[2] or size) + 1, size)) if found else None


Answer = Callable[[Asked], bytes | Iterator[bytes]]


def reply(
    asked: Asked,
    status: str = "200 OK",
    *lines: str,
    body: bytes = b"",
    version: str = "HTTP/1.1",
    length: int | None = -1,
) -> bytes:
    """The bytes of an answer. `lines`: its header lines, as they go out. No body goes out to HEAD.

    `length`: the Content-Length, None for none, -1 for the true one. After `Connection: close` the server
    closes the connection.
    """
    head = [f"{version} {status}", *lines]
    if length is not None:
        head.append(f"Content-Length: {len(body) if length < 0 else length}")
    sent = "".join(f"{line}\r\n" for line in head) + "\r\n"
    return sent.encode("iso-8859-1") + (b"" if asked.method == "HEAD" else body)


def ranged(asked: Asked, content: bytes, *lines: str) -> bytes:
    """What a correct server answers: 206 with the range that is asked for, or 200 with all of the content."""
    extent = asked.extent(len(content))
    if extent is None or asked.method == "HEAD":
        return reply(asked, "200 OK", *lines, body=content)
    start, stop = extent
    stated = f"Content-Range: bytes {start}-{stop - 1}/{len(content)}"
    return reply(asked, "206 Partial Content", stated, *lines, body=content[start:stop])


def chunked(content: bytes, size: int = 60_000) -> bytes:
    """A body in chunks (RFC 9112, 7.1)."""
    pieces = [content[at : at + size] for at in range(0, len(content), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@dataclass
class RawServer:
    """Answers each request with the bytes that `answer` gives for it, at once or piece by piece.

    Empty bytes close the connection. `connections` and `requests`: how many it takes at once. What is beyond
    is answered with `refusal`; `refusals` is released each time.
    """

    answer: Answer
    host: str = "127.0.0.1"
    connections: int | None = None
    requests: int | None = None
    refusal: str = "503 Service Unavailable"
    refused: int = 0
    refusals: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    asked: list[Asked] = field(default_factory=list)
    url: str = ""

    def __enter__(self) -> Self:
        self._listening = socket.create_server((self.host, 0), backlog=128)
        self.url = f"http://{self.host}:{self._listening.getsockname()[1]}"
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._answering = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listening.close()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            number += 1
            connection.settimeout(PATIENCE_SECONDS)
            with self._lock:
                self._open.add(connection)
                is_beyond = self.connections is not None and len(self._open) > self.connections
            serve = self._refuse if is_beyond else self._serve
            thread = threading.Thread(target=serve, args=(connection, number))
            self._threads.append(thread)
            thread.start()

    def _refuse(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            if (asked := self._heard(connection, number)) is not None:
                connection.sendall(reply(asked, self.refusal, "Connection: close"))
                self.refused += 1
                self.refusals.release()
        with self._lock:
            self._open.discard(connection)

    def _said(self, asked: Asked, connection: socket.socket) -> bytes:
        """Send the answer, and return its first piece."""
        with self._lock:
            self._answering += 1
            is_beyond = self.requests is not None and self._answering > self.requests
            self.refused += is_beyond
        try:
            answer = reply(asked, self.refusal) if is_beyond else self.answer(asked)
            said = b""
            for piece in [answer] if isinstance(answer, bytes) else answer:
                connection.sendall(piece)
                said = said or piece
        finally:
            with self._lock:
                self._answering -= 1
        return said

    def _serve(self, connection: socket.socket, number: int) -> None:
        with connection, suppress(OSError):
            while (asked := self._heard(connection, number)) is not None:
                said = self._said(asked, connection)
                if not said or b"connection: close\r\n" in said.partition(b"\r\n\r\n")[0].lower() + b"\r\n":
                    break
        with self._lock:
            self._open.discard(connection)

    def _heard(self, connection: socket.socket, number: int) -> Asked | None:
        seen = b""
        while not seen.endswith(b"\r\n\r\n"):
            got = connection.recv(65536)
            if not got:
                return None
            seen += got
        first, *lines = seen.decode("iso-8859-1").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        with self._lock:
            asked = Asked(method, target, headers, len(self.asked) + 1, number)
            self.asked.append(asked)
        return asked
