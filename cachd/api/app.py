"""Builds the FastAPI application: all routers behind the guard, with every failure as a problem document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute

from cachd import __version__
from cachd.api import models as model_routes
from cachd.api import node as node_routes
from cachd.api import space as space_routes
from cachd.api import upkeep as upkeep_routes
from cachd.api.access import RULES, Access, Tokens, check_complete
from cachd.api.audit import Audit
from cachd.api.connection import most_connections
from cachd.api.documents import Models
from cachd.api.guard import Guard
from cachd.api.lanes import Lanes
from cachd.api.probe import Probe
from cachd.api.problems import PROBLEM_RESPONSES, install
from cachd.api.status import StatusFiles
from cachd.kernel import threads
from cachd.metrics import Metrics
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.reclaim import Reclaim
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps

_THREADS = 32
ROUTERS = (model_routes.router, node_routes.router, space_routes.router, upkeep_routes.router)


def create_app(
    models: Models,
    *,
    metrics: Metrics,
    bandwidth: Bandwidth,
    sweeps: Sweeps,
    scrubs: Scrubs,
    reclaim: Reclaim,
    status: StatusFiles,
    required: Callable[[], Collection[str]],
    options: Callable[[], dict[str, object]],
    sources: Callable[[str | None], dict[str, object]],
    tokens: Tokens | None,
    anonymous_reads: bool,
    allowed_hosts: Collection[str],
) -> FastAPI:
    """The API of one store and its pulls.

    `required` returns the names of the models that /readyz?set=required checks. `options` returns the
    document of /v1/options. `sources` returns the document of /v1/sources, for one ref or for None. Without
    `tokens` (None), every caller may do everything.
    """

    blocking, lanes = threads.pool(_THREADS, "api"), Lanes(connections=most_connections())

    @asynccontextmanager
    async def with_threads(_app: FastAPI) -> AsyncIterator[None]:
        """Give asyncio.to_thread enough threads that a few slow calls do not delay the others."""
        asyncio.get_running_loop().set_default_executor(blocking)
        yield
        audit.close()
        lanes.close()

    audit = Audit(metrics)
    app = FastAPI(
        lifespan=with_threads,
        openapi_url=None,  # node.py serves it and renders it only once
        title="cachd",
        version=__version__,
        description="Node-local model cache: pull once, verify every byte, serve every pod.",
        generate_unique_id_function=_route_name,
        responses=PROBLEM_RESPONSES,
    )
    app.state.models, app.state.metrics, app.state.required = models, metrics, required
    app.state.bandwidth, app.state.reclaim, app.state.options = bandwidth, reclaim, options
    app.state.status, app.state.sources = status, sources
    app.state.lanes, app.state.described = lanes, None
    app.state.sweeps, app.state.scrubs = sweeps, scrubs
    routes = [*app.routes, *(route for router in ROUTERS for route in router.routes)]
    check_complete(routes)
    for router in ROUTERS:
        app.include_router(router)
    install(app)
    _document_roles(app)
    access = Access(routes, tokens, anonymous_reads=anonymous_reads)
    app.add_middleware(Probe, models=models)
    app.add_middleware(Guard, allowed_hosts=allowed_hosts, access=access, audit=audit, metrics=metrics)
    return app


def _document_roles(app: FastAPI) -> None:
    """Make the OpenAPI document state which calls need a bearer token, and which role (`x-role`)."""
    without_roles = app.openapi

    def with_roles() -> dict[str, Any]:
        document = without_roles()
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for calls in document["paths"].values():
            for call in calls.values():
                if role := RULES[call["operationId"]].role:
                    call |= {"x-role": role.name, "security": [{"token": []}]}
        return document

    # FastAPI's manual replaces the method in this way ("Extending OpenAPI").
    app.openapi = with_roles  # type: ignore[method-assign]


def _route_name(route: APIRoute) -> str:
    return route.name
