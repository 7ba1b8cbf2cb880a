"""The routes that concern the whole node: limits, options, sources, probes, metrics, OpenAPI document."""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import PlainTextResponse

from cachd.api.answers import (
    Alive,
    LimitsReport,
    NodeReady,
    OptionsReport,
    RefSettings,
    SourceEntries,
    answer,
    json_answer,
)
from cachd.api.dependencies import AnyLanes, AnyServices, Services
from cachd.api.lanes import Lanes
from cachd.api.problems import problem
from cachd.api.requests import AskedLimits
from cachd.api.schema import answers
from cachd.errors import CachdError, DiskFailed, Unavailable
from cachd.model import count_text
from cachd.report.readiness import RETRY_SECONDS
from cachd.report.values import as_json, from_document

router = APIRouter(tags=["node"])

_DISK_SECONDS = 3.0
_HINT = "see the kernel's log on the node, and cachd doctor"


@router.get("/v1/limits", responses=answers({200: LimitsReport}))
async def limits(services: AnyServices) -> Response:
    """Show the download limits in bytes per second: of all sources together, and of each kind of source."""
    return answer(LimitsReport.of(services.bandwidth.limits))


@router.put("/v1/limits", responses=answers({200: LimitsReport}))
async def set_limits(services: AnyServices, asked: AskedLimits) -> Response:
    """Replace all download limits. Running pulls follow the new limits at once.

    A limit that is null or left out is lifted. The new limits hold until the daemon restarts or the limits in
    its configuration file change.
    """
    await asyncio.to_thread(services.bandwidth.change, asked.limits())
    return answer(LimitsReport.of(services.bandwidth.limits))


@router.get("/v1/options", responses=answers({200: OptionsReport}))
async def options(services: AnyServices, lanes: AnyLanes) -> Response:
    """Show every option in force and where its value came from.

    The answer also states whether the configuration file on disk is in force.
    """
    return json_answer(await lanes.reads.shared("options", partial(_options, services)))


@router.get("/v1/sources", responses=answers({200: (SourceEntries, RefSettings)}))
async def sources(
    services: AnyServices,
    ref: Annotated[
        str | None,
        Query(max_length=2048, description="a ref as in POST /v1/models; default: show every entry"),
    ] = None,
) -> Response:
    """Show the entries of the option `sources`.

    With a ref, show whether that ref may be pulled and which settings apply to it.
    """
    document = await asyncio.to_thread(services.sources, ref)
    return answer(from_document(SourceEntries if ref is None else RefSettings, document))


@router.get("/livez", responses=answers({200: Alive}))
async def livez() -> Response:
    """Liveness probe: 200 while the process answers."""
    return answer(Alive())


@router.get("/readyz", responses=answers({200: NodeReady}))
async def readyz(
    services: AnyServices,
    lanes: AnyLanes,
    wanted: Annotated[
        str | None,
        Query(alias="set", pattern="^required$", description="also check the models marked `required`"),
    ] = None,
) -> Response:
    """Readiness probe: 200 when the cache's file system answers and is writable, else 503.

    With `set=required`, every model marked `required` in the configuration must be ready, too.
    """
    if fault := await _disk_fault(services, lanes):
        return problem(fault, status=503)
    required = services.required() if wanted else ()
    absent = sorted(name for name in required if not services.models.store.names.get(name))
    if absent:
        models = count_text(len(absent), "required model is", "required models are")
        detail = f"{models} not ready: {', '.join(absent[:20])}"
        error = Unavailable(detail, code="not_ready", retry_after=RETRY_SECONDS)
        return problem(error, models=absent)
    return answer(NodeReady())


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request, services: AnyServices, lanes: AnyLanes) -> Response:
    """The metrics of the daemon in the Prometheus text format, or in OpenMetrics if `Accept` asks for it."""
    content_type, encode = services.metrics.exposition(request.headers.get("Accept", ""))
    text = await lanes.scrapes.shared(("metrics", content_type), encode)
    return Response(text, headers={"Content-Type": content_type, "Vary": "Accept"})


@router.get("/openapi.json", include_in_schema=False)
async def openapi(request: Request, lanes: AnyLanes) -> Response:
    """The OpenAPI document. It is rendered once and kept."""
    app = request.app
    if app.state.described is None:
        app.state.described = await lanes.reads.shared("openapi", lambda: json.dumps(app.openapi()).encode())
    return json_answer(app.state.described)


def _options(services: Services) -> bytes:
    return as_json(from_document(OptionsReport, services.options()))


async def _disk_fault(services: Services, lanes: Lanes) -> CachdError | None:
    """What keeps the cache's file system from being written; None if nothing does."""
    try:
        async with asyncio.timeout(_DISK_SECONDS):
            is_read_only = await lanes.probes.shared("disk", services.models.store.space.is_read_only)
    except TimeoutError:
        late = f"the cache's file system did not answer within {_DISK_SECONDS:g} s"
        return Unavailable(late, code="disk_slow", hint=_HINT, retry_after=RETRY_SECONDS)
    if is_read_only:
        return DiskFailed("the cache's file system is read-only", code="read_only", hint=_HINT)
    return None
