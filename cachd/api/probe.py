"""The probe of pods, answered before it is routed, in a quarter of the time.

All pods ask, all the time; while a pull fills the cores, an answer that takes long holds up those behind it.
"""

from __future__ import annotations

import re

from starlette.types import ASGIApp, Receive, Scope, Send

from cachd.api import models as routes
from cachd.api.documents import Models

_PATH = re.compile(r"/v1/models/([^/]+)/ready")
_ROUTE = next(route for route in routes.router.routes if getattr(route, "endpoint", None) is routes.ready)


class Probe:
    """Answers for models that are ready; all else is the route's."""

    def __init__(self, app: ASGIApp, *, models: Models) -> None:
        self._app, self._models = app, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = None
        if scope["type"] == "http" and scope["method"] == "GET" and not scope["query_string"]:
            asked = _PATH.fullmatch(scope["path"])
            answer = routes.ready_now(asked[1], self._models) if asked else None
        if answer:
            scope["route"] = _ROUTE
        await (answer or self._app)(scope, receive, send)
