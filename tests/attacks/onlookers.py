"""Onlookers: how long a daemon's probes take while it is under attack, beside those of a bare responder.

    python -m tests.attacks.onlookers PORT NAME      asks until its input ends, then prints one line of JSON

Three threads ask on a connection each: `/livez` and `/v1/models/NAME/ready` of the daemon, and a responder in
a process of its own that does nothing but answer. Latency counts from the moment a probe was due, so that a
late answer makes the probes behind it late, too. An answer that is not 200 is kept as text.
"""

from __future__ import annotations

import json
import multiprocessing
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field

RATE = 40  # probes a second of each
PATIENCE_SECONDS = 60.0


@dataclass(slots=True)
class Asker:
    """One probe, asked again and again. `took`: seconds of each answer; `wrong`: what was no 200."""

    port: int
    path: str
    took: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    connection: socket.socket | None = None

    def ask_until(self, ended: threading.Event) -> None:
        due = time.monotonic()
        while not ended.is_set():
            answer = self._answer()
            self.took.append(time.monotonic() - due)
            if not answer.startswith(b"HTTP/1.1 200"):
                self.wrong.append(answer[:200].decode(errors="replace"))
            due = max(due + 1 / RATE, time.monotonic() - 1)
            ended.wait(max(due - time.monotonic(), 0))

    def _answer(self) -> bytes:
        """The answer's head; of a second connection when the server closed the first one."""
        for _ in range(2):
            reused = self.connection is not None
            with suppress(ConnectionError):
                if answer := self._asked_once():
                    return answer
            self.connection = None
            if not reused:
                break
        return b"no answer"

    def _asked_once(self) -> bytes:
        if self.connection is None:
            self.connection = socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_SECONDS)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection.sendall(f"GET {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        got = b""
        while b"\r\n\r\n" not in got:
            if not (piece := self.connection.recv(65536)):
                return b""
            got += piece
        head, _, body = got.partition(b"\r\n\r\n")
        length = next((int(v) for n, _, v in _headers(head) if n.lower() == b"content-length"), 0)
        while len(body) < length:
            body += self.connection.recv(65536)
        return head


def _headers(head: bytes) -> list[tuple[bytes, bytes, bytes]]:
    return [line.partition(b":") for line in head.split(b"\r\n")[1:]]


class _Bare(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        while line := self.rfile.readline():
            if line == b"\r\n":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n")


def respond(ports: multiprocessing.Queue[int]) -> None:
    """Answer 200 to whatever is asked; the port goes into the queue."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Bare) as server:
        server.daemon_threads = True
        ports.put(server.server_address[1])
        server.serve_forever()


def main(port: int, name: str) -> None:
    spawning = multiprocessing.get_context("spawn")
    ports: multiprocessing.Queue[int] = spawning.Queue()
    responder = spawning.Process(target=respond, args=(ports,), daemon=True)
    responder.start()
    asking = {
        "bare": Asker(ports.get(timeout=PATIENCE_SECONDS), "/"),
        "livez": Asker(port, "/livez"),
        "ready": Asker(port, f"/v1/models/{name}/ready"),
    }
    ended = threading.Event()
    threads = [threading.Thread(target=asker.ask_until, args=(ended,)) for asker in asking.values()]
    for thread in threads:
        thread.start()
    print("asking", flush=True)
    sys.stdin.read()
    ended.set()
    for thread in threads:
        thread.join()
    responder.terminate()
    print(json.dumps({word: [asker.took, asker.wrong] for word, asker in asking.items()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
