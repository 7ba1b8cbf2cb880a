"""What the daemon does for the models it has, asked for by hand: sweeps and scrubs."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from cachd.api.answers import as_json, json_answer
from cachd.api.dependencies import AnyLanes
from cachd.transfer.scrubs import Scrubs
from cachd.transfer.sweeps import Sweeps

router = APIRouter(tags=["upkeep"])


class AskedSweep(BaseModel):
    """The body of POST /v1/sweeps; none is as good as an empty one."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"dry_run": True}]})

    dry_run: bool = Field(default=False, description="say what would go, remove nothing")
    everything: bool = Field(default=False, description="what ended pulls left, too, however short ago")


@router.get("/v1/scrubs")
async def scrubs(request: Request, lanes: AnyLanes) -> Response:
    """What of the published models is being read again, how long ago it was, and what is damaged."""
    running: Scrubs = request.app.state.scrubs
    return json_answer(await lanes.reads.shared("scrubs", lambda: as_json(running.as_document())))


@router.post("/v1/sweeps")
async def sweep(request: Request, lanes: AnyLanes, asked: AskedSweep | None = None) -> Response:
    """Remove what no model and no pull needs, and wait for it: each thing with its kind and its bytes."""
    return json_answer(
        await lanes.changes.run(partial(_swept, request.app.state.sweeps, asked or AskedSweep()))
    )


def _swept(sweeps: Sweeps, asked: AskedSweep) -> bytes:
    if asked.dry_run:
        swept = [(each, each.size) for each in sweeps.leftovers(everything=asked.everything)]
    else:
        swept = sweeps.sweep(everything=asked.everything)
    return as_json(
        {
            "dry_run": asked.dry_run,
            "freed_bytes": sum(freed for _, freed in swept),
            "swept": [each.as_document() | {"freed_bytes": freed} for each, freed in swept],
        }
    )
