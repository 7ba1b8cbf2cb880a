"""Serves the application on its listeners until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from cachd.api.admission import Connections, Counted
from cachd.api.connection import Connection
from cachd.api.handshake import accept
from cachd.api.listeners import BACKLOG, Opened
from cachd.api.narrow import Narrow
from cachd.api.stagger import Stagger
from cachd.api.tls import Certificate
from cachd.kernel import threads
from cachd.kernel.notices import Notices

_GRACEFUL_SECONDS = 5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Server(uvicorn.Server):
    """A uvicorn server with several listeners, whose connections are counted together.

    On a stop signal it calls `interrupt` in a thread, so that callers who wait for pulls get an answer. From
    then on the process has 20 seconds to end before the kernel ends it: a thread that hangs on a disk cannot
    be stopped.

    `notices` go out when the API answers, when a stop begins, and as long as the event loop runs.
    """

    def __init__(
        self,
        options: uvicorn.Config,
        listeners: Sequence[Opened],
        certificate: Certificate | None,
        interrupt: Callable[[], None],
        notices: Notices,
    ) -> None:
        super().__init__(options)
        self._notices = notices
        self._listeners, self._certificate, self._counted = listeners, certificate, Connections()
        self._tasks: list[asyncio.Task[None]] = []
        self._interrupt, self._must_stop = interrupt, threading.Event()
        threads.start([threading.Thread(target=self._interrupt_at_stop, name="stop", daemon=True)])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 ours are in self._listeners
        """As in uvicorn, but on our listeners, each with its own TLS setting and allowed calls."""
        await super().startup(sockets=[])
        loop, app = asyncio.get_running_loop(), Stagger(self.config.loaded_app)
        for each in self._listeners:
            made = partial(self._connection, Narrow(app, each.listener.serves))
            if self._certificate and each.listener.may_speak_tls:
                taking = accept(each.sock, self._certificate, made, self._counted)
                self._tasks.append(loop.create_task(taking))
            else:
                self.servers.append(await loop.create_server(made, sock=each.sock, backlog=BACKLOG))
        self._notices.ready()
        if self._notices.watchdog_seconds:
            self._tasks.append(loop.create_task(self._report_alive(self._notices.watchdog_seconds / 2)))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for task in self._tasks:
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
        """Handle a stop signal while the server runs."""
        super().handle_exit(sig, frame)
        self.stop(sig, frame)

    def stop(self, _sig: int, _frame: FrameType | None) -> None:
        """Handle a stop signal before the server runs, and after."""
        self.should_exit = True
        if not self._must_stop.is_set():
            self._notices.stopping()
            threads.end_in_time()
            self._must_stop.set()

    def leave(self) -> None:
        """Have the server end without a signal. Any thread may call it."""
        self._must_stop.set()
        self.should_exit = True

    async def _report_alive(self, every_seconds: float) -> None:
        while True:
            self._notices.alive()
            await asyncio.sleep(every_seconds)

    def _interrupt_at_stop(self) -> None:
        self._must_stop.wait()
        self._interrupt()


def stoppable(
    app: ASGIApp,
    listeners: Sequence[Opened],
    *,
    certificate: Certificate | None,
    interrupt: Callable[[], None],
    notices: Notices,
) -> Callable[[], None]:
    """A function that serves until SIGTERM or SIGINT. A signal that comes before its call ends it at once.

    On the signal, `interrupt` is called in a thread, and running answers may finish.

    `notices` report both, and that the event loop runs.

    After its shutdown, uvicorn raises the signal again. The handlers set here keep that from ending the
    process before its cleanup.
    """
    server = _Server(_options(app), listeners, certificate, interrupt, notices)
    for number in STOP_SIGNALS:
        signal.signal(number, server.stop)
    return partial(_run, server, listeners)


def serve_until(
    free: Future[None], app: ASGIApp, listeners: Sequence[Opened], certificate: Certificate | None
) -> None:
    """Serve until `free` is done, or until SIGTERM or SIGINT, which the handlers of before then get, too.

    The sockets stay open: connections wait in them for whoever serves next.
    """
    copies = [Opened(each.listener, each.sock.dup()) for each in listeners]
    server = _Server(_options(app), copies, certificate, lambda: None, Notices({}))
    free.add_done_callback(lambda _: server.leave())
    try:
        _run(server, copies)
    finally:
        for each in copies:
            each.sock.close()


def _options(app: ASGIApp) -> uvicorn.Config:
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every malformed request
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # clients could forge these headers; the audit log needs the real peer
        ws="none",
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
        reset_contextvars=True,  # or a pipelined request would begin with the caller of the one before
    )


def _run(server: _Server, listeners: Sequence[Opened]) -> None:
    try:
        server.run(sockets=[each.sock for each in listeners])
    except RuntimeError:  # asyncio found no thread to join its pool, after the last answer
        if not server.should_exit:
            raise
