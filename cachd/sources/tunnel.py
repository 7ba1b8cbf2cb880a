"""Opens tunnels through a proxy by CONNECT (RFC 9110, 9.3.6), over TLS if the proxy's URL is https.

Plain http origins are asked through a tunnel, too, so no request for an origin is sent to the proxy itself.

    cachd --TCP or TLS--> proxy:  CONNECT host:port, Proxy-Authorization
    cachd <-------------- proxy:  200, and from here on every byte is the origin's
"""

from __future__ import annotations

import base64
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.client import HTTPException

from cachd import __version__
from cachd.errors import CachdError, Forbidden, Invalid, Unavailable
from cachd.policy.proxy import Proxy
from cachd.sources.cancel import CancelToken
from cachd.sources.dial import dial
from cachd.sources.failures import retry_after
from cachd.sources.http1 import ReceiveBuffer, head_of_request, receive_head
from cachd.sources.names import Names
from cachd.sources.secrets import Secret
from cachd.sources.timeouts import Timeouts
from cachd.sources.wire import Wire

_TEMPORARY = (408, 425, 429)


class Tunnels:
    """Opens tunnels. `credentials` are read again for each one and override those in the proxy's URL."""

    def __init__(
        self,
        credentials: Secret,
        tls: Callable[[], ssl.SSLContext],
        names: Names,
        timeouts: Timeouts,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._credentials, self._tls, self._names = credentials, tls, names
        self._connect_seconds, self._stall_seconds = timeouts.connect_seconds, timeouts.stall_seconds

    def open(self, proxy: Proxy, host: str, port: int, cancel_token: CancelToken) -> Wire:
        """A wire to the origin through `proxy`, open within `connect_seconds` in all.

        Raises Unavailable for a failure that may pass, Forbidden for one that will not, Invalid for malformed
        credentials, or Cancelled. No error repeats the proxy's answer, as it may echo the credentials. Only
        the daemon's log shows the proxy's address.
        """
        origin = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        by = self._clock() + self._connect_seconds
        headers = self._headers(proxy)
        asked = head_of_request("CONNECT", origin, origin, headers)
        wire = self._connect(proxy, origin, by, cancel_token)
        refusal: CachdError | None
        try:
            with cancel_token.reaches(wire):
                wire.sendall(asked)
                refusal = _refusal(origin, ReceiveBuffer(wire), headers)
            wire.answered()
        except CachdError:
            wire.close()
            raise
        except OSError as error:
            refusal = _failure(origin, error, self._connect_seconds)
        except HTTPException:
            refusal = _no_proxy(origin)
        if refusal:  # raised out here, without its cause, whose text may repeat the proxy's answer
            wire.close()
            raise refusal.withhold(proxy=str(proxy))
        return wire

    def _connect(self, proxy: Proxy, origin: str, by: float, cancel_token: CancelToken) -> Wire:
        """A wire to the proxy itself. Raises CachdError."""
        context = self._tls() if proxy.scheme == "https" else None
        try:
            places = self._names.addresses(proxy.host, proxy.port, cancel_token)
            connected = dial(places, by - self._clock(), cancel_token, self._clock)
        except (Unavailable, Invalid) as error:
            raise _unreachable(origin, "its name cannot be resolved").withhold(proxy=str(proxy)) from error
        except OSError as error:
            raise _failure(origin, error, self._connect_seconds).withhold(proxy=str(proxy)) from error
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(connected, self._stall_seconds, self._clock)
        wire.answer_by = by
        try:
            if context is not None:
                wire = wire.secured(context, proxy.host)
                with cancel_token.reaches(wire):
                    wire.handshake()
        except CachdError:
            wire.close()
            raise
        except OSError as error:
            wire.close()
            raise _failure(origin, error, self._connect_seconds).withhold(proxy=str(proxy)) from error
        return wire

    def _headers(self, proxy: Proxy) -> dict[str, str]:
        """The headers of CONNECT, with Basic credentials (RFC 7617). Raises Invalid for malformed ones."""
        headers = {"User-Agent": f"cachd/{__version__}"}
        credentials = self._credentials.user_and_password() or proxy.credentials
        if credentials:
            pair = credentials if ":" in credentials else f"{credentials}:"
            headers["Proxy-Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        return headers


def _refusal(origin: str, received: ReceiveBuffer, sent: Mapping[str, str]) -> CachdError | None:
    """The error that the response to CONNECT means; None for an open tunnel. `sent`: the request's headers.

    Raises OSError or HTTPException.
    """
    head = receive_head(received)
    status = head.status
    if 200 <= status < 300:
        return None if received.is_empty else _no_proxy(origin)
    phrase = next((f" ({known.phrase})" for known in HTTPStatus if known == status), "")
    said = f"the proxy answered {status}{phrase} when asked for {origin}"
    if status == 407:
        offered = (head.headers.get("Proxy-Authenticate") or "basic").lower()
        what = "check" if "Proxy-Authorization" in sent else "it wants credentials, and none are set: set"
        return Forbidden(
            said,
            code="proxy_auth",
            hint=f"{what} proxy_credentials_file (user:password on one line)"
            if "basic" in offered
            else "the proxy does not accept Basic authentication, and cachd supports no other",
            proxy_status=status,
        )
    if status in _TEMPORARY or status >= 500:
        return Unavailable(
            said,
            code="proxy_failed",
            hint="add the host to no_proxy if this node reaches it without the proxy",
            retry_after=retry_after(head.headers),
            proxy_status=status,
        )
    return Forbidden(
        said,
        code="proxy_refused",
        hint="make the proxy allow CONNECT to it (many allow port 443 alone),"
        " or add the host to no_proxy if this node reaches it without the proxy",
        proxy_status=status,
    )


def _failure(origin: str, error: Exception, patience: float) -> CachdError:
    """The error for a broken exchange with the proxy; `patience` is the timeout in seconds."""
    shown = f"the proxy, asked for {origin}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return Forbidden(
            f"{shown}, has a certificate that is not trusted (error {error.verify_code})",
            code="proxy_untrusted",
            hint="set ca_file if the proxy has its own certificate authority; check the node's clock",
        )
    if isinstance(error, ssl.SSLError) or not isinstance(error, OSError):
        return _no_proxy(origin)
    if isinstance(error, TimeoutError):
        return _unreachable(origin, f"no answer within {patience:g} s")
    return _unreachable(origin, error.strerror or "it closed the connection")


def _unreachable(origin: str, why: str) -> Unavailable:
    return Unavailable(
        f"the proxy, asked for {origin}: {why}",
        code="proxy_unreachable",
        hint="check the option proxy",
    )


def _no_proxy(origin: str) -> Unavailable:
    return Unavailable(
        f"the proxy does not answer as a proxy when asked for {origin}",
        code="proxy_protocol",
        hint="check that it is an HTTP proxy, and that its scheme (http or https) is right",
    )
