"""Waits for models on behalf of callers, without a thread for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Request

from cachd.api.lanes import Lanes
from cachd.errors import Busy
from cachd.report.models import Models
from cachd.report.readiness import RETRY_SECONDS
from cachd.sources.cancel import CancelToken
from cachd.transfer.request import Pull

_POLL_SECONDS = 0.2


async def until_settled(request: Request, name: str, models: Models, lanes: Lanes, *, seconds: float) -> None:
    """Return when the model is ready, when no pull or repair for it is left, or when the client disconnects.

    Returns after `seconds` at the latest, and at once when too many callers wait. The caller then looks at
    the model again.
    """
    with lanes.waits.one() as may_wait:
        if seconds and may_wait:
            await _while_client_stays(request, _settled(name, models, lanes), seconds)


async def until_stopped(pull: Pull, lanes: Lanes) -> None:
    """Return when a cancelled pull has ended. Raises Busy when too many callers wait.

    The event loop waits, not a thread, because many callers may wait for one slow source.
    """
    with lanes.waits.one() as may_wait:
        if not may_wait:
            raise Busy("too many calls wait for pulls", hint="try again later", retry_after=RETRY_SECONDS)
        await lanes.waits.end_of(pull.done)


async def _settled(name: str, models: Models, lanes: Lanes) -> None:
    """Return when a model is ready, or when neither a pull nor a repair is about to make it ready."""
    while not models.store.names.get(name):
        if running := models.pulls.awaited(name):
            await lanes.waits.end_of(running.done)
        elif models.store.names.quarantine_of(name) and not models.is_final(name):
            await asyncio.sleep(_POLL_SECONDS)  # the daemon has not started its repair yet
        else:
            return


async def _while_client_stays(request: Request, work: Coroutine[Any, Any, None], seconds: float) -> None:
    """Run `work` until it ends, `seconds` have passed, or the client has hung up."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(ended, Exception):  # CancelledError is none
                raise ended


@asynccontextmanager
async def cancelled_by_hang_up(request: Request) -> AsyncIterator[CancelToken]:
    """Yields a cancel token, which is cancelled when the client hangs up during the block."""
    token = CancelToken()
    watching = asyncio.ensure_future(_hung_up(request))
    watching.add_done_callback(lambda ended: None if ended.cancelled() else token.cancel())
    try:
        yield token
    finally:
        watching.cancel()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
