"""Cases of a daemon that is installed, and of the pods that it serves."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import yaml

from tests.kube.cases import case
from tests.kube.cluster import Cluster, Object, blocks_of_readme, is_ready
from tests.kube.models import BIG, CONSUMERS, QWEN, consumer, size_bytes
from tests.kube.processes import until
from tests.kube.worker import CACHE

ALLOWED_TWICE_BYTES = 1 << 20  # bytes on their way when a daemon ends: of one read for each stream
RATE_BYTES, SLOW_BYTES = 2 << 20, 32 << 10  # a second and connection


@case("helm install: the pods wait for the Secret, then the daemon is Ready and pulls its models")
def chart(cluster: Cluster) -> str:
    begun = time.monotonic()
    cluster.install([QWEN])
    pod = cluster.ready()
    seconds = time.monotonic() - begun
    said = cluster.model_ready("qwen-instruct")
    assert said["verified"] is True
    return f"Ready {seconds:.0f} s after helm install, {running_to_ready(pod):.0f} s after Running"


@case("kubectl apply -k: the manifests as they stand give a Ready daemon")
def kustomize(cluster: Cluster) -> str:
    configure(cluster.project / "daemonset/configmap.yaml", **cluster.origin())
    (block,) = [block for block in blocks_of_readme() if "apply -k daemonset\n" in block]
    cluster.sh(block)
    pod = cluster.ready()
    cluster.model_ready("qwen-instruct")
    return f"Ready {running_to_ready(pod):.0f} s after Running"


@case("a pod waits for its model, loads it through a read-only mount, holds it, and cannot write")
def consumers(cluster: Cluster) -> str:
    cluster.hub.cdn.rate = RATE_BYTES
    cluster.apply(consumer())
    cluster.installed([QWEN])
    until(lambda: not is_ready_anywhere(cluster), "the consumer waits")
    cluster.hub.cdn.rate = None
    said = loaded(cluster)
    assert said["create"] == "Read-only file system", said
    assert said["append"] in ("Read-only file system", "Permission denied"), said  # its mode comes first
    removed = cluster.cachd("rm qwen-instruct")
    assert removed.returncode != 0, "a model that is held was removed"
    cluster.sh("kubectl delete deployment vllm")
    cluster.gone(CONSUMERS, "default")
    return f"{said['tensors']} tensors, {said['bytes'] >> 20} MiB; create: {said['create']}"


def loaded(cluster: Cluster, namespace: str = "default") -> Object:
    """What the engine says of the model that it loaded, once its pod is Ready."""
    cluster.ready(CONSUMERS, namespace)
    logs = cluster.sh(f"kubectl -n {namespace} logs deployment/vllm -c vllm")
    said: Object = json.loads(logs.splitlines()[-1])
    return said


def is_ready_anywhere(cluster: Cluster) -> bool:
    return any(is_ready(pod) for pod in cluster.pods(CONSUMERS, "default"))


@case("a rolling update in the middle of a pull: the next daemon continues, nothing is fetched twice")
def rolling_update(cluster: Cluster) -> str:
    size = size_bytes(BIG, cluster.place / "models")
    cluster.hub.cdn.rate = RATE_BYTES
    old = cluster.installed([BIG])
    until(lambda: cluster.hub.cdn.bytes_sent() > size // 4, "a quarter has arrived")
    cluster.hub.cdn.rate = SLOW_BYTES
    cluster.sh("kubectl -n cachd rollout restart daemonset/cachd")
    until(lambda: not any(p["metadata"]["uid"] == old["metadata"]["uid"] for p in cluster.pods()), "it ends")
    before = cluster.hub.cdn.bytes_sent()
    assert before < size, "the pull ended before the daemon"
    cluster.ready(but=old["metadata"]["uid"])
    cluster.hub.cdn.rate = None
    cluster.model_ready("big")
    twice = cluster.hub.cdn.bytes_sent() - size
    assert 0 <= twice <= ALLOWED_TWICE_BYTES, f"{twice} bytes were fetched twice"
    return f"{before >> 20} of {size >> 20} MiB before; {twice >> 10} KiB were on their way and came again"


@case("kill -9 of the daemon: the container restarts, pods go on, nothing is fetched again")
def kill(cluster: Cluster) -> str:
    pod = cluster.installed([QWEN])
    cluster.model_ready("qwen-instruct")
    cluster.apply(consumer())
    reader = cluster.ready(CONSUMERS, "default")
    cluster.hub.forget_all()
    begun = time.monotonic()
    cluster.worker.kill_in(container_of(pod))
    until(lambda: cluster.restarts() == 1, "the kubelet restarts the container")
    cluster.ready()
    seconds = time.monotonic() - begun
    assert cluster.hub.fetched() == []
    (same,) = cluster.pods(CONSUMERS, "default")
    assert restarts_of(same) == restarts_of(reader) == 0
    cluster.model_ready("qwen-instruct")
    return f"Ready again after {seconds:.0f} s"


@case("a reboot: the daemon and the pods that use it come back, nothing is fetched again")
def reboot(cluster: Cluster) -> str:
    pod = cluster.installed([QWEN])
    cluster.model_ready("qwen-instruct")
    cluster.apply(consumer())
    cluster.ready(CONSUMERS, "default")
    was = container_of(pod)
    cluster.hub.forget_all()
    cluster.worker.power_cut()
    begun = time.monotonic()
    cluster.worker.start()
    until(lambda: container_of(cluster.ready()) != was, "another container of the daemon is Ready")
    until(lambda: restarts_of(cluster.ready(CONSUMERS, "default")) > 0, "the consumer is Ready again")
    seconds = time.monotonic() - begun
    cluster.model_ready("qwen-instruct")
    assert cluster.hub.fetched() == []
    return f"both Ready {seconds:.0f} s after the node's start"


def configure(file: Path, **options: object) -> None:
    """Change options in the configuration of a manifest, as an operator does with an editor."""
    document = yaml.safe_load(file.read_text())
    inner = {**yaml.safe_load(document["data"]["config.yaml"]), **options}
    document["data"]["config.yaml"] = yaml.safe_dump(inner)
    file.write_text(yaml.safe_dump(document))


def container_of(pod: Object) -> str:
    (status,) = pod["status"]["containerStatuses"]
    return str(status["containerID"]).rpartition("/")[2]


def restarts_of(pod: Object) -> int:
    return sum(each["restartCount"] for each in pod["status"]["containerStatuses"])


def running_to_ready(pod: Object) -> float:
    """Seconds from the start of the daemon's container until its pod was Ready, in steps of a second."""
    (status,) = pod["status"]["containerStatuses"]
    (ready,) = [each for each in pod["status"]["conditions"] if each["type"] == "Ready"]
    return (when(ready["lastTransitionTime"]) - when(status["state"]["running"]["startedAt"])).total_seconds()


def when(said: str) -> datetime:
    return datetime.fromisoformat(said.replace("Z", "+00:00"))


def is_here(name: str) -> bool:
    """Whether the node has a model, as a pod sees it."""
    return (CACHE / "ready" / f"{name}.json").exists()
