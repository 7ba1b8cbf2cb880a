"""The calls of /v1/models, made to the application in this process: statuses, headers, pages and effects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest_asyncio
from fastapi import APIRouter
from fastapi.routing import APIRoute

from cachd.api.models import router
from cachd.report.files import MAX_FILES_ON_A_PAGE
from cachd.report.models import MAX_ON_A_PAGE
from tests.ground.hub import Hub
from tests.ground.in_process import Api, running
from tests.ground.models import noise
from tests.ground.node import Answer
from tests.ground.origin import Origin, Status
from tests.ground.site import assert_problem, said

PATIENCE_SECONDS = 120
KIB = 1 << 10


@pytest_asyncio.fixture
async def api(root: Path) -> AsyncIterator[Api]:
    allow = ("127.0.0.0/8", "http://127.0.0.1/")
    async with running(root=root, allow=allow, retries=0, reserve_free=0, keep_previous=1) as made:
        yield made


async def pulled(api: Api, origin: Origin, name: str, size: int = KIB, **asked: Any) -> str:
    """Pull a model of one file and wait for it; its ref."""
    ref = origin.add(f"/{name}", noise(size, len(name)))
    assert (await api.ask("POST", "/v1/models", {"ref": ref, "name": name, **asked})).status == 202
    assert (await ready(api, name)).status == 200
    return ref


async def ready(api: Api, name: str, wait: int = 60) -> Answer:
    return await api.ask("GET", f"/v1/models/{name}/ready?wait={wait}")


async def show(api: Api, name: str) -> Any:
    answer = await api.ask("GET", f"/v1/models/{name}")
    assert answer.status == 200
    return answer.document


def statuses(of: APIRouter) -> dict[str, tuple[int | None, set[Any]]]:
    """The status of each call and those of its described answers, by its name."""
    routes = [route for route in of.routes if isinstance(route, APIRoute)]
    return {route.name: (route.status_code, set(route.responses)) for route in routes}


async def reached(hold: Any) -> None:
    assert await asyncio.to_thread(hold.reached.wait, PATIENCE_SECONDS)


async def ended(api: Api, name: str) -> None:
    """Wait for the end of a model's last pull."""
    pull = api.daemon.pulls.get(name)
    assert pull is not None
    await asyncio.wrap_future(pull.done)


# --- pulls ---


async def test_a_pull_is_accepted_while_it_runs_and_answered_once_it_is_ready(
    api: Api, origin: Origin
) -> None:
    ref = origin.add("/m", noise(6 * KIB))
    hold = origin.hold("/m", after=KIB)
    for _ in range(2):
        begun = await api.ask("POST", "/v1/models", {"ref": ref, "name": "m"})
        assert (begun.status, said(begun, "Location")) == (202, "/v1/models/m")
        assert begun.document["name"] == "m"
        assert begun.document["state"] != "ready"
    await reached(hold)
    early = await ready(api, "m", wait=0)
    assert_problem(early, 503, "not_ready")
    assert (early.document["state"], early.document["final"]) == ("downloading", False)
    assert 1 <= int(said(early, "Retry-After")) <= 60
    waiting = asyncio.create_task(ready(api, "m"))
    await asyncio.sleep(0)
    hold.release()
    answer = await waiting
    assert (answer.status, answer.document["ref"], answer.document["name"]) == (200, ref, "m")
    again = await api.ask("POST", "/v1/models", {"ref": ref, "name": "m"})
    assert (again.status, said(again, "Location"), again.document["state"]) == (200, "/v1/models/m", "ready")


async def test_a_name_is_taken_unless_the_call_replaces_it_and_goes_back_on_request(
    api: Api, origin: Origin
) -> None:
    first = await pulled(api, origin, "m")
    other = {"ref": origin.add("/other", noise(KIB)), "name": "m"}
    assert_problem(await api.ask("POST", "/v1/models", other), 409, "name_taken")
    assert (await api.ask("POST", "/v1/models", {**other, "replace": True})).status == 202
    await ended(api, "m")
    assert (await show(api, "m"))["ready"]["ref"] == other["ref"]
    back = await api.ask("POST", "/v1/models/m/rollback")
    assert (back.status, back.document["ready"]["ref"]) == (200, first)
    assert (await ready(api, "m")).document["ref"] == first
    assert_problem(await api.ask("POST", "/v1/models/unknown/rollback"), 404, "no_previous")


