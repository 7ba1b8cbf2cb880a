"""The FastAPI dependencies of the routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from cachd.api.documents import Models
from cachd.api.lanes import Lanes


async def models_of(request: Request) -> Models:
    """The models of the application. A coroutine, because FastAPI runs a plain function in a thread."""
    models: Models = request.app.state.models
    return models


async def lanes_of(request: Request) -> Lanes:
    """The lanes for the application's expensive calls."""
    lanes: Lanes = request.app.state.lanes
    return lanes


AnyModels = Annotated[Models, Depends(models_of)]
AnyLanes = Annotated[Lanes, Depends(lanes_of)]
