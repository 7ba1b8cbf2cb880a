"""The calls about the node, made to the application in this process, and what wrong calls are answered."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from structlog.testing import capture_logs

from cachd.api.node import router
from cachd.api.problems import _is_json, problem
from cachd.errors import Forbidden, NoSpace, Unauthorized, Unavailable
from tests.ground.in_process import Api
from tests.ground.models import noise
from tests.ground.node import Answer
from tests.ground.origin import Origin
from tests.ground.site import assert_problem, said
from tests.test_api_models import statuses

KIB = 1 << 10


async def pulled(api: Api, origin: Origin, name: str) -> str:
    ref = origin.add(f"/{name}", noise(KIB, len(name)))
    await api.ask("POST", "/v1/models", {"ref": ref, "name": name})
    assert (await api.ask("GET", f"/v1/models/{name}/ready?wait=60")).status == 200
    return ref


async def document(api: Api, path: str) -> Any:
    answer = await api.ask("GET", path)
    assert answer.status == 200, answer
    return answer.document


# --- the node ---


async def test_limits_are_shown_replaced_and_lifted(api: Api) -> None:
    assert await document(api, "/v1/limits") == {"bytes_per_second": None, "sources": {}}
    limited = {"bytes_per_second": 1000, "sources": {"hf": 500}}
    assert (await api.ask("PUT", "/v1/limits", limited)).document == limited
    assert api.daemon.bandwidth.limits.bytes_per_second == 1000
    assert await document(api, "/v1/limits") == limited
    assert (await api.ask("PUT", "/v1/limits", {})).document == {"bytes_per_second": None, "sources": {}}


async def test_a_node_is_alive_and_ready_and_ready_for_its_required_models(api: Api, origin: Origin) -> None:
    assert await document(api, "/livez") == {"status": "alive"}
    assert await document(api, "/readyz?set=required") == {"status": "ready"}
    await pulled(api, origin, "here")
    api.required = ["here"]
    assert await document(api, "/readyz?set=required") == {"status": "ready"}
    api.required = [f"absent-{number:02}" for number in range(21)] + ["here"]
    assert await document(api, "/readyz") == {"status": "ready"}
    absent = await api.ask("GET", "/readyz?set=required")
    assert_problem(absent, 503, "not_ready")
    assert absent.document["models"] == [f"absent-{number:02}" for number in range(21)]
    assert absent.document["detail"].startswith("21 required models are not ready: absent-00, ")
    assert absent.document["detail"].endswith(", absent-19")
    assert said(absent, "Retry-After") == "5"
    assert_problem(await api.ask("GET", "/readyz?set=other"), 422, "invalid_request")


async def test_options_and_sources_are_shown(api: Api, root: Path) -> None:
    options = await document(api, "/v1/options")
    values = {each["key"]: each["value"] for each in options["options"]}
    assert (values["root"], values["retries"]) == (str(root), 0)
    assert (options["file"]["path"], options["file"]["in_force"]) == (None, True)
    assert isinstance((await document(api, "/v1/sources"))["sources"], list)
    allowed = await document(api, "/v1/sources?ref=http://127.0.0.1/x")
    assert (allowed["ref"], allowed["verdict"]) == ("http://127.0.0.1/x", "allowed")
    assert allowed["error"] is None
    assert (await api.ask("GET", "/v1/sources?ref=no:such")).status == 400
    assert (await api.ask("GET", f"/v1/sources?ref={'x' * 2049}")).status == 422


async def test_metrics_come_in_the_format_that_the_caller_accepts(api: Api) -> None:
    plain = await api.ask("GET", "/metrics")
    assert said(plain, "Content-Type").startswith("text/plain")
    assert b"cachd_build_info" in plain.document
    assert said(plain, "Vary") == "Accept"
    openmetrics = await api.ask("GET", "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert said(openmetrics, "Content-Type").startswith("application/openmetrics-text")
    assert openmetrics.document.endswith(b"# EOF\n")


SUCCESSES = {
    "post /v1/models": {"200", "202"},
    "post /v1/models/{name}/verify": {"202"},
    "post /v1/models/{name}/warm": {"202"},
    "post /v1/models/{name}/leases": {"201"},
    "delete /v1/models/{name}/leases/{lease}": {"204"},
    "put /v1/models/{name}/pin": {"204"},
    "delete /v1/models/{name}/pin": {"204"},
}


def test_each_call_about_the_node_states_the_statuses_that_it_answers_with() -> None:
    described = ("limits", "set_limits", "options", "sources", "livez", "readyz")
    assert statuses(router) == {
        **dict.fromkeys(described, (None, {200})),
        **dict.fromkeys(("metrics", "openapi"), (None, set())),
    }


async def test_the_openapi_document_states_the_status_of_each_success(api: Api) -> None:
    paths = (await document(api, "/openapi.json"))["paths"]
    stated = {
        f"{method} {path}": {status for status in call["responses"] if status.isdecimal()}
        for path, calls in paths.items()
        for method, call in calls.items()
    }
    assert {call: statuses for call, statuses in stated.items() if statuses - {"422"} != {"200"}} == SUCCESSES


async def test_the_openapi_document_names_the_role_that_each_call_needs(api: Api) -> None:
    described = await document(api, "/openapi.json")
    assert await document(api, "/openapi.json") == described
    paths = described["paths"]
    assert paths["/v1/limits"]["put"]["x-role"] == "admin"
    assert paths["/v1/limits"]["get"]["security"] == [{"token": []}]
    assert "x-role" not in paths["/livez"]["get"]
    assert described["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    answers = paths["/v1/sources"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert [each["$ref"].rpartition("/")[2] for each in answers["oneOf"]] == ["SourceEntries", "RefSettings"]
    events = paths["/v1/events"]["get"]["responses"]["200"]["content"]
    assert {"application/json", "text/event-stream"} == set(events)
    missing = {ref for ref in refs(described) if ref not in described["components"]["schemas"]}
    assert missing == set()


def refs(part: Any) -> set[str]:
    """The names of all schemas that a document refers to."""
    if isinstance(part, list):
        return set().union(*map(refs, part))
    if not isinstance(part, dict):
        return set()
    own = {part["$ref"].rpartition("/")[2]} if isinstance(part.get("$ref"), str) else set()
    return own.union(*map(refs, part.values()))


# --- wrong calls ---


async def test_an_unknown_path_and_a_wrong_method_are_told_apart(api: Api) -> None:
    unknown = await api.ask("GET", "/v1/no/such")
    assert_problem(unknown, 404, "no_such_path")
    assert unknown.document["detail"].startswith("GET /v1/no/such: ")
    wrong = await api.ask("DELETE", "/v1/limits")
    assert_problem(wrong, 405, "method_not_allowed")
    assert "PUT" in said(wrong, "Allow") or "GET" in said(wrong, "Allow")


WRONG: list[tuple[object, str]] = [
    ({"ref": "hf://org/m", "rev": 1}, "rev"),
    ({}, "ref"),
    ({"ref": 5}, "ref"),
    ({"ref": "hf://org/m", "priority": 101}, "priority"),
    ({"ref": "hf://org/m", "priority": -101}, "priority"),
    ({"ref": "hf://org/m", "include": ["x"] * 1001}, "include"),
    ({"ref": "hf://org/m", "exclude": ["x"] * 1001}, "exclude"),
    ({"ref": "hf://org/m", "copy": ["x"] * 1001}, "copy"),
    ({"ref": "hf://org/m", "weights": "x" * 101}, "weights"),
    ({"ref": "hf://org/m", "formats": "unsafe"}, "formats"),
]


@pytest.mark.parametrize(("body", "field"), WRONG)
async def test_a_wrong_field_is_named(api: Api, body: object, field: str) -> None:
    refused = await api.ask("POST", "/v1/models", body)
    assert_problem(refused, 422, "invalid_request")
    assert refused.document["detail"].startswith(f"the request is wrong: {field}")


async def test_many_wrong_fields_are_named_up_to_a_bound(api: Api) -> None:
    refused = await api.ask("POST", "/v1/models", {f"x{number}": 1 for number in range(30)})
    assert refused.status == 422
    assert refused.document["detail"].count(";") == 19
    longer = await api.ask("POST", "/v1/models", {f"{number}{'x' * 900}": 1 for number in range(9)})
    assert len(longer.document["detail"]) <= 2000


@pytest.mark.parametrize(
    ("kind", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/merge-patch+json", True),
        ("text/plain", False),
        ("application/x-www-form-urlencoded", False),
    ],
)
async def test_a_body_that_is_not_said_to_be_json_is_refused_with_the_header_that_it_lacks(
    api: Api, kind: str, *, is_json: bool
) -> None:
    body = json.dumps({"bytes": 0}).encode()
    answer = await api.ask("POST", "/v1/evictions", body, content_type=kind)
    assert answer.status == (200 if is_json else 422)
    if not is_json:
        assert "send the header Content-Type: application/json" in answer.document["detail"]


@pytest.mark.parametrize("body", [b"{", b"[1]"])
async def test_a_body_that_is_no_document_is_refused(api: Api, body: bytes) -> None:
    assert_problem(await api.ask("POST", "/v1/evictions", body), 422, "invalid_request")
    assert_problem(await api.ask("POST", "/v1/evictions"), 422, "invalid_request")


async def test_what_an_error_withholds_is_in_the_log_and_in_no_answer(api: Api) -> None:
    @api.app.get("/withholds")
    async def withholds(_: Request) -> None:
        raise Forbidden("no", code="private_address").withhold(address="10.0.0.1")

    with capture_logs() as logs:
        refused = await api.ask("GET", "/withholds")
    assert_problem(refused, 403, "private_address")
    assert "10.0.0.1" not in str(refused.document)
    assert [each["withheld"] for each in logs if each["event"] == "request refused"] == [
        {"address": "10.0.0.1"}
    ]


PROBLEMS = [
    (Unavailable("x", retry_after=0.2), 503, {"retry-after": "1"}),
    (Unavailable("x", retry_after=1.0), 503, {"retry-after": "1"}),
    (Unavailable("x", retry_after=1.1), 503, {"retry-after": "2"}),
    (Unavailable("x"), 503, {}),
    (NoSpace("x"), 507, {}),
    (Forbidden("x"), 403, {}),
    (Unauthorized("x"), 401, {"www-authenticate": 'Bearer realm="cachd"'}),
    (
        Forbidden("x", code="role_too_low"),
        403,
        {"www-authenticate": 'Bearer realm="cachd", error="insufficient_scope"'},
    ),
    (
        Forbidden("x", code="outside_namespaces"),
        403,
        {"www-authenticate": 'Bearer realm="cachd", error="insufficient_scope"'},
    ),
]


@pytest.mark.parametrize(("error", "status", "headers"), PROBLEMS)
def test_an_error_has_the_status_of_its_class_and_the_headers_that_clients_need(
    error: Any, status: int, headers: dict[str, str]
) -> None:
    answer = problem(error)
    assert answer.status_code == status
    given = {
        name: answer.headers[name] for name in ("retry-after", "www-authenticate") if name in answer.headers
    }
    assert given == headers
    assert answer.headers["content-type"] == "application/problem+json"
    told = json.loads(bytes(answer.body))
    assert (told["type"], told["status"], told["detail"]) == ("about:blank", status, "x")
    assert json.loads(bytes(problem(error, status=418).body))["title"] == "I'm a Teapot"


# --- pages ---


@pytest.mark.parametrize(("path", "kind"), [("/", "text/html"), ("/docs", "text/html")])
async def test_a_page_is_sent_once_and_then_known_by_its_tag(api: Api, path: str, kind: str) -> None:
    page = await api.ask("GET", path)
    assert page.status == 200
    assert said(page, "Content-Type").startswith(kind)
    assert b"<!-- token -->" not in page.document
    tag = said(page, "ETag")
    for known in (tag, f'"other", W/{tag}'):
        again = await api.ask("GET", path, if_none_match=known)
        assert (again.status, again.document) == (304, b"")
        assert said(again, "ETag") == tag
        assert said(again, "X-Frame-Options") == "DENY"
    other: Answer = await api.ask("GET", path, if_none_match='"other"')
    assert other.document == page.document


async def test_the_probe_of_a_ready_model_is_answered_as_by_the_route(api: Api, origin: Origin) -> None:
    ref = await pulled(api, origin, "m")
    quick = await api.ask("GET", "/v1/models/m/ready")
    routed = await api.ask("GET", "/v1/models/m/ready?wait=0")
    assert (quick.status, quick.document) == (200, routed.document)
    assert quick.document["ref"] == ref
    assert (await api.ask("GET", "/v1/models/m/ready")).document == quick.document
    sample = api.daemon.metrics.registry.get_sample_value
    assert sample("cachd_requests_total", {"op": "ready", "result": "2xx"}) == 4
    other = {"ref": origin.add("/other", noise(KIB)), "name": "m", "replace": True}
    await api.ask("POST", "/v1/models", other)
    pull = api.daemon.pulls.get("m")
    assert pull is not None
    await asyncio.wrap_future(pull.done)
    assert (await api.ask("GET", "/v1/models/m/ready")).document["ref"] == other["ref"]
    await api.ask("DELETE", "/v1/models/m")
    assert_problem(await api.ask("GET", "/v1/models/m/ready"), 404, "no_such_model")


@pytest.mark.parametrize(
    ("kind", "is_json"),
    [
        ("application/json", True),
        ("Application/JSON ; charset=utf-8", True),
        ("application/problem+json", True),
        ("text/json", False),
        ("text/x+json", False),
        ("application/x-www-form-urlencoded", False),
        (";application/json", False),
        (None, False),
    ],
)
def test_a_body_is_json_if_its_type_says_so(kind: str | None, *, is_json: bool) -> None:
    headers = [] if kind is None else [(b"content-type", kind.encode())]
    assert _is_json(Request({"type": "http", "headers": headers})) is is_json
