"""The admission policy: which pods may mount the cache, decided by its own expressions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import celpy
import pytest
import yaml

from tests.test_daemonset import BASE, CACHE, DAEMON_POD, DEPLOYMENT, NEWEST, OBJECTS, validate

Object = dict[str, Any]
FILE = BASE / "admission/cache-mounts.yaml"
POLICY, BINDING = yaml.safe_load_all(FILE.read_text())
DAEMON_UID = DAEMON_POD["securityContext"]["runAsUser"]
EXAMPLE: Object = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "vllm", "namespace": "serving"},
    "spec": DEPLOYMENT["spec"]["template"]["spec"],
}


def value_of(expression: str, pod: Object, variables: Any) -> Any:
    """What a CEL expression says of a pod."""
    environment = celpy.Environment()
    program = environment.program(environment.compile(expression))
    return program.evaluate({"object": celpy.adapter.json_to_cel(pod), "variables": variables})


def refusals(pod: Object) -> list[str]:
    """Why the policy refuses a pod; nothing when it admits it."""
    variables = celpy.celtypes.MapType()
    for variable in POLICY["spec"]["variables"]:
        variables[celpy.celtypes.StringType(variable["name"])] = value_of(
            variable["expression"], pod, variables
        )
    return [
        each["message"]
        for each in POLICY["spec"]["validations"]
        if not value_of(each["expression"], pod, variables)
    ]


def changed(change: Callable[[Object], object]) -> Object:
    pod = copy.deepcopy(EXAMPLE)
    change(pod["spec"])
    return pod


def security(spec: Object, kind: str = "containers") -> Object:
    found: Object = spec[kind][0].setdefault("securityContext", {})
    return found


def host_path(spec: Object) -> Object:
    found: Object
    (found,) = (volume["hostPath"] for volume in spec["volumes"] if "hostPath" in volume)
    return found


REFUSED: dict[str, Callable[[Object], object]] = {
    "the daemon's uid for the pod": lambda spec: spec["securityContext"].update(runAsUser=DAEMON_UID),
    "the daemon's uid in a container": lambda spec: security(spec).update(runAsUser=DAEMON_UID),
    "the daemon's uid in an init container": lambda spec: security(spec, "initContainers").update(
        runAsUser=DAEMON_UID
    ),
    "the user of the image": lambda spec: spec["securityContext"].pop("runAsUser"),
    "no security context": lambda spec: spec.pop("securityContext"),
    "a container that keeps its capabilities": lambda spec: security(spec).pop("capabilities"),
    "a container that may change its uid": lambda spec: security(spec)["capabilities"].update(add=["SETUID"]),
    "a container that may hold any lease": lambda spec: security(spec)["capabilities"].update(add=["LEASE"]),
    "a container that may gain rights": lambda spec: security(spec).pop("allowPrivilegeEscalation"),
    "a privileged container": lambda spec: security(spec).update(privileged=True),
    "an ephemeral container without limits": lambda spec: spec.update(
        ephemeralContainers=[{"name": "debug", "image": "x"}]
    ),
    **{
        f"the same by way of {path}": lambda spec, path=path: (
            host_path(spec).update(path=path),
            security(spec).update(runAsUser=DAEMON_UID),
        )
        for path in (
            "/",
            "/var",
            "/var/lib/",
            f"{CACHE}/",
            f"{CACHE}/models",
            "/var//lib/cachd",
            "/var/./lib/cachd",
        )
    },
}
ADMITTED: dict[str, Callable[[Object], object]] = {
    "the example": lambda spec: None,
    "another uid in a container": lambda spec: security(spec).update(runAsUser=1000),
    "root without capabilities": lambda spec: spec["securityContext"].update(runAsUser=0),
    "a pod without the cache": lambda spec: (
        host_path(spec).update(path="/var/lib/cachd-other"),
        spec.pop("securityContext"),
    ),
    "a pod without volumes": lambda spec: (spec.pop("volumes"), spec.pop("securityContext")),
}


@pytest.mark.parametrize("change", REFUSED.values(), ids=REFUSED)
def test_a_pod_with_the_cache_that_is_or_can_become_the_daemon_s_uid_is_refused(
    change: Callable[[Object], object],
) -> None:
    assert refusals(changed(change))


@pytest.mark.parametrize("change", ADMITTED.values(), ids=ADMITTED)
def test_other_pods_are_admitted(change: Callable[[Object], object]) -> None:
    assert refusals(changed(change)) == []


def test_the_daemon_itself_is_admitted() -> None:
    pod = {"metadata": {"namespace": OBJECTS["DaemonSet"]["metadata"]["namespace"]}, "spec": DAEMON_POD}
    assert refusals(pod) == []
    assert refusals({**pod, "metadata": {"namespace": "another"}})


def test_the_policy_speaks_of_the_daemon_set_s_uid_root_and_namespace() -> None:
    told = {each["name"]: each["expression"] for each in POLICY["spec"]["variables"]}
    assert told["daemonUid"] == str(DAEMON_UID)
    assert told["root"] == f"'{CACHE}/'"
    assert told["ownNamespace"] == f"'{OBJECTS['Namespace']['metadata']['name']}'"
    assert BINDING["spec"] == {"policyName": POLICY["metadata"]["name"], "validationActions": ["Deny"]}


@pytest.mark.parametrize("version", ["1.30", NEWEST])
@pytest.mark.parametrize("document", [POLICY, BINDING], ids=lambda document: document["kind"])
def test_the_policy_passes_the_strict_schema(document: Object, version: str) -> None:
    validate(document, version)
