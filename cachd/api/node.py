"""The node: limits, options, probes, metrics."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from cachd.api.dependencies import AnyModels
from cachd.api.documents import AskedLimits, limits_document
from cachd.api.problems import problem
from cachd.errors import DiskFailed, Unavailable
from cachd.metrics import CONTENT_TYPE

router = APIRouter(tags=["node"])

_RETRY_SECONDS = 5.0


@router.get("/v1/limits")
async def limits(request: Request) -> dict[str, Any]:
    """Bytes a second that are received at most: from all sources together, and from single ones."""
    return limits_document(request.app.state.bandwidth.limits)


@router.put("/v1/limits")
async def set_limits(request: Request, asked: AskedLimits) -> dict[str, Any]:
    """Replace all limits, for running pulls, too; null lifts one, and so does leaving it out.

    They hold until the daemon restarts or the limits of its configuration file change.
    """
    await asyncio.to_thread(request.app.state.bandwidth.change, asked.limits())
    return limits_document(request.app.state.bandwidth.limits)


@router.get("/v1/options")
async def options(request: Request) -> dict[str, Any]:
    """Every option in force, where it came from, and whether the configuration file on disk is in force."""
    found: dict[str, Any] = await asyncio.to_thread(request.app.state.options)
    return found


@router.get("/v1/sources")
async def sources(
    request: Request,
    ref: Annotated[
        str | None, Query(max_length=2048, description="typed as for a pull; none: every entry")
    ] = None,
) -> dict[str, Any]:
    """What `sources` says: every entry; or, for a ref, whether it may be pulled and what holds for it."""
    found: dict[str, Any] = await asyncio.to_thread(request.app.state.sources, ref)
    return found


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The process lives."""
    return {"status": "alive"}


@router.get("/readyz")
async def readyz(
    request: Request,
    models: AnyModels,
    wanted: Annotated[str | None, Query(alias="set", pattern="^required$")] = None,
) -> JSONResponse:
    """The daemon can work; with set=required, also: every model marked `required` is ready."""
    if await asyncio.to_thread(models.store.space.is_read_only):
        return problem(DiskFailed("the cache's file system is read-only", code="read_only"), status=503)
    required = request.app.state.required() if wanted else ()
    absent = sorted(name for name in required if not models.snapshots.get(name))
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
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(await asyncio.to_thread(request.app.state.metrics.text), media_type=CONTENT_TYPE)
