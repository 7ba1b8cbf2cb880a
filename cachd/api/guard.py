"""Checks every request before any route sees it: its Host, its Origin, its size and its caller's role."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bound_contextvars

from cachd.api.access import READS, Access, Call, Caller
from cachd.api.audit import Audit
from cachd.api.connection import MAX_BODY_BYTES, body_too_long
from cachd.api.problems import problem
from cachd.errors import CachdError, Forbidden, Invalid
from cachd.metrics import Metrics
from cachd.policy.hosts import OwnNames

_DEFAULT_PORTS = {"http": 80, "https": 443}
_KNOWN_COUNTERS = 256  # one for each route and class of status


class Guard:
    """Middleware that refuses requests and audits every write.

    It refuses foreign Host and Origin headers, which a browser sends when another site's page calls this API
    (DNS rebinding, cross-site requests), calls that the caller's role does not allow, before their body is
    read, and bodies longer than 1 MiB.
    """

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: Collection[str], access: Access, audit: Audit, metrics: Metrics
    ) -> None:
        self._app, self._access, self._audit = app, access, audit
        self._counter = lru_cache(_KNOWN_COUNTERS)(metrics.requests.labels)
        self._names = OwnNames(allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a refused request; pass any other on, with its body already read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500
        call = self._access.call(scope)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = await self._refusal(scope, call)
            if not refusal and _has_body(scope):
                body = await _read(receive)
                refusal = body_too_long() if body is None else None
                receive = _replayed(body or b"", receive)
            if refusal:
                await problem(refusal)(scope, receive, watched)
            else:
                with _named(scope):
                    await self._app(scope, receive, watched)
        finally:
            route = scope.get("route")
            op = getattr(route, "name", "none")
            self._counter(op, f"{status // 100}xx").inc()
            if scope["method"] not in READS:
                self._audit.record(scope, call, status)

    async def _refusal(self, scope: Scope, call: Call) -> CachdError | None:
        """The reason to refuse a request, judged by its head; None to accept it."""
        if refusal := self._foreign(Headers(scope=scope)):
            return refusal
        try:
            await self._access.admit(scope, call)
        except Forbidden as error:
            return error
        return None

    def _foreign(self, headers: Headers) -> CachdError | None:
        """The reason to refuse a request from any caller: a foreign Host or Origin, or its Content-Length."""
        hosts = headers.getlist("host")
        host = hosts[0] if len(hosts) == 1 else ""
        if not self._names.has(host):
            return Forbidden(
                f"the Host header {host!r:.120} is not one of this daemon's names",
                code="foreign_host",
                hint="use the daemon's address in the URL, or add the name to allowed_hosts",
            )
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, host):
            return Forbidden(
                "requests from web pages of other sites are refused",
                code="foreign_origin",
                hint="use the daemon's own page at /, or call the API from a program",
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            return Invalid("the Content-Length header is not a number", code="invalid_request")
        if int(length) > MAX_BODY_BYTES:
            return body_too_long()
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether `origin` is this daemon at the port of `host`, the Host header: by that or another name."""
        try:
            page, asked = urlsplit(origin), urlsplit(f"//{host}")
            default = _DEFAULT_PORTS.get(page.scheme)
            ports = page.port or default, asked.port or default
        except ValueError:
            return False
        is_named = page.hostname == asked.hostname or page.hostname in self._names.allowed
        return bool(page.hostname) and is_named and ports[0] == ports[1] and default is not None


def _named(scope: Scope) -> AbstractContextManager[object]:
    """In the block, log lines have the name of the caller's token as `who`, if the call needs one."""
    caller: Caller | None = scope.get("state", {}).get("caller")
    return bound_contextvars(who=caller.grant.name) if caller else nullcontext()


def _has_body(scope: Scope) -> bool:
    """Whether a request may have a body: only with one of two headers (RFC 9112, section 6.3)."""
    return any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])


async def _read(receive: Receive) -> bytes | None:
    """The complete body; None when it is longer than 1 MiB, whatever Content-Length said."""
    body: bytes = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > MAX_BODY_BYTES:
            return None
        if not message.get("more_body", False):
            return body


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that first returns the body that was already read, then whatever follows."""
    is_body_sent = False

    async def replayed() -> Message:
        nonlocal is_body_sent
        if is_body_sent:
            return await receive()
        is_body_sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
