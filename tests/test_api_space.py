"""The calls about space, made to the application in this process: what is here, and what is evicted."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from cachd.api.space import router
from cachd.report.space import InUseReportedBy
from tests.ground.in_process import Api, running
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import assert_problem
from tests.test_api_models import statuses
from tests.test_api_node import document, pulled

KIB = 1 << 10


@pytest_asyncio.fixture
async def api(root: Path) -> AsyncIterator[Api]:
    allow = ("127.0.0.0/8", "http://127.0.0.1/")
    async with running(
        root=root, allow=allow, retries=0, reserve_free=0, reserve_inodes=0, limit_bytes="1MB"
    ) as made:
        yield made


async def test_an_eviction_is_planned_and_done(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    shown = await document(api, "/v1/capacity")
    assert [each["names"] for each in shown["snapshots"]] == [["m"]]
    nothing = (await api.ask("POST", "/v1/evictions", {"bytes": 0})).document
    assert (nothing["need_bytes"], nothing["evictions"], nothing["freed_bytes"]) == (0, [], 0)
    assert (await api.ask("POST", "/v1/evictions?dry_run=true", {"bytes": "1KB"})).document[
        "need_bytes"
    ] == 1000
    assert (await document(api, "/v1/evictions"))["evictions"] == []
    too_much = await api.ask("POST", "/v1/evictions", {"bytes": 1 << 60})
    assert too_much.status == 507
    for wrong in ({}, {"bytes": 1, "ref": "hf://org/model"}):
        assert_problem(await api.ask("POST", "/v1/evictions", wrong), 422, "invalid_request")


async def test_the_space_that_a_ref_needs_is_asked_of_its_source(api: Api, origin: Origin) -> None:
    ref = origin.add("/big", noise(9 * KIB))
    plan = await api.ask("POST", "/v1/evictions?dry_run=true", {"ref": ref})
    assert plan.status == 200
    assert plan.document["need_bytes"] >= 9 * KIB
    assert (await api.ask("POST", "/v1/evictions", {"ref": ref})).document["freed_bytes"] == 0


async def test_models_are_evicted_until_there_is_space_and_the_history_has_them(
    api: Api, origin: Origin
) -> None:
    for name in ("a", "b", "c"):
        ref = origin.add(f"/{name}", noise(250 * KIB, ord(name)))
        await api.ask("POST", "/v1/models", {"ref": ref, "name": name})
        assert (await api.ask("GET", f"/v1/models/{name}/ready?wait=60")).status == 200
    asked = {"bytes": "600KB"}
    plan = (await api.ask("POST", "/v1/evictions?dry_run=true", asked)).document
    assert len(plan["evictions"]) == 2
    assert len((await document(api, "/v1/models"))["models"]) == 3, "nothing was evicted"
    done = (await api.ask("POST", "/v1/evictions", asked)).document
    assert (done["need_bytes"], done["short_bytes"]) == (600_000, plan["short_bytes"])
    assert done["short_bytes"] > 0
    assert [each["names"] for each in done["evictions"]] == [each["names"] for each in plan["evictions"]]
    assert done["freed_bytes"] == sum(each["freed_bytes"] for each in done["evictions"]) > 500 * KIB
    assert len((await document(api, "/v1/models"))["models"]) == 1
    history = (await document(api, "/v1/evictions"))["evictions"]
    assert [each["names"] for each in history] == [each["names"] for each in reversed(done["evictions"])]


async def test_capacity_says_by_what_a_use_would_be_noticed(api: Api) -> None:
    by = InUseReportedBy.kernel if api.daemon.store.reports_open_files else InUseReportedBy.protections
    shown = await document(api, "/v1/capacity")
    assert shown["in_use_reported_by"] == by.value
    assert shown["snapshots"] == []


def test_each_call_about_space_states_the_statuses_that_it_answers_with() -> None:
    assert statuses(router) == dict.fromkeys(["capacity", "evictions", "evict"], (None, {200}))
