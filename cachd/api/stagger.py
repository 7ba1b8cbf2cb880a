"""Starts a burst of requests a few at a time, so that probes are answered in between."""

from __future__ import annotations

import asyncio
import re

from starlette.types import ASGIApp, Receive, Scope, Send

_AT_ONCE = 16  # each takes a few hundred microseconds
_QUICK = re.compile(r"/livez|/readyz|/v1/models/[^/]+/ready")


class Stagger:
    """Middleware that starts at most 16 requests in one iteration of the event loop. Probes are exempt."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._beginning = app, asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on when it is its turn."""
        if scope["type"] == "http" and (scope["query_string"] or not _QUICK.fullmatch(scope["path"])):
            async with self._beginning:
                await asyncio.sleep(0)
        await self._app(scope, receive, send)
