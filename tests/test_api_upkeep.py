"""The calls about upkeep, made to the application in this process: leftovers and scrubs."""

from __future__ import annotations

import asyncio

from cachd.api.upkeep import router
from tests.ground.in_process import Api
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.test_api_models import statuses
from tests.test_api_node import document, pulled

KIB = 1 << 10


async def test_leftovers_are_shown_and_then_removed(api: Api, origin: Origin) -> None:
    ref, hold = origin.add("/m", noise(6 * KIB)), origin.hold("/m", after=KIB)
    await api.ask("POST", "/v1/models", {"ref": ref, "name": "m"})
    assert await asyncio.to_thread(hold.reached.wait, 120)
    await api.ask("DELETE", "/v1/models/m/pull")
    hold.release()
    assert (await api.ask("POST", "/v1/sweeps")).document["swept"] == [], "they are kept for a while"
    shown = (await api.ask("POST", "/v1/sweeps", {"dry_run": True, "everything": True})).document
    removed = (await api.ask("POST", "/v1/sweeps", {"everything": True})).document
    assert (shown["dry_run"], removed["dry_run"]) == (True, False)
    assert shown["swept"]
    assert [each["kind"] for each in shown["swept"]] == [each["kind"] for each in removed["swept"]]
    assert removed["freed_bytes"] == sum(each["freed_bytes"] for each in removed["swept"]) > 0
    assert (await api.ask("POST", "/v1/sweeps", {"everything": True})).document["swept"] == []


async def test_scrubs_are_shown(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    shown = await document(api, "/v1/scrubs")
    assert (shown["reading"], shown["damaged"]) == (None, [])
    assert shown["interval_seconds"] == 604_800


def test_each_call_about_upkeep_states_the_statuses_that_it_answers_with() -> None:
    assert statuses(router) == dict.fromkeys(["scrubs", "sweep"], (None, {200}))
