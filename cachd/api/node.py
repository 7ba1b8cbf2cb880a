"""The routes that concern the whole node: limits, options, sources, probes, metrics and documentation."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, PlainTextResponse

from cachd.api.answers import as_json, json_answer
from cachd.api.dependencies import AnyLanes, AnyModels
from cachd.api.documents import AskedLimits, limits_document
from cachd.api.problems import problem
from cachd.errors import DiskFailed, Unavailable
from cachd.metrics import CONTENT_TYPE

router = APIRouter(tags=["node"])

_RETRY_SECONDS = 5.0
_DISK_SECONDS = 3.0


@router.get("/v1/limits")
async def limits(request: Request) -> dict[str, Any]:
    """Show the download limits in bytes per second: of all sources together, and of each kind of source."""
    return limits_document(request.app.state.bandwidth.limits)


@router.put("/v1/limits")
async def set_limits(request: Request, asked: AskedLimits) -> dict[str, Any]:
    """Replace all download limits. Running pulls follow the new limits at once.

    A limit that is null or left out is lifted. The new limits hold until the daemon restarts or the limits in
    its configuration file change.
    """
    await asyncio.to_thread(request.app.state.bandwidth.change, asked.limits())
    return limits_document(request.app.state.bandwidth.limits)


@router.get("/v1/options")
async def options(request: Request, lanes: AnyLanes) -> Response:
    """Show every option in force and where its value came from.

    The answer also states whether the configuration file on disk is in force.
    """
    document = request.app.state.options
    return json_answer(await lanes.reads.shared("options", lambda: as_json(document())))


@router.get("/v1/sources")
async def sources(
    request: Request,
    ref: Annotated[
        str | None,
        Query(max_length=2048, description="a ref as in POST /v1/models; default: show every entry"),
    ] = None,
) -> dict[str, Any]:
    """Show the entries of the option `sources`.

    With a ref, show whether that ref may be pulled and which settings apply to it.
    """
    found: dict[str, Any] = await asyncio.to_thread(request.app.state.sources, ref)
    return found


@router.get("/livez")
async def livez() -> dict[str, str]:
    """Liveness probe: 200 while the process answers."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(
    request: Request,
    models: AnyModels,
    lanes: AnyLanes,
    wanted: Annotated[
        str | None,
        Query(alias="set", pattern="^required$", description="also check the models marked `required`"),
    ] = None,
) -> JSONResponse:
    """Readiness probe: 200 when the cache's file system answers and is writable, else 503.

    With `set=required`, every model marked `required` in the configuration must be ready, too.
    """
    try:
        async with asyncio.timeout(_DISK_SECONDS):
            is_read_only = await lanes.probes.shared("disk", models.store.space.is_read_only)
    except TimeoutError:
        late = f"the cache's file system did not answer within {_DISK_SECONDS:g} s"
        return problem(Unavailable(late, code="disk_slow", retry_after=_RETRY_SECONDS))
    if is_read_only:
        return problem(DiskFailed("the cache's file system is read-only", code="read_only"), status=503)
    required = request.app.state.required() if wanted else ()
    absent = sorted(name for name in required if not models.store.names.get(name))
    if absent:
        return problem(
            Unavailable(
                f"{len(absent)} required models are not ready: {', '.join(absent[:20])}",
                code="not_ready",
                retry_after=_RETRY_SECONDS,
                models=absent,
            )
        )
    return JSONResponse({"status": "ready"})


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, lanes: AnyLanes) -> Response:
    """The metrics of the daemon in the Prometheus text format."""
    text = await lanes.scrapes.shared("metrics", request.app.state.metrics.text)
    return Response(text, media_type=CONTENT_TYPE)


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, lanes: AnyLanes) -> Response:
    """The OpenAPI document. It is rendered once and kept."""
    app = request.app
    if app.state.described is None:
        app.state.described = await lanes.reads.shared("openapi", lambda: as_json(app.openapi()))
    return json_answer(app.state.described)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> Response:
    """The OpenAPI document as a web page."""
    return get_swagger_ui_html(openapi_url="/openapi.json", title=request.app.title)
