"""What the daemon does for the models it has, asked for by hand: sweeps and scrubs."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from cachd.transfer.scrubs import Scrubs
from cachd.transfer.sweeps import Sweeps

router = APIRouter(tags=["upkeep"])


class AskedSweep(BaseModel):
    """The body of POST /v1/sweeps; none is as good as an empty one."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"dry_run": True}]})

    dry_run: bool = Field(default=False, description="say what would go, remove nothing")
    everything: bool = Field(default=False, description="what ended pulls left, too, however short ago")


@router.get("/v1/scrubs")
async def scrubs(request: Request) -> dict[str, Any]:
    """What of the published models is being read again, how long ago it was, and what is damaged."""
    running: Scrubs = request.app.state.scrubs
    return await asyncio.to_thread(running.as_document)


@router.post("/v1/sweeps")
async def sweep(request: Request, asked: AskedSweep | None = None) -> dict[str, Any]:
    """Remove what no model and no pull needs, and wait for it: each thing with its kind and its bytes."""
    asked = asked or AskedSweep()
    sweeps: Sweeps = request.app.state.sweeps
    if asked.dry_run:
        found = await asyncio.to_thread(sweeps.leftovers, everything=asked.everything)
        swept = [(each, each.size) for each in found]
    else:
        swept = await asyncio.to_thread(sweeps.sweep, everything=asked.everything)
    return {
        "dry_run": asked.dry_run,
        "freed_bytes": sum(freed for _, freed in swept),
        "swept": [each.as_document() | {"freed_bytes": freed} for each, freed in swept],
    }
