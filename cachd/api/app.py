"""Builds the FastAPI application: all routers behind the guard, with every failure as a problem document."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import APIRoute

from cachd import __version__
from cachd.api import events as event_routes
from cachd.api import models as model_routes
from cachd.api import node as node_routes
from cachd.api import pages, problems, schema
from cachd.api import resolve as resolve_routes
from cachd.api import space as space_routes
from cachd.api import upkeep as upkeep_routes
from cachd.api.access import Access, Tokens, check_complete
from cachd.api.admission import most_connections
from cachd.api.audit import Audit
from cachd.api.dependencies import Services
from cachd.api.guard import Guard
from cachd.api.lanes import Lanes
from cachd.api.probe import Probe
from cachd.kernel import threads
from cachd.report.values import adapter

_THREADS = 32
ROUTERS = (
    model_routes.router,
    resolve_routes.router,
    node_routes.router,
    space_routes.router,
    upkeep_routes.router,
    event_routes.router,
    pages.router,
)


def create_app(
    services: Services, *, tokens: Tokens | None, anonymous_reads: bool, allowed_hosts: Collection[str]
) -> FastAPI:
    """The API of one store and its pulls. Without `tokens` (None), every caller may do everything."""
    audit, lanes = Audit(services.metrics), Lanes(connections=most_connections())
    app = FastAPI(
        lifespan=_lifespan(audit, lanes),
        openapi_url=None,  # node.py serves it and renders it only once
        title="cachd",
        version=__version__,
        description="Node-local model cache: pull once, verify every byte, serve every pod.",
        generate_unique_id_function=_route_name,
        responses=schema.PROBLEMS,
    )
    app.state.services, app.state.lanes, app.state.described = services, lanes, None
    routes = [*app.routes, *(route for router in ROUTERS for route in router.routes)]
    check_complete(routes)
    for router in ROUTERS:
        app.include_router(router)
    problems.install(app)
    schema.install(app)
    access = Access(routes, tokens, anonymous_reads=anonymous_reads)
    app.add_middleware(Probe, models=services.models)
    app.add_middleware(
        Guard, allowed_hosts=allowed_hosts, access=access, audit=audit, metrics=services.metrics
    )
    return app


def _lifespan(audit: Audit, lanes: Lanes) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    blocking = threads.pool(_THREADS, "api")

    @asynccontextmanager
    async def with_threads(_app: FastAPI) -> AsyncIterator[None]:
        """Give asyncio.to_thread enough threads that a few slow calls do not delay the others."""
        asyncio.get_running_loop().set_default_executor(blocking)
        blocking.submit(adapter, problems.Problem)  # it takes some milliseconds, for which nobody should wait
        yield
        audit.close()
        lanes.close()

    return with_threads


def _route_name(route: APIRoute) -> str:
    return route.name
