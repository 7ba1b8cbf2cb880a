"""Each notice to a service manager, word for word, without a daemon; what cannot be sent disturbs nobody."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.kernel.notices import Notices


class Manager:
    """A service manager. A notice is here as soon as it was sent."""

    def __init__(self, path: Path) -> None:
        self.path, self.socket = path, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))

    def heard(self) -> list[str]:
        """All notices since the last question."""
        notices: list[str] = []
        while True:
            try:
                notices.append(self.socket.recv(4096, socket.MSG_DONTWAIT).decode())
            except BlockingIOError:
                return notices


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.socket.close()


def notices(manager: Manager, **environment: str) -> Notices:
    return Notices({"NOTIFY_SOCKET": str(manager.path), **environment}, clock=lambda: 2.5)


def test_each_notice_has_its_words(manager: Manager) -> None:
    sent = notices(manager)
    for send, said in (
        (sent.ready, "READY=1"),
        (sent.reloading, "RELOADING=1\nMONOTONIC_USEC=2500000"),
        (sent.reloaded, "READY=1"),
        (sent.alive, "WATCHDOG=1"),
        (sent.stopping, "STOPPING=1"),
    ):
        send()
        assert manager.heard() == [said]
    sent.waiting("for pid 7", for_seconds=1.5)
    assert manager.heard() == ["STATUS=for pid 7\nEXTEND_TIMEOUT_USEC=1500000"]


def test_the_end_of_a_reload_is_told_once_and_only_after_its_beginning(manager: Manager) -> None:
    sent = notices(manager)
    sent.reloaded()
    assert manager.heard() == []
    sent.reloading()
    sent.reloaded()
    sent.reloaded()
    assert manager.heard() == ["RELOADING=1\nMONOTONIC_USEC=2500000", "READY=1"]


def test_a_name_in_the_abstract_namespace_is_written_with_an_at_sign(tmp_path: Path) -> None:
    name = f"cachd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(f"\0{name}")
        Notices({"NOTIFY_SOCKET": f"@{name}"}).alive()
        assert other.recv(100, socket.MSG_DONTWAIT) == b"WATCHDOG=1"


@pytest.mark.parametrize("named", ["", "notify", "vsock:2:1234"])
def test_without_the_address_of_a_socket_nothing_is_sent(named: str) -> None:
    sent = Notices({"NOTIFY_SOCKET": named})
    with capture_logs() as logs:
        sent.ready()
        sent.alive()
    assert logs == []
    assert Notices({}).watchdog_seconds is None


def test_what_cannot_be_sent_is_logged_once_the_api_answers_and_never_raised(tmp_path: Path) -> None:
    sent = Notices({"NOTIFY_SOCKET": str(tmp_path / "absent")})
    with capture_logs() as logs:
        sent.alive()
        sent.stopping()
        sent.reloading()
        assert logs == []
        sent.ready()
    assert [(each["event"], each["address"]) for each in logs] == [
        ("service manager not notified", str(tmp_path / "absent"))
    ]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": str(os.getpid())}, 2.5),
        ({"WATCHDOG_USEC": "2500000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "1"}, 1e-6),
    ],
)
def test_signs_of_life_are_wanted_as_often_as_the_environment_says(
    environment: dict[str, str], seconds: float | None
) -> None:
    assert Notices(environment).watchdog_seconds == seconds
