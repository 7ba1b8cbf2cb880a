"""Look-ups of host names: the C library's, made aside, since it takes its time and nothing interrupts it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

from cachd.errors import Invalid, Unavailable
from cachd.sources.dial import Address
from cachd.sources.helper_threads import HelperThreads
from cachd.sources.source import CancelToken

MOST_LEFT = 64
LookUp = Callable[[str, int], Sequence[Address]]


def by_the_system(host: str, port: int) -> Sequence[Address]:
    """What the system's resolver knows of a host. Raises OSError or UnicodeError."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class Names:
    """Addresses of hosts. A look-up that is given up is left behind with its thread, so many at most."""

    def __init__(self, seconds: float, look_up: LookUp = by_the_system) -> None:
        self._seconds, self._look_up = seconds, look_up
        self._helpers = HelperThreads(MOST_LEFT)

    def addresses(self, host: str, port: int, cancel_token: CancelToken) -> Sequence[Address]:
        """Raises Unavailable for a name that has no address or no answer in time, Invalid for what is no
        name, Cancelled."""
        if _is_address(host):
            return by_the_system(host, port)  # which then asks nobody
        try:
            with self._helpers.aside(self._seconds) as aside, cancel_token.reaches(aside):
                return aside.call(self._look_up, host, port)
        except UnicodeError as error:
            raise Invalid(f"{host:.80} is no host name", code="bad_ref", hint="check it") from error
        except OSError as error:  # TimeoutError among them
            cancel_token.check()
            raise Unavailable(
                f"{host} cannot be resolved: {error.strerror or error}",
                code="dns_failed",
            ) from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
