"""Cases of what a node tells the scheduler: labels, the condition, events and the startup taint."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.kube.cases import case
from tests.kube.changes import ANNOTATE, change
from tests.kube.cluster import Cluster, Object
from tests.kube.image import CACHD
from tests.kube.models import OTHER, QWEN, SMALL
from tests.kube.processes import until
from tests.kube.serving import container_of, is_here
from tests.kube.worker import NODE

PREFIX = "models.cachd.dev/"
CONDITION = "CachdRequiredModelsReady"
TAINT = "cachd.dev/models-not-ready"
ALL = {"labels": True, "condition": True, "events": True, "startupTaint": TAINT}
ACCOUNT = "system:serviceaccount:cachd:cachd"
SLOW_BYTES = 64 << 10  # a second and connection: a pull stays under way until a case lets it end
MOST_SECONDS = 60.0  # docs/kubernetes.md: about seven seconds, five times at once, then once a minute


@case("a new node keeps pods away until its required models are ready; labels, condition and events say so")
def signals(cluster: Cluster) -> str:
    with new_node(cluster):
        cluster.hub.cdn.rate = SLOW_BYTES
        cluster.installed([QWEN], nodeSignals=ALL)
        until(lambda: state(cluster) == ({"qwen-instruct": "updating"}, "False"), "the node says: not ready")
        cluster.apply(pod("any"), pod("chooses", nodeSelector={f"{PREFIX}qwen-instruct": "ready"}))
        until(lambda: is_unschedulable(cluster, "any"), "the taint keeps every other pod away")
        assert TAINT in taints(cluster)
        cluster.hub.cdn.rate = None
        cluster.model_ready("qwen-instruct")
        begun = time.monotonic()
        until(lambda: state(cluster) == ({"qwen-instruct": "ready"}, "True"), "the node says: ready")
        until(lambda: TAINT not in taints(cluster), "the taint is gone")
        seconds = time.monotonic() - begun
        assert seconds < MOST_SECONDS, f"the node said so {seconds:.0f} s after the model was ready"
        for name in ("any", "chooses"):
            cluster.succeeded(name)
        until(lambda: "ModelPulled" in events(cluster), "an event says that the model was pulled")
        assert checked(cluster) == "ok", "the doctor finds the API server, and every right"
        change(cluster, [])
        cluster.sh(ANNOTATE)
        until(lambda: condition(cluster).get("reason") == "NoRequiredModels", "the daemon has read the list")
        cluster.sh("kubectl -n cachd exec ds/cachd -- cachd rm qwen-instruct")
        until(lambda: state(cluster) == ({}, "True"), "its label is gone")
    return f"label, condition and taint {seconds:.1f} s after the model was ready"


@case("with signals on, the daemon may change nodes and write events, and nothing else")
def rights(cluster: Cluster) -> str:
    cluster.installed([QWEN])
    for verb, kind in (("get", "nodes"), ("patch", "nodes"), ("create", "events")):
        assert not may(cluster, verb, kind), f"without signals, the account may {verb} {kind}"
    cluster.upgrade([QWEN], nodeSignals=ALL)
    granted = [
        *(("get", "nodes"), ("patch", "nodes"), ("patch", "nodes/status")),
        *(("create", "events"), ("patch", "events")),
    ]
    for verb, kind in granted:
        assert may(cluster, verb, kind), f"the account may not {verb} {kind}"
    refused = [
        *(("list", "nodes"), ("update", "nodes"), ("delete", "nodes"), ("get", "nodes/proxy")),
        *(("get", "secrets"), ("list", "pods"), ("create", "pods"), ("delete", "events")),
    ]
    for verb, kind in refused:
        assert not may(cluster, verb, kind), f"the account may {verb} {kind}"
    return f"{len(granted)} rights, and {len(refused)} refused"


@case("without the API server the daemon pulls and serves all the same; the signals follow when it is back")
def api_server_away(cluster: Cluster) -> str:
    with new_node(cluster):
        cluster.hub.cdn.rate = SLOW_BYTES
        daemon = cluster.installed([{**OTHER, "required": True}], nodeSignals=ALL)
        until(lambda: state(cluster) == ({"other": "updating"}, "False"), "the node says: not ready")
        cluster.plane.stop_api()
        try:
            cluster.hub.cdn.rate = None
            until(lambda: is_here("other"), "the model is ready without an API server")
        finally:
            cluster.plane.start_api()
        begun = time.monotonic()
        until(lambda: state(cluster) == ({"other": "ready"}, "True"), "the node says: ready")
        until(lambda: TAINT not in taints(cluster), "the taint is gone")
        seconds = time.monotonic() - begun
        assert container_of(cluster.ready()) == container_of(daemon), "the daemon was restarted"
    return f"{seconds:.0f} s after the API server was back"


@contextmanager
def new_node(cluster: Cluster) -> Iterator[None]:
    """The node with the startup taint, as a node pool makes it. In the end all signals are removed."""
    cluster.sh(f"kubectl taint node {NODE} {TAINT}=:NoSchedule")
    try:
        yield
    finally:
        forget_signals(cluster)


def forget_signals(cluster: Cluster) -> None:
    """Take the labels, the condition and the taint off the node: nothing else does once a daemon is gone."""
    for namespace in ("cachd", "default"):
        cluster.tried(f"kubectl -n {namespace} delete daemonset,pod --all --grace-period=1 --timeout=120s")
    cluster.tried(f"kubectl taint node {NODE} {TAINT}-")
    cluster.tried(f"kubectl label node {NODE} {' '.join(f'{PREFIX}{name}-' for name in labels(cluster))}")
    gone = {"status": {"conditions": [{"type": CONDITION, "$patch": "delete"}]}}
    cluster.tried(f"kubectl patch node {NODE} --subresource=status -p '{json.dumps(gone)}'")
    cluster.tried("kubectl -n default delete events --field-selector source=cachd")


def pod(name: str, **spec: object) -> Object:
    """A pod that runs `cachd --version` and tolerates nothing."""
    container = {"name": name, "image": CACHD, "args": ["--version"], "resources": SMALL}
    described = {"restartPolicy": "Never", "containers": [container], **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": described}


def labels(cluster: Cluster) -> dict[str, str]:
    """The node's labels of models, by the name of the model."""
    found = cluster.get("node", NODE)["metadata"]["labels"].items()
    return {key.removeprefix(PREFIX): value for key, value in found if key.startswith(PREFIX)}


