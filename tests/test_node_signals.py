"""What cachd tells Kubernetes about its node, over real TLS connections to a server that speaks that API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cachd.cluster.api_server import ApiServer, Place
from cachd.cluster.pace import Pace
from cachd.cluster.signals import NodeSignals, Seen, Switches, Watched
from cachd.metrics import Metrics
from cachd.report.events import EventLog
from cachd.report.values import ModelState
from tests.ground.kube_api import Call, Handler, KubeApi
from tests.ground.site import until

# No wait of its own: what is slow here is the test machine.
QUICK = Pace(look=0.01, settle=0.0, each=0.01, burst=1000, check=3600.0, chance=lambda: 0.0)
TAINT = "cachd.dev/models-not-ready"


class Told:
    """The signals of one node, and the models that they are made from, which a test changes."""

    def __init__(self, api: KubeApi, pace: Pace = QUICK, seconds: float = 30.0, **switches: Any) -> None:
        self.states: dict[str, ModelState] = {}
        self.required: set[str] = set()
        self.is_configuration_right = True
        self.events, self.metrics = EventLog(), Metrics()
        place = Place(api.url, api.token_file, api.pem)
        self.signals = NodeSignals(
            Switches(api.name, **{"max_labels": 50, **switches}),
            ApiServer(place, seconds=seconds),
            Watched(self.look, self.events),
            self.metrics,
            pace=pace,
        )

    def look(self) -> Seen:
        return Seen(dict(self.states), frozenset(self.required), self.is_configuration_right)

    def set(self, **states: str) -> None:
        self.states = {name.replace("_", "-"): ModelState(state) for name, state in states.items()}

    def require(self, *names: str) -> None:
        self.required = set(names)

    def log(self, event: str, **fields: Any) -> None:
        self.events(None, "info", {"event": event, **fields})

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


@pytest.fixture
def api(tmp_path: Path) -> Iterator[KubeApi]:
    with KubeApi(tmp_path) as started:
        yield started


@pytest.fixture
def tell(api: KubeApi) -> Iterator[Callable[..., Told]]:
    with ExitStack() as stack:

        def started(*required: str, **how: Any) -> Told:
            told = Told(api, **how)
            told.require(*required)
            told.signals.start()
            stack.callback(told.signals.close)
            return told

        yield started


Tells = Callable[..., Told]


# --- labels ---


def test_each_model_is_a_label_of_its_state(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True)
    told.set(qwen="ready", llama="downloading", whisper="failed", gone="cancelled")
    until(lambda: api.labels == {"qwen": "ready", "llama": "updating", "whisper": "failed"})
    until(lambda: told.signals.are_written)
    assert told.value("cachd_node_signal_writes_total", signal="labels") >= 1


def test_labels_are_applied_by_a_field_manager_of_their_own(api: KubeApi, tell: Tells) -> None:
    tell(labels=True).set(qwen="ready")
    until(lambda: api.labels)
    call = api.writes[-1]
    assert (call.method, call.kind) == ("PATCH", "application/apply-patch+yaml")
    assert call.path == "/api/v1/nodes/gpu-7?fieldManager=cachd&force=true"
    assert call.body == {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"uid": "uid-1", "labels": {"models.cachd.dev/qwen": "ready"}},
    }


def test_a_label_that_is_no_longer_true_goes_and_those_of_others_stay(api: KubeApi, tell: Tells) -> None:
    assert api.node is not None
    api.node["metadata"]["labels"]["models.cachd.dev/by-hand"] = "ready"
    told = tell(labels=True)
    told.set(qwen="ready", llama="ready")
    until(lambda: len(api.labels) == 3)
    told.set(llama="ready")
    until(lambda: api.labels == {"llama": "ready", "by-hand": "ready"})
    assert api.node["metadata"]["labels"]["kubernetes.io/os"] == "linux"


def test_labels_of_an_earlier_process_go_at_the_first_look(api: KubeApi, tell: Tells) -> None:
    first = tell(labels=True)
    first.set(qwen="ready")
    until(lambda: api.labels == {"qwen": "ready"})
    first.signals.close()
    tell(labels=True)
    until(lambda: api.labels == {})


def test_what_did_not_change_is_not_written_again(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True, condition=True)
    until(lambda: told.signals.are_written)
    told.set(qwen="ready")
    until(lambda: api.labels)
    until(lambda: told.signals.are_written)
    before = len(api.calls)
    looked = threading.Semaphore(0)
    look = told.look
    told.signals._watched = Watched(lambda: (looked.release(), look())[1], told.events)
    for _ in range(20):
        assert looked.acquire(timeout=60)
    assert len(api.calls) == before


def test_what_somebody_else_changed_is_corrected_at_the_next_check(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True, pace=Pace(look=0.01, settle=0, each=0.01, burst=1000, check=0.05))
    told.set(qwen="ready")
    until(lambda: api.labels == {"qwen": "ready"})
    assert api.node is not None
    api.node["metadata"]["labels"]["models.cachd.dev/qwen"] = "failed"
    until(lambda: api.labels == {"qwen": "ready"})


def test_a_pull_that_fails_again_and_again_changes_no_label(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True)
    told.set(qwen="failed")
    until(lambda: api.labels == {"qwen": "failed"})
    told.set(qwen="resolving", llama="ready")
    until(lambda: "llama" in api.labels)
    assert api.labels["qwen"] == "failed"
    told.set(qwen="downloading", llama="ready")
    until(lambda: api.labels["qwen"] == "updating")


# --- the condition ---


def test_the_condition_follows_the_required_models(api: KubeApi, tell: Tells) -> None:
    told = tell(condition=True)
    until(lambda: api.condition.get("reason") == "NoRequiredModels")
    assert api.condition["status"] == "True"
    began = api.condition["lastTransitionTime"]

    told.require("qwen")
    until(lambda: api.condition["status"] == "False")
    assert api.condition["reason"] == "RequiredModelsNotReady"
    assert api.condition["message"] == "required models that are not ready: qwen"

    told.set(qwen="ready")
    until(lambda: api.condition["status"] == "True")
    assert api.condition["reason"] == "RequiredModelsReady"
    assert api.condition["lastTransitionTime"] >= began

    told.is_configuration_right = False
    until(lambda: api.condition["status"] == "Unknown")
    assert api.condition["reason"] == "ConfigurationRefused"
    assert api.node is not None
    assert api.node["status"]["conditions"][0] == {"type": "Ready", "status": "True"}, "the kubelet's"


def test_the_time_of_the_transition_stays_while_the_status_does(api: KubeApi, tell: Tells) -> None:
    told = tell("qwen", condition=True)
    until(lambda: api.condition.get("status") == "False")
    api.condition["lastTransitionTime"] = "2001-02-03T04:05:06Z"
    told.require("qwen", "llama")
    until(lambda: "llama" in api.condition["message"])
    assert api.condition["lastTransitionTime"] == "2001-02-03T04:05:06Z"


# --- the taint ---


def test_the_taint_goes_when_the_required_models_are_ready_and_never_comes(api: KubeApi, tell: Tells) -> None:
    assert api.node is not None
    other = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}
    api.node["spec"]["taints"] = [{"key": TAINT, "effect": "NoSchedule"}, other]
    told = tell("qwen", taint=TAINT, condition=True)
    until(lambda: api.condition.get("status") == "False")
    assert api.taints == [TAINT, "nvidia.com/gpu"]
    told.set(qwen="ready")
    until(lambda: api.taints == ["nvidia.com/gpu"])
    told.set(qwen="damaged")
    until(lambda: api.condition["status"] == "False")
    assert api.taints == ["nvidia.com/gpu"]
    told.set(qwen="ready")
    until(lambda: api.condition["status"] == "True")
    assert told.value("cachd_node_signal_writes_total", signal="taint") == 1


def test_a_taint_that_moved_in_the_list_meanwhile_is_removed_at_the_next_try(
    api: KubeApi, tell: Tells
) -> None:
    assert api.node is not None
    api.node["spec"]["taints"] = [{"key": TAINT, "effect": "NoSchedule"}]
    other = {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}

    def between(_: Handler, call: Call) -> bool:
        if call.is_write:
            api.node["spec"]["taints"].insert(0, other)  # type: ignore[index]
            api.answer = None
        return False

    api.answer = between
    told = tell(taint=TAINT)
    until(lambda: api.taints == ["node.kubernetes.io/unreachable"])
    assert told.value("cachd_node_signal_failures_total", reason="conflict") == 1
