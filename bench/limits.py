"""The limits of this machine, in processes of their own: receive, write, hash, each with nothing else to do.

python -m bench.limits RECEIVE URL SIZE TARGET [THREADS] 4 threads, 1 MiB aligned buffers, parts of 32 MiB
python -m bench.limits shards URL SIZE TARGET FILE...    4 threads, each a file of SIZE below URL at a time
python -m bench.limits sha256|sha256-all SIZE            one core, every core at once
python -m bench.limits sha256-file SIZE FILE             one core, from a file in the page cache
python -m bench.limits pwrite|pwrite+fsync SIZE TARGET   one thread, from memory
python -m bench.limits small URL SUMS THREADS TARGET     every small file that SUMS lists: ask to publish
python -m bench.limits small-library ...                 the same by http.client, a file's size asked first

RECEIVE is recv, and +xxh3, which knows a part again after a crash, +pwrite, +sha256, which follows in a
thread of its own and reads back, +fsync.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import socket
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import xxhash

from bench.clock import clocked

MIB = 1 << 20
PART = 32 * MIB
THREADS = 4
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)\r\n.*?\r\n\r\n", re.DOTALL)

T = TypeVar("T")
Ask = Callable[[str], bytes | memoryview]  # the content of the file at a path


class Hash(Protocol):
    def update(self, content: memoryview, /) -> None: ...


def main(what: str, *args: str) -> None:
    """Do one of these inside the clock."""
    match what, args:
        case _, (url, size, target, *threads) if what.startswith("recv"):
            count = int(threads[0]) if threads else THREADS
            with clocked():
                receive(url, int(size), Path(target), count, frozenset(what.split("+")))
        case "shards", (url, size, target, *paths):
            with clocked():
                receive_shards(url, int(size), paths, Path(target))
        case "sha256" | "sha256-all", (size,):
            cores = 1 if what == "sha256" else os.cpu_count() or 1
            with clocked():
                at_once(*[lambda: hash_memory(int(size) // cores)] * cores)
        case "sha256-file", (size, file):
            with clocked():
                hash_file(Path(file), int(size))
        case "pwrite" | "pwrite+fsync", (size, target):
            with clocked():
                write(Path(target), int(size), sync=what == "pwrite+fsync")
        case "small" | "small-library", (url, sums, threads, target):
            digests = {line[66:]: line[:64] for line in Path(sums).read_text().splitlines()}
            asking = asking_bare if what == "small" else asking_by_library
            with clocked():
                receive_small(url, digests, int(threads), Path(target), asking)
        case _:
            raise SystemExit(__doc__)


def receive(url: str, size: int, target: Path, threads: int, also: Set[str]) -> None:
    """Every byte of the file at `url` into buffers, and what `also` says with them."""
    parts = list(range(0, size, PART))[::-1]
    file = made(target, size) if "pwrite" in also else None
    received = {start: threading.Event() for start in range(0, size, MIB)} if "sha256" in also else {}

    def work() -> None:
        buffer = buffer_of_a_thread()
        with connected(url) as connection:
            for start in popped(parts):
                hashes = (xxhash.xxh3_128(),) if "xxh3" in also else ()
                stop = min(start + PART, size)
                for at in receive_part(connection, url, start, stop, buffer, file, hashes):
                    if received:
                        received[at].set()

    def follow() -> None:
        assert file is not None
        digest, block = hashlib.sha256(), buffer_of_a_thread()
        for start, event in received.items():
            event.wait()
            digest.update(block[: os.preadv(file, [block], start)])

    at_once(*[work] * threads, *[follow] * bool(received))
    if file is not None:
        if "fsync" in also:
            os.fsync(file)
        os.close(file)


def receive_shards(url: str, size: int, paths: list[str], target: Path) -> None:
    """The files below `url`, a thread at each, into `target`; their bytes are hashed where they came."""

    def work() -> None:
        buffer = buffer_of_a_thread()
        with connected(url) as connection:
            for path in popped(paths):
                file = made(target / path, size)
                sha256 = hashlib.sha256()
                for start in range(0, size, PART):
                    stop = min(start + PART, size)
                    hashes = xxhash.xxh3_128(), sha256
                    for _ in receive_part(connection, f"{url}/{path}", start, stop, buffer, file, hashes):
                        pass
                os.close(file)

    at_once(*[work] * THREADS)


def made(path: Path, size: int) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(file, 0, size)
    return file


def buffer_of_a_thread() -> memoryview:
    return memoryview(mmap.mmap(-1, MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def popped(waiting: list[T]) -> Iterator[T]:
    """Each once, whichever of several threads asks."""
    while waiting:
        try:
            one = waiting.pop()
        except IndexError:
            return
        yield one


def receive_part(
    connection: socket.socket,
    url: str,
    start: int,
    stop: int,
    buffer: memoryview,
    file: int | None,
    hashes: Iterable[Hash],
) -> Iterator[int]:
    """Ask for a part and yield where each piece of it is, once it has landed."""
    asked = f"GET {urlsplit(url).path} HTTP/1.1\r\nHost: limit\r\nRange: bytes={start}-{stop - 1}\r\n\r\n"
    connection.sendall(asked.encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += connection.recv(1)
    if not head.startswith(b"HTTP/1.1 206"):
        raise SystemExit(f"no part: {head!r}")
    while start < stop:
        wanted = min(MIB, stop - start)
        filled = 0
        while filled < wanted:
            got = connection.recv_into(buffer[filled:wanted])
            if not got:
                raise SystemExit("the origin hung up")
            filled += got
        for digest in hashes:
            digest.update(buffer[:wanted])
        if file is not None:
            os.pwrite(file, buffer[:wanted], start)
        yield start
        start += wanted


def receive_small(
    url: str,
    digests: Mapping[str, str],
    threads: int,
    target: Path,
    asking: Callable[[str], AbstractContextManager[Ask]],
) -> None:
    """What a daemon owes every file below `url`, none larger than a buffer, and no more: GET, sha256, write,
    sync, rename, and a name in each of two views.
    """
    waiting = list(digests.items())

    def work() -> None:
        with asking(url) as ask:
            for path, sha256 in popped(waiting):
                content = ask(path)
                if hashlib.sha256(content).hexdigest() != sha256:
                    raise SystemExit(f"{path} has other bytes")
                staged = f"{target}/.{sha256}"
                file = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                os.write(file, content)
                os.fchmod(file, 0o444)
                os.fsync(file)
                os.close(file)
                os.rename(staged, f"{target}/{sha256}")
                for view in ("plain", "hub"):
                    os.link(f"{target}/{sha256}", f"{target}/{view}-{sha256}")

    at_once(*[work] * threads)


@contextmanager
def asking_bare(url: str) -> Iterator[Ask]:
    """On a raw socket, with no more of HTTP than it takes."""
    buffer, base = memoryview(bytearray(MIB)), urlsplit(url).path
    with connected(url) as connection:
        yield lambda path: receive_whole(connection, f"{base}/{path}", buffer)


@contextmanager
def asking_by_library(url: str) -> Iterator[Ask]:
    """By the standard library, and for the size first, which a list of digests does not tell."""
    where = urlsplit(url)
    with closing(HTTPConnection(where.netloc)) as connection:

        def ask(path: str) -> bytes:
            for method in ("HEAD", "GET"):
                connection.request(method, f"{where.path}/{path}")
                content = connection.getresponse().read()
            return content

        yield ask


def receive_whole(connection: socket.socket, path: str, buffer: memoryview) -> memoryview:
    connection.sendall(f"GET {path} HTTP/1.1\r\nHost: limit\r\n\r\n".encode())
    got, start, size = 0, 0, 1
    while got < start + size:
        count = connection.recv_into(buffer[got:])
        if not count:
            raise SystemExit("the origin hung up")
        got += count
        if not start and (found := _LENGTH.search(buffer[:got])):
            start, size = found.end(), int(found[1])
    return buffer[start:got]


def connected(url: str) -> socket.socket:
    where = urlsplit(url)
    assert where.hostname
    connection = socket.create_connection((where.hostname, where.port or 80))
    if where.scheme == "https":  # SSL_CERT_FILE names the authority
        return ssl.create_default_context().wrap_socket(connection, server_hostname=where.hostname)
    return connection


def hash_memory(size: int) -> None:
    block = os.urandom(MIB)
    digest = hashlib.sha256()
    for _ in range(size // MIB):
        digest.update(block)


def hash_file(path: Path, size: int) -> None:
    block = buffer_of_a_thread()
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for start in range(0, size, MIB):
            os.preadv(file.fileno(), [block], start)
            digest.update(block)


def write(target: Path, size: int, *, sync: bool) -> None:
    block = buffer_of_a_thread()
    block[:] = os.urandom(MIB)
    with target.open("wb", buffering=0) as file:
        for start in range(0, size, MIB):
            os.pwrite(file.fileno(), block, start)
        if sync:
            os.fsync(file.fileno())


def at_once(*works: Callable[[], None]) -> None:
    """Run each in a thread; any failure ends the process."""

    def watched(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - a limit measured in part is none
            print(f"{error!r}", file=sys.stderr, flush=True)
            os._exit(1)

    running = [threading.Thread(target=watched, args=(work,)) for work in works]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])
