"""Starts a burst of requests a few at a time, so that probes are answered in between."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from cachd.api.access import PROBES

_AT_ONCE = 16  # each takes a few hundred microseconds


class Stagger:
    """Middleware that starts at most 16 requests in one iteration of the event loop. Probes are exempt."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._beginning = app, asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on when it is its turn."""
        if scope["type"] == "http" and (scope["query_string"] or not PROBES.fullmatch(scope["path"])):
            async with self._beginning:
                await asyncio.sleep(0)
        await self._app(scope, receive, send)
