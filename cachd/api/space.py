"""/v1/capacity and /v1/evictions: what holds the disk, what would go to make room, what went."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from cachd.api.dependencies import AnyModels
from cachd.api.documents import AskedRoom, Models, capacity_document, eviction_document, plan_document
from cachd.transfer.reclaim import Reclaim

router = APIRouter(prefix="/v1", tags=["space"])


@router.get("/capacity")
async def capacity(request: Request, models: AnyModels) -> dict[str, Any]:
    """The file system, what models take and may take, and which snapshot holds what, protected by what."""
    reclaim: Reclaim = request.app.state.reclaim

    def told() -> dict[str, Any]:
        store = models.store
        return capacity_document(
            store.space.capacity(),
            reclaim.candidates(),
            store.watch.watched(),
            tells_use=store.tells_use,
        )

    return await asyncio.to_thread(told)


@router.get("/evictions")
async def evictions(request: Request) -> dict[str, Any]:
    """The last thousand evictions since the daemon started, the newest first."""
    reclaim: Reclaim = request.app.state.reclaim
    return {"evictions": [eviction_document(eviction) for eviction in reclaim.evicted()]}


@router.post("/evictions")
async def evict(
    request: Request,
    asked: AskedRoom,
    models: AnyModels,
    dry_run: Annotated[bool, Query(description="only tell what would go")] = False,
) -> dict[str, Any]:
    """Make room for so many bytes or for a ref: what goes, in order, why, and what that frees.

    507 when all that may go is not enough; then nothing does.
    """
    reclaim: Reclaim = request.app.state.reclaim

    def made() -> dict[str, Any]:
        need = _need(asked, models)
        plan = reclaim.plan(need)
        if dry_run:
            return {"dry_run": True, **plan_document(need, plan)}
        done = reclaim.make_available(need)
        return {
            "dry_run": False,
            "need_bytes": need,
            "short_bytes": plan.short,
            "freed_bytes": sum(eviction.freed for eviction in done),
            "evictions": [eviction_document(eviction) for eviction in done],
        }

    return await asyncio.to_thread(made)


def _need(asked: AskedRoom, models: Models) -> int:
    wish = asked.wish()
    if wish is None:
        return asked.bytes or 0
    return models.store.need(models.pulls.resolve(wish))
