"""The application answered over a socket, until the process is told to stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cachd.api.connection import Connection, Connections
from cachd.transfer import threads

_GRACEFUL_SECONDS = 5


class _Server(uvicorn.Server):
    """Calls `interrupt` when it is told to stop, so that those who wait for pulls get their answer.

    From then on the process has so long to end: what hangs on a disk, no thread of ours can end.
    """

    def __init__(self, options: uvicorn.Config, interrupt: Callable[[], None]) -> None:
        super().__init__(options)
        self._interrupt, self._told = interrupt, threading.Event()
        threads.start([threading.Thread(target=self._stop, name="stop", daemon=True)])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        threads.end_in_time()
        self._told.set()

    def _stop(self) -> None:
        self._told.wait()
        self._interrupt()


def run(app: FastAPI, sock: socket.socket, *, interrupt: Callable[[], None]) -> None:
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
        http=partial(Connection, connections=Connections()),  # type: ignore[arg-type] # it calls it like a class
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    server = _Server(options, interrupt)

    def stop(_number: int, _frame: object) -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        server.run(sockets=[sock])
    except RuntimeError:  # the loop, all answered, joins its threads by one more, which it may not get
        if not server.should_exit:
            raise
