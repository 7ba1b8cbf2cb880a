"""What comes in over the API, made up from its own document and by hand: never more than a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.ground.hub import Hub
from tests.ground.node import Node
from tests.ground.site import MIB, PATIENCE_SECONDS, Ground, said
from tests.test_model import hostile, hostile_refs

CALLS = [
    ("GET", "/livez"),
    ("GET", "/readyz"),
    ("GET", "/metrics"),
    ("GET", "/v1/capacity"),
    ("GET", "/v1/limits"),
    ("PUT", "/v1/limits"),
    ("GET", "/v1/models"),
    ("POST", "/v1/models"),
    ("GET", "/v1/models/{name}"),
    ("DELETE", "/v1/models/{name}"),
    ("GET", "/v1/models/{name}/ready"),
    ("PUT", "/v1/models/{name}/pin"),
    ("DELETE", "/v1/models/{name}/pin"),
]
TAKES_WRONG = {  # where the document rules something out; what names a model is judged by 400 and 404
    ("GET", "/readyz"),
    ("PUT", "/v1/limits"),
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/{name}"),
    ("GET", "/v1/models/{name}/ready"),
}
TOP_LEVEL = {"models", "hub", "ready", "cache", ".cachd", "CACHEDIR.TAG"}
Alone = Callable[..., Ground]
GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
DOCUMENTED = [
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A daemon for generated requests alone: its Hub knows nothing, and nothing else is within reach."""
    with (
        Hub() as hub,
        Node(tmp_path_factory.mktemp("fuzzed") / "node", {"hf_endpoint": hub.url, "allow": []}) as node,
    ):
        yield node


def is_problem(status: int, content_type: str, told: Any) -> bool:
    """Whether an answer is a problem document (RFC 9457) about its own status, with a code and a detail."""
    if content_type != "application/problem+json":
        return False
    return told["status"] == status and bool(told["title"] and told["code"] and told["detail"])


@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [(*call, GOOD) for call in CALLS] + [(*call, BAD) for call in sorted(TAKES_WRONG)],
    ids=str,
)
def test_only_documented_answers_and_problem_documents_come_out(
    fuzzed: Node, method: str, path: str, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_dict(fuzzed.ask("GET", "/openapi.json").document)
    schema.config.update(base_url=fuzzed.url)
    outside = {place.name for place in fuzzed.root.parent.iterdir()}
    takes_input = "{" in path or method in ("POST", "PUT")

    with requests.Session() as session:

        @settings(
            max_examples=40 if takes_input else 5,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(schema[path][method].as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            answer = case.call(session=session, timeout=PATIENCE_SECONDS)
            assert answer.status_code != 500, answer.text
            content_type = answer.headers["content-type"][0] if answer.status_code >= 400 else ""
            assert answer.status_code < 400 or is_problem(answer.status_code, content_type, answer.json()), (
                answer.text
            )
            case.validate_response(answer, checks=DOCUMENTED)

        ask()
    assert {place.name for place in fuzzed.root.parent.iterdir()} == outside
    assert fuzzed.ask("GET", "/livez").status == 200
    assert "a request failed in a way it should not" not in fuzzed.output


def test_every_call_of_the_document_is_tried(fuzzed: Node) -> None:
    document = fuzzed.ask("GET", "/openapi.json").document
    calls = {(method.upper(), path) for path, calls in document["paths"].items() for method in calls}
    assert calls == set(CALLS)


@settings(max_examples=150, derandomize=True, database=None, deadline=None)
@given(hostile_refs, st.none() | hostile)
def test_no_hostile_ref_or_name_ends_in_more_than_a_refusal(fuzzed: Node, ref: str, name: str | None) -> None:
    asked = {"ref": ref, "name": name} if name is not None else {"ref": ref}
    answer = fuzzed.ask("POST", "/v1/models", asked)
    told = is_problem(answer.status, said(answer, "Content-Type"), answer.document)
    assert answer.status in (200, 202) or told, answer
    assert answer.status < 500
    assert {place.name for place in fuzzed.root.iterdir()} <= TOP_LEVEL


def test_a_thousand_equal_requests_are_one_pull_and_one_transfer(alone: Alone) -> None:
    ground = alone()
    ref = ground.add("wished.bin", MIB)
    hold = ground.origin.hold("/wished.bin", after=1000)
    asked = {"ref": ref, "name": "wished"}
    try:
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: ground.node.ask("POST", "/v1/models", asked), range(1000)))
    finally:
        hold.release()
    assert {(a.status, said(a, "Location")) for a in answers} == {(202, "/v1/models/wished")}
    assert ground.node.ready("wished").status == 200
    assert ground.node.metric("cachd_misses_total") == 1
    assert ground.origin.bytes_sent() == MIB
    assert ground.node.pull(ref, name="wished").status == 200
