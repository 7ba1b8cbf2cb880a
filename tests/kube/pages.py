"""Cases of what the pages say: their commands run as they stand."""

from __future__ import annotations

import re
import time

import yaml

from tests.kube.cases import case
from tests.kube.cluster import Cluster, Object, blocks_of_readme, page
from tests.kube.image import CACHD
from tests.kube.models import QWEN, SMALL
from tests.kube.processes import until
from tests.kube.programs import PROJECT
from tests.kube.worker import ADDRESS

REFUSED = 7  # of curl's statuses; 28 is a timeout
ASK = "curl -sS -o /dev/null -w '%{http_code}' --connect-timeout 2 --max-time 10"
PAGE = "docs/kubernetes.md"
ASKED = "app=asks"


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


@case("the commands of the pages, and those that the chart's notes name, run as they stand")
def commands(cluster: Cluster) -> str:
    named = {**QWEN, "name": "qwen"}
    cluster.installed([named], hostPort={"enabled": True}, service={"enabled": False})
    cluster.model_ready("qwen")
    blocks = page(PAGE, "Is a model ready?") + page(PAGE, "Two daemons on one node")
    blocks += [block for block in blocks_of_readme() if "for pod in" in block or "annotate" in block]
    notes = cluster.sh("helm -n cachd get notes cachd")
    blocks += re.findall(r"^  (kubectl -n cachd (?:rollout|exec) .*)", notes, re.MULTILINE)
    blocks += ["helm -n cachd test cachd"]
    for block in blocks:
        cluster.sh(block)
    return f"{len(blocks)} blocks"


@case("a hostPort at status.hostIP answers, and refuses at once without a daemon; so does the Service")
def addresses(cluster: Cluster) -> str:
    cluster.installed([QWEN], hostPort={"enabled": True})
    service = cluster.get("service", "cachd", "-n", "cachd")["spec"]["clusterIP"]
    for host in (ADDRESS, service):
        until(lambda host=host: status(cluster, host) == (0, "200"), f"{host} answers")
    cluster.apply(asking())
    until(lambda: phase(cluster) in ("Succeeded", "Failed"), "the pod that asks has ended")
    assert phase(cluster) == "Succeeded", cluster.sh("kubectl logs asks")
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


def phase(cluster: Cluster) -> str:
    (pod,) = cluster.pods(ASKED, "default")
    return str(pod["status"]["phase"])
