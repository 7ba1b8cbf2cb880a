"""The server of the API in this process: its listeners, its notices, and its ways to end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from cachd.api.listeners import Opened, Sockets
from cachd.api.server import serve_until, stoppable
from cachd.api.tls import Certificate, TlsFiles
from cachd.kernel import threads
from cachd.kernel.notices import Notices
from cachd.model.listener import Listener
from tests.ground.origin.certificates import Tls, certify
from tests.ground.site import until
from tests.test_notices_sent import Manager

PATIENCE_SECONDS = 60.0
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


class App:
    """Answers with its path; `/held` waits until the server is interrupted."""

    def __init__(self) -> None:
        self.is_held, self.interrupted_in = threading.Event(), list[threading.Thread]()
        self._interrupted = threading.Event()

    def interrupt(self) -> None:
        self.interrupted_in.append(threading.current_thread())
        self._interrupted.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            for said in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{said}.complete"})
            return
        if scope["path"] == "/held":
            self.is_held.set()
            await asyncio.to_thread(self._interrupted.wait, PATIENCE_SECONDS)
        body = scope["path"].encode()
        head = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": body})


def said(opened: Opened, path: str = "/livez", trusted: Path | None = None) -> str:
    """The body of the answer that a listener gives."""
    kind = opened.sock.family
    with socket.socket(kind) as client:
        client.settimeout(PATIENCE_SECONDS)
        client.connect(opened.sock.getsockname())
        if trusted:
            context = ssl.create_default_context(cafile=trusted)
            client = context.wrap_socket(client, server_hostname="localhost")
        client.sendall(GET % path.encode())
        answer = b""
        while piece := client.recv(65536):
            answer += piece
        client.close()
    return answer.partition(b"\r\n\r\n")[2].decode()


def descriptors(sock: socket.socket) -> int:
    """How many descriptors of this process are this socket."""
    shown = os.readlink(f"/proc/self/fd/{sock.fileno()}")
    return sum(
        os.path.lexists(each) and os.readlink(each) == shown for each in Path("/proc/self/fd").iterdir()
    )


def stop_threads() -> int:
    return sum(thread.name == "stop" for thread in threading.enumerate())


@pytest.fixture
def opening() -> Iterator[Callable[..., list[Opened]]]:
    """Opens listeners, which the end of the test closes."""
    made: list[Sockets] = []

    def opened(*listeners: str) -> list[Opened]:
        made.append(Sockets(map(Listener.parse, listeners)))
        return made[-1].open_all()

    yield opened
    for each in made:
        each.__exit__()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


# --- without signals ---


def test_a_server_answers_at_each_listener_what_it_serves_until_it_is_told_to_end(
    opening: Callable[..., list[Opened]], tmp_path: Path
) -> None:
    opened = opening("127.0.0.1:0", "127.0.0.1:0 probes", f"unix:{tmp_path}/s")
    free = Future[None]()
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(serve_until, free, App(), opened, None)
        assert [said(each, "/v1/models") for each in (opened[0], opened[2])] == ["/v1/models"] * 2
        assert json.loads(said(opened[1], "/v1/models"))["code"] == "not_on_this_listener"
        assert said(opened[1]) == "/livez"
        assert not running.done()
        free.set_result(None)
        running.result(PATIENCE_SECONDS)
    until(lambda: not stop_threads())
    assert [descriptors(each.sock) for each in opened] == [1, 1, 1], "its copies are closed"


def test_the_next_server_answers_who_connected_before_it(opening: Callable[..., list[Opened]]) -> None:
    opened = opening("127.0.0.1:0")
    for _ in range(2):
        free = Future[None]()
        with ThreadPoolExecutor(2) as pool:
            asking = pool.submit(said, opened[0])
            running = pool.submit(serve_until, free, App(), opened, None)
            assert asking.result(PATIENCE_SECONDS) == "/livez"
            free.set_result(None)
            running.result(PATIENCE_SECONDS)


def test_with_a_certificate_only_what_is_marked_plain_is_plain(
    opening: Callable[..., list[Opened]], tmp_path: Path
) -> None:
    pem, free = tmp_path / "tls.pem", Future[None]()
    certify(pem, Tls())
    opened = opening("127.0.0.1:0", "127.0.0.1:0 plain", f"unix:{tmp_path}/s")
    with closing(Certificate(TlsFiles(pem, pem))) as certificate, ThreadPoolExecutor(1) as thread:
        running = thread.submit(serve_until, free, App(), opened, certificate)
        try:
            assert said(opened[0], trusted=pem) == "/livez"
            assert [said(each) for each in opened[1:]] == ["/livez"] * 2
        finally:
            free.set_result(None)
        running.result(PATIENCE_SECONDS)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
async def test_a_server_that_could_not_run_says_so_unless_it_was_to_end(
    opening: Callable[..., list[Opened]],
) -> None:
    """It cannot run here, because this thread has a running event loop."""
    free = Future[None]()
    with pytest.raises(RuntimeError):
        serve_until(free, App(), opening("127.0.0.1:0"), None)
    free.set_result(None)
    serve_until(free, App(), opening("127.0.0.1:0"), None)


# --- with signals ---


@pytest.mark.usefixtures("stops")
def test_a_signal_interrupts_once_lets_answers_finish_and_is_told(
    opening: Callable[..., list[Opened]], manager: Manager
) -> None:
    opened, app = opening("127.0.0.1:0"), App()
    environment = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "20000000"}
    run = stoppable(app, opened, certificate=None, interrupt=app.interrupt, notices=Notices(environment))
    heard: list[str] = []

    def act() -> str:
        with ThreadPoolExecutor(1) as asker:
            asking = asker.submit(said, opened[0], "/held")
            assert app.is_held.wait(PATIENCE_SECONDS)
            until(lambda: heard.extend(manager.heard()) or "WATCHDOG=1" in heard)
            assert not app.interrupted_in
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            return asking.result(PATIENCE_SECONDS)

    with ThreadPoolExecutor(1) as actor:
        acting = actor.submit(act)
        run()
        assert acting.result(PATIENCE_SECONDS) == "/held"
    heard += manager.heard()
    assert heard[0] == "READY=1"
    assert [each for each in heard if each != "WATCHDOG=1"] == ["READY=1", "STOPPING=1"]
    assert 0 < signal.alarm(0) <= threads.STOP_SECONDS, "the kernel would end this process"
    assert len(app.interrupted_in) == 1
    assert app.interrupted_in[0] is not threading.main_thread()


@pytest.mark.usefixtures("stops")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_before_the_server_runs_ends_it_at_once(
    opening: Callable[..., list[Opened]], manager: Manager, number: int
) -> None:
    app = App()
    notices = Notices({"NOTIFY_SOCKET": str(manager.path)})
    run = stoppable(app, opening("127.0.0.1:0"), certificate=None, interrupt=app.interrupt, notices=notices)
    signal.raise_signal(number)
    assert manager.heard() == ["STOPPING=1"]
    run()
    until(lambda: app.interrupted_in)
