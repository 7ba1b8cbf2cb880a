"""Cases of the node: a full disk, two daemons, an uninstall, and who may connect."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import yaml

from tests.kube.cases import case
from tests.kube.cluster import DAEMONS, Cluster, Object, is_ready
from tests.kube.models import QWEN, RESTRICTED, consumer
from tests.kube.processes import until
from tests.kube.serving import loaded, restarts_of
from tests.kube.worker import CACHE, NODE

CRITICAL = "system-node-critical"
FOREIGN_GROUP = 2000


@case("two daemons on one root: the second waits, unready and not restarted, and takes over")
def second_daemon(cluster: Cluster) -> str:
    first = cluster.installed([QWEN])
    cluster.model_ready("qwen-instruct")
    cluster.hub.forget_all()
    cluster.apply(*another(cluster), namespace="cachd")
    name = until(lambda: running(cluster, "app=another"), "the second daemon runs")["metadata"]["name"]
    script = (
        "import urllib.request as u, urllib.error as e\n"
        "try: print(u.urlopen('http://127.0.0.1:8470/readyz').read().decode())\n"
        "except e.HTTPError as error: print(error.read().decode())"
    )
    ask = f'kubectl -n cachd exec {name} -- python3 -c "{script}"'
    told = until(lambda: cluster.tried(ask).stdout, "it answers")
    assert "root_locked" in told, told
    assert first["metadata"]["name"] in told, told
    (waits,) = cluster.pods("app=another")
    assert not is_ready(waits)
    cluster.sh("helm uninstall cachd --namespace cachd")
    taken = cluster.ready("app=another")
    assert restarts_of(taken) == 0
    assert cluster.hub.fetched() == []
    return "no restart"


def another(cluster: Cluster) -> tuple[Object, Object]:
    """A second daemon with the same root: the DaemonSet under another name, and a ConfigMap of its own."""
    owner = cluster.get("daemonset", "cachd", "-n", "cachd")
    template = copy.deepcopy(owner["spec"]["template"])
    template["metadata"] = {"labels": {"app": "another"}}
    template["spec"].pop("serviceAccountName", None)
    template["spec"].pop("serviceAccount", None)
    config_map = cluster.get("configmap", "cachd", "-n", "cachd")
    named = {"name": "another", "namespace": "cachd"}
    own = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": named, "data": config_map["data"]}
    for volume in template["spec"]["volumes"]:
        for source in volume.get("projected", {}).get("sources", []):
            if "configMap" in source:
                source["configMap"]["name"] = "another"
    spec = {"selector": {"matchLabels": {"app": "another"}}, "template": template}
    return own, {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": named, "spec": spec}


def running(cluster: Cluster, selector: str) -> Object | None:
    """A pod whose containers run."""
    for pod in cluster.pods(selector):
        statuses = pod["status"].get("containerStatuses", [])
        if statuses and all("running" in each["state"] for each in statuses):
            return pod
    return None


@case("an uninstall leaves the cache, and the next install adopts it: nothing is fetched")
def uninstall(cluster: Cluster) -> str:
    cluster.installed([QWEN])
    before = cluster.model_ready("qwen-instruct")
    cluster.uninstall()
    cluster.sh("kubectl delete namespace cachd --timeout=300s")
    assert (CACHE / "ready/qwen-instruct.json").exists()
    cluster.hub.forget_all()
    cluster.install([QWEN])
    cluster.ready()
    until(lambda: cluster.cachd("wait qwen-instruct --timeout 60s").returncode == 0, "it is ready")
    after = cluster.model_ready("qwen-instruct")
    assert before["revision"] == after["revision"]
    assert cluster.hub.fetched() == []
    return f"revision {before['revision'][:12]}"


@case("DiskPressure: without a priority class the daemon is evicted and refused until the disk has space")
def pressure(cluster: Cluster) -> str:
    pod = cluster.installed([QWEN])
    cluster.model_ready("qwen-instruct")
    with full_disk(cluster):
        until(lambda: is_refused(cluster, pod), "the kubelet evicts the daemon")
        assert (CACHE / "ready/qwen-instruct.json").exists()
    cluster.ready(but=pod["metadata"]["uid"])
    return "evicted; Ready again when the disk had space"


@case("DiskPressure: with system-node-critical the daemon stays, and a new one is admitted")
def pressure_critical(cluster: Cluster) -> str:
    pod = cluster.installed([QWEN], priorityClassName=CRITICAL)
    cluster.model_ready("qwen-instruct")
    with full_disk(cluster):
        assert cluster.ready()["metadata"]["uid"] == pod["metadata"]["uid"]
        cluster.sh("kubectl -n cachd delete pod -l app.kubernetes.io/name=cachd")
        admitted = cluster.ready(but=pod["metadata"]["uid"])
        assert has_pressure(cluster)
        assert restarts_of(admitted) == 0
    return "neither evicted nor refused"


@contextmanager
def full_disk(cluster: Cluster) -> Iterator[None]:
    """The node's disk with too little space, from when the kubelet says so until it no longer does."""
    ballast = cluster.worker.disk / "ballast"
    space = os.statvfs(cluster.worker.disk)
    free_bytes = space.f_bavail * space.f_frsize
    keep_bytes = space.f_blocks * space.f_frsize * 5 // 100
    try:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free_bytes - keep_bytes)
        until(lambda: has_pressure(cluster), "the node has DiskPressure")
        yield
    finally:
        ballast.unlink(missing_ok=True)
        until(lambda: not has_pressure(cluster), "the node has no DiskPressure")
        cluster.worker.import_images()


