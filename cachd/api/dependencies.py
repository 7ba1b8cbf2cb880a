"""What the routes get from the application."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from cachd.api.lanes import Lanes
from cachd.metrics import Metrics
from cachd.report.events import EventLog
from cachd.report.models import Models
from cachd.report.space import KubeletReport
from cachd.report.status import StatusFiles
from cachd.transfer.bandwidth import Bandwidth
from cachd.transfer.reclaim import Reclaim
from cachd.upkeep.scrubs import Scrubs
from cachd.upkeep.sweeps import Sweeps


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The objects of the daemon that the routes call.

    `required` returns the names of the models that /readyz?set=required checks. `options` returns the
    document of /v1/options. `sources` returns the document of /v1/sources, for one ref or for None. `kubelet`
    returns the kubelet's thresholds.
    """

    models: Models
    metrics: Metrics
    bandwidth: Bandwidth
    sweeps: Sweeps
    scrubs: Scrubs
    reclaim: Reclaim
    status: StatusFiles
    events: EventLog
    required: Callable[[], Collection[str]]
    options: Callable[[], dict[str, object]]
    sources: Callable[[str | None], dict[str, object]]
    kubelet: Callable[[], KubeletReport | None]


async def services_of(request: Request) -> Services:
    """The services of the application. A coroutine, because FastAPI runs a plain function in a thread."""
    services: Services = request.app.state.services
    return services


async def models_of(request: Request) -> Models:
    """The models of the application."""
    services: Services = request.app.state.services
    return services.models


async def lanes_of(request: Request) -> Lanes:
    """The lanes for the application's expensive calls."""
    lanes: Lanes = request.app.state.lanes
    return lanes


AnyServices = Annotated[Services, Depends(services_of)]
AnyModels = Annotated[Models, Depends(models_of)]
AnyLanes = Annotated[Lanes, Depends(lanes_of)]
