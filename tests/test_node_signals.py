"""What cachd tells Kubernetes about its node, over real TLS connections to a server that speaks that API."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import given, strategies
from structlog.testing import capture_logs

from cachd import config
from cachd.cluster.api_server import ApiServer
from cachd.cluster.labels import label_of, labels
from cachd.cluster.pace import Bucket, Pace
from cachd.cluster.signals import NodeSignals, Seen, Switches, Watched
from cachd.daemon.signals import place
from cachd.metrics import Metrics
from cachd.report.events import EventLog
from cachd.report.values import ModelState
from cachd.sources.kubernetes_place import Place
from tests.ground.kube_api import Call, Handler, KubeApi
from tests.ground.models import noise
from tests.ground.node import Node
from tests.ground.origin import Origin
from tests.ground.origin.certificates import certify
from tests.ground.site import until

LETTERS = "aZ09._-"  # what names of models are made of
# No wait of its own: what is slow here is the test machine.
QUICK = Pace(interval=0.01, settle=0.0, each=0.01, burst=1000, check=3600.0, chance=lambda: 0.0)
TAINT = "cachd.dev/models-not-ready"


class Server(Protocol):
    """Where an API server answers, with the credentials for it, and the name of a node that it has."""

    url: str
    pem: Path
    token_file: Path
    name: str


class Told:
    """The signals of one node, and the models that they are made from, which a test changes."""

    def __init__(self, api: Server, pace: Pace = QUICK, seconds: float = 30.0, **switches: Any) -> None:
        self.states: dict[str, ModelState] = {}
        self.required: set[str] = set()
        self.is_configuration_right = True
        self.events, self.metrics = EventLog(), Metrics()
        place = Place(api.url, api.token_file, api.pem)
        self.signals = NodeSignals(
            Switches(api.name, **{"max_labels": 50, **switches}),
            ApiServer(place, seconds=seconds),
            Watched(self.current, self.events),
            self.metrics,
            pace=pace,
        )

    def current(self) -> Seen:
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
    current = told.current
    told.signals._watched = Watched(lambda: (looked.release(), current())[1], told.events)
    for _ in range(20):
        assert looked.acquire(timeout=60)
    assert len(api.calls) == before


def test_what_somebody_else_changed_is_corrected_at_the_next_check(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True, pace=Pace(interval=0.01, settle=0, each=0.01, burst=1000, check=0.05))
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


# --- the daemon ---


def test_a_daemon_tells_kubernetes_what_its_options_say(
    api: KubeApi, node: Callable[..., Node], origin: Origin
) -> None:
    assert api.node is not None
    api.node["spec"]["taints"] = [{"key": TAINT, "effect": "NoSchedule"}]
    model = {"ref": origin.add("/it.bin", noise(1000)), "name": "it", "required": True}
    on = {"node_labels": True, "node_condition": True, "node_events": True, "startup_taint": TAINT}
    named = {key: value for key, value in api.options.items() if key != "node_name"}
    running = node(models=[model], env={"NODE_NAME": api.name}, **on, **named)
    until(lambda: api.labels.get("it") == "ready")
    until(lambda: api.condition.get("status") == "True")
    until(lambda: api.taints == [])
    until(lambda: any(each["reason"] == "ModelPulled" for each in api.events.values()))
    until(lambda: running.metric("cachd_node_signals_written") == 1)
    assert running.stop() == 0
    assert api.labels == {"it": "ready"}, "the model is still there"


def test_a_daemon_without_signals_asks_nobody(api: KubeApi, node: Callable[..., Node]) -> None:
    running = node(env={"NODE_NAME": api.name}, **api.options)
    assert "cachd_node_signals_written" not in running.ask("GET", "/metrics").document.decode()
    running.stop()
    assert api.calls == []


SIGNALS: tuple[dict[str, Any], ...] = (
    {"node_labels": True},
    {"node_condition": True},
    {"node_events": True},
    {"startup_taint": TAINT},
)


@pytest.mark.parametrize("on", SIGNALS, ids=str)
def test_a_signal_needs_the_name_of_the_node(on: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = config.examine(**on).findings
    assert f"{next(iter(on))} needs the name of this node: set it, or the variable NODE_NAME" in str(found)
    monkeypatch.setenv("NODE_NAME", "gpu-7")
    assert config.load(**on).node_name == "gpu-7"


@pytest.mark.parametrize(
    "wrong",
    [
        {"startup_taint": f"{TAINT}:NoSchedule", "node_name": "a"},
        {"startup_taint": "a/b/c", "node_name": "a"},
        {"node_name": "../nodes/b"},
        {"max_node_labels": 0},
        {"max_node_labels": 1000},
        {"kubernetes_url": "http://10.0.0.1:443"},
    ],
    ids=str,
)
def test_a_wrong_option_is_refused(wrong: dict[str, Any]) -> None:
    (found,) = config.examine(**wrong).findings
    assert str(found).startswith(next(iter(wrong))) or next(iter(wrong)) in str(found)


def test_the_address_is_the_one_that_kubernetes_tells_its_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert place(config.load()).address == ("kubernetes.default.svc", 443)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert place(config.load()).address == ("10.0.0.1", 6443)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    assert place(config.load()).address == ("fd00::1", 6443)
    assert place(config.load(kubernetes_url="https://[::1]:1")).address == ("::1", 1)


# --- the bounds of labels ---


def test_a_name_that_is_no_label_becomes_a_stable_one_with_a_hash() -> None:
    assert label_of("qwen") == "models.cachd.dev/qwen"
    long, dotted = "a" * 70, "qwen."
    assert label_of(long) == f"models.cachd.dev/{'a' * 50}-6bd5e5034855"
    assert label_of(dotted).startswith("models.cachd.dev/qwen-")
    assert label_of(long) != label_of("a" * 71)


@given(strategies.text(LETTERS, min_size=1, max_size=96).filter(lambda name: name[0].isalnum()))
def test_every_name_of_a_model_becomes_a_valid_label(name: str) -> None:
    found = label_of(name).removeprefix("models.cachd.dev/")
    assert re.fullmatch(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", found), "as Kubernetes checks it"
    assert len(found) <= 63


def test_of_many_models_required_and_ready_ones_are_shown() -> None:
    states = {f"m{number:02}": ModelState.downloading for number in range(20)}
    states |= {"x": ModelState.ready, "y": ModelState.failed, "z": ModelState.queued}
    found = labels(states, {"z"}, at_most=4, before={})
    prefix = "models.cachd.dev/"
    assert found == {
        f"{prefix}m00": "updating",
        f"{prefix}m01": "updating",
        f"{prefix}x": "ready",
        f"{prefix}z": "updating",
    }


def test_of_two_models_with_one_label_the_worse_state_is_shown() -> None:
    long = "a" * 70
    same = label_of(long).removeprefix("models.cachd.dev/")
    states = {long: ModelState.failed, same: ModelState.ready}
    assert labels(states, set(), at_most=9, before={}) == {label_of(long): "failed"}


# --- a server that is away, slow or wrong ---


def say(status: int, document: Any, **headers: str) -> Callable[[Handler, Call], bool]:
    def answer(handler: Handler, _: Call) -> bool:
        handler.say(status, document, **headers)
        return True

    return answer


FAILURES: dict[str, tuple[int, Any, str, str]] = {
    "401": (401, {"message": "Unauthorized"}, "forbidden", "it answered 401: Unauthorized"),
    "403": (403, {"message": "cannot get nodes"}, "forbidden", "it answered 403: cannot get nodes"),
    "404": (404, {"message": "nodes not found"}, "refused", "it answered 404"),
    "429": (429, b"slow down", "limited", "it answered 429"),
    "500": (500, b"<html>" * 100_000, "refused", "it answered 500"),
    "a redirection": (302, b"", "refused", "it answered 302"),
    "no JSON": (200, b"no JSON", "unreachable", "ValueError"),
    "another kind": (200, {"kind": "Status"}, "unreachable", "is no Node"),
    "labels that are a list": (
        200,
        {"metadata": {"uid": "u", "labels": ["a"]}, "spec": {}, "status": {}},
        "unreachable",
        "is no Node",
    ),
    "too deep": (200, b"[" * 1000, "unreachable", "nested deeper"),
    "too long": (200, b'{"a": "' + b"x" * (5 << 20) + b'"}', "unreachable", "the limit is"),
}


@pytest.mark.parametrize(("status", "document", "reason", "detail"), FAILURES.values(), ids=FAILURES)
def test_an_answer_that_is_none_is_counted_and_logged(
    api: KubeApi, tell: Tells, status: int, document: Any, reason: str, detail: str
) -> None:
    api.answer = say(status, document)
    with capture_logs() as logs:
        told = tell(labels=True)
        until(lambda: told.value("cachd_node_signal_failures_total", reason=reason))
        (logged,) = until(lambda: [each for each in logs if each["event"] == "node signals not written"])
    assert detail in logged["reason"]
    assert not told.signals.are_written


def test_after_a_failure_the_latest_state_is_written(api: KubeApi, tell: Tells) -> None:
    api.answer = say(503, b"")
    told = tell(labels=True)
    told.set(qwen="downloading")
    until(lambda: told.value("cachd_node_signal_failures_total", reason="refused") >= 1)
    assert not told.signals.are_written
    told.set(qwen="ready")
    before = len(api.writes)
    api.answer = None
    until(lambda: told.signals.are_written)
    assert [call.body["metadata"]["labels"] for call in api.writes[before:]] == [
        {"models.cachd.dev/qwen": "ready"}
    ]


def test_a_write_that_is_refused_keeps_no_other_from_being_made(api: KubeApi, tell: Tells) -> None:
    api.answer = lambda handler, call: (
        call.kind == "application/apply-patch+yaml" and say(403, {"message": "no"})(handler, call)
    )
    told = tell(labels=True, condition=True)
    told.set(qwen="ready")
    until(lambda: api.condition)
    assert api.labels == {}


def test_a_server_that_says_nothing_is_left_after_the_deadline(api: KubeApi, tell: Tells) -> None:
    enough = threading.Event()
    api.answer = lambda *_: enough.wait(120)
    try:
        told = tell(labels=True, seconds=0.2)
        until(lambda: told.value("cachd_node_signal_failures_total", reason="unreachable"))
    finally:
        enough.set()


def test_a_server_that_drips_is_left_after_the_deadline(api: KubeApi, tell: Tells) -> None:
    enough = threading.Event()

    def drip(handler: Handler, _: Call) -> bool:
        with suppress(OSError):
            while not enough.wait(0.02):
                handler.wfile.write(b"x")  # a status line without an end
        return True

    api.answer = drip
    try:
        told = tell(labels=True, seconds=0.3)
        until(lambda: told.value("cachd_node_signal_failures_total", reason="unreachable"))
    finally:
        enough.set()


def test_a_stop_does_not_wait_for_a_server_that_says_nothing(api: KubeApi, tell: Tells) -> None:
    enough, asked = threading.Event(), threading.Event()
    api.answer = lambda *_: (asked.set(), enough.wait(120))[1]
    try:
        told = tell(labels=True, seconds=120.0)
        assert asked.wait(120)
        told.signals.close()
        assert not enough.is_set(), "the server still waits"
    finally:
        enough.set()


def test_a_server_that_is_away_is_asked_again(tmp_path: Path) -> None:
    with KubeApi(tmp_path) as api:
        pass
    told = Told(api, labels=True)
    told.signals.start()
    try:
        until(lambda: told.value("cachd_node_signal_failures_total", reason="unreachable") >= 2)
    finally:
        told.signals.close()


def test_a_server_of_another_authority_is_not_shown_the_token(api: KubeApi, tell: Tells) -> None:
    other = api.pem.with_name("other.pem")
    certify(other)
    api.pem = other
    told = tell(labels=True)
    until(lambda: told.value("cachd_node_signal_failures_total", reason="unreachable"))
    assert api.calls == []


def test_a_token_that_was_replaced_is_used_for_the_next_call(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True)
    until(lambda: told.signals.are_written)
    api.tokens = {"second"}
    api.token_file.write_text("second\n")
    told.set(qwen="ready")
    until(lambda: api.labels == {"qwen": "ready"})
    assert {call.token for call in api.writes} == {"second"}


def test_a_token_that_cannot_be_read_is_no_secret_in_the_log(api: KubeApi, tell: Tells) -> None:
    api.token_file.write_text("se\ncret")
    with capture_logs() as logs:
        told = tell(labels=True)
        until(lambda: told.value("cachd_node_signal_failures_total", reason="unreachable"))
    assert "cret" not in str(logs)
    assert api.calls == []


def test_a_burst_of_changes_is_written_once_per_minute_in_the_end(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True, pace=Pace(interval=0.01, settle=0.0, each=3600.0, burst=3, check=3600.0))
    until(lambda: told.signals.are_written)
    for number in range(3):
        told.set(**{f"m{number}": "ready"})
        until(lambda number=number: api.labels == {f"m{number}": "ready"})
    told.set(last="ready")
    until(lambda: not told.signals.are_written)
    assert len(api.writes) == 3
    assert api.labels == {"m2": "ready"}


def test_a_bucket_permits_a_burst_and_then_one_write_at_a_time() -> None:
    bucket = Bucket(60.0, 3, 0.0)
    taken = []
    for now in range(600):
        if bucket.has(now):
            bucket.take(now)
            taken.append(now)
    assert taken[:4] == [0, 1, 2, 60]
    assert len(taken) == 3 + 9


# --- events ---


EVENTS: dict[str, tuple[str, dict[str, Any], str, str, str]] = {
    "pulled": (
        "pull ended",
        {"state": "ready", "size_bytes": 5000, "fetched_bytes": 4000, "seconds": 12.3},
        "Normal",
        "ModelPulled",
        "qwen is ready: 5000 bytes, of which 4000 were fetched in 12 s",
    ),
    "failed": (
        "pull ended",
        {"state": "failed", "code": "no_space", "detail": "s3://secret at 10.0.0.7"},
        "Warning",
        "ModelPullFailed",
        "the pull of qwen failed: no_space; cachd show qwen has the reason",
    ),
    "evicted": (
        "evicted",
        {"names": ["qwen"], "reason": "pressure", "freed_bytes": 7},
        "Normal",
        "ModelEvicted",
        "qwen was evicted (pressure), which freed 7 bytes",
    ),
    "corrupt": (
        "blob damaged",
        {"models": ["qwen"], "path": "a", "wrong": "b"},
        "Warning",
        "ModelCorrupt",
        "a file of qwen is damaged on the disk",
    ),
    "quarantined": (
        "readiness withdrawn",
        {"file": "a", "reason": "b"},
        "Warning",
        "ModelQuarantined",
        "qwen is not ready until it is repaired",
    ),
    "repaired": ("repaired", {}, "Normal", "ModelRepaired", "qwen is repaired, and ready again"),
    "refused": (
        "model refused",
        {"reason": "b"},
        "Warning",
        "ModelRefused",
        "qwen has a digest that the operator refuses",
    ),
}


@pytest.mark.parametrize(("event", "fields", "kind", "reason", "message"), EVENTS.values(), ids=EVENTS)
def test_what_happens_to_a_model_is_an_event_of_the_node(
    api: KubeApi, tell: Tells, event: str, fields: dict[str, Any], kind: str, reason: str, message: str
) -> None:
    told = tell(events=True)
    told.log(event, **{"name": "qwen", "ref": "s3://secret/10.0.0.7", "who": "team-a", **fields})
    until(lambda: api.events)
    ((name, found),) = api.events.items()
    assert name.startswith("gpu-7.")
    assert (found["type"], found["reason"], found["message"]) == (kind, reason, message)
    assert found["involvedObject"] == {"apiVersion": "v1", "kind": "Node", "name": "gpu-7", "uid": "uid-1"}
    assert found["firstTimestamp"] == found["lastTimestamp"]
    assert not {"secret", "10.0.0.7", "team-a"} & set(re.split(r"[^\w.-]", str(found)))
    until(lambda: told.value("cachd_node_signal_writes_total", signal="event") == 1)


def test_events_without_the_switch_are_not_written(api: KubeApi, tell: Tells) -> None:
    told = tell(labels=True)
    told.log("repaired", name="qwen")
    told.set(qwen="ready")
    until(lambda: api.labels)
    assert api.events == {}


def test_an_event_that_happens_again_is_counted_and_one_that_is_gone_begins_anew(
    api: KubeApi, tell: Tells
) -> None:
    told = tell(events=True)
    told.log("repaired", name="qwen")
    until(lambda: api.events)
    told.log("repaired", name="qwen")
    until(lambda: [each["count"] for each in api.events.values()] == [2])
    api.events.clear()
    told.log("repaired", name="qwen")
    until(lambda: [each["count"] for each in api.events.values()] == [1])


def test_many_events_are_bounded_in_memory_and_in_writes(api: KubeApi, tell: Tells) -> None:
    told = tell(events=True, pace=Pace(interval=0.01, settle=0.0, each=3600.0, burst=2))
    for number in range(300):
        told.log("repaired", name=f"m{number}")
    until(lambda: len(api.events) == 4)
    waiting = told.signals._node_events._waiting
    assert len(waiting) <= 50
    assert next(reversed(waiting)) == ("ModelRepaired", "m299"), "the newest are kept"


def test_an_event_whose_answer_was_lost_is_not_written_twice(api: KubeApi, tell: Tells) -> None:
    def lost(handler: Handler, call: Call) -> bool:
        if call.method != "POST":
            return False
        api.do(call)
        api.answer = None
        handler.close_connection = True
        return True

    api.answer = lost
    told = tell(events=True)
    told.log("repaired", name="qwen")
    until(lambda: told.value("cachd_node_signal_writes_total", signal="event") == 1)
    assert [each["count"] for each in api.events.values()] == [1]
    assert told.value("cachd_node_signal_failures_total", reason="unreachable") == 1