def has_pressure(cluster: Cluster) -> bool:
    conditions = cluster.get("node", NODE)["status"]["conditions"]
    return any(each["type"] == "DiskPressure" and each["status"] == "True" for each in conditions)


def is_refused(cluster: Cluster, pod: Object) -> bool:
    """Whether this pod was evicted, and no other one runs."""
    named = pod["metadata"]["name"]
    pods = cluster.get("pods", "-n", "cachd", "-l", DAEMONS)["items"]
    gone = [each for each in pods if each["metadata"]["name"] == named]
    evicted = not gone or gone[0]["status"].get("reason") == "Evicted"
    return evicted and not any(each["status"]["phase"] == "Running" for each in pods)


@case("a namespace without hostPath has the cache by a claim: read-only, and no file gets a pod's fsGroup")
def claims(cluster: Cluster) -> str:
    space, *_ = yaml.safe_load_all(RESTRICTED.read_text())
    namespace = space["metadata"]["name"]
    cluster.apply(space)
    try:
        cluster.installed([QWEN], consumers={"namespaces": [namespace]})
        cluster.model_ready("qwen-instruct")
        deployment = consumer(RESTRICTED)
        deployment["spec"]["template"]["spec"]["securityContext"]["fsGroup"] = FOREIGN_GROUP
        cluster.apply(deployment, namespace=namespace)
        said = loaded(cluster, namespace)
        assert said["create"] == "Read-only file system", said
        assert foreign_files() == []
    finally:
        cluster.sh(f"kubectl delete namespace {namespace} --timeout=300s")
    return f"{said['tensors']} tensors; no file has the group of the pod"


def foreign_files() -> list[str]:
    """What in the cache has the group of the pod's fsGroup."""
    found = []
    for path in (CACHE, *CACHE.rglob("*")):
        with suppress(FileNotFoundError):  # the daemon works meanwhile
            if path.lstat().st_gid == FOREIGN_GROUP:
                found.append(str(path))
    return found


@case("a NetworkPolicy of the chart is admitted, and selects the daemons, their port and who may connect")
def network_policy(cluster: Cluster) -> str:
    allowed = {"namespaceSelector": {"matchLabels": {"team": "inference"}}}
    pod = cluster.installed([QWEN], networkPolicy={"enabled": True, "from": [allowed]})
    spec = cluster.get("networkpolicy", "cachd", "-n", "cachd")["spec"]
    wanted = spec["podSelector"]["matchLabels"].items()
    assert wanted <= pod["metadata"]["labels"].items()
    selector = ",".join(f"{key}={value}" for key, value in wanted)
    assert [each["metadata"]["uid"] for each in cluster.pods(selector)] == [pod["metadata"]["uid"]]
    (rule,) = spec["ingress"]
    (daemon,) = pod["spec"]["containers"]
    ports = {each["name"] for each in daemon["ports"]}
    assert {each["port"] for each in rule["ports"]} <= ports
    assert allowed in rule["from"]
    return "not enforced here: the node's network plugin has no policies"
