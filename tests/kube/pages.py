"""Cases of what the pages say: their commands run as they stand."""

from __future__ import annotations

import re
import time
from typing import Any

import yaml

from cachd import __version__
from tests.kube.cases import case
from tests.kube.changes import write_config_map
from tests.kube.cluster import OLD_API, Cluster, Object, blocks_of_readme, is_ready
from tests.kube.image import CACHD
from tests.kube.models import QWEN, SMALL, held_by_cachd, plain_consumer
from tests.kube.processes import until
from tests.kube.programs import PROJECT
from tests.kube.serving import loaded
from tests.kube.signals import labels, new_node
from tests.kube.worker import ADDRESS

REFUSED = 7  # of curl's statuses; 28 is a timeout
ASK = "curl -sS -o /dev/null -w '%{http_code}' --connect-timeout 2 --max-time 10"
PAGE = "docs/kubernetes.md"
ASKED = "app=asks"


def checking(containers: list[Object]) -> Object:
    """A pod with the init containers that the page gives it, and the daemon's ConfigMap."""
    main = {"name": "checks", "image": CACHD, "args": ["--version"], "resources": SMALL}
    volume = {"name": "config", "configMap": {"name": "cachd"}}
    spec = {"restartPolicy": "Never", "initContainers": containers, "containers": [main], "volumes": [volume]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "checks"}, "spec": spec}


def asking() -> Object:
    """A pod that asks the daemon of its own node, with the environment that the page gives it."""
    (block,) = re.findall(r"```yaml\n(# daemon: .*?)```", (PROJECT / PAGE).read_text(), re.DOTALL)
    rights = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    container = {
        "name": "asks",
        "image": CACHD,
        "args": ["ls"],
        "env": yaml.safe_load(block)["env"],
        "resources": SMALL,
        "securityContext": rights,
    }
    metadata = {"name": "asks", "labels": dict([ASKED.split("=")])}
    spec = {"restartPolicy": "Never", "containers": [container]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@case("the commands of daemonset/README.md, and those that the chart's notes name, run as they stand")
def commands(cluster: Cluster) -> str:
    named = {**QWEN, "name": "qwen"}
    cluster.installed([named], hostPort={"enabled": True}, service={"enabled": False})
    cluster.model_ready("qwen")
    blocks = [block for block in blocks_of_readme() if "for pod in" in block or "annotate" in block]
    notes = cluster.sh("helm -n cachd get notes cachd")
    blocks += re.findall(r"^  (kubectl -n cachd (?:rollout|exec) .*)", notes, re.MULTILINE)
    blocks += ["helm -n cachd test cachd"]
    for block in blocks:
        cluster.sh(block)
    return f"{len(blocks)} blocks"


@case("docs/kubernetes.md from first block to last, beside pods that hold by a shell, and by `cachd hold --`")
def follow_the_page(cluster: Cluster) -> str:
    model = {**QWEN, "name": "qwen"}
    blocks = blocks_of_page()
    described = [yaml.safe_load(text) for kind, text in blocks if kind == "yaml"]
    (options,) = [each for each in described if "nodeSignals" in each]
    with new_node(cluster):
        install_by_readme(cluster, [model], hostPort={"enabled": True}, **options)
        cluster.ready()
        cluster.model_ready("qwen")
        apply_consumers(cluster, next(each["affinity"] for each in described if "affinity" in each))
        until(lambda: labels(cluster) == {"qwen": "ready"}, "the label of the model is there")
        write_config_map(cluster, [model])
        for kind, text in blocks:
            follow(cluster, kind, text)
            assert labels(cluster) == {} or "kubectl label nodes" not in text, "the page removes the label"
        assert cluster.cachd("rm qwen").returncode != 0, "a model that is held was removed"
    return f"{len(blocks)} blocks"


def blocks_of_page() -> list[tuple[str, str]]:
    """Language and text of each block of docs/kubernetes.md, in their order."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (PROJECT / PAGE).read_text(), re.DOTALL | re.MULTILINE)


def install_by_readme(cluster: Cluster, models: list[Object], **values: Any) -> None:
    """Install as daemonset/README.md says. Its first line builds the image, which the node has already."""
    (block,) = [block for block in blocks_of_readme() if "helm install" in block]
    build, install, secret = block.splitlines()
    assert build.startswith("docker build")
    cluster.worker.ctr("images", "tag", "--force", CACHD, f"registry.example.com/cachd:{__version__}")
    (cluster.project / "values.yaml").write_text(yaml.safe_dump(cluster.values(models, **values)))
    cluster.sh(f"{install} {OLD_API} --values values.yaml")
    cluster.sh(secret)


def apply_consumers(cluster: Cluster, affinity: Object) -> None:
    """A pod whose plain shell holds, and one that `cachd hold` starts; both prefer nodes with the model."""
    plain, holds = plain_consumer("qwen"), held_by_cachd("qwen")
    for spec in (plain["spec"]["template"]["spec"], holds["spec"]):
        spec["affinity"] = affinity
    cluster.apply(plain, holds)
    said = loaded(cluster)
    assert said["create"] == "Read-only file system", said
    until(lambda: is_ready(cluster.get("pod", "holds")), "the pod that cachd hold starts is ready")


def follow(cluster: Cluster, kind: str, text: str) -> None:
    """Do what a block of the page says."""
    document = yaml.safe_load(text) if kind == "yaml" else {}
    if kind == "sh":
        cluster.sh(text)
    elif "kind" in document:
        cluster.apply(document)
        cluster.sh(f"kubectl delete {document['kind']} {document['metadata']['name']}")
    elif "env" in document:
        cluster.apply(asking())
        cluster.succeeded("asks")
    elif "initContainers" in document:
        cluster.apply(checking(document["initContainers"]), namespace="cachd")
        cluster.succeeded("checks", "cachd")
    else:
        assert document.keys() <= {"nodeSignals", "affinity"}, document


@case("a hostPort at status.hostIP answers, and refuses at once without a daemon; so does the Service")
def addresses(cluster: Cluster) -> str:
    cluster.installed([QWEN], hostPort={"enabled": True})
    service = cluster.get("service", "cachd", "-n", "cachd")["spec"]["clusterIP"]
    for host in (ADDRESS, service):
        until(lambda host=host: status(cluster, host) == (0, "200"), f"{host} answers")
    cluster.apply(asking())
    cluster.succeeded("asks")
    nowhere = '{"spec":{"template":{"spec":{"nodeSelector":{"nowhere":"true"}}}}}'
    cluster.sh(f"kubectl -n cachd patch daemonset cachd -p '{nowhere}'")
    cluster.gone()
    seconds = []
    for host in (ADDRESS, service):
        begun = time.monotonic()
        until(lambda host=host: status(cluster, host)[0] == REFUSED, f"{host} refuses")
        begun = time.monotonic()
        assert status(cluster, host)[0] == REFUSED
        seconds.append(time.monotonic() - begun)
    return (
        f"refused after {1000 * max(seconds):.0f} ms; 1.20 has no internalTrafficPolicy, so no drop was seen"
    )


def status(cluster: Cluster, host: str) -> tuple[int, str]:
    """How curl ends, and the status that it got."""
    asked = cluster.tried(f"{ASK} http://{host}:8470/livez")
    return asked.returncode, asked.stdout
