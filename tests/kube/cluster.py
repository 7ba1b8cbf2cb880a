"""The cluster as an operator has it: kubectl, helm, and a Hub beside it that counts what the nodes fetch."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.ground.helm import helm_binary
from tests.ground.hub import Cdn, Hub
from tests.kube.plane import Plane
from tests.kube.processes import until
from tests.kube.programs import PROJECT
from tests.kube.worker import ADDRESS, CACHE, Worker

Object = dict[str, Any]
NAMESPACE = "cachd"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
DAEMONS = "app.kubernetes.io/name=cachd"
# What the manifests have that Kubernetes 1.20 lacks, and what stands there instead.
NEWER = {
    "internalTrafficPolicy: Local": "",
    "maxSurge: 0": "",
    'kubeVersion: ">=1.26.0-0"': 'kubeVersion: ">=1.20.0-0"',
}


class NodeCdn(Cdn):
    host = ADDRESS


class NodeHub(Hub):
    """A Hub that the pods of the node reach."""

    host = ADDRESS

    def __init__(self) -> None:
        super().__init__()
        self.cdn = NodeCdn()

    def forget_all(self) -> None:
        """Count from here."""
        self.forget()
        self.cdn.forget()

    def fetched(self) -> list[str]:
        """The path of each file that was asked for, in order."""
        resolved = [seen.path for seen in self.requests if seen.method == "GET" and "/resolve/" in seen.path]
        return resolved + [seen.path for seen in self.cdn.requests if seen.method == "GET"]


@dataclass
class Cluster:
    """One node, and the project's manifests in a directory of their own, in which commands run."""

    place: Path
    plane: Plane
    worker: Worker
    hub: NodeHub
    log: Callable[[str], None]
    project: Path = field(init=False)

    def __post_init__(self) -> None:
        self.project = self.place / "project"
        shutil.copytree(PROJECT / "daemonset", self.project / "daemonset")
        adapt(self.project / "daemonset")

    # --- commands ---

    def sh(self, script: str, **variables: str) -> str:
        """What a script prints, as a page has it, in the project's directory. Raises RuntimeError."""
        ended = self.tried(script, **variables)
        if ended.returncode:
            raise RuntimeError(f"{script.strip()}: exit {ended.returncode}: {ended.stderr}{ended.stdout}")
        return ended.stdout

    def tried(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The same, whatever its exit status."""
        homes = self.place / "home"
        homes.mkdir(exist_ok=True)
        tools = f"{Path(helm_binary() or 'helm').parent}:{SYSTEM_PATH}"
        here = {"KUBECONFIG": str(self.plane.kubeconfig), "HOME": str(homes), "PATH": tools, **variables}
        ended = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.project,
            env=here,
            capture_output=True,
            text=True,
            timeout=900,
        )
        self.log(f"$ {script.strip()}\n{ended.stdout}{ended.stderr}exit {ended.returncode}")
        return ended

    def get(self, *words: str) -> Any:
        """What `kubectl get WORDS -o json` gives. Raises LookupError if the object is not there.

        It asks again while the API server gives no answer in time, as on a busy machine.
        """
        command = ["kubectl", "--kubeconfig", str(self.plane.kubeconfig), "get", *words, "-o", "json"]

        def answer() -> Any:
            ended = subprocess.run(command, capture_output=True, text=True)
            if "(NotFound)" in ended.stderr:
                raise LookupError(ended.stderr)
            if ended.returncode:
                self.log(f"kubectl get {' '.join(words)}: {ended.stderr}")
                return None
            return json.loads(ended.stdout)

        return until(answer, f"the API server answers: get {' '.join(words)}")

    def pods(self, selector: str = DAEMONS, namespace: str = NAMESPACE) -> list[Object]:
        """Those that are not being deleted."""
        listed = self.get("pods", "-n", namespace, "-l", selector)["items"]
        return [pod for pod in listed if "deletionTimestamp" not in pod["metadata"]]

    def apply(self, *objects: Object, namespace: str = "default") -> None:
        text = yaml.safe_dump_all(objects)
        command = ["kubectl", "--kubeconfig", str(self.plane.kubeconfig), "apply", "-n", namespace, "-f", "-"]
        ended = subprocess.run(command, input=text, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"kubectl apply: {ended.stderr}")

    # --- waits ---

    def ready(self, selector: str = DAEMONS, namespace: str = NAMESPACE, but: str = "") -> Object:
        """The one pod of a selector, once it is Ready; not the one of uid `but`."""

        def found() -> Object | None:
            pods = [each for each in self.pods(selector, namespace) if each["metadata"]["uid"] != but]
            return next((pod for pod in pods if is_ready(pod)), None)

        return until(found, f"a pod of {selector} is Ready")

    def gone(self, selector: str = DAEMONS, namespace: str = NAMESPACE) -> None:
        until(
            lambda: not self.get("pods", "-n", namespace, "-l", selector)["items"],
            f"the pods of {selector} are gone",
        )

    def node_ready(self) -> None:
        """Wait until the kubelet has registered the node, and it is Ready."""
        until(lambda: any(map(is_ready, self.get("nodes")["items"])), "the node is Ready")

    def succeeded(self, name: str, namespace: str = "default") -> None:
        """Wait until a pod has ended. Raises RuntimeError with its log if it failed."""

        def phase() -> str:
            found = str(self.get("pod", name, "-n", namespace)["status"]["phase"])
            return found if found in ("Succeeded", "Failed") else ""

        if until(phase, f"the pod {name} has ended") == "Failed":
            logs = self.tried(f"kubectl -n {namespace} logs {name} --all-containers --prefix")
            raise RuntimeError(f"the pod {name} failed: {logs.stdout}{logs.stderr}")

    def model_ready(self, name: str) -> Object:
        """What the ready file of a model says, once it is there."""
        file = CACHE / "ready" / f"{name}.json"
        until(file.exists, f"{file.name} is there")
        said: Object = json.loads(file.read_text())
        return said

    # --- the daemon ---

    def values(self, models: list[Object], **values: Any) -> Object:
        """The chart's values with which the daemon pulls from the Hub of this ground."""
        config = {**self.origin(), **values.pop("config", {})}
        return {"models": models, "config": config, **values}

    def origin(self) -> Object:
        return {"hf_endpoint": self.hub.url, "allow": [f"{ADDRESS}/32"]}

    def install(self, models: list[Object], **values: Any) -> None:
        """As the chart's page has it, without a wait: the Secret comes after the pods."""
        (self.project / "values.yaml").write_text(yaml.safe_dump(self.values(models, **values)))
        self.sh(
            "helm install cachd daemonset/chart --namespace cachd --create-namespace"
            f" {OLD_API} --values values.yaml"
        )
        self.secret()

    def upgrade(self, models: list[Object], **values: Any) -> None:
        (self.project / "values.yaml").write_text(yaml.safe_dump(self.values(models, **values)))
        self.sh(f"helm upgrade cachd daemonset/chart --namespace cachd {OLD_API} --values values.yaml")

    def secret(self) -> None:
        """The Secret that the pods wait for. Its key is any token."""
        self.sh(
            'kubectl -n cachd create secret generic cachd --from-literal=token="$TOKEN"',
            TOKEN=secrets.token_hex(32),
        )

    def uninstall(self) -> None:
        self.sh("helm uninstall cachd --namespace cachd")
        self.sh("kubectl -n cachd delete secret cachd --ignore-not-found")
        self.gone()

    def installed(self, models: list[Object], **values: Any) -> Object:
        """The pod of a new release, whose daemon is Ready."""
        self.hub.forget_all()
        self.install(models, **values)
        return self.ready()

    def clear(self) -> None:
        """Remove every pod, all that a release or a manifest has made, and what is in the cache."""
        made = f"{MADE} -l '{NOT_KUBERNETES}'"
        for namespace in ("default", NAMESPACE):
            self.tried(f"kubectl -n {namespace} delete {made} --grace-period=1 --wait=false")
        self.tried(f"kubectl delete {OF_CLUSTER} -l {DAEMONS} --wait=false")
        until(lambda: not self.get("pods", "-A")["items"], "every pod is gone")
        for each in CACHE.iterdir():
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
        self.hub.cdn.rate = None

    def cachd(self, words: str) -> subprocess.CompletedProcess[str]:
        """A command of cachd in the daemon's pod."""
        return self.tried(f"kubectl -n cachd exec ds/cachd -- cachd {words}")

    def restarts(self) -> int:
        """How often the containers of the daemon's pod were restarted."""
        (pod,) = self.pods()
        return sum(each["restartCount"] for each in pod["status"]["containerStatuses"])


# What installs and cases make; the Secrets of helm are its releases.
MADE = "deployment,daemonset,job,pod,service,configmap,secret,serviceaccount,networkpolicy,role,rolebinding"
NOT_KUBERNETES = "component!=apiserver"  # the Service by which pods reach the API server stays
OF_CLUSTER = "clusterrole,clusterrolebinding,persistentvolume"
# Helm 4 applies on the server, which in 1.20 refuses fields that it does not know.
OLD_API = "--server-side=false"


def adapt(directory: Path) -> None:
    """Take out of a copy of the manifests what Kubernetes 1.20 lacks (`NEWER`)."""
    for file in directory.rglob("*.yaml"):
        text = file.read_text()
        for newer, older in NEWER.items():
            text = text.replace(newer, older)
        file.write_text(text)


def is_ready(pod: Mapping[str, Any]) -> bool:
    return any(
        each["type"] == "Ready" and each["status"] == "True" for each in pod["status"].get("conditions", [])
    )


def page(name: str, section: str) -> list[str]:
    """The blocks of shell in a section of a page, as they stand."""
    text = (PROJECT / name).read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"```sh(?:ell)?\n(.*?)```", text, re.DOTALL)


def blocks_of_readme() -> list[str]:
    """The blocks of shell of daemonset/README.md."""
    return re.findall(r"```sh(?:ell)?\n(.*?)```", (PROJECT / "daemonset/README.md").read_text(), re.DOTALL)
