"""Probes that come on time whatever the answers do: `python -m bench.probes PORT PATH RATE SECONDS`.

Latency counts from the moment at which a probe was due, not from when it was sent: an answer that is late
makes the probes behind it late too, and they say so. One thread, keep-alive connections, a new one whenever
all wait. Prints one line of JSON: the milliseconds of every probe.
"""

from __future__ import annotations

import json
import re
import select
import socket
import sys
import time
from contextlib import suppress

AHEAD_SECONDS = 0.2
LAST_SECONDS = 10.0
CONNECTIONS = 256


class Connection(socket.socket):
    """One probe at a time: when it was due, and what came so far of its answer."""

    def __init__(self, port: int, asked: bytes) -> None:
        super().__init__()
        self.connect(("127.0.0.1", port))
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port, self.asked = port, asked
        self.due, self.answer = 0.0, b""

    def ask(self, due: float) -> None:
        """Send the probe that is due at this time."""
        self.due, self.answer = due, b""
        with suppress(ConnectionError):  # closed already: the answer will be none
            self.send(self.asked)

    def is_answered(self) -> bool:
        """Take in what came; nothing, when the server closed it. Raises ConnectionError unless it is 2xx."""
        with suppress(ConnectionResetError):
            self.answer += self.recv(65536)
        if self.answer and not self.answer.startswith(b"HTTP/1.1 2"):
            raise ConnectionError(f"{self.asked!r}: {self.answer!r}")
        head, end, body = self.answer.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: *(\d+)", head)
        return bool(end) and len(body) >= int(length[1] if length else 0)


def asked(port: int, path: str, rate: float, seconds: float) -> list[float]:
    """Seconds that each of RATE * SECONDS probes took. Raises ConnectionError, TimeoutError."""
    words = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    count = int(rate * seconds)
    idle = [Connection(port, words) for _ in range(4)]
    waiting: set[Connection] = set()
    took: list[float] = []
    began, sent = time.monotonic() + AHEAD_SECONDS, 0
    while len(took) < count:
        now, due = time.monotonic(), began + sent / rate
        if now > began + seconds + LAST_SECONDS:
            raise TimeoutError(f"{count - len(took)} of {count} probes have no answer")
        if sent < count and due <= now and len(waiting) < CONNECTIONS:
            connection = idle.pop() if idle else Connection(port, words)
            connection.ask(due)
            waiting.add(connection)
            sent += 1
            continue
        patience = max(due - now, 0.0) if sent < count and len(waiting) < CONNECTIONS else 1.0
        for connection in select.select(waiting, (), (), patience)[0]:
            answered = connection.is_answered()
            if answered or not connection.answer:
                waiting.remove(connection)
            if answered:
                took.append(time.monotonic() - connection.due)
                idle.append(connection)
            elif not connection.answer:  # it was idle for so long that the server closed it
                anew = Connection(port, words)
                anew.ask(connection.due)
                waiting.add(anew)
                connection.close()
    return took


def main(port: int, path: str, rate: float, seconds: float) -> None:
    """Probe, and print what it took."""
    took = asked(port, path, rate, seconds)
    print(json.dumps([round(1000 * one, 4) for one in took]))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
