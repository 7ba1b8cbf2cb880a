"""Cases of a configuration that changes: how soon, and what a wrong one does."""

from __future__ import annotations

import json
import time

import yaml

from tests.kube.cases import case
from tests.kube.cluster import Cluster, Object, page
from tests.kube.models import OTHER, QWEN
from tests.kube.processes import until
from tests.kube.serving import container_of, is_here
from tests.kube.worker import CACHE

APPLY, ANNOTATE = (
    line for line in page("docs/kubernetes.md", "A changed ConfigMap")[0].splitlines() if line.strip()
)


def change(cluster: Cluster, models: list[Object] | None = None, text: str | None = None) -> None:
    """Apply a ConfigMap as the page does; the daemons read it when the kubelet brings it."""
    write_config_map(cluster, models, text)
    cluster.sh(APPLY)


def write_config_map(cluster: Cluster, models: list[Object] | None = None, text: str | None = None) -> None:
    """Write the `configmap.yaml` that the page applies: the live one with other models, or another text."""
    live = cluster.get("configmap", "cachd", "-n", "cachd")
    options = yaml.safe_load(live["data"]["config.yaml"])
    kept = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cachd", "namespace": "cachd"}}
    written = text if text is not None else yaml.safe_dump({**options, "models": models})
    (cluster.project / "configmap.yaml").write_text(
        yaml.safe_dump({**kept, "data": {"config.yaml": written}})
    )


@case("a changed ConfigMap arrives within seconds with the annotation of the page, and later without")
def config_changes(cluster: Cluster) -> str:
    cluster.installed([QWEN])
    cluster.model_ready("qwen-instruct")
    begun = time.monotonic()
    change(cluster, [QWEN, OTHER])
    cluster.sh(ANNOTATE)
    until((CACHE / "status/other.json").exists, "the daemon has read the list")
    annotated = time.monotonic() - begun
    cluster.model_ready("other")
    begun = time.monotonic()
    change(cluster, [QWEN, OTHER, {**OTHER, "name": "third"}])
    until((CACHE / "status/third.json").exists, "the daemon has read the list")
    plain = time.monotonic() - begun
    cluster.model_ready("third")
    assert cluster.restarts() == 0
    assert annotated < 15, f"with the annotation it took {annotated:.1f} s"
    return f"{annotated:.1f} s with the annotation, {plain:.0f} s without"


@case("a wrong configuration: the daemon goes on with what it has, says so, and its next start does, too")
def wrong_config(cluster: Cluster) -> str:
    pod = cluster.installed([QWEN])
    cluster.model_ready("qwen-instruct")
    change(cluster, text="streams: many\n")
    cluster.sh(ANNOTATE)
    until(lambda: is_refused(cluster), "the metric says that the file was refused")
    assert cluster.ready()["metadata"]["uid"] == pod["metadata"]["uid"]
    doctor = cluster.cachd("doctor")
    assert "streams" in doctor.stdout + doctor.stderr, "the doctor names the option"
    cluster.worker.kill_in(container_of(pod))
    until(lambda: cluster.restarts() == 1, "the kubelet restarts the container")
    cluster.ready()
    assert is_here("qwen-instruct")
    assert is_refused(cluster)
    cluster.worker.power_cut()  # its init containers run again, and check the wrong file
    cluster.worker.start()
    until(lambda: cluster.restarts() > 1 and cluster.ready(), "the daemon is Ready after a reboot")
    assert is_here("qwen-instruct")
    return "live, after kill -9 and after a reboot"


def is_refused(cluster: Cluster) -> bool:
    script = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8470/metrics').read().decode())"
    told = cluster.tried(f'kubectl -n cachd exec ds/cachd -- python3 -c "{script}"').stdout
    return "\ncachd_config_last_reload_successful 0.0\n" in told


@case("a model that leaves the list stays, but is no longer pinned")
def unlisted(cluster: Cluster) -> str:
    cluster.installed([QWEN, {**OTHER, "pin": True}])
    cluster.model_ready("other")
    assert is_pinned(cluster, "other")
    change(cluster, [QWEN])
    cluster.sh(ANNOTATE)
    until(lambda: not is_pinned(cluster, "other"), "it is unpinned")
    assert is_here("other")
    removed = cluster.cachd("rm other")
    assert removed.returncode == 0, removed.stderr
    until(lambda: not is_here("other"), "it is removed")
    return ""


def is_pinned(cluster: Cluster, name: str) -> bool:
    listed = json.loads(cluster.cachd("ls --output json").stdout or "[]")
    models = listed["models"] if isinstance(listed, dict) else listed
    return any(each["name"] == name and each["pinned"] for each in models)
