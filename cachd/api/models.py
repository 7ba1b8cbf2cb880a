"""The routes of /v1/models: pull, list, await, pin, lease, verify, warm, roll back and delete models."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from cachd.api.access import check_folders, check_pull
from cachd.api.answers import as_json, json_answer
from cachd.api.dependencies import AnyLanes, AnyModels
from cachd.api.documents import (
    MOST_OF_A_PAGE,
    Asked,
    AskedLease,
    Models,
    error_document,
    lease_document,
    unknown_model,
)
from cachd.api.lanes import Lanes
from cachd.api.problems import problem
from cachd.errors import CachdError, Unavailable
from cachd.fields import Seconds
from cachd.model import check_name
from cachd.store.catalog import ready_document
from cachd.transfer.progress import Progress
from cachd.upkeep.jobs import Job

router = APIRouter(prefix="/v1/models", tags=["models"])

_RETRY_SECONDS = 5.0
_REPAIR_SECONDS = 0.2
_LONGEST_RETRY_SECONDS = 60.0


@router.post("", status_code=202, responses={200: {"description": "the model is ready"}})
async def pull(request: Request, asked: Asked, models: AnyModels) -> JSONResponse:
    """Pull a model: 202 when its pull was started or already runs, 200 when the model is ready.

    The call is idempotent and does not wait for the source. It answers 409 `name_taken` when the name belongs
    to another model and `replace` is false.
    """
    spec = asked.spec()
    check_pull(request, asked, spec)
    if asked.replace:
        check_folders(request, models.store.names.owner(spec.name))
    started = await asyncio.to_thread(
        models.pulls.start,
        spec,
        priority=asked.priority,
        refresh=asked.refresh,
        replace=asked.replace,
        pins=asked.pin,
    )
    if asked.pin:
        await asyncio.to_thread(models.store.pins.add, spec.name)
    document = await asyncio.to_thread(models.describe, spec.name)
    await asyncio.to_thread(request.app.state.status.settle)
    location = {"Location": f"/v1/models/{spec.name}"}
    return JSONResponse(document, status_code=202 if started else 200, headers=location)


@router.get("")
async def list_models(
    models: AnyModels,
    lanes: AnyLanes,
    limit: Annotated[
        int, Query(ge=1, le=MOST_OF_A_PAGE, description="maximum number of models per page")
    ] = MOST_OF_A_PAGE,
    after: Annotated[
        str, Query(max_length=200, description="the `next` of the previous page; empty: the first page")
    ] = "",
) -> Response:
    """List the models of this node by name: those that are ready, being pulled, failed or damaged.

    The answer is one page. It has `next` when more models follow.
    """
    page = partial(models.page, after=after, limit=limit)
    return json_answer(await lanes.reads.shared(("page", after, limit), lambda: as_json(page())))


@router.get("/{name}")
async def show(name: str, models: AnyModels, lanes: AnyLanes) -> Response:
    """Show one model: its state, revision, paths, leases and use, and the progress or error of its pull."""
    check_name(name)
    return json_answer(await lanes.reads.shared(("model", name), lambda: as_json(models.describe(name))))


@router.get("/{name}/ready")
async def ready(
    request: Request,
    name: str,
    models: AnyModels,
    lanes: AnyLanes,
    wait: Annotated[
        Seconds, Query(ge=0, le=3600, description="how long to wait for the model, in seconds")
    ] = 0,
) -> JSONResponse:
    """Whether a model is ready: 200 with its ready document, or 503 with Retry-After. Made for pods' probes.

    `wait` delays the answer until the model is ready, its pull fails, or the time is over. When too many
    callers wait, the call answers at once instead. When the pull failed for good, the status is that of its
    error (400, 403, 404, 413, 500, 502) and `final` is true.
    """
    check_name(name)
    with lanes.waits.one() as may_wait:
        if wait and may_wait:
            await _while_client_stays(request, _until_settled(name, models, lanes), wait)
    return ready_now(name, models) or problem(_why_not_ready(name, models))


@router.put("/{name}/pin", status_code=204)
async def pin(name: str, models: AnyModels) -> Response:
    """Pin a model: until it is unpinned, it is never evicted, and only a forced delete removes it."""
    models.check_known(name)
    await asyncio.to_thread(models.store.pins.add, name)
    return Response(status_code=204)


@router.delete("/{name}/pin", status_code=204)
async def unpin(name: str, models: AnyModels) -> Response:
    """Unpin a model, so that it may be evicted or deleted again."""
    models.check_known(name)
    await asyncio.to_thread(models.store.pins.remove, name)
    return Response(status_code=204)


@router.post("/{name}/rollback")
async def rollback(request: Request, name: str, models: AnyModels) -> dict[str, Any]:
    """Make a name point to its previous snapshot again. This is immediate and does not need the source."""
    before = await asyncio.to_thread(models.store.history.of, check_name(name))
    check_folders(request, models.store.names.owner(name), *(snapshot.spec for snapshot in before))
    await asyncio.to_thread(models.pulls.rollback, name)
    return await asyncio.to_thread(models.describe, name)


@router.post("/{name}/verify", status_code=202)
async def verify(name: str, models: AnyModels) -> JSONResponse:
    """Start to verify a ready model: read every byte again and compare the digests.

    The field `verification` of GET /v1/models/{name} shows the progress. When a file is damaged, the model is
    no longer ready, and its repair starts at once.
    """
    started = await asyncio.to_thread(models.scrubs.verify, check_name(name))
    return _begun(name, started)


@router.post("/{name}/warm", status_code=202)
async def warm(name: str, models: AnyModels) -> JSONResponse:
    """Start to load a ready model into the page cache.

    The field `warming` of GET /v1/models/{name} shows the progress. Warming fails with `no_memory` when pods
    and the cached pages of other models leave too little memory.
    """
    started = await asyncio.to_thread(models.warms.warm, check_name(name))
    return _begun(name, started)


@router.post("/{name}/leases", status_code=201)
async def take_lease(name: str, asked: AskedLease, models: AnyModels) -> JSONResponse:
    """Take a lease on a model, for a pod that is about to start.

    Until the lease is released or expires, the model is not evicted, and only a forced delete removes it. A
    model that is still being pulled can be leased, too.
    """
    models.check_known(name)
    now = time.time()
    until = now + asked.seconds
    lease = await asyncio.to_thread(models.store.leases.take, name, asked.holder, until=until)
    models.store.usage_log.used(name, now)
    location = {"Location": f"/v1/models/{name}/leases/{lease.id}"}
    return JSONResponse(lease_document(lease), status_code=201, headers=location)


@router.put("/{name}/leases/{lease}")
async def renew_lease(name: str, lease: str, asked: AskedLease, models: AnyModels) -> dict[str, Any]:
    """Renew a lease for `seconds` from now. 404 when it has expired: the model may have been evicted."""
    now = time.time()
    renewed = await asyncio.to_thread(
        models.store.leases.renew, check_name(name), lease, until=now + asked.seconds, now=now
    )
    models.store.usage_log.used(name, now)
    return lease_document(renewed)


@router.delete("/{name}/leases/{lease}", status_code=204)
async def release_lease(name: str, lease: str, models: AnyModels) -> Response:
    """Release a lease. Releasing an expired or unknown lease also succeeds."""
    await asyncio.to_thread(models.store.leases.release, check_name(name), lease)
    return Response(status_code=204)


@router.delete("/{name}")
async def delete(
    request: Request,
    name: str,
    models: AnyModels,
    lanes: AnyLanes,
    force: Annotated[
        bool, Query(description="delete even when the model is pinned, leased, in use or listed")
    ] = False,
) -> dict[str, Any]:
    """Delete a model: cancel its pull, withdraw it from the pods' view, and free its bytes.

    409 when the model is pinned, leased, in use or listed in the configuration, unless `force` is true. A
    model that the configuration lists is pulled again when the daemon starts or the file changes.
    """
    check_folders(request, models.store.names.owner(check_name(name)))
    stopped = await asyncio.to_thread(models.pulls.cancel, name, force=force)
    if stopped:
        # Wait here and not in a thread, because many callers may wait for one slow source.
        with lanes.waits.one() as may_wait:
            if not may_wait:
                raise Unavailable("too many calls wait for pulls", code="busy", retry_after=_RETRY_SECONDS)
            await lanes.waits.end_of(stopped.done)
    freed = await lanes.changes.run(partial(models.pulls.delete, name, force=force))
    await asyncio.to_thread(request.app.state.status.settle)
    return {"name": name, "freed_bytes": freed, "configured": request.app.state.reclaim.keeps(name)}


async def _until_settled(name: str, models: Models, lanes: Lanes) -> None:
    """Return when a model is ready, or when neither a pull nor a repair is about to make it ready."""
    while not models.store.names.get(name):
        if running := models.pulls.running_for(name):
            await lanes.waits.end_of(running.done)
        elif models.store.names.quarantine(name) and not models.is_final(name):
            await asyncio.sleep(_REPAIR_SECONDS)  # the daemon has not started its repair yet
        else:
            return


async def _while_client_stays(request: Request, work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Run `work` until it ends, `seconds` have passed, or the client has hung up."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _begun(name: str, job: Job) -> JSONResponse:
    location = {"Location": f"/v1/models/{name}"}
    return JSONResponse({"name": name, **job.as_document()}, status_code=202, headers=location)


def ready_now(name: str, models: Models) -> JSONResponse | None:
    """The ready document of a model, as an answer; None when the model is not ready."""
    snapshot = models.store.names.get(name)
    if snapshot is None:
        return None
    models.store.usage_log.used(name, time.time())
    return JSONResponse(ready_document(snapshot))


def _why_not_ready(name: str, models: Models) -> CachdError:
    """The reason why a name is not ready. It has the class of the pull's error when that is final."""
    pull, state, failure = models.pulls.get(name), models.state(name), models.failure(name)
    damage = models.store.names.quarantine(name)
    if failure is not None and models.is_final(name):
        detail, error = f"{name} is not ready ({state}): {failure.detail}", error_document(failure)
        return type(failure)(
            detail, code=failure.code, hint=failure.hint, state=state, final=True, error=error
        )
    if damage and state == "damaged":
        return Unavailable(
            f"{name} is damaged ({damage.reason}) and waits to be repaired",
            code="damaged",
            retry_after=_RETRY_SECONDS,
            state=state,
            final=False,
            error=error_document(failure),
        )
    if pull is None:
        return unknown_model(name, final=False)
    if failure is not None:
        return Unavailable(
            f"{name} is not ready ({state}): {failure.detail}",
            code=failure.code,
            hint=failure.hint,
            retry_after=_RETRY_SECONDS,
            state=state,
            final=False,
            error=error_document(failure),
        )
    return _on_its_way(name, pull.progress)


def _on_its_way(name: str, progress: Progress) -> Unavailable:
    now = progress.now
    eta = progress.eta_seconds(now)
    return Unavailable(
        f"{name} is {progress.state}: {now.done} of {progress.total} bytes",
        code="not_ready",
        retry_after=min(_RETRY_SECONDS if eta is None else eta, _LONGEST_RETRY_SECONDS),
        state=progress.state,
        final=False,
        bytes_done=now.done,
        bytes_total=progress.total,
        eta_seconds=eta,
    )
