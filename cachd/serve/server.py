"""Serves the Hub endpoint: one thread accepts connections, and a fixed number of threads answer them.

A thread answers one connection at a time, because it waits for the disk and for pulls and sends files by
sendfile(2). A client that keeps its connection open between requests loses it as soon as another one waits.
"""

from __future__ import annotations

import queue
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from cachd.kernel import threads
from cachd.serve.answer import Answer, refusal
from cachd.serve.exchange import Exchange, Left, Request

log = structlog.get_logger(__name__)

THREADS = 64
_MOST_WAITING = 256
_IDLE_SECONDS, _TURN_SECONDS = 10.0, 0.2


class HubServer:
    """The listening sockets and threads of the endpoint. `answer` gives the answer to a request.

    `start` starts the threads, `close` ends them and all connections. The caller closes the sockets after
    that. One peer may have three quarters of the threads.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        answer: Callable[[Request], Answer],
        *,
        count: int = THREADS,
    ) -> None:
        self._sockets, self._answer = list(sockets), answer
        self._waiting: queue.Queue[socket.socket | None] = queue.Queue(_MOST_WAITING)
        self._stopping = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._peers: Counter[str] = Counter()
        self._most_of_peer = max(1, count * 3 // 4)
        names = [(f"hub-{number}", self._work) for number in range(count)]
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in [("hub-accept", self._accept), *names]
        ]

    def start(self) -> None:
        """Start all threads. Raises Busy when the system refuses one."""
        threads.start(self._threads)

    def close(self) -> None:
        """End all connections and threads."""
        self._stopping.set()
        self._wake.send(b"x")
        with self._lock:
            for sock in self._open:
                with suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        while not self._waiting.empty():
            if left := self._waiting.get_nowait():
                left.close()
        self._wake.close()
        self._woken.close()

    # --- the thread that accepts ---

    def _accept(self) -> None:
        poll, by_number = select.poll(), {sock.fileno(): sock for sock in self._sockets}
        for sock in (*self._sockets, self._woken):
            sock.setblocking(False)  # noqa: FBT003 - the interface of sockets
            poll.register(sock, select.POLLIN)
        while not self._stopping.is_set():
            for number, _ in poll.poll():
                if number in by_number:
                    self._take(by_number[number])
        for _ in self._threads:
            with suppress(queue.Full):
                self._waiting.put_nowait(None)

    def _take(self, listening: socket.socket) -> None:
        try:
            sock, peer = listening.accept()
        except OSError:  # the client left, or no descriptor is free
            self._stopping.wait(_TURN_SECONDS)
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                if self._peers[peer[0]] < self._most_of_peer:
                    self._waiting.put_nowait(sock)
                    return
        except (OSError, queue.Full):
            pass
        sock.close()

    # --- the threads that answer ---

    def _work(self) -> None:
        while not self._stopping.is_set():
            with suppress(queue.Empty):
                sock = self._waiting.get(timeout=_IDLE_SECONDS)
                if sock is not None:
                    self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        """Answer the requests of one connection, then close it."""
        peer = ""
        try:
            with sock:
                exchange = Exchange(sock, self._stopping.is_set)
                peer = exchange.peer
                with self._lock:
                    self._open.add(sock)
                    self._peers[peer] += 1
                while (request := exchange.request()) and exchange.answer(self._answered(request)):
                    if not self._has_request(sock):
                        break
        except OSError as error:
            log.debug("a client of the Hub endpoint left", reason=str(error))
        finally:
            with self._lock:
                self._open.discard(sock)
                if peer:
                    self._peers[peer] -= 1
                    self._peers += Counter()  # drops those at zero

    def _has_request(self, sock: socket.socket) -> bool:
        """Wait until the client sends something: for 10 s, or until another client needs the thread."""
        poll, waited = select.poll(), 0.0
        poll.register(sock, select.POLLIN)
        while not self._stopping.is_set():
            if poll.poll(round(_TURN_SECONDS * 1000)):
                return True
            waited += _TURN_SECONDS
            if waited >= _IDLE_SECONDS or not self._waiting.empty():
                return False
        return False

    def _answered(self, request: Request) -> Answer:
        try:
            return self._answer(request)
        except Left:
            raise
        except Exception:
            log.exception("a request of the Hub endpoint failed in a way it should not")
            return refusal(500, "internal error: see the daemon's log")
