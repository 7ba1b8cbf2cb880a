"""Answers for a daemon that waits for its root: it lives, and is not ready."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from cachd.api.answers import Alive, answer
from cachd.api.problems import problem
from cachd.errors import CachdError, Unavailable
from cachd.report.readiness import RETRY_SECONDS


def standby(reason: CachdError) -> ASGIApp:
    """An application that answers /livez with 200, and every other call with 503 and `reason`."""
    refusal = Unavailable(reason.detail, code=reason.code, hint=reason.hint, retry_after=RETRY_SECONDS)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            is_probe = scope["path"] == "/livez" and scope["method"] == "GET"
            await (answer(Alive()) if is_probe else problem(refusal))(scope, receive, send)

    return app
