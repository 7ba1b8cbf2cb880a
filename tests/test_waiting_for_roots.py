"""The wait of a daemon for its root, in this process: what it answers, who ends it, and what it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.api.listeners import Sockets
from cachd.config import load
from cachd.daemon.waiting import _LOGGED_AGAIN, StoppedWaiting, Waiting, _end, _Notes, _stoppable
from cachd.errors import CachdError, Forbidden, InUse, Invalid
from tests.ground.site import until
from tests.test_notices_sent import Manager

PATIENCE_SECONDS = 60.0
REFUSAL = InUse("another cachd (pid 7 on host) uses it", code="root_locked", hint="stop that process")
HANDLED = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    """The service manager that the environment names."""
    made = Manager(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", str(made.path))
    yield made
    made.socket.close()


@pytest.fixture
def lock(root: Path) -> Path:
    path = root / ".cachd/lock"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@contextmanager
def held(lock: Path) -> Iterator[Callable[[], None]]:
    """Another holder of the lock; what is yielded releases it."""
    fd = os.open(lock, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        yield lambda: fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def status(port: int, path: str, method: str = "GET") -> tuple[int, object]:
    """The status and the document of an answer. Connections wait until somebody answers."""
    asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE_SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, json.load(refused)


def answered(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def waiting_threads() -> set[str]:
    return {each.name for each in threading.enumerate()} & {"waiting", "root lock", "stop"}


@pytest.mark.usefixtures("stops")
def test_it_lives_unready_until_the_lock_is_free_and_keeps_its_sockets(
    root: Path, lock: Path, manager: Manager
) -> None:
    port = free_port()
    config = load(root=root, listen=f"127.0.0.1:{port}")
    sockets, before = Sockets(config.listeners), [signal.getsignal(number) for number in HANDLED]
    waiting = Waiting(config, sockets)

    def act(release: Callable[[], None]) -> list[tuple[int, object]]:
        until(lambda: answered(port))
        heard = [status(port, "/livez"), status(port, "/readyz"), status(port, "/livez", "POST")]
        release()
        return heard

    with capture_logs() as logs, held(lock) as release, ThreadPoolExecutor(1) as actor:
        acting = actor.submit(act, release)
        waiting.until_free(REFUSAL, lock)
        alive, *refused = acting.result(PATIENCE_SECONDS)
    assert alive == (200, {"status": "alive"})
    assert [each[0] for each in refused] == [503, 503]
    assert all(isinstance(said, dict) and said["code"] == "root_locked" for _, said in refused)
    assert [each["event"] for each in logs] == [
        "waiting for another daemon to end",
        "answering probes",
        "the root is free",
    ]
    assert (logs[0]["code"], logs[0]["reason"], logs[1]["port"]) == ("root_locked", REFUSAL.detail, port)
    assert manager.heard()[0] == f"STATUS={REFUSAL.detail}\nEXTEND_TIMEOUT_USEC=60000000"
    assert [signal.getsignal(number) for number in HANDLED] == before
    until(lambda: not waiting_threads())
    with waiting.listening() as opened:
        assert [each.sock.getsockname()[1] for each in opened] == [port]
        assert answered(port)
    assert not answered(port)


@pytest.mark.usefixtures("stops", "manager")
@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_ends_the_wait(root: Path, lock: Path, number: int) -> None:
    config = load(root=root, listen="127.0.0.1:0")

    def act() -> None:
        until(lambda: "waiting" in waiting_threads())
        os.kill(os.getpid(), number)

    with held(lock), Sockets(config.listeners) as sockets, ThreadPoolExecutor(1) as actor:
        acting = actor.submit(act)
        with pytest.raises(StoppedWaiting):
            Waiting(config, sockets).until_free(REFUSAL, lock)
        acting.result(PATIENCE_SECONDS)


@pytest.mark.usefixtures("stops", "manager")
def test_a_lock_that_cannot_be_opened_ends_the_wait_with_its_error(root: Path, tmp_path: Path) -> None:
    config = load(root=root, listen="127.0.0.1:0")
    with Sockets(config.listeners) as sockets, pytest.raises(CachdError, match="absent"):
        Waiting(config, sockets).until_free(REFUSAL, tmp_path / "absent")


@pytest.mark.usefixtures("stops", "manager")
def test_a_daemon_that_cannot_listen_or_has_no_certificate_does_not_wait(
    root: Path, lock: Path, tmp_path: Path
) -> None:
    for wrong in (
        {"listen": f"unix:{tmp_path}/absent/s"},
        {"listen": "127.0.0.1:0", "tls_cert_file": tmp_path / "absent"},
    ):
        config = load(root=root, **wrong)
        with Sockets(config.listeners) as sockets, held(lock), pytest.raises(Invalid):
            Waiting(config, sockets).until_free(REFUSAL, lock)


@pytest.mark.usefixtures("stops", "manager")
def test_only_after_a_wait_an_address_that_is_taken_is_tried_again(root: Path, lock: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = load(root=root, listen=f"127.0.0.1:{port}")
        first, second = Sockets(config.listeners), Sockets(config.listeners)
        with pytest.raises(InUse), Waiting(config, first).listening():
            pass
        waiting, tried = Waiting(config, second), Future[None]()
        waiting.until_free(REFUSAL, lock)
        with ThreadPoolExecutor(1) as other:

            def listen() -> int:
                tried.set_result(None)
                with waiting.listening() as opened:
                    return int(opened[0].sock.getsockname()[1])

            listening = other.submit(listen)
            tried.result(PATIENCE_SECONDS)
            taken.close()
            assert listening.result(PATIENCE_SECONDS) == port


# --- its parts ---


def test_the_log_says_it_again_every_so_often(manager: Manager) -> None:
    notes, heard = _Notes(REFUSAL), 0
    with capture_logs() as logs:
        for ticks, lines in ((_LOGGED_AGAIN - 1, 0), (1, 1), (_LOGGED_AGAIN - 1, 1), (1, 2)):
            for _ in range(ticks):
                assert notes.tick() == 30.0
                heard += len(manager.heard())
            assert len(logs) == lines
    assert heard == 2 * _LOGGED_AGAIN


@pytest.mark.usefixtures("stops")
def test_only_the_first_end_of_a_wait_counts() -> None:
    for first, second in ((None, Forbidden("late")), (Forbidden("early"), None)):
        free = Future[None]()
        _end(free, first)
        _end(free, second)
        assert free.exception() is first
    with pytest.raises(Forbidden), _stoppable(free):
        pass
