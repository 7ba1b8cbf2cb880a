"""Two proxies: a real one (proxy.py), and a small one that hears what it is told and fails on request.

Both find every name below .test at 127.0.0.1, where no resolver does: what is asked at such a name came
through them.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.ground.origin import Server, Tls, certify
from tests.ground.s3 import free_ports

LOOPBACK = "127.0.0.1"
PATIENCE_SECONDS = 20.0
_LOGGED = re.compile(r" - ([A-Z]+) ([\w.-]+):(\d+)\S* - .*?(\d+) bytes - ")


def named(server: Server, name: str) -> None:
    """Call a server by a name that only the proxies know."""
    server.url = server.url.replace(LOOPBACK, name)


@dataclass(frozen=True, slots=True)
class Logged:
    """A line of the proxy's log, written when a connection ended."""

    method: str
    host: str
    port: int
    received_bytes: int


class Proxy:
    """proxy.py in a process of its own, on the same port at each start. `credentials` are user:password.

    With `tls` it is spoken to by TLS; its certificate for `tls.hosts` is its own authority, in `ca_file`.
    """

    def __init__(self, *, credentials: str = "", tls: Tls | None = None) -> None:
        self._resources = contextlib.ExitStack()
        self._credentials, self._tls = credentials, tls
        (self.port,) = free_ports(1)
        self.url = f"http{'s' if tls else ''}://{LOOPBACK}:{self.port}"

    def __enter__(self) -> Self:
        self._directory = Path(self._resources.enter_context(tempfile.TemporaryDirectory(prefix="proxy-")))
        self.ca_file = self._directory / "ca.pem"
        if self._tls:
            certify(self.ca_file, self._tls)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._resources.close()

    def start(self) -> None:
        """Return once it listens."""
        told = ["--hostname", LOOPBACK, "--port", str(self.port), "--log-file", str(self._log_file)]
        told += ["--num-workers", "1", "--num-acceptors", "1", "--timeout", "60"]
        if self._credentials:
            told += ["--basic-auth", self._credentials]
        if self._tls:
            told += ["--cert-file", str(self.ca_file), "--key-file", str(self.ca_file)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.ground.named_proxy", *told],
            cwd=Path(__file__).parent.parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        """kill -9, it and its workers. Once is enough, twice does no harm."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    @property
    def log(self) -> list[Logged]:
        """Every connection that ended."""
        lines = self._log_file.read_text().splitlines() if self._log_file.exists() else []
        found = filter(None, map(_LOGGED.search, lines))
        return [Logged(each[1], each[2], int(each[3]), int(each[4])) for each in found]

    @property
    def _log_file(self) -> Path:
        return self._directory / "log"


class Listener:
    """A proxy of the simplest kind, a thread a connection: what each was told is in `heads`.

    `refusal` answers every CONNECT while it is set, given its head. After `cut_after` bytes of an origin a
    tunnel breaks, once each time it is set. `passed` is all that went through the tunnels, either way.
    """

    def __init__(self) -> None:
        self.heads: list[str] = []
        self.passed = bytearray()
        self.refusal: Callable[[bytes], bytes] | None = None
        self.cut_after: int | None = None
        self._threads: list[threading.Thread] = []
        self._open: set[socket.socket] = set()

    def __enter__(self) -> Self:
        self._listening = socket.create_server((LOOPBACK, 0), backlog=128)
        self.url = f"http://{LOOPBACK}:{self._listening.getsockname()[1]}"
        self._begin(self._accept)
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listening, *self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        self._listening.close()

    def _begin(self, target: Callable[..., None], *args: object) -> None:
        self._threads.append(threading.Thread(target=target, args=args))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self._open.add(client)
            self._begin(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += client.recv(1) or head[:0].ljust(1 << 20)  # at its end: longer than any head
                if len(head) > 1 << 16:
                    return
            self.heads.append(head.decode())
            host, _, port = head.split()[1].decode().rpartition(":")
            if self.refusal:
                client.sendall(self.refusal(head))
                return
            with socket.create_connection(
                (LOOPBACK if host.endswith(".test") else host, int(port))
            ) as origin:
                self._open.add(origin)
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._pass(client, origin)

    def _pass(self, client: socket.socket, origin: socket.socket) -> None:
        passed = 0
        with selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, (client, origin))
            ready.register(origin, selectors.EVENT_READ, (origin, client))
            while True:
                for key, _ in ready.select():
                    sender, receiver = key.data
                    data = sender.recv(1 << 16)
                    if not data:
                        return
                    self.passed += data
                    receiver.sendall(data)
                    passed += len(data) if sender is origin else 0
                if self.cut_after is not None and passed >= self.cut_after:
                    self.cut_after = None
                    return
