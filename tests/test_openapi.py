"""The OpenAPI document describes every answer: each is validated against it, down to each field."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields
from typing import Any

import pytest

from cachd import errors
from cachd.api.problems import Problem
from cachd.errors import CachdError
from cachd.report.values import ErrorReport, ModelState
from cachd.transfer.progress import State
from tests.ground.models import noise
from tests.ground.node import Answer
from tests.ground.origin import Status
from tests.ground.site import MIB, Ground, said, until

Alone = Callable[..., Ground]


class Described:
    """A daemon whose answers are compared with its OpenAPI document."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        self.document = ground.node.ask("GET", "/openapi.json").document
        self.seen: set[tuple[str, str, int]] = set()
        self._strict = closed(self.document)

    def ask(self, method: str, path: str, body: object = None, *, expect: int) -> Answer:
        """Make a call, and check its status and its answer."""
        answer = self.ground.node.ask(method, path, body)
        assert answer.status == expect, (method, path, answer)
        template = self.template(path.partition("?")[0])
        self.check(answer, template, method.lower())
        self.seen.add((template, method.lower(), answer.status))
        return answer

    def check(self, answer: Answer, template: str, method: str) -> None:
        """Raises ValidationError unless the answer is as its schema says, with no other field."""
        responses = self.document["paths"][template][method]["responses"]
        stated = responses.get(str(answer.status)) or responses[f"{answer.status // 100}XX"]
        if answer.status == 204:
            assert "content" not in stated
            return
        media = said(answer, "Content-Type").partition(";")[0]
        content = stated["content"][media]
        if "json" in media:
            schema = closed(content["schema"]) | {"components": self._strict["components"]}
            jsonschema = importlib.import_module("jsonschema")  # compiles a grammar: only where it is needed
            jsonschema.Draft202012Validator(schema).validate(answer.document)

    def template(self, path: str) -> str:
        """The path of the document that a path of a request stands for; exact ones before patterns."""
        steps = path.split("/")
        alike = [
            each
            for each in self.document["paths"]
            if len(each.split("/")) == len(steps)
            and all(a == b or a.startswith("{") for a, b in zip(each.split("/"), steps, strict=True))
        ]
        return str(min(alike, key=lambda each: each.count("{")))

    def stated(self) -> set[tuple[str, str, int]]:
        """Every (path, method, status) of a success in the document."""
        return {
            (path, method, int(status))
            for path, calls in self.document["paths"].items()
            for method, call in calls.items()
            for status in call["responses"]
            if status.isdecimal()
        }


