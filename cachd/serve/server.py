"""Serves the Hub endpoint: one thread watches the connections, and a fixed number of threads answer requests.

A thread answers one request at a time, because it waits for the disk and for pulls and sends files by
sendfile(2). A connection without a request costs no thread.

    accepted --> closed, if its address may not ask
    accepted --> idle --it sends something--> queued --> answered by a thread --> idle, or closed
                 idle --10 s, or the place is needed--> closed
"""

from __future__ import annotations

import queue
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress

import structlog

from cachd.errors import CachdError
from cachd.kernel import threads
from cachd.serve.answer import Answer, refusal, refused
from cachd.serve.exchange import Exchange, Left, Request
from cachd.serve.waits import Waits

log = structlog.get_logger(__name__)

THREADS = 64
MAX_CONNECTIONS = 1024
_IDLE_SECONDS, _STEP_SECONDS = 10.0, 1.0
_NO_DESCRIPTOR_SECONDS = 0.2
_NOT_ALLOWED = b"this address is not in hub_allow of this node's cachd\n"
_FORBIDDEN = b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
    len(_NOT_ALLOWED),
    _NOT_ALLOWED,
)


class HubServer:
    """The listening sockets and threads of the endpoint. `answer` gives the answer to a request.

    `may_connect`: whether a peer is answered at all; it gets the addresses of both ends of the connection.
    `waits`: counts the requests that wait for a pull.

    `start` starts the threads, `close` ends them and all connections. The caller closes the sockets after
    that. One peer may have three quarters of the threads. Only the thread that watches changes the
    connections; the others hand theirs back through `_answered`.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        answer: Callable[[Request], Answer],
        *,
        waits: Waits | None = None,
        may_connect: Callable[[str, str], bool] = lambda _peer, _own: True,
        count: int = THREADS,
        most: int = MAX_CONNECTIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._answer, self._may_connect, self._clock = answer, may_connect, clock
        self._most = most
        self._listening = {sock.fileno(): sock for sock in sockets}
        self._queue: queue.SimpleQueue[Exchange | None] = queue.SimpleQueue()
        self._answered: deque[tuple[Exchange, bool]] = deque()
        self._stopping = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._poll = select.poll()
        self._idle: dict[int, tuple[Exchange, float]] = {}  # by descriptor, the idlest first
        self._busy: set[Exchange] = set()
        self._deferred: list[Exchange] = []  # their peers have enough threads
        self._peers: Counter[str] = Counter()  # busy connections of each
        self._most_of_peer = max(1, count * 3 // 4)
        self._waits = waits or Waits(max(1, count // 2))
        self._threads = [
            threading.Thread(target=self._watch, name="hub-watch", daemon=True),
            *(
                threading.Thread(target=self._work, name=f"hub-{number}", daemon=True)
                for number in range(count)
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
        self._wake.close()
        self._woken.close()

    # --- the thread that watches ---

    def _watch(self) -> None:
        self._woken.setblocking(False)  # noqa: FBT003 - the interface of sockets
        self._poll.register(self._woken, select.POLLIN)
        for sock in self._listening.values():
            sock.setblocking(False)  # noqa: FBT003
            self._poll.register(sock, select.POLLIN)
        while not self._stopping.is_set():
            ready = [number for number, _ in self._poll.poll(_STEP_SECONDS * 1000)]
            # New connections come last: they may close idle ones, whose events must be handled before.
            for number in sorted(ready, key=self._listening.__contains__):
                if number in self._listening:
                    self._accept(self._listening[number])
                elif number in self._idle:
                    self._hand_out(self._without_watch(number))
                else:
                    self._woken.recv(4096)
            self._take_back()
            self._close_idle()
        self._end_all()

    def _accept(self, listening: socket.socket) -> None:
        if len(self._idle) + len(self._busy) + len(self._deferred) >= self._most:
            if not self._idle:
                self._stopping.wait(_NO_DESCRIPTOR_SECONDS)  # the client waits in the queue of the kernel
                return
            self._without_watch(next(iter(self._idle))).close()
        try:
            sock, _ = listening.accept()
        except BlockingIOError:
            return
        except OSError:  # the client left, or no descriptor is free
            self._stopping.wait(_NO_DESCRIPTOR_SECONDS)
            return
        try:
            exchange = Exchange(sock, self._stopping.is_set)
        except OSError:
            sock.close()
            return
        if self._may_connect(exchange.peer, exchange.own):
            self._watch_idle(exchange)
        else:
            exchange.turn_away(_FORBIDDEN)

    def _watch_idle(self, exchange: Exchange) -> None:
        self._idle[exchange.fileno()] = exchange, self._clock()
        self._poll.register(exchange.fileno(), select.POLLIN)

    def _without_watch(self, number: int) -> Exchange:
        self._poll.unregister(number)
        return self._idle.pop(number)[0]

    def _hand_out(self, exchange: Exchange) -> None:
        if self._peers[exchange.peer] >= self._most_of_peer:
            self._deferred.append(exchange)
            return
        self._peers[exchange.peer] += 1
        self._busy.add(exchange)
        self._queue.put(exchange)

    def _take_back(self) -> None:
        """Take the connections back whose requests are answered."""
        if not self._answered:
            return
        while self._answered:
            exchange, goes_on = self._answered.popleft()
            self._busy.discard(exchange)
            self._peers[exchange.peer] -= 1
            if goes_on:
                self._watch_idle(exchange)
            else:
                exchange.close()
        self._peers += Counter()  # drops those at zero
        deferred, self._deferred = self._deferred, []
        for exchange in deferred:
            self._hand_out(exchange)

    def _close_idle(self) -> None:
        before = self._clock() - _IDLE_SECONDS
        while self._idle and (number := next(iter(self._idle))) and self._idle[number][1] < before:
            self._without_watch(number).close()

    def _end_all(self) -> None:
        """Close the connections without a thread, and have the threads close theirs."""
        for exchange in (*self._deferred, *(each for each, _ in self._idle.values())):
            exchange.close()
        for exchange in self._busy:
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
            goes_on = False
            try:
                goes_on = self._serve(exchange)
            except OSError as error:
                log.debug("a client of the Hub endpoint left", reason=str(error))
            except Exception:
                log.exception("a connection of the Hub endpoint failed in a way it should not")
            finally:
                if self._stopping.is_set():
                    exchange.close()
                else:
                    self._answered.append((exchange, goes_on))
                    self._tell()
        if exchange is not None:
            exchange.close()

    def _serve(self, exchange: Exchange) -> bool:
        """Answer the requests that have arrived. Returns whether the client may send another one."""
        while request := exchange.request():
            if not self._send(exchange, request, self._answer_to(request)):
                return False
            if not exchange.has_more:
                return True
        return False

    def _send(self, exchange: Exchange, request: Request, answer: Answer) -> bool:
        """Send an answer; if its body would wait behind too many others, a refusal."""
        with ExitStack() as stack:
            if answer.waits and request.method != "HEAD":
                try:
                    stack.enter_context(self._waits.one())
                except CachdError as error:
                    answer = refused(error, "")
            return exchange.answer(answer)

    def _answer_to(self, request: Request) -> Answer:
        try:
            return self._answer(request)
        except Left:
            raise
        except Exception:
            log.exception("a request of the Hub endpoint failed in a way it should not")
            return refusal(500, "internal error: see the daemon's log")
