"""The schemas that routes name, and small answers, made without an application."""

from __future__ import annotations

import json

import pytest
from fastapi import FastAPI

from cachd.api.answers import Alive, LeaseReport, LimitsReport, NodeReady, answer, json_answer
from cachd.api.schema import EVENT_STREAM, answers, install
from cachd.model import Limits
from cachd.store.leases import Lease

JSON = "application/json"


def ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def test_a_route_that_answers_with_one_report_names_it_and_one_of_several_all() -> None:
    one = answers({200: Alive})[200]
    assert (one["content"], one["description"]) == ({JSON: {"schema": ref("Alive")}}, "The process answers.")
    several = answers({202: Alive, 200: (Alive, NodeReady)})
    assert several.keys() == {200, 202}
    assert several[200]["content"] == {JSON: {"schema": {"oneOf": [ref("Alive"), ref("NodeReady")]}}}
    assert several[200]["description"].startswith("The process answers. Or: The cache's file system")


def test_a_stream_is_described_beside_the_page() -> None:
    content = answers({200: Alive}, stream=(NodeReady,))[200]["content"]
    assert content.keys() == {JSON, EVENT_STREAM}
    sent = content[EVENT_STREAM]["itemSchema"]["properties"]
    assert sent["data"]["contentSchema"] == {"oneOf": [ref("NodeReady")]}
    assert sent.keys() == {"data", "event", "id", "retry"}


@pytest.mark.parametrize(("name", "role"), [("livez", None), ("set_limits", "admin")])
def test_the_document_has_the_schemas_and_the_role_of_each_call(name: str, role: str | None) -> None:
    app = FastAPI(generate_unique_id_function=lambda route: route.name)

    async def call(number: int) -> None: ...

    app.add_api_route("/call", call, name=name, responses=answers({200: Alive}))
    install(app)
    document = app.openapi()
    schemas = document["components"]["schemas"]
    assert schemas["Alive"]["properties"]["status"]["const"] == "alive"
    assert {"Problem", "NodeReady"} <= schemas.keys()
    found = document["paths"]["/call"]["get"]
    assert (found.get("x-role"), found.get("security")) == (role, [{"token": []}] if role else None)


def test_an_answer_has_its_status_and_headers() -> None:
    plain, made = answer(Alive()), json_answer(b"{}", 201, {"Location": "/x"})
    assert (plain.status_code, json.loads(bytes(plain.body))) == (200, {"status": "alive"})
    assert (made.status_code, made.body, made.headers["location"]) == (201, b"{}", "/x")
    assert {each.headers["content-type"] for each in (plain, made)} == {JSON}


def test_reports_have_what_they_are_of() -> None:
    lease = LeaseReport.of(Lease("id", "m", "pod/a", 0.0))
    assert (lease.id, lease.name, lease.holder) == ("id", "m", "pod/a")
    assert str(lease.expires_at).startswith("1970-01-01T00:00:00")
    limits = LimitsReport.of(Limits(5, {"hf": 3}))
    assert (limits.bytes_per_second, limits.sources) == (5, {"hf": 3})