def closed(schema: Any) -> Any:
    """The schema with no other fields than those that it lists."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    if isinstance(found.get("properties"), dict) and found.get("type") == "object":
        found["additionalProperties"] = False
    return found


@pytest.fixture
def described(alone: Alone) -> Described:
    return Described(alone(keep_previous=1, limit_bytes="64MiB", models=[]))


def test_every_route_answers_as_the_document_says(described: Described) -> None:
    ground, ask = described.ground, described.ask
    models_of_all_states(described)
    jobs(described)
    leases_and_pins(described)
    space(described)
    the_node(described)
    ask("GET", "/v1/models/blue", expect=200)
    ask("GET", "/v1/models?limit=1", expect=200)
    ask("DELETE", "/v1/models/blue", expect=200)
    assert described.stated() - described.seen == set()
    assert ground.node.ask("GET", "/v1/models/blue").status == 404


def models_of_all_states(described: Described) -> None:
    """blue is ready and was replaced once, held is on its way, lost and slow have failed."""
    ground, ask = described.ground, described.ask
    for number in (1, 2):
        files = {"config.json": b"{}", "model.safetensors": noise(MIB, number)}
        ground.hub.tag("org/blue", f"v{number}", ground.hub.add("org/blue", files))
        begun = {"ref": f"hf://org/blue@v{number}", "name": "blue", "include": ["*"], "replace": True}
        ask("POST", "/v1/models", begun, expect=202)
        ground.node.wait_for("pull ended", name="blue", ref=begun["ref"])
    until(lambda: ground.node.ask("POST", "/v1/models", begun).status == 200)
    ask("POST", "/v1/models", begun, expect=200)
    ask("GET", "/v1/models/blue/ready", expect=200)
    ask("GET", "/v1/models/blue/ready?wait=1", expect=200)
    with ground.held("held"):
        ask("GET", "/v1/models/held", expect=200)
        ask("GET", "/v1/models/held/files", expect=200)
        ask("GET", "/v1/models/held/ready", expect=503)
    for name, status in (("lost", 404), ("slow", 503)):
        ground.origin.fault(f"/{name}", Status(status))
        ask("POST", "/v1/models", {"ref": ground.add(name), "name": name}, expect=202)
        ask("GET", f"/v1/models/{name}/ready?wait=60", expect=status)
        ask("GET", f"/v1/models/{name}", expect=200)
    ask("POST", "/v1/models", {"ref": ground.add("huge", 65 * MIB), "name": "huge"}, expect=202)
    ask("GET", "/v1/models/huge/ready?wait=60", expect=413)
    ask("GET", "/v1/models", expect=200)
    with ground.held("ended"):
        ask("DELETE", "/v1/models/ended/pull", expect=200)
    ask("DELETE", "/v1/models/ended/pull", expect=404)
    ask("GET", "/v1/models/blue/files?limit=1", expect=200)
    ask("GET", "/v1/models/nobody/files", expect=404)
    examined = ask("GET", "/v1/models/blue/preflight", expect=200)
    assert examined.document["findings"]
    ask("GET", "/v1/models/nobody/preflight", expect=404)
    resolved = ask("POST", "/v1/resolve", {"ref": "hf://org/blue@v1", "include": ["*.json"]}, expect=200)
    assert resolved.document["left_out"] is not None
    ask("POST", "/v1/resolve", {"ref": "hf://org/nothing"}, expect=403)
    examined = ask("POST", "/v1/preflight", {"ref": "hf://org/blue@v1"}, expect=200)
    assert examined.document["findings"]
    ask("POST", "/v1/preflight", {"ref": "hf://org/nothing"}, expect=403)
    ask("POST", "/v1/resolve", {}, expect=422)
    ask("GET", "/v1/models/nobody/ready", expect=404)
    ask("POST", "/v1/models", {"ref": "ftp://x/y"}, expect=400)
    ask("POST", "/v1/models", {"reff": "x"}, expect=422)
    ask("POST", "/v1/models/nobody/rollback", expect=404)
    ask("POST", "/v1/models/blue/rollback", expect=200)


def jobs(described: Described) -> None:
    """A verification that finds damage, and a warming."""
    ground, ask = described.ground, described.ask

    def ended(job: str) -> bool:
        return bool(ground.show("blue")[job]["state"] != "running")

    for job in ("verify", "warm"):
        ask("POST", f"/v1/models/blue/{job}", expect=202)
        until(lambda job=job: ended({"verify": "verification", "warm": "warming"}[job]))
        assert ask("GET", "/v1/models/blue", expect=200).document["name"] == "blue"
    ask("POST", "/v1/models/nobody/verify", expect=404)


def leases_and_pins(described: Described) -> None:
    """A lease and a pin on blue, of which the pin stays."""
    ask = described.ask
    taken = ask("POST", "/v1/models/blue/leases", {"seconds": 60, "holder": "a"}, expect=201).document
    ask("PUT", f"/v1/models/blue/leases/{taken['id']}", {"seconds": 90}, expect=200)
    assert ask("GET", "/v1/models/blue", expect=200).document["leases"] != []
    ask("GET", "/v1/capacity", expect=200)
    ask("DELETE", "/v1/models/blue", expect=409)
    ask("DELETE", f"/v1/models/blue/leases/{taken['id']}", expect=204)
    ask("PUT", f"/v1/models/blue/leases/{taken['id']}", {"seconds": 90}, expect=404)
    ask("PUT", "/v1/models/blue/pin", expect=204)
    ask("POST", "/v1/evictions?dry_run=true", {"bytes": "63MiB"}, expect=200)
    ask("POST", "/v1/evictions", {"bytes": "63MiB"}, expect=507)
    ask("DELETE", "/v1/models/blue/pin", expect=204)


def space(described: Described) -> None:
    """An eviction that was planned and then done, and a sweep."""
    ground, ask = described.ground, described.ask
    ground.have("victim", 6 * MIB)
    planned = ask("POST", "/v1/evictions?dry_run=true", {"ref": ground.add("new", 60 * MIB)}, expect=200)
    assert planned.document["evictions"] != []
    assert ask("POST", "/v1/evictions", {"bytes": "55MiB"}, expect=200).document["evictions"] != []
    assert ask("GET", "/v1/evictions", expect=200).document["evictions"] != []
    ground.have("again", MIB)
    assert ask("GET", "/v1/capacity", expect=200).document["snapshots"] != []
    for dry_run in (True, False):
        ask("POST", "/v1/sweeps", {"dry_run": dry_run, "everything": True}, expect=200)
    if "blue" not in [each["name"] for each in ask("GET", "/v1/models", expect=200).document["models"]]:
        ask("POST", "/v1/models", {"ref": "hf://org/blue@v2", "name": "blue"}, expect=202)
        ground.node.ready("blue")


def the_node(described: Described) -> None:
    """The routes that concern the node, with a required model that is absent."""
    ground, ask = described.ground, described.ask
    for path in ("/livez", "/readyz", "/metrics", "/v1/scrubs", "/v1/options", "/v1/limits"):
        ask("GET", path, expect=200)
    ask("GET", "/v1/events?follow=false", expect=200)
    ask("GET", "/v1/sources", expect=200)
    ask("GET", "/v1/sources?ref=hf://org/model", expect=200)
    ask("PUT", "/v1/limits", {"bytes_per_second": 10**9, "sources": {"hf": 10**8}}, expect=200)
    required = {"ref": f"{ground.origin.url}/lost", "name": "needed", "required": True}
    entries = [{"prefix": "hf://acme/", "allow": ["*.json"]}]
    ground.node.configure(**{**ground.node.options, "models": [required], "sources": entries})
    until(lambda: ground.node.ask("GET", "/readyz?set=required").status == 503)
    ask("GET", "/readyz?set=required", expect=503)
    ask("GET", "/v1/options", expect=200)
    ask("GET", "/v1/sources", expect=200)
    ask("GET", "/v1/sources?ref=hf://acme/model", expect=200)


@pytest.mark.parametrize(
    "dropped", [("ModelReport", "in_use"), ("ReadyReport", "hub"), ("HubReport", "commit")], ids=".".join
)
def test_a_field_that_the_document_lacks_is_noticed(ground: Ground, dropped: tuple[str, str]) -> None:
    """Of the test above: its comparison is strict."""
    ground.have("strict.bin")
    described = Described(ground)
    described.ask("GET", "/v1/models/strict.bin", expect=200)
    lacking = deepcopy(described.document)
    del lacking["components"]["schemas"][dropped[0]]["properties"][dropped[1]]
    described._strict = closed(lacking)
    with pytest.raises(importlib.import_module("jsonschema").ValidationError):
        described.ask("GET", "/v1/models/strict.bin", expect=200)


def test_the_report_of_an_error_has_the_fields_of_every_class_of_error() -> None:
    def below(kind: type[CachdError]) -> list[type[CachdError]]:
        return [kind, *(each for direct in kind.__subclasses__() for each in below(direct))]

    reported = {each.name for each in fields(ErrorReport)}
    ours = [kind for kind in below(CachdError) if kind.__module__ == errors.__name__]
    assert {each.name for kind in ours for each in fields(kind)} | {"error_class"} == reported
    assert reported < {each.name for each in fields(Problem)}


def test_the_document_names_no_schema_that_it_lacks(ground: Ground) -> None:
    text = json.dumps(ground.node.ask("GET", "/openapi.json").document)
    named = {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(json.loads(text)["components"]["schemas"])


def test_a_model_has_the_states_of_a_pull_and_two_of_a_snapshot() -> None:
    """Clients see one enum, so it repeats those of a pull."""
    assert {state.value for state in ModelState} == {state.value for state in State} | {"damaged", "refused"}
