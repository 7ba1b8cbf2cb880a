"""Restricts a listener to the calls that it serves. Also answers HEAD like GET, on every listener."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from cachd.api.access import PROBES, READS
from cachd.api.problems import problem
from cachd.errors import Forbidden
from cachd.model.listener import Serves

_ANSWERS: Mapping[Serves, str] = {Serves.reads: "reads", Serves.probes: "/livez, /readyz and …/ready"}


class Narrow:
    """Middleware that refuses the calls that its listener does not serve, before any other check."""

    def __init__(self, app: ASGIApp, serves: Serves) -> None:
        self._app, self._serves = app, serves

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a call that the listener does not serve; pass any other on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif not _is_served(scope, self._serves):
            refusal = Forbidden(
                f"this listener answers only {_ANSWERS[self._serves]}",
                code="not_on_this_listener",
                hint="use a listener that is not marked read-only or probes",
            )
            await problem(refusal)(scope, receive, send)
        elif scope["method"] == "HEAD":  # uvicorn knows the method, and sends no body
            scope.setdefault("state", {})["is_head"] = True
            await self._app({**scope, "method": "GET"}, receive, send)
        else:
            await self._app(scope, receive, send)


def _is_served(scope: Scope, serves: Serves) -> bool:
    if serves is Serves.everything:
        return True
    is_read = scope["method"] in READS
    return is_read and (serves is Serves.reads or PROBES.fullmatch(scope["path"]) is not None)
