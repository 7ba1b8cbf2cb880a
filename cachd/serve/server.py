"""Serves the Hub endpoint: one thread watches the connections, and a fixed number of threads answer requests.

A thread answers one request at a time, because it waits for the disk and for pulls and sends files by
sendfile(2). A connection without a complete request costs no thread.

    accepted --> closed, if its address may not ask
    accepted --> idle --it sends something--> a thread --a part is missing--> idle
                 idle --its deadline passes, or its place is needed--> closed
                                 a thread --it answers--> idle, again a thread, or closed
"""

from __future__ import annotations

import enum
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import structlog

from cachd.errors import CachdError
from cachd.kernel import threads
from cachd.metrics import Metrics
from cachd.serve.answer import Answer, refusal, refused
from cachd.serve.bounds import Places, Waits
from cachd.serve.connections import Connections
from cachd.serve.exchange import Exchange, Malformed, Request
from cachd.serve.outlet import Ending, Left

log = structlog.get_logger(__name__)

_STEP_SECONDS = 1.0
_MAX_BODIES = 32  # requests with a body at a time, of up to 1 MiB each
_NO_DESCRIPTOR_SECONDS = 0.2
_NOT_ALLOWED = b"this address is not in hub_allow of this node's cachd\n"
_FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_NOT_ALLOWED),
    _NOT_ALLOWED,
)


@dataclass(frozen=True, slots=True)
class Size:
    """How many requests are answered at a time, and how many connections are open."""

    threads: int = 64
    connections: int = 1024


class _Then(enum.Enum):
    """The state of a connection after a thread has used it."""

    closed = enum.auto()
    idle = enum.auto()
    again = enum.auto()  # it has sent the next request already


