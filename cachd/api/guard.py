"""What a request must pass before any route sees it: its Host, its Origin, its size and its token."""

from __future__ import annotations

import hmac
from collections.abc import Collection
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import aiofiles
from fastapi import Header, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cachd.api.connection import MOST_BODY_BYTES
from cachd.api.problems import problem
from cachd.errors import CachdError, Forbidden, Invalid, TooBig, Unauthorized
from cachd.metrics import Metrics

_READS = ("GET", "HEAD", "OPTIONS")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Guard:
    """Refuses foreign hosts and origins (a browser led here by another site), writes without the token
    before their body is read, and bodies past 1 MiB."""

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: Collection[str], token: WriteToken, metrics: Metrics
    ) -> None:
        self._app, self._token, self._metrics = app, token, metrics
        self._allowed = {host.lower() for host in allowed_hosts} | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = await self._refusal(scope)
            body = b"" if refusal else await _read(receive)
            if refusal or body is None:
                await problem(refusal or _too_long())(scope, receive, watched)
            else:
                await self._app(scope, _replayed(body, receive), watched)
        finally:
            route = scope.get("route")
            op = getattr(route, "name", "none")
            self._metrics.requests.labels(op, f"{status // 100}xx").inc()

    async def _refusal(self, scope: Scope) -> CachdError | None:
        """Why a request is refused by its head alone."""
        headers = Headers(scope=scope)
        if refusal := self._foreign(headers):
            return refusal
        if scope["method"] not in _READS:
            try:
                await self._token.check(headers.get("authorization", ""))
            except Unauthorized as error:
                return error
        return None

    def _foreign(self, headers: Headers) -> CachdError | None:
        """Why a request is refused whoever sends it."""
        host = headers.get("host", "")
        if not self._is_name(host) and not _is_address(host):
            return Forbidden(
                f"Host {host!r:.120} is not one of this daemon's names",
                code="foreign_host",
                mend="ask by address, or add the name to allowed_hosts",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            return Forbidden("requests from other sites' pages are refused", code="foreign_origin")
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return Invalid("Content-Length is no number", code="invalid_request")
        if int(length) > MOST_BODY_BYTES:
            return _too_long()
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page from `origin` is one of this daemon, asked as `host`: its names at its port."""
        try:
            page, asked = urlsplit(origin), urlsplit(f"//{host}")
            default = _DEFAULT_PORTS.get(page.scheme)
            ports = page.port or default, asked.port or default
        except ValueError:
            return False
        is_named = page.hostname == asked.hostname or page.hostname in self._allowed
        return bool(page.hostname) and is_named and ports[0] == ports[1] and default is not None

    def _is_name(self, place: str) -> bool:
        """Whether the host of a Host or Origin header is one of this daemon's names."""
        return _host(place) in self._allowed


def _host(place: str) -> str:
    try:
        return urlsplit(place if "://" in place else f"//{place}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    """A page that rebinds a name still sends the name: an address is no attack."""
    with suppress(ValueError):
        ip_address(_host(host))
        return True
    return False


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None when it is too long, whatever its headers said."""
    body: bytes = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MOST_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """What was read, given to the application as it expects it; then what comes after."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def _too_long() -> TooBig:
    return TooBig(f"the body is longer than {MOST_BODY_BYTES} bytes", code="body_too_long")


class WriteToken:
    """The bearer token that writes need, as its file holds it now."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    async def check(self, authorization: str) -> None:
        """Raises Unauthorized unless the Authorization header carries the token."""
        if self._file is None:
            return
        try:
            async with aiofiles.open(self._file, "rb") as opened:
                expected = (await opened.read()).strip()
        except OSError as error:
            raise Unauthorized(
                "the daemon's token_file cannot be read, so no token can be right",
                code="token_unreadable",
                mend="write the file, readable for the daemon",
            ) from error
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode("latin-1", "replace"), expected)
        if not expected or scheme.lower() != "bearer" or not right:
            raise Unauthorized(
                "writes need the daemon's bearer token",
                code="unauthorized",
                mend="send Authorization: Bearer with the content of its token_file"
                " (cachd: --token-file or CACHD_TOKEN_FILE)",
            )


async def write_allowed(request: Request, authorization: Annotated[str, Header()] = "") -> None:
    """The FastAPI dependency of every route that writes."""
    token: WriteToken = request.app.state.write_token
    await token.check(authorization)
