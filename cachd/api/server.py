"""The application answered over a socket, until the process is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cachd.api.connection import Connection, Connections, Counted
from cachd.api.handshake import accept
from cachd.api.listeners import BACKLOG, Opened
from cachd.api.narrow import Narrow
from cachd.api.tls import Certificate
from cachd.api.turns import Turns
from cachd.transfer import threads

_GRACEFUL_SECONDS = 5


class _Server(uvicorn.Server):
    """Answers at several listeners, whose connections are counted together.

    It calls `interrupt` when it is told to stop, so that those who wait for pulls get their answer. From then
    on the process has so long to end: what hangs on a disk, no thread of ours can end.
    """

    def __init__(
        self,
        options: uvicorn.Config,
        listeners: Sequence[Opened],
        certificate: Certificate | None,
        interrupt: Callable[[], None],
    ) -> None:
        super().__init__(options)
        self._listeners, self._certificate, self._counted = listeners, certificate, Connections()
        self._accepting: list[asyncio.Task[None]] = []
        self._interrupt, self._told = interrupt, threading.Event()
        threads.start([threading.Thread(target=self._stop, name="stop", daemon=True)])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 we have them
        """As uvicorn's, but that each listener has connections of its own kind."""
        await super().startup(sockets=[])
        loop, app = asyncio.get_running_loop(), Turns(self.config.loaded_app)
        for each in self._listeners:
            made = partial(self._connection, Narrow(app, each.listener.serves))
            if self._certificate and each.listener.may_speak_tls:
                taking = accept(each.sock, self._certificate, made, self._counted)
                self._accepting.append(loop.create_task(taking))
            else:
                self.servers.append(await loop.create_server(made, sock=each.sock, backlog=BACKLOG))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._accepting:
            task.cancel()
        self._counted.end_handshakes()
        await super().shutdown(sockets)

    def _connection(self, app: Narrow, handshake: Counted | None = None) -> Connection:
        return Connection(
            self.config,
            self.server_state,
            self.lifespan.state,
            connections=self._counted,
            app=app,
            handshake=handshake,
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        threads.end_in_time()
        self._told.set()

    def _stop(self) -> None:
        self._told.wait()
        self._interrupt()


def run(
    app: FastAPI,
    listeners: Sequence[Opened],
    *,
    certificate: Certificate | None,
    interrupt: Callable[[], None],
) -> None:
    """Answer until SIGTERM or SIGINT, then `interrupt` in a thread and let the answers under way end.

    uvicorn raises the signal again behind itself: it must not end us there.
    """
    options = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody says in a header who they are: the audit names the peer
        ws="none",
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of each request that makes no sense
    server = _Server(options, listeners, certificate, interrupt)

    def stop(_number: int, _frame: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        server.run(sockets=[each.sock for each in listeners])
    except RuntimeError:  # the loop, all answered, joins its threads by one more, which it may not get
        if not server.should_exit:
            raise