def condition(cluster: Cluster) -> Object:
    """The node's condition about required models; empty if there is none."""
    conditions = cluster.get("node", NODE)["status"]["conditions"]
    return next((each for each in conditions if each["type"] == CONDITION), {})


def state(cluster: Cluster) -> tuple[dict[str, str], str]:
    """The node's labels of models, and the status of its condition."""
    return labels(cluster), condition(cluster).get("status", "")


def checked(cluster: Cluster) -> str:
    """What the doctor finds about the API server: ok, or worse."""
    examined = json.loads(cluster.cachd("doctor --output json").stdout)
    (found,) = [each for each in examined["findings"] if each["code"] == "kubernetes"]
    return str(found["state"])


def taints(cluster: Cluster) -> list[str]:
    return [each["key"] for each in cluster.get("node", NODE)["spec"].get("taints", [])]


def events(cluster: Cluster) -> set[str]:
    """The reasons of the events that cachd wrote about the node."""
    found = cluster.get("events", "-n", "default", "--field-selector", "involvedObject.kind=Node")["items"]
    return {each["reason"] for each in found if each["source"].get("component") == "cachd"}


def may(cluster: Cluster, verb: str, kind: str) -> bool:
    """Whether the daemon's account has a right in the namespace default, where events of nodes are."""
    resource, _, subresource = kind.partition("/")  # kubectl takes RESOURCE/NAME for one object
    of = f"--subresource={subresource}" if subresource else ""
    return cluster.tried(f"kubectl auth can-i {verb} {resource} {of} --as={ACCOUNT}").stdout.strip() == "yes"


def is_unschedulable(cluster: Cluster, name: str) -> bool:
    conditions = cluster.get("pod", name)["status"].get("conditions", [])
    return any(each.get("reason") == "Unschedulable" for each in conditions)
