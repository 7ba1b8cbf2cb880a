"""The routes of /v1/models: pull, list, await, pin, lease, verify, warm, roll back and delete models."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from cachd.api.access import check_folders, check_pull
from cachd.api.answers import (
    BegunVerification,
    BegunWarming,
    Deleted,
    LeaseReport,
    answer,
    json_answer,
)
from cachd.api.dependencies import AnyLanes, AnyModels, AnyServices, Services
from cachd.api.problems import problem_of
from cachd.api.requests import Asked, AskedLease
from cachd.api.schema import answers
from cachd.api.waiting import until_settled, until_stopped
from cachd.fields import Seconds
from cachd.model import ModelSpec, Snapshot, check_name
from cachd.report.files import MAX_FILES_ON_A_PAGE, FilePage, file_page
from cachd.report.models import MAX_ON_A_PAGE, Models
from cachd.report.preflight import PreflightReport, preflight_report
from cachd.report.readiness import why_not_ready
from cachd.report.values import ModelPage, ModelReport, ReadyReport, as_json, from_document
from cachd.store.catalog import ready_document

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.post("", status_code=202, responses=answers({202: ModelReport, 200: ModelReport}))
async def pull(request: Request, asked: Asked, services: AnyServices) -> Response:
    """Pull a model: 202 when its pull was started or already runs, 200 when the model is ready.

    The call is idempotent and does not wait for the source. It answers 409 `name_taken` when the name belongs
    to another model and `replace` is false.
    """
    spec = asked.spec()
    check_pull(request, asked, spec)
    if asked.replace:
        check_folders(request, services.models.store.names.owner(spec.name))
    is_running, report = await asyncio.to_thread(_begin, services, asked, spec)
    return json_answer(report, 202 if is_running else 200, _at(spec.name))


@router.get("", responses=answers({200: ModelPage}))
async def list_models(
    models: AnyModels,
    lanes: AnyLanes,
    limit: Annotated[
        int, Query(ge=1, le=MAX_ON_A_PAGE, description="maximum number of models per page")
    ] = MAX_ON_A_PAGE,
    after: Annotated[
        str, Query(max_length=200, description="the `next` of the previous page; empty: the first page")
    ] = "",
) -> Response:
    """List the models of this node by name: those that are ready, being pulled, failed or damaged.

    The answer is one page. When more models follow, it has `next`, and a Link header to the next page
    (RFC 8288). In a listing, `in_use`, `resident_bytes` and `verified_at` may be a minute old, or a few
    minutes on a node with thousands of models.
    """
    page, following = await lanes.reads.shared(("page", after, limit), partial(_page, models, after, limit))
    if following is None:
        return json_answer(page)
    query = urlencode({"after": following, "limit": limit})
    return json_answer(page, headers={"Link": f'</v1/models?{query}>; rel="next"'})


@router.get("/{name}", responses=answers({200: ModelReport}))
async def show(name: str, models: AnyModels, lanes: AnyLanes) -> Response:
    """Show one model: its state, revision, paths, leases and use, and the progress or error of its pull."""
    check_name(name)
    return json_answer(await lanes.reads.shared(("model", name), lambda: as_json(models.describe(name))))


@router.get("/{name}/ready", responses=answers({200: ReadyReport}))
async def ready(
    request: Request,
    name: str,
    models: AnyModels,
    lanes: AnyLanes,
    wait: Annotated[
        Seconds, Query(ge=0, le=3600, description="how long to wait for the model, in seconds")
    ] = 0,
) -> Response:
    """Whether a model is ready: 200 with its ready document, or 503 with Retry-After. Made for pods' probes.

    `wait` delays the answer until the model is ready, its pull fails, or the time is over. When too many
    callers wait, the call answers at once instead. When the pull failed for good, the status is that of its
    error (400, 403, 404, 413, 500, 502) and `final` is true.
    """
    check_name(name)
    if models.store.names.get(name) is None:
        models.pulls.awaited(name)
    await until_settled(request, name, models, lanes, seconds=wait)
    return _ready_now(name, models) or problem_of(why_not_ready(name, models))


@router.put("/{name}/pin", status_code=204)
async def pin(name: str, models: AnyModels) -> Response:
    """Pin a model: until it is unpinned, it is never evicted, and only a forced delete removes it."""
    models.check_known(name)
    await asyncio.to_thread(models.store.pins.add, name)
    return Response(status_code=204)


@router.delete("/{name}/pin", status_code=204)
async def unpin(name: str, models: AnyModels) -> Response:
    """Unpin a model, so that it may be evicted or deleted again.

    409 `pinned_by_configuration` while the configuration pins it. Nothing changes then.
    """
    models.check_known(name)
    await asyncio.to_thread(models.store.pins.unpin, name)
    return Response(status_code=204)


@router.delete("/{name}/pull", responses=answers({200: ModelReport}))
async def cancel(name: str, services: AnyServices, lanes: AnyLanes) -> Response:
    """Cancel the running pull of a model, and answer when it has ended.

    The model's snapshot stays, if it has one. The bytes that were received are kept for a while, and a new
    pull resumes from them. A model that the configuration lists is pulled again when the daemon starts or the
    file changes.
    """
    stopped = await asyncio.to_thread(services.models.pulls.stop, check_name(name))
    await until_stopped(stopped, lanes)
    report = await lanes.reads.run(lambda: as_json(services.models.describe(name)))
    await asyncio.to_thread(services.status.settle)
    return json_answer(report)


@router.get("/{name}/files", responses=answers({200: FilePage}))
async def list_files(
    name: str,
    models: AnyModels,
    lanes: AnyLanes,
    limit: Annotated[
        int, Query(ge=1, le=MAX_FILES_ON_A_PAGE, description="maximum number of files per page")
    ] = MAX_FILES_ON_A_PAGE,
    after: Annotated[
        str, Query(max_length=4096, description="the `next` of the previous page; empty: the first page")
    ] = "",
) -> Response:
    """List the files of a model by path, with their digests: those that are ready, else those being pulled.

    404 `not_resolved` while the source has not yet said which files the model has.
    """
    check_name(name)
    page = lanes.reads.shared(
        ("files", name, after, limit), lambda: as_json(file_page(models, name, after=after, limit=limit))
    )
    return json_answer(await page)


@router.get("/{name}/preflight", responses=answers({200: PreflightReport}))
async def preflight(name: str, models: AnyModels, lanes: AnyLanes) -> Response:
    """Examine whether engines would load a ready model without a network, and which engines take its layout.

    Only headers of weights and small JSON files are read; nothing of the model is run. Each finding has a
    code, a level (`ok`, `warning`, `refused`), the file, the numbers and a hint. 503 while the model is not
    ready.
    """
    check_name(name)
    report = lanes.preflights.shared(("preflight", name), lambda: as_json(preflight_report(models, name)))
    return json_answer(await report)


@router.post("/{name}/rollback", responses=answers({200: ModelReport}))
async def rollback(request: Request, name: str, models: AnyModels) -> Response:
    """Make a name point to its previous snapshot again. This is immediate and does not need the source."""
    before = await asyncio.to_thread(models.store.history.of, check_name(name))
    check_folders(request, models.store.names.owner(name), *(snapshot.spec for snapshot in before))
    return json_answer(await asyncio.to_thread(_rolled_back, name, models))


@router.post("/{name}/verify", status_code=202, responses=answers({202: BegunVerification}))
async def verify(name: str, models: AnyModels) -> Response:
    """Start to verify a ready model: read every byte again and compare the digests.

    The field `verification` of GET /v1/models/{name} shows the progress. When a file is damaged, the model is
    no longer ready, and its repair starts at once.
    """
    begun = await asyncio.to_thread(models.scrubs.verify, check_name(name))
    report = from_document(BegunVerification, {"name": name, **begun.as_document()})
    return answer(report, 202, _at(name))


@router.post("/{name}/warm", status_code=202, responses=answers({202: BegunWarming}))
async def warm(name: str, models: AnyModels) -> Response:
    """Start to load a ready model into the page cache.

    The field `warming` of GET /v1/models/{name} shows the progress. Warming fails with `no_memory` when pods
    and the cached pages of other models leave too little memory.
    """
    begun = await asyncio.to_thread(models.warms.warm, check_name(name))
    report = from_document(BegunWarming, {"name": name, **begun.as_document()})
    return answer(report, 202, _at(name))


@router.post("/{name}/leases", status_code=201, responses=answers({201: LeaseReport}))
async def take_lease(name: str, asked: AskedLease, models: AnyModels) -> Response:
    """Take a lease on a model, for a pod that is about to start.

    Until the lease is released or expires, the model is not evicted, and only a forced delete removes it. A
    model that is still being pulled can be leased, too.
    """
    models.check_known(name)
    lease = await asyncio.to_thread(models.lease, name, asked.holder, asked.seconds)
    location = {"Location": f"/v1/models/{name}/leases/{lease.id}"}
    return answer(LeaseReport.of(lease), 201, location)


@router.put("/{name}/leases/{lease}", responses=answers({200: LeaseReport}))
async def renew_lease(name: str, lease: str, asked: AskedLease, models: AnyModels) -> Response:
    """Renew a lease for `seconds` from now. 404 when it has expired: the model may have been evicted."""
    renewed = await asyncio.to_thread(models.renew_lease, check_name(name), lease, asked.seconds)
    return answer(LeaseReport.of(renewed))


@router.delete("/{name}/leases/{lease}", status_code=204)
async def release_lease(name: str, lease: str, models: AnyModels) -> Response:
    """Release a lease. Releasing an expired or unknown lease also succeeds."""
    await asyncio.to_thread(models.store.leases.release, check_name(name), lease)
    return Response(status_code=204)


@router.delete("/{name}", responses=answers({200: Deleted}))
async def delete(
    request: Request,
    name: str,
    services: AnyServices,
    lanes: AnyLanes,
    *,
    force: Annotated[
        bool, Query(description="delete even when the model is pinned, leased, in use or listed")
    ] = False,
) -> Response:
    """Delete a model: cancel its pull, withdraw it from the pods' view, and free its bytes.

    409 when the model is pinned, leased, in use or listed in the configuration, unless `force` is true. A
    model that the configuration lists is pulled again when the daemon starts or the file changes.
    """
    pulls = services.models.pulls
    check_folders(request, services.models.store.names.owner(check_name(name)))
    if stopped := await asyncio.to_thread(pulls.cancel, name, force=force):
        await until_stopped(stopped, lanes)
    freed = await lanes.changes.run(partial(pulls.delete, name, force=force))
    await asyncio.to_thread(services.status.settle)
    return answer(Deleted(name=name, freed_bytes=freed, configured=services.reclaim.keeps(name)))


def ready_answer(snapshot: Snapshot) -> JSONResponse:
    """The ready document of a model, as an answer."""
    return JSONResponse(ready_document(snapshot))


def _ready_now(name: str, models: Models) -> JSONResponse | None:
    """The ready document of a model, as an answer; None when the model is not ready."""
    snapshot = models.store.names.get(name)
    if snapshot is None:
        return None
    models.note_use(name)
    return ready_answer(snapshot)


def _begin(services: Services, asked: Asked, spec: ModelSpec) -> tuple[bool, bytes]:
    """Start or join a pull. Returns whether one is running now, and the model's report."""
    models = services.models
    pins, replace, refresh = asked.pin, asked.replace, asked.refresh
    started = models.pulls.start(spec, priority=asked.priority, refresh=refresh, replace=replace, pins=pins)
    if asked.pin:
        models.store.pins.add(spec.name)
    report = as_json(models.describe(spec.name))
    services.status.settle()
    return started is not None, report


def _rolled_back(name: str, models: Models) -> bytes:
    models.pulls.rollback(name)
    return as_json(models.describe(name))


def _page(models: Models, after: str, limit: int) -> tuple[bytes, str | None]:
    page = models.page(after=after, limit=limit)
    return as_json(page), page.next


def _at(name: str) -> dict[str, str]:
    return {"Location": f"/v1/models/{name}"}
