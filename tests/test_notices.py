"""What systemd hears of the daemon: that it answers, lives, reloads and stops (man 3 sd_notify)."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachd.kernel.notices import Notices
from tests.ground.node import Node

PATIENCE_SECONDS = 120.0
Nodes = Callable[..., Node]


class Listener:
    """A service manager that hears notices at `address`."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        self._socket.settimeout(PATIENCE_SECONDS)

    def heard(self) -> dict[str, str]:
        """The next notice, waited for."""
        lines = self._socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def hears(self, wanted: str) -> dict[str, str]:
        """The next notice that is not a sign of life; it must say `wanted`."""
        while (notice := self.heard()) == {"WATCHDOG": "1"}:
            pass
        assert notice.get(wanted) == "1", notice
        return notice

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Listener]:
    address = str(tmp_path / "notify") if request.param == "path" else f"@cachd-{os.getpid()}-{id(request)}"
    listener = Listener(address)
    yield listener
    listener.close()


def test_systemd_hears_when_the_api_answers_when_options_are_loaded_and_when_a_stop_begins(
    node: Nodes, systemd: Listener
) -> None:
    running = node(env={"NOTIFY_SOCKET": systemd.address})
    assert systemd.heard() == {"READY": "1"}
    assert running.ask("GET", "/livez").status == 200
    before = time.monotonic()
    running.configure(**running.options, limit_bytes_per_second=1_000_000)
    os.kill(running.pid, 1)
    notice = systemd.hears("RELOADING")
    assert before * 1e6 <= int(notice["MONOTONIC_USEC"]) <= time.monotonic() * 1e6
    assert systemd.heard() == {"READY": "1"}
    assert running.ask("GET", "/v1/limits").document["bytes_per_second"] == 1_000_000
    assert running.stop() == 0
    assert systemd.heard() == {"STOPPING": "1"}


def test_systemd_is_asked_for_more_time_while_a_daemon_waits_for_its_root(systemd: Listener) -> None:
    Notices({"NOTIFY_SOCKET": systemd.address}).waiting("for pid 7", for_seconds=60)
    assert systemd.heard() == {"STATUS": "for pid 7", "EXTEND_TIMEOUT_USEC": "60000000"}


def test_a_configuration_that_is_refused_ends_the_reload_too(node: Nodes, systemd: Listener) -> None:
    running = node(env={"NOTIFY_SOCKET": systemd.address})
    systemd.hears("READY")
    running.configure(**{**running.options, "pulls": "many"})
    os.kill(running.pid, 1)
    systemd.hears("RELOADING")
    systemd.hears("READY")
    assert running.ask("GET", "/v1/options").document["file"]["error"]


def test_the_daemon_gives_signs_of_life_only_where_they_are_waited_for(node: Nodes, tmp_path: Path) -> None:
    watched, unwatched = Listener(str(tmp_path / "first")), Listener(str(tmp_path / "second"))
    with_watchdog = {"NOTIFY_SOCKET": watched.address, "WATCHDOG_USEC": "100000"}
    of_another = {"NOTIFY_SOCKET": unwatched.address, "WATCHDOG_USEC": "100000", "WATCHDOG_PID": "1"}
    node("one", env=with_watchdog)
    other = node("two", env=of_another)
    unwatched.hears("READY")
    other.stop()
    assert watched.heard() == {"READY": "1"}
    assert [watched.heard() for _ in range(3)] == [{"WATCHDOG": "1"}] * 3
    assert unwatched.heard() == {"STOPPING": "1"}
    watched.close()
    unwatched.close()


def test_the_daemon_serves_where_nobody_hears_it(node: Nodes, tmp_path: Path) -> None:
    running = node(env={"NOTIFY_SOCKET": str(tmp_path / "absent"), "WATCHDOG_USEC": "50000"})
    running.wait_for("service manager not notified")
    assert running.ask("GET", "/livez").status == 200
    assert running.stop() == 0


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_an_address_that_is_no_socket_of_this_machine_gets_nothing(address: str) -> None:
    manager = Notices({"NOTIFY_SOCKET": address})
    manager.ready()
    manager.stopping()


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "120000000"}, 120.0),
        ({"WATCHDOG_USEC": "120000000", "WATCHDOG_PID": str(os.getpid())}, 120.0),
        ({"WATCHDOG_USEC": "120000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_signs_of_life_are_due_as_often_as_the_environment_says(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert Notices(environment).watchdog_seconds == seconds


def test_no_notice_is_a_reload_that_did_not_begin(tmp_path: Path) -> None:
    listener = Listener(str(tmp_path / "notify"))
    manager = Notices({"NOTIFY_SOCKET": listener.address}, clock=lambda: 12.5)
    manager.reloaded()
    manager.reloading()
    manager.reloaded()
    manager.reloaded()
    manager.stopping()
    said = [listener.heard() for _ in range(3)]
    listener.close()
    assert said == [{"RELOADING": "1", "MONOTONIC_USEC": "12500000"}, {"READY": "1"}, {"STOPPING": "1"}]
    assert re.fullmatch(r"\d+", said[0]["MONOTONIC_USEC"])
