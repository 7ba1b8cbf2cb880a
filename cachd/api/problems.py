"""Answers errors with problem documents (RFC 9457)."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, Literal

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from cachd import errors
from cachd.findings import Finding, Place, key_of, sentence
from cachd.report.define import report
from cachd.report.outcomes import outcome_of
from cachd.report.readiness import NotReady
from cachd.report.values import LEFT_OUT, ErrorReport, ModelState, as_json

log = structlog.get_logger(__name__)

_MAX_FAULTS = 20
_CALLS = "GET /openapi.json lists all calls; /docs shows them in a browser"
_CHALLENGE = 'Bearer realm="cachd"'  # RFC 6750, section 3


@report
class Problem(ErrorReport):
    """A problem document (RFC 9457): the report of an error, with the HTTP status of the answer.

    Answers of …/ready also have `state`, `final`, `eta_seconds`, and the `error` that the last pull failed
    with. /readyz names the required `models` that are not ready.
    """

    type: Literal["about:blank"]
    title: str
    status: int
    state: Annotated[ModelState | None, LEFT_OUT] = None
    final: Annotated[bool | None, LEFT_OUT] = None
    eta_seconds: Annotated[float | None, LEFT_OUT] = None
    error: Annotated[ErrorReport | None, LEFT_OUT] = None
    models: Annotated[Sequence[str] | None, LEFT_OUT] = None


def problem(error: errors.CachdError, /, *, status: int | None = None, **about: Any) -> JSONResponse:
    """The answer for an error: its problem document, and a Retry-After header when the error has one.

    `status` is by default that of the error's class. `about`: other fields of `Problem`.
    """
    status = status or outcome_of(error).status
    headers = {}
    if isinstance(error, errors.Unavailable) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = _CHALLENGE
    elif error.code in ("role_too_low", "outside_namespaces"):
        headers["WWW-Authenticate"] = f'{_CHALLENGE}, error="insufficient_scope"'
    title = HTTPStatus(status).phrase
    document = Problem(type="about:blank", title=title, status=status, **error.as_document(), **about)
    return _Answer(error.code, document, status, headers)


def problem_of(reason: NotReady) -> JSONResponse:
    """The answer for a model that is not ready."""
    return problem(
        reason.error,
        state=reason.state,
        final=reason.is_final,
        eta_seconds=reason.eta_seconds,
        error=reason.failure,
    )


class _Answer(JSONResponse):
    """An answer that stores its error code in the request's state, for the audit log."""

    def __init__(self, code: str, document: Problem, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(document, status, headers, media_type="application/problem+json")
        self._code = code

    def render(self, content: Problem) -> bytes:
        """The document as JSON."""
        return as_json(content)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("state", {})["code"] = self._code
        await super().__call__(scope, receive, send)


_HINT = "GET /openapi.json describes the parameters of every call; a browser shows them at /docs"
_JSON_HINT = (
    "send JSON with the header Content-Type: application/json (curl: -H 'Content-Type: application/json')"
)


def _wrong(fault: Mapping[str, Any], known: Collection[str]) -> str:
    """One validation error as a sentence that names the field and its fault."""
    return str(Finding(Place(""), key_of(fault["loc"][1:]) or "body", sentence(fault, known)))


def _is_unread_body(fault: Mapping[str, Any]) -> bool:
    """Whether there is a body, and it was not read as JSON."""
    return tuple(fault["loc"]) == ("body",) and fault["type"] != "missing"


def _fields(request: Request) -> Collection[str]:
    """The names of the fields that the body of this call may have."""
    body = getattr(request.scope.get("route"), "body_field", None)
    return getattr(body.field_info.annotation, "model_fields", ()) if body else ()


def _is_json(request: Request) -> bool:
    """Whether the request says that its body is JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def install(app: FastAPI) -> None:
    """Make the app answer every failure with a problem document."""

    @app.exception_handler(errors.CachdError)
    async def known(_request: Request, error: errors.CachdError) -> Response:
        if error.withheld:
            log.info("request refused", code=error.code, detail=error.detail, withheld=dict(error.withheld))
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        known, faults = _fields(request), error.errors()[:_MAX_FAULTS]
        wrong = "; ".join(_wrong(fault, known) for fault in faults)
        if known and not _is_json(request) and any(fault["loc"] == ("body",) for fault in faults):
            wrong = "the body was not read as JSON: send the header Content-Type: application/json"
        invalid = errors.Invalid(
            f"the request is wrong: {wrong}"[:2000],
            code="invalid_request",
            hint="GET /openapi.json describes the parameters of every call; /docs shows them in a browser",
        )
        return problem(invalid, status=422)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        code = {404: "no_such_path", 405: "method_not_allowed"}.get(error.status_code, "refused")
        refusal = errors.Invalid(
            f"{request.method} {request.url.path}: {error.detail}", code=code, hint=_CALLS
        )
        answer = problem(refusal, status=error.status_code)
        answer.headers.update(error.headers or {})  # Allow, which a 405 must have (RFC 9110, section 15.5.6)
        return answer

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        log.error("a request failed in a way it should not", path=request.url.path, exc_info=error)
        return problem(errors.CachdError(type(error).__name__, hint="see the daemon's log"))
