"""Notifies the service manager that started this process, such as systemd, of its state (man 3 sd_notify).

    starting -- ready --> running -- stopping --> stopping
                          |    ^
                reloading |    | reloaded
                          v    |
                        reloading

Each notice is a datagram to the socket that the environment names. Without that name all methods do nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import structlog

log = structlog.get_logger(__name__)

_READY_SECONDS = 1.0  # to wait while the service manager is busy


class Notices:
    """What this process reports to whoever started it, if anybody waits for it. Safe in a signal handler.

    A notice that cannot be sent does not stop the daemon. Only `ready` logs it: a signal handler may not log.
    """

    def __init__(self, environment: Mapping[str, str], clock: Callable[[], float] = time.monotonic) -> None:
        self._address, self._clock = _address(environment.get("NOTIFY_SOCKET", "")), clock
        self.watchdog_seconds = _watchdog_seconds(environment)
        self._is_reloading = False

    def ready(self) -> None:
        """The API answers. Not for a signal handler."""
        try:
            self._send("READY=1", _READY_SECONDS)
        except OSError as error:
            log.warning("service manager not notified", address=self._address, reason=str(error))

    def waiting(self, reason: str, *, for_seconds: float) -> None:
        """The process is not ready yet, and will not be for a while: it may take `for_seconds` longer."""
        self._notify(f"STATUS={reason}\nEXTEND_TIMEOUT_USEC={int(for_seconds * 1e6)}")

    def reloading(self) -> None:
        """The configuration is being loaded again."""
        self._is_reloading = True
        self._notify(f"RELOADING=1\nMONOTONIC_USEC={int(self._clock() * 1e6)}")

    def reloaded(self) -> None:
        """The configuration was loaded. Does nothing unless `reloading` was called before."""
        if self._is_reloading:
            self._is_reloading = False
            self._notify("READY=1")

    def stopping(self) -> None:
        """The process ends soon."""
        self._notify("STOPPING=1")

    def alive(self) -> None:
        """The process works. Due once in `watchdog_seconds`, or the service manager ends it."""
        self._notify("WATCHDOG=1")

    def _notify(self, notice: str) -> None:
        with suppress(OSError):
            self._send(notice, 0)

    def _send(self, notice: str, wait_seconds: float) -> None:
        if self._address is None:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(wait_seconds)
            sock.sendto(notice.encode(), self._address)


def _address(named: str) -> str | None:
    """The address of a socket: a path, or a name in the abstract namespace, which is written with `@`."""
    if named.startswith("@"):
        return f"\0{named[1:]}"
    return named if named.startswith("/") else None


def _watchdog_seconds(environment: Mapping[str, str]) -> float | None:
    """The longest time between two calls of `alive`; None if nobody waits for them (sd_watchdog_enabled)."""
    microseconds, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or not int(microseconds) or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1e6
