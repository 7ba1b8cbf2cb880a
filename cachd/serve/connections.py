"""Holds the open connections of the Hub endpoint, and chooses which one is closed for a new one.

    idle       nothing has arrived that a thread has not read
    waiting    bytes have arrived, but the peer has as many threads as it may have
    busy       a thread reads the request or writes the answer

The thread that watches the sockets moves a connection from one state to the next.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from cachd.serve.bounds import most_of_peer
from cachd.serve.exchange import Exchange


class Connections:
    """At most `most` connections, for so many `threads`. Only one thread may use it.

    One peer may have three quarters of the threads. `changed`: called with the number of connections.
    """

    def __init__(self, *, most: int, threads: int, changed: Callable[[int], object]) -> None:
        self._most, self._changed = most, changed
        self._threads_of_peer = most_of_peer(threads)
        self._idle: dict[int, Exchange] = {}  # by descriptor
        self._waiting: defaultdict[str, dict[Exchange, None]] = defaultdict(dict)  # by peer, in order
        self._busy: set[Exchange] = set()
        self._peers: Counter[str] = Counter()  # connections of each
        self._busy_peers: Counter[str] = Counter()  # busy ones of each

    @property
    def is_full(self) -> bool:
        """Whether a new connection needs the place of another."""
        return self._peers.total() >= self._most

    def idle(self, number: int) -> Exchange | None:
        """The idle connection with this descriptor."""
        return self._idle.get(number)

    def add(self, exchange: Exchange) -> None:
        """Count a new one, as idle."""
        self._idle[exchange.fileno()] = exchange
        self._peers[exchange.peer] += 1
        self._changed(self._peers.total())

    def wait(self, exchange: Exchange) -> None:
        """An idle one wants a thread. It comes after the others of its peer."""
        del self._idle[exchange.fileno()]
        self._waiting[exchange.peer][exchange] = None

    def begin(self, peer: str) -> Exchange | None:
        """The next waiting one of a peer, which is busy from now on; None if no thread is left for it."""
        if peer not in self._waiting or self._busy_peers[peer] >= self._threads_of_peer:
            return None
        exchange = next(iter(self._waiting[peer]))
        self._leave_wait(exchange)
        self._busy.add(exchange)
        self._busy_peers[peer] += 1
        return exchange

    def end(self, exchange: Exchange) -> None:
        """A busy one is idle again."""
        self._release(exchange)
        self._idle[exchange.fileno()] = exchange

    def remove(self, exchange: Exchange) -> None:
        """Count a connection no more. The caller closes it after this."""
        self._release(exchange)
        self._idle.pop(exchange.fileno(), None)
        self._leave_wait(exchange)
        self._peers[exchange.peer] -= 1
        self._peers += Counter()  # drops those at zero
        self._changed(self._peers.total())

    def late(self, now: float) -> list[Exchange]:
        """The idle ones whose request did not arrive in time. `now`: monotonic."""
        return [each for each in self._idle.values() if each.deadline < now]

    def to_close(self) -> Exchange | None:
        """The connection that gives way to a new one; None if each has a thread.

        The peer with the most connections without a thread loses the one that has waited longest. So a peer
        with few connections loses none to one with many.
        """
        without = self.without_thread()
        if not without:
            return None
        ((heaviest, _),) = Counter(each.peer for each in without).most_common(1)
        return min((each for each in without if each.peer == heaviest), key=lambda each: each.since)

    def without_thread(self) -> list[Exchange]:
        """Those that are idle or waiting."""
        return [*self._idle.values(), *(each for some in self._waiting.values() for each in some)]

    def with_thread(self) -> list[Exchange]:
        """Those that are busy."""
        return list(self._busy)

    def _leave_wait(self, exchange: Exchange) -> None:
        some = self._waiting[exchange.peer]
        some.pop(exchange, None)
        if not some:
            del self._waiting[exchange.peer]

    def _release(self, exchange: Exchange) -> None:
        """Give back the thread of a connection, if it has one."""
        if exchange in self._busy:
            self._busy.remove(exchange)
            self._busy_peers[exchange.peer] -= 1
            self._busy_peers += Counter()
