"""What FastAPI hands to routes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from cachd.api.documents import Models


async def models_of(request: Request) -> Models:
    """The models of the application. A coroutine, lest FastAPI ask a thread for them."""
    models: Models = request.app.state.models
    return models


AnyModels = Annotated[Models, Depends(models_of)]
