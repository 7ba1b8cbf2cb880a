"""The routes /v1/capacity and /v1/evictions: disk usage, planned evictions and those that were done."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from fastapi import APIRouter, Query, Response

from cachd.api.answers import json_answer
from cachd.api.dependencies import AnyLanes, AnyServices, Services
from cachd.api.requests import AskedSize
from cachd.api.schema import answers
from cachd.report.space import (
    CapacityReport,
    EvictionHistory,
    EvictionPlan,
    EvictionReport,
    EvictionsDone,
    InUseReportedBy,
)
from cachd.report.values import as_json
from cachd.transfer.reclaim import Reclaim

router = APIRouter(prefix="/v1", tags=["space"])


@router.get("/capacity", responses=answers({200: CapacityReport}))
async def capacity(services: AnyServices, lanes: AnyLanes) -> Response:
    """Show the disk space: of the file system, of all models, and of each snapshot.

    `protected_by` is why a snapshot cannot be evicted now.
    """
    return json_answer(await lanes.reads.shared("capacity", partial(_capacity, services)))


@router.get("/evictions", responses=answers({200: EvictionHistory}))
async def evictions(services: AnyServices, lanes: AnyLanes) -> Response:
    """List up to 1000 evictions since the daemon started, newest first."""
    return json_answer(await lanes.reads.shared("evictions", partial(_history, services.reclaim)))


@router.post("/evictions", responses=answers({200: (EvictionPlan, EvictionsDone)}))
async def evict(
    services: AnyServices,
    asked: AskedSize,
    lanes: AnyLanes,
    *,
    dry_run: Annotated[bool, Query(description="show what would be evicted, and evict nothing")] = False,
) -> Response:
    """Make a number of bytes, or the space that a ref needs, available by evicting models.

    The answer lists each evicted snapshot in order, with the reason and the freed bytes. 507 when evicting
    everything that is unprotected would not be enough; then nothing is evicted.
    """
    spec, need, models = asked.spec(), asked.bytes or 0, services.models
    if spec is not None:
        need = await lanes.resolves.run(lambda: models.store.need(models.pulls.previews.resolve(spec)))
    if dry_run:
        return json_answer(
            await lanes.reads.shared(("plan", need), partial(_planned, services.reclaim, need))
        )
    return json_answer(await lanes.changes.run(partial(_evicted, services.reclaim, need)))


def _capacity(services: Services) -> bytes:
    store = services.models.store
    by = InUseReportedBy.kernel if store.reports_open_files else InUseReportedBy.protections
    candidates, views = services.reclaim.candidates(), store.watch.watched()
    now, kubelet = store.space.capacity(), services.kubelet()
    return as_json(CapacityReport.of(now, candidates, views, by=by, kubelet=kubelet))


def _history(reclaim: Reclaim) -> bytes:
    return as_json(EvictionHistory(evictions=[EvictionReport.of(each) for each in reclaim.evicted()]))


def _planned(reclaim: Reclaim, need: int) -> bytes:
    return as_json(EvictionPlan.of(need, reclaim.plan(need)))


def _evicted(reclaim: Reclaim, need: int) -> bytes:
    plan = reclaim.plan(need)
    done = reclaim.make_available(need)
    return as_json(
        EvictionsDone(
            need_bytes=need,
            short_bytes=plan.short,
            freed_bytes=sum(eviction.freed for eviction in done),
            evictions=[EvictionReport.of(each) for each in done],
        )
    )