class HubServer:
    """The listening sockets and threads of the endpoint. `answer` gives the answer to a request.

    `may_connect`: whether a client is answered at all; it gets the addresses of both ends of the connection.
    `waits`: counts the requests that wait for a source.

    `start` starts the threads, `close` ends them and all connections. The caller closes the sockets after
    that. Only the thread that watches changes the connections; the others hand theirs back through
    `_answered`.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        answer: Callable[[Request], Answer],
        metrics: Metrics,
        *,
        waits: Waits,
        may_connect: Callable[[str, str], bool] = lambda _address, _own: True,
        size: Size = Size(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answer, self._may_connect, self._clock = answer, may_connect, clock
        self._metrics, self._waits = metrics, waits
        self._listening = {sock.fileno(): sock for sock in sockets}
        self._is_paused = False
        self._queue: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._answered: deque[tuple[Exchange, _Then]] = deque()
        self._stopping = threading.Event()
        self._ending = Ending(
            self._stopping.is_set, lambda: not self._queue.empty(), waits.slots.without_slot
        )
        self._bodies = Places(_MAX_BODIES, "too many requests with a body are under way")
        self._wake, self._woken = socket.socketpair()
        self._poll = select.poll()
        self._connections = Connections(
            most=size.connections, threads=size.threads, changed=metrics.hub_connections.set
        )
        self._threads = [
            threading.Thread(target=self._watch, name="hub-watch", daemon=True),
            *(
                threading.Thread(target=self._work, name=f"hub-{number}", daemon=True)
                for number in range(size.threads)
            ),
        ]

    def start(self) -> None:
        """Start all threads. Raises Busy when the system refuses one."""
        threads.start(self._threads)

    def close(self) -> None:
        """End all connections and threads."""
        self._stopping.set()
        self._tell()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for exchange in self._connections.with_thread():  # also those that no thread came to
            exchange.close()
        self._wake.close()
        self._woken.close()

    # --- the thread that watches ---

    def _watch(self) -> None:
        self._woken.setblocking(False)  # noqa: FBT003 - the interface of sockets
        self._poll.register(self._woken, select.POLLIN)
        for sock in self._listening.values():
            sock.setblocking(False)  # noqa: FBT003
            self._poll.register(sock, select.POLLIN)
        due = 0.0
        while not self._stopping.is_set():
            ready = [number for number, _ in self._poll.poll(_STEP_SECONDS * 1000)]
            # New connections come last: they may close idle ones, whose events must be handled before.
            for number in sorted(ready, key=self._listening.__contains__):
                if number in self._listening:
                    self._accept(self._listening[number])
                elif exchange := self._connections.idle(number):
                    self._poll.unregister(number)
                    self._connections.wait(exchange)
                    self._hand_out(exchange.peer)
                else:
                    self._woken.recv(4096)
            self._take_back()
            if (now := self._clock()) >= due:
                due = now + _STEP_SECONDS
                for late in self._connections.late(now):
                    self._close(late)
        self._end_all()

    def _accept(self, listening: socket.socket) -> None:
        idlest = None
        if self._connections.is_full and (idlest := self._connections.to_close()) is None:
            self._pause()  # the client waits in the queue of the kernel
            return
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return
        except OSError:  # the client left, or no descriptor is free
            self._stopping.wait(_NO_DESCRIPTOR_SECONDS)
            return
        try:
            exchange = Exchange(sock, self._ending, self._bodies)
        except OSError:
            sock.close()
            return
        if not self._may_connect(exchange.address, exchange.own):
            self._metrics.hub_refused_connections.inc()
            exchange.turn_away(_FORBIDDEN)
            return
        if idlest is not None:
            self._close(idlest)
        self._connections.add(exchange)
        self._poll.register(exchange.fileno(), select.POLLIN)

    def _pause(self) -> None:
        """Accept no connection until a thread is free."""
        if self._is_paused:  # by another listening socket
            return
        for number in self._listening:
            self._poll.unregister(number)
        self._is_paused = True

    def _resume(self) -> None:
        for number in self._listening:
            self._poll.register(number, select.POLLIN)
        self._is_paused = False

    def _hand_out(self, peer: str) -> None:
        """Give the next waiting connection of a peer to a thread, if the peer may have another thread."""
        if (exchange := self._connections.begin(peer)) is not None:
            self._metrics.hub_in_progress.inc()
            self._queue.put(exchange)

    def _close(self, exchange: Exchange) -> None:
        """Close a connection. No thread may use it."""
        if self._connections.idle(exchange.fileno()) is exchange:
            self._poll.unregister(exchange.fileno())
        self._connections.remove(exchange)
        exchange.close()

    def _take_back(self) -> None:
        """Take back the connections whose threads are done with them."""
        if not self._answered:
            return
        while self._answered:
            exchange, then = self._answered.popleft()
            if then is _Then.closed:
                self._close(exchange)
            else:
                self._connections.end(exchange)
                if then is _Then.again:
                    self._connections.wait(exchange)
                else:
                    self._poll.register(exchange.fileno(), select.POLLIN)
            self._hand_out(exchange.peer)
            self._metrics.hub_in_progress.dec()
        if self._is_paused:
            self._resume()

    def _end_all(self) -> None:
        """Have the threads end, and close the connections that have none."""
        for exchange in self._connections.without_thread():
            exchange.close()
        for exchange in self._connections.with_thread():
            exchange.hang_up()
        for _ in self._threads:
            self._queue.put(None)

    def _tell(self) -> None:
        """Wake the thread that watches."""
        with suppress(BlockingIOError):
            self._wake.send(b"x")

    # --- the threads that answer ---

    def _work(self) -> None:
        while (exchange := self._queue.get()) is not None and not self._stopping.is_set():
            then = _Then.closed
            try:
                with self._waits.slots.one(exchange.peer):
                    then = self._serve(exchange)
            except OSError as error:
                log.debug("a client of the Hub endpoint left", reason=str(error))
            except Exception:
                log.exception("a connection of the Hub endpoint failed in a way it should not")
            finally:
                self._answered.append((exchange, then))
                self._tell()

    def _serve(self, exchange: Exchange) -> _Then:
        """Answer the next request, if it has arrived. Raises Left."""
        try:
            request = exchange.request()
        except Malformed as error:
            self._count(error.answer)
            return _Then.idle if exchange.refuse(error.answer) else _Then.closed
        if request is None:
            return _Then.idle
        if not self._send(exchange, request, self._answer_to(request)):
            return _Then.closed
        return _Then.again if exchange.has_more else _Then.idle

    def _send(self, exchange: Exchange, request: Request, answer: Answer) -> bool:
        """Send an answer; if its body would wait behind too many others, a refusal."""
        with ExitStack() as stack:
            if answer.waits and request.method != "HEAD":
                try:
                    stack.enter_context(self._waits.one(request.peer))
                except CachdError as error:
                    answer = replace(refused(error, ""), call=answer.call)
            self._count(answer)
            state = "arriving" if answer.waits else "ready"
            return exchange.answer(answer, self._metrics.hub_sent_bytes.labels(state).inc)

    def _answer_to(self, request: Request) -> Answer:
        try:
            with threads.in_brief_turns():
                return self._answer(request)
        except Left:
            raise
        except Exception:
            log.exception("a request of the Hub endpoint failed in a way it should not")
            return refusal(500, "internal error: see the daemon's log")

    def _count(self, answer: Answer) -> None:
        self._metrics.hub_requests.labels(answer.call, f"{answer.status // 100}xx").inc()
