"""/v1/capacity and /v1/evictions: what holds the disk, what would go to make room, what went."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from cachd.api.answers import as_json, json_answer
from cachd.api.dependencies import AnyLanes, AnyModels
from cachd.api.documents import AskedSize, capacity_document, eviction_document, plan_document
from cachd.transfer.reclaim import Reclaim

router = APIRouter(prefix="/v1", tags=["space"])


@router.get("/capacity")
async def capacity(request: Request, models: AnyModels, lanes: AnyLanes) -> Response:
    """The file system, what models take and may take, and which snapshot holds what, protected by what."""
    reclaim: Reclaim = request.app.state.reclaim

    def told() -> bytes:
        store = models.store
        document = capacity_document(
            store.space.capacity(),
            reclaim.candidates(),
            store.watch.watched(),
            tells_use=store.tells_use,
        )
        return as_json(document)

    return json_answer(await lanes.reads.shared("capacity", told))


@router.get("/evictions")
async def evictions(request: Request, lanes: AnyLanes) -> Response:
    """The last thousand evictions since the daemon started, the newest first."""
    reclaim: Reclaim = request.app.state.reclaim

    def told() -> bytes:
        return as_json({"evictions": [eviction_document(eviction) for eviction in reclaim.evicted()]})

    return json_answer(await lanes.reads.shared("evictions", told))


@router.post("/evictions")
async def evict(
    request: Request,
    asked: AskedSize,
    models: AnyModels,
    lanes: AnyLanes,
    dry_run: Annotated[bool, Query(description="only tell what would go")] = False,
) -> Response:
    """Make room for so many bytes or for a ref: what goes, in order, why, and what that frees.

    507 when all that may go is not enough; then nothing does.
    """
    reclaim: Reclaim = request.app.state.reclaim
    spec, need = asked.spec(), asked.bytes or 0
    if spec is not None:
        need = await lanes.resolves.run(lambda: models.store.need(models.pulls.resolve(spec)))
    if dry_run:
        return json_answer(await lanes.reads.shared(("plan", need), lambda: _planned(reclaim, need)))
    return json_answer(await lanes.changes.run(lambda: _evicted(reclaim, need)))


def _planned(reclaim: Reclaim, need: int) -> bytes:
    return as_json({"dry_run": True, **plan_document(need, reclaim.plan(need))})


def _evicted(reclaim: Reclaim, need: int) -> bytes:
    plan = reclaim.plan(need)
    done = reclaim.make_available(need)
    return as_json(
        {
            "dry_run": False,
            "need_bytes": need,
            "short_bytes": plan.short,
            "freed_bytes": sum(eviction.freed for eviction in done),
            "evictions": [eviction_document(eviction) for eviction in done],
        }
    )