async def test_a_pull_asks_the_source_again_only_if_the_call_says_so(api: Api, origin: Origin) -> None:
    ref = await pulled(api, origin, "m")
    origin.forget()
    assert (await api.ask("POST", "/v1/models", {"ref": ref, "name": "m"})).status == 200
    assert origin.requests == []
    assert (await api.ask("POST", "/v1/models", {"ref": ref, "name": "m", "refresh": True})).status == 202
    await ended(api, "m")
    assert origin.requests


async def test_a_failed_pull_is_final_and_has_the_status_of_its_error(api: Api, origin: Origin) -> None:
    origin.fault("/lost", Status(404))
    await api.ask("POST", "/v1/models", {"ref": origin.add("/lost", b"x"), "name": "lost"})
    answer = await ready(api, "lost")
    assert answer.status == 404
    assert (answer.document["final"], answer.document["state"]) == (True, "failed")
    assert answer.document["error"]["code"] == answer.document["code"]
    unknown = await ready(api, "unknown", wait=0)
    assert_problem(unknown, 404, "no_such_model")
    assert "state" not in unknown.document


async def test_a_cancelled_pull_ends_before_its_answer(api: Api, origin: Origin) -> None:
    ref, hold = origin.add("/m", noise(6 * KIB)), origin.hold("/m", after=KIB)
    await api.ask("POST", "/v1/models", {"ref": ref, "name": "m"})
    await reached(hold)
    answer = await api.ask("DELETE", "/v1/models/m/pull")
    assert (answer.status, answer.document["state"]) == (200, "cancelled")
    pull = api.daemon.pulls.get("m")
    assert pull is not None
    assert pull.done.done()
    hold.release()
    assert_problem(await api.ask("DELETE", "/v1/models/unknown/pull"), 404, "no_such_model")


# --- pages ---


async def test_models_are_listed_by_name_in_pages_with_a_link_to_the_next(api: Api, origin: Origin) -> None:
    for name in ("c", "a", "b"):
        await pulled(api, origin, name)
    complete = await api.ask("GET", "/v1/models")
    assert [model["name"] for model in complete.document["models"]] == ["a", "b", "c"]
    assert "link" not in complete.headers
    assert "next" not in complete.document
    page = await api.ask("GET", "/v1/models?limit=2")
    assert [model["name"] for model in page.document["models"]] == ["a", "b"]
    assert (page.document["next"], said(page, "Link")) == ("b", '</v1/models?after=b&limit=2>; rel="next"')
    rest = await api.ask("GET", "/v1/models?after=b&limit=2")
    assert ([model["name"] for model in rest.document["models"]], "link" in rest.headers) == (["c"], False)


async def test_pages_have_bounds(api: Api) -> None:
    for query in (f"limit={MAX_ON_A_PAGE}", "limit=1", f"after={'x' * 200}"):
        assert (await api.ask("GET", f"/v1/models?{query}")).status == 200
    for query in (f"limit={MAX_ON_A_PAGE + 1}", "limit=0", f"after={'x' * 201}"):
        assert_problem(await api.ask("GET", f"/v1/models?{query}"), 422, "invalid_request")


async def test_files_are_listed_by_path_in_pages(api: Api, origin: Origin) -> None:
    contents = {"a.json": b"{}", "b/c.bin": noise(KIB), "d.bin": noise(9)}
    ref = origin.add_model("m", contents)
    await api.ask("POST", "/v1/models", {"ref": ref, "name": "m", "include": ["*.bin", "a.json"]})
    assert (await ready(api, "m")).status == 200
    page = (await api.ask("GET", "/v1/models/m/files?limit=2")).document
    assert [(file["path"], file["bytes"]) for file in page["files"]] == [
        ("a.json", 2),
        ("b/c.bin", KIB),
    ]
    rest = (await api.ask("GET", f"/v1/models/m/files?after={page['next']}")).document
    assert ([file["path"] for file in rest["files"]], "next" in rest) == (["d.bin"], False)
    for query, status in (
        (f"limit={MAX_FILES_ON_A_PAGE}", 200),
        (f"limit={MAX_FILES_ON_A_PAGE + 1}", 422),
        ("limit=1", 200),
        ("limit=0", 422),
        (f"after={'x' * 4096}", 200),
        (f"after={'x' * 4097}", 422),
    ):
        assert (await api.ask("GET", f"/v1/models/m/files?{query}")).status == status, query
    assert (await api.ask("GET", "/v1/models/unknown/files")).status == 404


