"""One daemon with the origins within its reach, and the ways tests ask it."""

from __future__ import annotations

import errno
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tests.ground.hub import Hub
from tests.ground.models import digests, noise
from tests.ground.node import Answer, Node
from tests.ground.origin import Hold, Origin

MIB = 1 << 20
PATIENCE_SECONDS = 120
LONGEST_LOOK_SECONDS = 60  # whatever the load; the look that needs no event comes every 300 s
Nodes = Callable[..., Node]
T = TypeVar("T")


def until(what: Callable[[], T | None]) -> T:
    """The first true answer, of what nothing tells. Fails when there is none in time."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return found


@dataclass(frozen=True, slots=True)
class Ground:
    """One daemon and the origins within its reach. Tests that share it use names of their own."""

    node: Node
    origin: Origin
    hub: Hub

    def add(self, name: str, size: int = 6 * MIB) -> str:
        """Let the origin hold a file; its URL is a ref whose model is called `name`."""
        return self.origin.add(f"/{name}", noise(size, seed=len(name)))

    def have(self, name: str, size: int = MIB) -> str:
        """Pull a file and wait; its ref."""
        ref = self.add(name, size)
        self.node.pull(ref)
        assert self.node.ready(name).status == 200
        return ref

    @contextmanager
    def held(self, name: str) -> Iterator[Hold]:
        """Pull a file of 6 MiB that stops in its first part of 4 MiB, after the second is durable."""
        ref = self.add(name)
        hold = self.origin.hold(f"/{name}", after=3 * MIB)
        try:
            assert self.node.pull(ref).status == 202
            assert hold.reached.wait(PATIENCE_SECONDS)
            self.node.wait_for("part made durable", path=name)
            yield hold
        finally:
            hold.release()

    def show(self, name: str) -> Any:
        return self.node.ask("GET", f"/v1/models/{name}").document


def assert_problem(answer: Answer, status: int, code: str) -> None:
    """The answer is a problem document (RFC 9457) with this status and code."""
    assert said(answer, "Content-Type") == "application/problem+json", answer
    assert (answer.status, answer.document["code"]) == (status, code), answer.document
    assert answer.document["status"] == status
    assert answer.document["title"]
    assert answer.document["detail"]


def said(answer: Answer, header: str) -> str:
    """A header of the answer, whatever its case; empty when there is none."""
    return {name.lower(): value for name, value in answer.headers.items()}.get(header.lower(), "")


def names(ground: Ground) -> list[str]:
    return [model["name"] for model in ground.node.ask("GET", "/v1/models").document["models"]]


def files_left(root: Path) -> list[str]:
    """What is in a root beside what every root has."""
    own = ("format", "lock", "usage.json", "scrub_log.json", "last_good.json")
    always = {"CACHEDIR.TAG", "hub/CACHEDIR.TAG", *(f".cachd/{name}" for name in own)}
    return sorted({*digests(root)} - always)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return call(), time.monotonic() - began


def send(node: Node, method: str, path: str, body: bytes = b"") -> socket.socket:
    """Send a request and leave its answer unread."""
    url = urlsplit(node.url)
    connection = socket.create_connection((url.hostname or "", url.port or 0), timeout=PATIENCE_SECONDS)
    head = f"{method} {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return connection


def received(response: http.client.HTTPResponse) -> Answer:
    """An answer that did not come through `Node.ask`."""
    content = response.read()
    is_json = "json" in (response.getheader("Content-Type") or "")
    return Answer(response.status, json.loads(content) if is_json else content, dict(response.getheaders()))


def hang_up(node: Node, method: str, path: str, body: bytes = b"") -> None:
    """Send a request and close before its answer."""
    send(node, method, path, body).close()


@contextmanager
def mapped(file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has mapped a file and closed it; told to end, it prints the sha256 of what it sees."""
    script = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as opened:
    seen = mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ)
print("mapped", flush=True)
sys.stdin.read()
print(hashlib.sha256(seen).hexdigest())
"""
    command = [sys.executable, "-c", script, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            assert reader.stdout.readline() == "mapped\n"
            yield reader
        finally:
            reader.kill()


def remove(path: Path) -> None:
    """Delete a file or a directory of a view, as root could: its owner must open the directories first."""
    path.parent.chmod(0o755)
    if path.is_dir() and not path.is_symlink():
        for directory in (path, *filter(Path.is_dir, path.rglob("*"))):
            directory.chmod(0o755)
        try:
            shutil.rmtree(path)
        except OSError as error:  # the daemon has put a part of it back meanwhile
            if error.errno != errno.ENOTEMPTY:
                raise
    else:
        path.unlink()
