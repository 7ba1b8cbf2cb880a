"""The routes /v1/scrubs and /v1/sweeps: the state of verification, and the removal of leftovers."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from cachd.api.answers import as_json, json_answer
from cachd.api.dependencies import AnyLanes
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps

router = APIRouter(tags=["upkeep"])


class AskedSweep(BaseModel):
    """The body of POST /v1/sweeps. It may be omitted."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"dry_run": True}]})

    dry_run: bool = Field(default=False, description="show what would be removed, and remove nothing")
    everything: bool = Field(
        default=False,
        description="also remove what ended pulls left behind recently, instead of keeping it for a retry",
    )


@router.get("/v1/scrubs")
async def scrubs(request: Request, lanes: AnyLanes) -> Response:
    """Show the state of scrubbing: the blob being read, the oldest verification, and the damaged models."""
    running: Scrubs = request.app.state.scrubs
    return json_answer(await lanes.reads.shared("scrubs", lambda: as_json(running.as_document())))


@router.post("/v1/sweeps")
async def sweep(request: Request, lanes: AnyLanes, asked: AskedSweep | None = None) -> Response:
    """Remove leftovers: files that neither a model nor a pull needs.

    The call returns when they are removed. The answer lists each with its kind and the bytes it freed.
    """
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