async def test_a_wait_has_bounds(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    assert (await api.ask("GET", "/v1/models/m/ready")).status == 200
    for wait, status in ((3600, 200), (3601, 422), (0, 200), (-1, 422)):
        assert (await ready(api, "m", wait=wait)).status == status, wait


async def test_a_name_that_is_none_is_refused_by_each_call(api: Api) -> None:
    lease = {"seconds": 1}
    calls = [
        ("GET", "", None),
        ("GET", "/ready", None),
        ("GET", "/files", None),
        ("GET", "/preflight", None),
        ("DELETE", "", None),
        ("DELETE", "/pull", None),
        ("POST", "/rollback", None),
        ("POST", "/verify", None),
        ("POST", "/warm", None),
        ("PUT", "/leases/l", lease),
        ("DELETE", "/leases/l", None),
    ]
    for method, path, body in calls:
        refused = await api.ask(method, f"/v1/models/..bad{path}", body)
        assert_problem(refused, 400, "bad_name")


# --- pins, leases, deletes ---


async def test_a_pinned_model_is_deleted_only_by_force_and_an_unpinned_one_at_once(
    api: Api, origin: Origin
) -> None:
    await pulled(api, origin, "asked", pin=True)
    await pulled(api, origin, "later")
    assert (await show(api, "asked"))["pinned"] is True
    assert (await show(api, "later"))["pinned"] is False
    pinned = await api.ask("PUT", "/v1/models/later/pin")
    assert (pinned.status, pinned.document) == (204, b"")
    for name in ("asked", "later"):
        assert (await api.ask("DELETE", f"/v1/models/{name}")).status == 409
        assert (await ready(api, name)).status == 200
    unpinned = await api.ask("DELETE", "/v1/models/later/pin")
    assert (unpinned.status, unpinned.document) == (204, b"")
    assert (await show(api, "later"))["pinned"] is False
    deleted = await api.ask("DELETE", "/v1/models/later")
    assert deleted.status == 200
    assert (deleted.document["name"], deleted.document["configured"]) == ("later", False)
    assert deleted.document["freed_bytes"] >= KIB
    api.daemon.reclaim.keep(["asked"])
    forced = await api.ask("DELETE", "/v1/models/asked?force=true")
    assert (forced.status, forced.document["configured"]) == (200, True)
    for method, path in (("GET", ""), ("PUT", "/pin"), ("DELETE", "/pin"), ("DELETE", "")):
        assert_problem(await api.ask(method, f"/v1/models/later{path}"), 404, "no_such_model")


async def test_a_delete_ends_the_pull_of_the_model_first(api: Api, origin: Origin) -> None:
    ref, hold = origin.add("/m", noise(6 * KIB)), origin.hold("/m", after=KIB)
    await api.ask("POST", "/v1/models", {"ref": ref, "name": "m"})
    await reached(hold)
    assert (await api.ask("DELETE", "/v1/models/m")).status == 200
    hold.release()
    assert_problem(await ready(api, "m", wait=0), 404, "no_such_model")


async def test_a_lease_is_taken_renewed_and_released(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    taken = await api.ask("POST", "/v1/models/m/leases", {"seconds": 600, "holder": "pod/a"})
    lease = taken.document
    assert (taken.status, lease["name"], lease["holder"]) == (201, "m", "pod/a")
    place = f"/v1/models/m/leases/{lease['id']}"
    assert said(taken, "Location") == place
    assert (await api.ask("DELETE", "/v1/models/m")).status == 409
    renewed = await api.ask("PUT", place, {"seconds": 7 * 86400})
    assert (renewed.status, renewed.document["id"]) == (200, lease["id"])
    assert renewed.document["expires_at"] > lease["expires_at"]
    for _ in range(2):
        assert (await api.ask("DELETE", place)).status == 204
    assert (await api.ask("PUT", place, {"seconds": 1})).status == 404
    for wrong in ({"seconds": 0}, {"seconds": 7 * 86400 + 1}, {"seconds": 1, "holder": "x" * 201}):
        assert (await api.ask("POST", "/v1/models/m/leases", wrong)).status == 422, wrong
    assert (await api.ask("POST", "/v1/models/m/leases", {"seconds": 1, "holder": "x" * 200})).status == 201
    assert (await api.ask("POST", "/v1/models/unknown/leases", {"seconds": 1})).status == 404


# --- what a token may do ---

TOKENS = """
tokens:
  - {name: puller, role: pull, namespaces: ["m*"], token: of-the-puller}
  - {name: lead, role: admin, namespaces: ["m*"], token: of-the-lead}
  - {name: boss, role: admin, token: of-the-boss}
"""


async def test_a_token_pulls_and_deletes_only_what_its_role_and_namespaces_cover(
    hub: Hub, origin: Origin, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "tokens").write_text(TOKENS)
    hub.add("org/model", {"config.json": b"{}"})
    plain, shown = {"ref": origin.add("/m", b"x"), "name": "m"}, {"ref": "hf://org/model", "name": "mine"}
    options = {"allow": ("http://127.0.0.1/", "127.0.0.0/8"), "hf_endpoint": hub.url, "reserve_free": 0}
    async with running(root=root, token_file=tmp_path / "tokens", keep_previous=1, **options) as api:

        async def code(who: str, method: str, path: str, body: object = None) -> str:
            answer = await api.ask(method, path, body, authorization=f"Bearer of-the-{who}")
            return "" if answer.status < 300 else str(answer.document["code"])

        assert await code("puller", "POST", "/v1/models", {**plain, "pin": True}) == "role_too_low"
        assert await code("puller", "POST", "/v1/models", {**plain, "name": "x"}) == "outside_namespaces"
        assert await code("puller", "POST", "/v1/resolve", {**plain, "name": "x"}) == "outside_namespaces"
        assert await code("puller", "POST", "/v1/preflight", {**plain, "name": "x"}) == "outside_namespaces"
        assert await code("puller", "POST", "/v1/models", shown) == "outside_namespaces"
        assert await code("puller", "POST", "/v1/models", plain) == ""
        assert await code("boss", "POST", "/v1/models", shown) == ""
        for name in ("m", "mine"):
            assert (await ready(api, name)).status == 200
        replaces = {**plain, "name": "mine", "replace": True}
        assert await code("lead", "POST", "/v1/models", replaces) == "outside_namespaces"
        assert await code("lead", "DELETE", "/v1/models/mine") == "outside_namespaces"
        assert await code("boss", "POST", "/v1/models", replaces) == ""
        await ended(api, "mine")
        assert await code("lead", "POST", "/v1/models/mine/rollback") == "outside_namespaces"
        assert await code("boss", "POST", "/v1/models/mine/rollback") == ""
        assert await code("lead", "DELETE", "/v1/models/m") == ""


# --- jobs ---


async def test_a_verification_and_a_warming_are_begun_and_shown(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    for job, field, done in (("verify", "verification", "intact"), ("warm", "warming", "warm")):
        begun = await api.ask("POST", f"/v1/models/m/{job}")
        assert (begun.status, said(begun, "Location"), begun.document["name"]) == (202, "/v1/models/m", "m")
        assert begun.document["bytes"]["total"] == KIB
        parts = api.daemon
        running = parts.scrubs.verification("m") if job == "verify" else parts.warms.warming("m")
        assert running is not None
        assert await asyncio.to_thread(running.ended.wait, PATIENCE_SECONDS)
        assert (await show(api, "m"))[field]["state"] == done
        assert (await api.ask("POST", f"/v1/models/unknown/{job}")).status == 404


async def test_a_preflight_says_what_engines_would_find(api: Api, origin: Origin) -> None:
    await pulled(api, origin, "m")
    answer = await api.ask("GET", "/v1/models/m/preflight")
    assert (answer.status, answer.document["name"]) == (200, "m")
    assert (await api.ask("GET", "/v1/models/unknown/preflight")).status == 404


# --- what the document says ---

STATUSES = {
    "pull": (202, {200, 202}),
    "list_models": (None, {200}),
    "show": (None, {200}),
    "ready": (None, {200}),
    "pin": (204, set()),
    "unpin": (204, set()),
    "cancel": (None, {200}),
    "list_files": (None, {200}),
    "preflight": (None, {200}),
    "rollback": (None, {200}),
    "verify": (202, {202}),
    "warm": (202, {202}),
    "take_lease": (201, {201}),
    "renew_lease": (None, {200}),
    "release_lease": (204, set()),
    "delete": (None, {200}),
}


def test_each_call_states_the_statuses_that_it_answers_with() -> None:
    assert statuses(router) == STATUSES
