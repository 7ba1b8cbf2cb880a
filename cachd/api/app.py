"""The routes of API v1."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Query, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from cachd import __version__
from cachd.api.documents import Asked, Models, error_document, models_of, unknown_model
from cachd.api.guard import Guard, WriteToken
from cachd.api.problems import PROBLEM_RESPONSES, install, problem
from cachd.errors import CachdError, DiskFailed, Unavailable
from cachd.metrics import CONTENT_TYPE, Metrics
from cachd.model import check_name
from cachd.store.catalog import ready_document
from cachd.store.space import Space

_RETRY_SECONDS = 5.0
_LONGEST_RETRY_SECONDS = 60.0

AnyModels = Annotated[Models, Depends(models_of)]


def create_app(
    models: Models,
    *,
    root: Path,
    space: Space,
    metrics: Metrics,
    required: Callable[[], Collection[str]],
    token_file: Path | None,
    allowed_hosts: Collection[str],
) -> FastAPI:
    """The API over one store and its pulls. `required` names the models that /readyz?set=required wants."""
    app = FastAPI(
        title="cachd",
        version=__version__,
        description="Node-local model cache: pull once, verify every byte, serve every pod.",
        generate_unique_id_function=_route_name,
        responses=PROBLEM_RESPONSES,
    )
    app.state.models = models
    install(app)
    app.add_middleware(Guard, allowed_hosts=allowed_hosts, metrics=metrics)
    writes = [Depends(WriteToken(token_file))]

    @app.post("/v1/models", status_code=202, dependencies=writes, tags=["models"])
    async def pull(asked: Asked, models: AnyModels) -> JSONResponse:
        """Start or join a pull: 202, or 200 when the model is ready. Asking again changes nothing."""
        wish = asked.wish()
        if asked.pin:
            await asyncio.to_thread(models.snapshots.pin, wish.name)
        started = await asyncio.to_thread(
            models.pulls.start, wish, priority=asked.priority, refresh=asked.refresh
        )
        document = await asyncio.to_thread(models.describe, wish.name)
        location = {"Location": f"/v1/models/{wish.name}"}
        return JSONResponse(document, status_code=202 if started else 200, headers=location)

    @app.get("/v1/models", tags=["models"])
    async def list_models(models: AnyModels) -> dict[str, Any]:
        """Every model of this node: ready, on its way, or failed."""

        def describe_all() -> list[dict[str, Any]]:
            return [models.describe(name) for name in models.names()]

        return {"models": await asyncio.to_thread(describe_all)}

    @app.get("/v1/models/{name}", tags=["models"])
    async def show(name: str, models: AnyModels) -> dict[str, Any]:
        """State, revision, bytes, rate, ETA, files, error, in use, pinned."""
        return await asyncio.to_thread(models.describe, check_name(name))

    @app.get("/v1/models/{name}/ready", tags=["models"])
    async def ready(
        name: str,
        models: AnyModels,
        wait: Annotated[float, Query(ge=0, le=3600, description="seconds to wait for it")] = 0,
    ) -> JSONResponse:
        """200 with the ready document, else 503 with Retry-After. The probe for pods."""
        check_name(name)
        running = models.pulls.get(name)
        if wait and running and not models.snapshots.get(name):
            # Shielded: neither the time-out nor a client that hangs up ends the pull.
            await asyncio.wait([asyncio.shield(asyncio.wrap_future(running.done))], timeout=wait)
        snapshot = models.snapshots.get(name)
        if snapshot:
            return JSONResponse(ready_document(snapshot))
        if running is None:
            raise unknown_model(name)
        return problem(_not_ready(name, models), status=503)

    @app.put("/v1/models/{name}/pin", status_code=204, dependencies=writes, tags=["models"])
    async def pin(name: str, models: AnyModels) -> Response:
        """Refuse to delete the model until it is unpinned."""
        _check_known(name, models)
        await asyncio.to_thread(models.snapshots.pin, name)
        return Response(status_code=204)

    @app.delete("/v1/models/{name}/pin", status_code=204, dependencies=writes, tags=["models"])
    async def unpin(name: str, models: AnyModels) -> Response:
        """Let the model be deleted again."""
        _check_known(name, models)
        await asyncio.to_thread(models.snapshots.unpin, name)
        return Response(status_code=204)

    @app.delete("/v1/models/{name}", dependencies=writes, tags=["models"])
    async def delete(name: str, models: AnyModels, force: bool = False) -> dict[str, Any]:
        """Cancel its pull, unpublish it, then free its bytes. 409 when pinned or in use, unless forced."""
        check_name(name)
        freed = await asyncio.to_thread(models.pulls.delete, name, force=force)
        return {"name": name, "freed_bytes": freed}

    @app.get("/v1/capacity", tags=["node"])
    async def capacity() -> dict[str, int]:
        """Bytes of the cache's file system: total, free, promised to pulls; and free inodes."""
        now = await asyncio.to_thread(space.capacity)
        return {
            "total_bytes": now.total,
            "free_bytes": now.free,
            "reserved_bytes": now.reserved,
            "reserve_free_bytes": now.reserve_free,
            "free_inodes": now.free_inodes,
        }

    @app.get("/livez", tags=["node"])
    async def livez() -> dict[str, str]:
        """The process lives."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["node"])
    async def readyz(
        wanted: Annotated[str | None, Query(alias="set", pattern="^required$")] = None,
    ) -> JSONResponse:
        """The daemon can work; with set=required, also: every model marked `required` is ready."""
        if await asyncio.to_thread(lambda: os.statvfs(root).f_flag & os.ST_RDONLY):
            return problem(DiskFailed(f"{root} is mounted read-only", code="read_only"), status=503)
        absent = sorted(name for name in required() if not models.snapshots.get(name)) if wanted else []
        if absent:
            waiting = Unavailable(
                f"{len(absent)} required models are not ready: {', '.join(absent[:20])}",
                code="not_ready",
                retry_after=_RETRY_SECONDS,
                models=absent,
            )
            return problem(waiting)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics", tags=["node"])
    async def scrape() -> Response:
        """Prometheus metrics."""
        return Response(await asyncio.to_thread(metrics.text), media_type=CONTENT_TYPE)

    return app


def _route_name(route: APIRoute) -> str:
    return route.name


def _check_known(name: str, models: Models) -> None:
    if models.state(check_name(name)) == "unknown":
        raise unknown_model(name)


def _not_ready(name: str, models: Models) -> CachdError:
    """Why a model is not ready, and when to ask again."""
    pull = models.pulls.get(name)
    if pull is None:
        return unknown_model(name)
    progress = pull.progress
    if pull.error is not None:
        return Unavailable(
            f"{name}: the pull {progress.state}: {pull.error.detail}",
            code=pull.error.code,
            mend=pull.error.mend,
            state=progress.state,
            error=error_document(pull.error),
        )
    eta = progress.eta_seconds
    return Unavailable(
        f"{name} is {progress.state}: {progress.done} of {progress.total} bytes",
        code="not_ready",
        retry_after=min(_RETRY_SECONDS if eta is None else eta, _LONGEST_RETRY_SECONDS),
        state=progress.state,
        bytes_done=progress.done,
        bytes_total=progress.total,
        eta_seconds=eta,
    )
