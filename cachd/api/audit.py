"""The audit log: one log line for each attempt to write, including the refused ones."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import structlog
from starlette.datastructures import Headers
from starlette.types import Scope

from cachd.api.access import Call, Caller, peer_of
from cachd.errors import printable
from cachd.metrics import Metrics

log = structlog.get_logger(__name__)

_LINES_A_WINDOW = 30
_WINDOW_SECONDS = 60.0
_LONGEST_MODEL = 120
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class Audit:
    """Writes the audit lines. Used only on the event loop.

    Strangers cannot flood the log: requests without a known token get at most 30 lines a minute. Further ones
    are counted, and one line states their number when the minute is over.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lines = 0
        self._unwritten = 0
        self._window: asyncio.TimerHandle | None = None

    def record(self, scope: Scope, call: Call, status: int) -> None:
        """Log how an attempt to write ended."""
        state: Mapping[str, Any] = scope.get("state", {})
        caller: Caller | None = state.get("caller")
        is_refused = status in (401, 403)
        verdict = "accepted" if status < 400 else "refused" if is_refused else "failed"
        role = caller.grant.role.name if caller else "anonymous"
        self._metrics.writes.labels(role, verdict).inc()
        if caller is None and not self._may_log():
            self._unwritten += 1
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        about = {
            "model": printable(str(state.get("model") or call.model)[:_LONGEST_MODEL]),
            "ref": state.get("ref"),
            "code": state.get("code"),
            "request_id": request_id if _REQUEST_ID.fullmatch(request_id) else None,
        }
        log.info(
            "audit",
            who=caller.grant.name if caller else "anonymous",
            peer=caller.peer if caller else peer_of(scope),
            role=role,
            method=printable(scope["method"][:20]),
            action=call.action,
            verdict=verdict,
            status=status,
            **{key: value for key, value in about.items() if value},
        )

    def close(self) -> None:
        """Log the number of requests that were counted so far."""
        if self._window is not None:
            self._window.cancel()
            self._end_window()

    def _may_log(self) -> bool:
        if self._window is None:
            self._window = asyncio.get_running_loop().call_later(_WINDOW_SECONDS, self._end_window)
        self._lines += 1
        return self._lines <= _LINES_A_WINDOW

    def _end_window(self) -> None:
        if self._unwritten:
            log.info("audit", who="anonymous", verdict="refused", more=self._unwritten)
        self._lines, self._unwritten, self._window = 0, 0, None
