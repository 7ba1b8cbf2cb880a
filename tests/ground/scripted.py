"""A server that says, byte for byte, what a script tells it: for what no HTTP library would say."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

PATIENCE_SECONDS = 120.0


class Scripted:
    """A server that says `script` to every connection and counts them: for what no HTTP library would say."""

    def __init__(self, script: Callable[[socket.socket, int], None]) -> None:
        self._script = script
        self._connection: socket.socket | None = None
        self.accepted = 0
        self.stopped = threading.Event()

    def __enter__(self) -> Self:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for waited_for in filter(None, (self._listening, self._connection)):
            with suppress(OSError):
                waited_for.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listening.close()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self.accepted += 1
            self._connection = connection
            with connection, suppress(OSError):
                connection.settimeout(PATIENCE_SECONDS)
                self._script(connection, self.accepted)


def heard(connection: socket.socket) -> bool:
    """Read one request; False when the client is gone."""
    seen = b""
    while not seen.endswith(b"\r\n\r\n"):
        got = connection.recv(65536)
        if not got:
            return False
        seen += got
    return True


def saying(answer: bytes) -> Callable[[socket.socket, int], None]:
    """A script that answers every request with these bytes and closes when they do not make an answer."""

    def script(connection: socket.socket, _: int) -> None:
        while heard(connection):
            connection.sendall(answer)
            if b"Content-Length: 2\r\n" not in answer:
                return

    return script


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """An address where connections are neither taken nor refused: a queue of one that is full."""
    with socket.socket() as hole:
        hole.bind(("127.0.0.2", 0))
        hole.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(hole.getsockname())
        yield hole.getsockname()
        for each in waiting:
            each.close()
