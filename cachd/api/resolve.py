"""The routes /v1/resolve and /v1/preflight: what a pull would do and engines would find, without pulling."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from cachd.api.access import check_spec
from cachd.api.answers import json_answer
from cachd.api.dependencies import AnyLanes, AnyServices
from cachd.api.requests import AskedResolve
from cachd.api.schema import answers
from cachd.api.waiting import cancelled_by_hang_up
from cachd.report.files import ResolveReport, resolve_report
from cachd.report.preflight import PreflightReport, preflight_of
from cachd.report.values import as_json

router = APIRouter(prefix="/v1", tags=["models"])


@router.post("/resolve", responses=answers({200: ResolveReport}))
async def resolve(request: Request, asked: AskedResolve, services: AnyServices, lanes: AnyLanes) -> Response:
    """Ask the source of a ref for its files, and show what a pull would fetch and evict. Pulls nothing.

    If a pull would be refused by the source, by the rules of this node or for its patterns, the answer is the
    error of that pull. cachd stops asking the source when the client hangs up or `seconds` are over. At most
    10,000 files are listed.
    """
    spec = asked.spec()
    check_spec(request, spec)
    models = services.models
    async with cancelled_by_hang_up(request) as cancel_token:
        manifest = await lanes.resolves.run(
            partial(models.pulls.previews.resolve, spec, cancel_token, seconds=asked.seconds)
        )
    report = partial(resolve_report, spec, manifest, models.store, services.reclaim)
    return json_answer(await lanes.reads.run(lambda: as_json(report())))


@router.post("/preflight", responses=answers({200: PreflightReport}))
async def preflight_ref(
    request: Request, asked: AskedResolve, services: AnyServices, lanes: AnyLanes
) -> Response:
    """Examine whether engines would load a model that is not here, by its list of files and their headers.

    At most 64 MiB are read from the source, by at most 500 requests; nothing is kept or verified. The answer
    is as that of `GET /v1/models/{name}/preflight`; the finding `not_examined` counts files that were not
    read.
    cachd stops asking the source when the client hangs up or `seconds` are over.
    """
    spec = asked.spec()
    check_spec(request, spec)
    previews = services.models.pulls.previews
    async with cancelled_by_hang_up(request) as cancel_token:
        manifest, found = await lanes.resolves.run(
            partial(previews.preflight, spec, cancel_token, seconds=asked.seconds)
        )
    return json_answer(as_json(preflight_of(spec, manifest, found)))
