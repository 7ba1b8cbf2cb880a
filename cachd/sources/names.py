"""Looks up host names in detached threads, as getaddrinfo(3) may take long and cannot be interrupted."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

from cachd.errors import Invalid, Unavailable
from cachd.sources.cancel import CancelToken
from cachd.sources.detached import DetachedThreads
from cachd.sources.dial import Address

MAX_LEFT = 64
Resolver = Callable[[str, int], Sequence[Address]]


def by_the_system(host: str, port: int) -> Sequence[Address]:
    """The addresses of a host from the system's resolver. Raises OSError or UnicodeError."""
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


class Names:
    """Looks up addresses of hosts.

    A lookup that takes longer than `seconds` is abandoned. While MAX_LEFT abandoned ones still run, every
    further lookup fails at once.
    """

    def __init__(self, seconds: float, resolver: Resolver = by_the_system) -> None:
        self._seconds, self._resolver = seconds, resolver
        self._detached = DetachedThreads(MAX_LEFT)

    def addresses(self, host: str, port: int, cancel_token: CancelToken) -> Sequence[Address]:
        """The addresses of a host.

        Raises Unavailable when it has none or the resolver is too slow, Invalid for a malformed name, or
        Cancelled.
        """
        if _is_address(host):
            return by_the_system(host, port)  # it asks no name server for an address
        try:
            with self._detached.one(self._seconds) as thread, cancel_token.reaches(thread):
                return thread.call(self._resolver, host, port)
        except UnicodeError as error:
            raise Invalid(f"{host:.80} is not a host name", code="bad_ref", hint="check the host") from error
        except OSError as error:  # such as TimeoutError
            cancel_token.check()
            raise Unavailable(
                f"{host} cannot be resolved: {error.strerror or error}",
                code="dns_failed",
                hint="check the host's name and this node's name servers (cachd doctor)",
            ) from error


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
