"""Resolving and examining a ref, asked of the application in this process."""

from __future__ import annotations

from cachd.api.resolve import router
from tests.ground.in_process import Api
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import assert_problem
from tests.test_api_models import statuses
from tests.test_api_node import document

KIB = 1 << 10


async def test_a_ref_is_resolved_and_nothing_is_pulled(api: Api, origin: Origin) -> None:
    ref = origin.add("/big", noise(9 * KIB))
    answer = await api.ask("POST", "/v1/resolve", {"ref": ref, "seconds": 600})
    assert (answer.status, answer.document["ref"]) == (200, ref)
    assert [file["path"] for file in answer.document["files"]] == ["big"]
    assert (await document(api, "/v1/models")) == {"models": []}
    for wrong in (0, 601):
        assert (await api.ask("POST", "/v1/resolve", {"ref": ref, "seconds": wrong})).status == 422
    examined = await api.ask("POST", "/v1/preflight", {"ref": ref})
    assert (examined.status, examined.document["ref"]) == (200, ref)


async def test_what_a_pull_would_be_refused_for_is_the_answer(api: Api, origin: Origin) -> None:
    paths = ["/v1/resolve", "/v1/preflight"]
    assert [getattr(route, "path", "") for route in router.routes] == paths
    for path in paths:
        assert_problem(await api.ask("POST", path, {"ref": "https://10.0.0.1/m"}), 403, "private_address")
        assert_problem(await api.ask("POST", path, {"ref": f"{origin.url}/absent"}), 404, "file_not_found")


def test_each_call_about_a_ref_states_the_statuses_that_it_answers_with() -> None:
    assert statuses(router) == dict.fromkeys(["resolve", "preflight_ref"], (None, {200}))
