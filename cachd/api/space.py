"""The routes /v1/capacity and /v1/evictions: disk usage, planned evictions and past evictions."""

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
    """Show the disk space: of the file system, of all models, and of each snapshot.

    `protected_by` is why a snapshot cannot be evicted now.
    """
    reclaim: Reclaim = request.app.state.reclaim

    def document() -> bytes:
        store = models.store
        return as_json(
            capacity_document(
                store.space.capacity(),
                reclaim.candidates(),
                store.watch.watched(),
                tells_use=store.reports_open_files,
            )
        )

    return json_answer(await lanes.reads.shared("capacity", document))


@router.get("/evictions")
async def evictions(request: Request, lanes: AnyLanes) -> Response:
    """List up to 1000 evictions since the daemon started, newest first."""
    reclaim: Reclaim = request.app.state.reclaim

    def document() -> bytes:
        return as_json({"evictions": [eviction_document(eviction) for eviction in reclaim.evicted()]})

    return json_answer(await lanes.reads.shared("evictions", document))


@router.post("/evictions")
async def evict(
    request: Request,
    asked: AskedSize,
    models: AnyModels,
    lanes: AnyLanes,
    dry_run: Annotated[bool, Query(description="show what would be evicted, and evict nothing")] = False,
) -> Response:
    """Make a number of bytes, or the space that a ref needs, available by evicting models.

    The answer lists each evicted snapshot in order, with the reason and the freed bytes. 507 when evicting
    everything that is unprotected would not be enough; then nothing is evicted.
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
