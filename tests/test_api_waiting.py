"""The waits of callers for models: what ends them, and that they leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from fastapi import Request
from starlette.types import Message

from cachd.api.lanes import Lanes
from cachd.api.waiting import cancelled_by_hang_up, until_settled, until_stopped
from cachd.errors import Busy
from cachd.report.readiness import RETRY_SECONDS
from cachd.transfer.request import Pull
from tests.conftest import spec_of
from tests.ground.in_process import Api
from tests.ground.models import noise
from tests.ground.origin import Hold, Origin

PATIENCE_SECONDS = 60.0


@pytest.fixture
def lanes(api: Api) -> Lanes:
    found: Lanes = api.app.state.lanes
    return found


async def stays() -> Message:
    """Waits for ever, as if the client stayed connected and sent nothing."""
    await asyncio.Event().wait()
    raise AssertionError


async def hangs_up() -> Message:
    return {"type": "http.disconnect"}


def request(receive: Callable[[], Awaitable[Message]] = stays) -> Request:
    return Request({"type": "http"}, receive)


async def held(api: Api, origin: Origin) -> tuple[Pull, Hold]:
    """A pull of the model `m` that does not go on."""
    hold = origin.hold("/m", after=1)
    pull = api.daemon.pulls.start(spec_of(origin.add("/m", noise(64))))
    assert pull is not None
    assert await asyncio.to_thread(hold.reached.wait, PATIENCE_SECONDS)
    return pull, hold


async def test_a_wait_lasts_until_the_model_is_ready(api: Api, lanes: Lanes, origin: Origin) -> None:
    _, hold = await held(api, origin)
    waiting = asyncio.ensure_future(
        until_settled(request(), "m", api.daemon.models, lanes, seconds=PATIENCE_SECONDS)
    )
    for _ in range(9):
        await asyncio.sleep(0)
    assert not waiting.done()
    hold.release()
    await waiting
    assert api.daemon.store.names.get("m")
    await until_settled(request(), "m", api.daemon.models, lanes, seconds=PATIENCE_SECONDS)


async def test_a_wait_for_what_nobody_pulls_ends_at_once(api: Api, lanes: Lanes) -> None:
    await until_settled(request(), "absent", api.daemon.models, lanes, seconds=PATIENCE_SECONDS)


async def test_a_wait_ends_with_its_time_its_client_or_for_want_of_a_place(
    api: Api, lanes: Lanes, origin: Origin
) -> None:
    pull, _ = await held(api, origin)
    before = asyncio.all_tasks()
    for receive, seconds, within in (
        (stays, 0.05, lanes),
        (stays, 0.0, lanes),
        (hangs_up, PATIENCE_SECONDS, lanes),
        (stays, PATIENCE_SECONDS, Lanes(connections=0)),
    ):
        await until_settled(request(receive), "m", api.daemon.models, within, seconds=seconds)
        assert not pull.done.done()
        assert asyncio.all_tasks() == before
        if within is not lanes:
            within.close()


async def test_a_failure_of_a_wait_is_raised(api: Api, lanes: Lanes, origin: Origin) -> None:
    async def fails() -> Message:
        raise ZeroDivisionError

    await held(api, origin)
    with pytest.raises(ZeroDivisionError):
        await until_settled(request(fails), "m", api.daemon.models, lanes, seconds=PATIENCE_SECONDS)


async def test_the_end_of_a_cancelled_pull_is_awaited_if_there_is_a_place(
    api: Api, lanes: Lanes, origin: Origin
) -> None:
    pull, _ = await held(api, origin)
    full = Lanes(connections=0)
    with pytest.raises(Busy) as refused:
        await until_stopped(pull, full)
    full.close()
    assert refused.value.retry_after == RETRY_SECONDS
    stopping = asyncio.ensure_future(until_stopped(pull, lanes))
    for _ in range(9):
        await asyncio.sleep(0)
    assert not stopping.done()
    api.daemon.pulls.stop("m")
    await stopping
    assert pull.done.done()


async def test_a_token_is_cancelled_by_a_client_that_hangs_up_and_by_no_other() -> None:
    arriving: asyncio.Queue[Message] = asyncio.Queue()
    async with cancelled_by_hang_up(request(arriving.get)) as token:
        arriving.put_nowait({"type": "http.request"})
        for _ in range(9):
            await asyncio.sleep(0)
        assert not token.is_cancelled
    for _ in range(9):
        await asyncio.sleep(0)
    assert not token.is_cancelled, "nor by the end of the call"
    async with cancelled_by_hang_up(request(hangs_up)) as token:
        for _ in range(9):
            await asyncio.sleep(0)
        assert token.is_cancelled
