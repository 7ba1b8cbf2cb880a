"""What cachd tells Kubernetes, to a real API server, with the rights that the chart grants and no others."""

from __future__ import annotations

import urllib.error
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cachd.cluster.labels import label_of
from tests.ground.kube import Kube, Object
from tests.ground.site import until
from tests.test_chart import objects
from tests.test_node_signals import TAINT, Told

pytestmark = pytest.mark.needs("kube-apiserver", "helm")

NO_SCHEDULE = {"key": TAINT, "effect": "NoSchedule"}
GRANTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")


@pytest.fixture(scope="module")
def kube(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kube]:
    with Kube(tmp_path_factory.mktemp("kube")) as started:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "cachd"}}
        started.ask("POST", "/api/v1/namespaces", namespace)
        on = {"labels": True, "condition": True, "events": True, "startupTaint": TAINT}
        for each in objects(nodeSignals=on):
            if each["kind"] in GRANTS:
                started.create(each)
        yield started


class OfKube:
    """One node of the real server, with what `Told` asks of a server."""

    def __init__(self, kube: Kube, place: Path, name: str, **how: Any) -> None:
        kube.add_node(name, **how)
        self.url, self.pem, self.name, self._kube = kube.url, kube.pem, name, kube
        self.token_file = place / "token"
        self.token_file.write_text(kube.token_of("cachd", "cachd"))

    @property
    def node(self) -> Object:
        return self._kube.node(self.name)

    @property
    def labels(self) -> dict[str, str]:
        found = self.node["metadata"].get("labels", {}).items()
        return {key.partition("/")[2]: value for key, value in found if key.startswith("models.cachd.dev/")}

    @property
    def condition(self) -> Object:
        found = self.node["status"].get("conditions", [])
        return next((each for each in found if each["type"] == "CachdRequiredModelsReady"), {})

    @property
    def events(self) -> dict[str, Object]:
        path = f"/api/v1/namespaces/default/events?fieldSelector=involvedObject.name={self.name}"
        return {each["reason"]: each for each in self._kube.ask("GET", path)["items"]}


@pytest.fixture
def told(kube: Kube, tmp_path: Path) -> Iterator[Callable[..., tuple[OfKube, Told]]]:
    with ExitStack() as stack:

        def started(
            node: str, *required: str, taints: tuple[Object, ...] = (), **switches: Any
        ) -> tuple[OfKube, Told]:
            of_kube = OfKube(kube, tmp_path, node, taints=taints)
            found = Told(of_kube, **switches)
            found.require(*required)
            found.signals.start()
            stack.callback(found.signals.close)
            return of_kube, found

        yield started


Tells = Callable[..., tuple[OfKube, Told]]


def test_labels_come_and_go_beside_those_of_others(kube: Kube, told: Tells) -> None:
    node, models = told("labels", labels=True)
    long = "a" * 80
    models.set(qwen="ready", llama="downloading", **{long: "ready"})
    until(lambda: node.labels == {"qwen": "ready", "llama": "updating", label_of(long)[17:]: "ready"})
    merge = {"metadata": {"labels": {"team": "a", "models.cachd.dev/by-hand": "ready"}}}
    kube.ask("PATCH", "/api/v1/nodes/labels", merge, kind="application/merge-patch+json")
    models.set(llama="ready")
    until(lambda: node.labels == {"llama": "ready", "by-hand": "ready"})
    until(lambda: models.signals.are_written)
    assert node.node["metadata"]["labels"]["team"] == "a"
    version = node.node["metadata"]["resourceVersion"]
    models.signals._written = None  # look again at once
    until(lambda: models.signals.are_written)
    assert node.node["metadata"]["resourceVersion"] == version, "nothing differs, so nothing is written"


def test_the_condition_and_the_taint_follow_the_required_models(kube: Kube, told: Tells) -> None:
    other = {"key": "gpu", "effect": "NoSchedule"}
    node, models = told("taint", "qwen", taints=(other, NO_SCHEDULE), condition=True, taint=TAINT)
    until(lambda: node.condition.get("status") == "False")
    assert node.node["spec"]["taints"] == [other, NO_SCHEDULE]
    kubelet = {"status": {"conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}]}}
    kind = "application/strategic-merge-patch+json"
    kube.ask("PATCH", "/api/v1/nodes/taint/status", kubelet, kind=kind)
    models.set(qwen="ready")
    until(lambda: node.condition["status"] == "True")
    until(lambda: node.node["spec"]["taints"] == [other])
    found = {each["type"]: each["status"] for each in node.node["status"]["conditions"]}
    assert found == {"CachdRequiredModelsReady": "True", "Ready": "True"}


def test_an_event_that_happens_again_is_counted(told: Tells) -> None:
    node, models = told("events", events=True)
    models.log("pull ended", name="qwen", state="failed", code="no_space")
    until(lambda: "ModelPullFailed" in node.events)
    models.log("pull ended", name="qwen", state="failed", code="no_space")
    until(lambda: node.events["ModelPullFailed"]["count"] == 2)
    found = node.events["ModelPullFailed"]
    assert found["message"] == "the pull of qwen failed: no_space; cachd show qwen has the reason"
    assert found["involvedObject"]["uid"] == node.node["metadata"]["uid"]
    assert (found["type"], found["source"]) == ("Warning", {"component": "cachd", "host": "events"})


def test_a_node_that_is_gone_is_not_made_again(kube: Kube, told: Tells) -> None:
    node, models = told("gone", labels=True)
    until(lambda: models.signals.are_written)
    kube.ask("DELETE", "/api/v1/nodes/gone")
    models.set(qwen="ready")
    until(lambda: models.value("cachd_node_signal_failures_total", reason="refused") >= 1)
    with pytest.raises(urllib.error.HTTPError):
        _ = node.node
