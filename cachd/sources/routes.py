"""Connects to an origin, directly or through a proxy, if the address policy allows all its addresses."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult

from cachd.bounded import Bounded
from cachd.errors import Unavailable
from cachd.policy.address_policy import AddressPolicy
from cachd.policy.proxy import Proxies
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import Address, dial
from cachd.sources.names import Names
from cachd.sources.timeouts import Timeouts
from cachd.sources.tunnel import Tunnels
from cachd.sources.wire import Wire

_UNKNOWN_SECONDS = 60.0  # until an unknown name is resolved again: a lookup that fails may be slow
_MAX_UNKNOWN = 1000


@dataclass(frozen=True, slots=True)
class Dialled:
    """A wire to an origin, and the checked addresses of its host: none if only `proxy` can resolve it."""

    wire: Wire
    addresses: tuple[str, ...]
    proxy: str = ""


class Routes:
    """Connects to origins that the address policy allows, by a proxy where `proxies` says so. Thread-safe."""

    def __init__(
        self,
        address_policy: AddressPolicy,
        proxies: Proxies,
        tunnels: Tunnels,
        names: Names,
        timeouts: Timeouts,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._address_policy = address_policy
        self._proxies, self._tunnels, self._names = proxies, tunnels, names
        self._connect_seconds, self._stall_seconds = timeouts.connect_seconds, timeouts.stall_seconds
        # host that this node cannot resolve -> when to try again
        self._unknown = Bounded[str, float](_MAX_UNKNOWN)

    def dial(self, url: SplitResult, cancel_token: CancelToken) -> Dialled:
        """A new wire to the origin of `url`. The address policy allows every address of its host.

        A proxy is given the host's name and resolves it itself, so for a name that this node cannot resolve
        there are no addresses to check. Raises CachdError, such as Cancelled, or OSError.
        """
        host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        proxy = self._proxies.of(url)
        if proxy is None:
            places = self._resolved(host, port, cancel_token)
            self._address_policy.check_addresses(url, _addresses(places))
            connected = dial(
                places, self._connect_seconds, cancel_token, self._clock
            )  # the checked addresses
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            address = str(connected.getpeername()[0])
            return Dialled(Wire(connected, self._stall_seconds, self._clock), (address,))
        addresses = _addresses(self._resolved_if_known(host, port, cancel_token))
        self._address_policy.check_addresses(url, addresses)
        return Dialled(self._tunnels.open(proxy, host, port, cancel_token), addresses, str(proxy))

    def _resolved(self, host: str, port: int, cancel_token: CancelToken) -> Sequence[Address]:
        """The addresses of a host. Raises as `Names.addresses` does."""
        try:
            return self._names.addresses(host, port, cancel_token)
        except Unavailable as error:
            if unused := self._proxies.unused:
                error.hint = (
                    f"{unused} is set, but cachd uses a proxy only if the option proxy is set"
                    " (`proxy: env` uses the environment's)"
                )
            raise

    def _resolved_if_known(self, host: str, port: int, cancel_token: CancelToken) -> Sequence[Address]:
        """The addresses of a host; an empty list when this node cannot resolve it."""
        if self._unknown.get(host, 0) > self._clock():
            return []
        try:
            return self._resolved(host, port, cancel_token)
        except Unavailable:
            self._unknown[host] = self._clock() + _UNKNOWN_SECONDS
            return []


def _addresses(places: Iterable[Address]) -> tuple[str, ...]:
    return tuple(str(address[0]) for *_, address in places)
