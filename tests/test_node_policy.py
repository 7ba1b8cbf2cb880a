"""The admission policy that confines a daemon to its own node, decided by its own expressions."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import celpy
import pytest

from tests.test_chart import objects
from tests.test_daemonset import NEWEST, validate

pytestmark = pytest.mark.needs("helm")

Object = dict[str, Any]
TAINT = "cachd.dev/models-not-ready"
SIGNALS = {"labels": True, "condition": True, "startupTaint": TAINT}
NODE_NAME = "authentication.kubernetes.io/node-name"
NODE: Object = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "gpu-7", "labels": {"kubernetes.io/os": "linux", "models.cachd.dev/qwen": "ready"}},
    "spec": {"podCIDR": "10.0.7.0/24", "taints": [{"key": TAINT, "effect": "NoSchedule"}, {"key": "gpu"}]},
    "status": {"capacity": {"cpu": "8"}, "conditions": [{"type": "Ready", "status": "True"}]},
}


def policy(version: str = NEWEST, **signals: Any) -> list[Object]:
    """The policy and its binding; nothing if the chart leaves them out."""
    found = objects(version=version, nodeSignals={**SIGNALS, **signals})
    return [each for each in found if each["kind"].startswith("ValidatingAdmissionPolicy")]


@functools.cache
def program_of(expression: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(expression))


def value_of(expression: str, given: Any) -> Any:
    return program_of(expression).evaluate(given)


def refusals(
    new: Object | None,
    old: Object | None = NODE,
    *,
    operation: str = "UPDATE",
    node: str | None = "gpu-7",
    user: str = "system:serviceaccount:cachd:cachd",
    **signals: Any,
) -> list[str]:
    """Why the policy refuses a request; nothing when it admits it."""
    spec = policy(**signals)[0]["spec"]
    extra = {NODE_NAME: [node]} if node else {}
    request = {"operation": operation, "name": "gpu-7", "userInfo": {"username": user, "extra": extra}}
    document = {"object": new, "oldObject": old, "request": request}
    given: Any = {name: celpy.adapter.json_to_cel(value) for name, value in document.items()}
    if not all(value_of(each["expression"], given) for each in spec["matchConditions"]):
        return []
    given["variables"] = celpy.celtypes.MapType()
    for each in spec["variables"]:
        name = celpy.celtypes.StringType(each["name"])
        given["variables"][name] = value_of(each["expression"], given)
    return [each["message"] for each in spec["validations"] if not value_of(each["expression"], given)]


def changed(change: Callable[[Object], object]) -> Object:
    node = copy.deepcopy(NODE)
    change(node)
    return node


CONDITION = {"type": "CachdRequiredModelsReady", "status": "False"}
ADMITTED: dict[str, Callable[[Object], object]] = {
    "nothing": lambda node: None,
    "a new label of a model": lambda node: node["metadata"]["labels"].update({"models.cachd.dev/a": "ready"}),
    "a label of a model gone": lambda node: node["metadata"]["labels"].pop("models.cachd.dev/qwen"),
    "the condition": lambda node: node["status"]["conditions"].append(CONDITION),
    "the taint gone": lambda node: node["spec"]["taints"].pop(0),
}
REFUSED: dict[str, Callable[[Object], object]] = {
    "another label": lambda node: node["metadata"]["labels"].update({"a": "b"}),
    "another value of a label": lambda node: node["metadata"]["labels"].update({"kubernetes.io/os": "plan9"}),
    "a label of others gone": lambda node: node["metadata"]["labels"].pop("kubernetes.io/os"),
    "all labels gone": lambda node: node["metadata"].pop("labels"),
    "an annotation": lambda node: node["metadata"].update(annotations={"a": "b"}),
    "a finalizer": lambda node: node["metadata"].update(finalizers=["a/b"]),
    "another taint gone": lambda node: node["spec"]["taints"].pop(1),
    "all taints gone": lambda node: node["spec"].pop("taints"),
    "a taint more": lambda node: node["spec"]["taints"].append({"key": "a", "effect": "NoExecute"}),
    "the taint with another effect": lambda node: node["spec"]["taints"][0].update(effect="NoExecute"),
    "cordoned": lambda node: node["spec"].update(unschedulable=True),
    "another network": lambda node: node["spec"].update(podCIDR="10.0.0.0/24"),
    "the kubelet's condition": lambda node: node["status"]["conditions"][0].update(status="False"),
    "a condition gone": lambda node: node["status"].update(conditions=[]),
    "another condition": lambda node: node["status"]["conditions"].append({"type": "MemoryPressure"}),
    "more capacity": lambda node: node["status"]["capacity"].update(cpu="9"),
    "an address": lambda node: node["status"].update(addresses=[{"type": "InternalIP", "address": "::"}]),
}


@pytest.mark.parametrize("change", ADMITTED.values(), ids=ADMITTED)
def test_a_daemon_may_change_its_labels_its_condition_and_its_taint(
    change: Callable[[Object], object],
) -> None:
    assert refusals(changed(change)) == []


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_daemon_may_change_nothing_else_of_its_node(change: Callable[[Object], object]) -> None:
    assert refusals(changed(change))
    assert refusals(changed(change), user="system:node:gpu-7") == [], "others are not confined"


@pytest.mark.parametrize("node", ["gpu-8", None], ids=str)
def test_a_daemon_of_another_node_or_of_none_may_change_nothing(node: str | None) -> None:
    (message,) = refusals(changed(ADMITTED["the condition"]), node=node)
    assert "that its own pod runs on" in message


@pytest.mark.parametrize(("operation", "new", "old"), [("CREATE", NODE, None), ("DELETE", None, NODE)])
def test_a_daemon_may_neither_make_nor_delete_a_node(
    operation: str, new: Object | None, old: Object | None
) -> None:
    assert refusals(new, old, operation=operation)


def test_without_a_startup_taint_a_daemon_may_remove_no_taint() -> None:
    assert refusals(changed(ADMITTED["the taint gone"]), startupTaint="")


def test_the_policy_passes_the_schema_and_is_left_out_where_the_cluster_has_none() -> None:
    for version in ("1.30", NEWEST):
        found = policy(version)
        assert len(found) == 2
        for each in found:
            validate(each, version)
    assert policy("1.29") == []
    assert policy(admissionPolicy=False) == []
