"""The routes /v1/scrubs and /v1/sweeps: the state of verification, and the removal of leftovers."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Response

from cachd.api.answers import ScrubsReport, SweepReport, SweptLeftover, json_answer
from cachd.api.dependencies import AnyLanes, AnyServices
from cachd.api.requests import AskedSweep
from cachd.api.schema import answers
from cachd.report.values import as_json, from_document
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps

router = APIRouter(tags=["upkeep"])


@router.get("/v1/scrubs", responses=answers({200: ScrubsReport}))
async def scrubs(services: AnyServices, lanes: AnyLanes) -> Response:
    """Show the state of scrubbing: the blob being read, the oldest verification, and the damaged models."""
    return json_answer(await lanes.reads.shared("scrubs", partial(_scrubs, services.scrubs)))


@router.post("/v1/sweeps", responses=answers({200: SweepReport}))
async def sweep(services: AnyServices, lanes: AnyLanes, asked: AskedSweep | None = None) -> Response:
    """Remove leftovers: files that neither a model nor a pull needs.

    The call returns when they are removed. The answer lists each with its kind and the bytes it freed.
    """
    return json_answer(await lanes.changes.run(partial(_swept, services.sweeps, asked or AskedSweep())))


def _scrubs(running: Scrubs) -> bytes:
    return as_json(from_document(ScrubsReport, running.as_document()))


def _swept(sweeps: Sweeps, asked: AskedSweep) -> bytes:
    if asked.dry_run:
        swept = [(each, each.size) for each in sweeps.leftovers(everything=asked.everything)]
    else:
        swept = sweeps.sweep(everything=asked.everything)
    return as_json(
        SweepReport(
            dry_run=asked.dry_run,
            freed_bytes=sum(freed for _, freed in swept),
            swept=[
                from_document(SweptLeftover, each.as_document() | {"freed_bytes": freed})
                for each, freed in swept
            ],
        )
    )
