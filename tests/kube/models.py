"""The models of the cases, and the pods that use them: those of the examples, with another engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tests.ground.models import safetensors_model
from tests.kube.cluster import NodeHub
from tests.kube.image import CACHD, ENGINE
from tests.kube.programs import PROJECT

Object = dict[str, Any]
QWEN = {"ref": "hf://Qwen/Qwen2.5-0.5B-Instruct", "name": "qwen-instruct", "required": True}
OTHER = {"ref": "hf://org/other", "name": "other"}
BIG = {"ref": "hf://org/big", "name": "big"}
SHAPES = {QWEN["ref"]: (2, 4 << 20), OTHER["ref"]: (1, 1 << 20), BIG["ref"]: (4, 24 << 20)}
WRAPPER = PROJECT / "daemonset/examples/vllm/wrapper/vllm.yaml"
RESTRICTED = PROJECT / "daemonset/examples/restricted/wrapper/vllm.yaml"
PODS = PROJECT / "docs/pods.md"
SMALL = {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "256Mi"}}
CONSUMERS = "app.kubernetes.io/name=vllm"


def supply(hub: NodeHub, place: Path) -> None:
    """Let the Hub have every model."""
    for seed, (ref, (shards, shard_bytes)) in enumerate(SHAPES.items()):
        repository = str(ref).removeprefix("hf://")
        directory = place / repository
        safetensors_model(directory, shards=shards, shard_bytes=shard_bytes, seed=seed)
        files = {str(f.relative_to(directory)): f for f in directory.rglob("*") if f.is_file()}
        hub.add(repository, dict(files))


def size_bytes(model: Object, place: Path) -> int:
    """Of all files of a model that come from the CDN: the weights."""
    directory = place / str(model["ref"]).removeprefix("hf://")
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def consumer(example: Path = WRAPPER) -> Object:
    """The Deployment of an example that holds by the engine's own shell, with an engine that only loads.

    All else is as the example has it, but for what a node without GPU cannot give.
    """
    documents = yaml.safe_load_all(example.read_text())
    deployment: Object = next(each for each in documents if each["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    engine["image"] = ENGINE
    for container in (*pod["initContainers"], engine):
        container["resources"] = SMALL
    return deployment


def plain_consumer(model: str) -> Object:
    """The same Deployment for an image without cachd: docs/pods.md has its two scripts."""
    deployment = consumer()
    pod = deployment["spec"]["template"]["spec"]
    (waits,), (engine,) = pod["initContainers"], pod["containers"]
    waiting, holding = (script_of_pods(name) for name in ("wait", "hold"))
    environment = [{"name": "CACHE", "value": "/cache"}, {"name": "MODEL", "value": model}]
    waits |= {"image": ENGINE, "command": ["sh", "-c", waiting], "args": [], "env": environment}
    kept = [each for each in engine["env"] if each["name"] not in ("CACHE", "MODEL")]
    engine |= {"command": ["sh", "-c", holding], "env": [*environment, *kept]}
    return deployment


def held_by_cachd(model: str) -> Object:
    """A pod of an image that has cachd: `cachd hold` of docs/pods.md waits, holds and starts its program."""
    (words,) = re.findall(r"`cachd (hold\s+qwen --link /model --) ", PODS.read_text())
    mounts = [
        {"name": "cache", "mountPath": "/cache", "readOnly": True},
        {"name": "model", "mountPath": "/model"},
    ]
    container = {
        "name": "holds",
        "image": CACHD,
        "args": [*words.replace("qwen", model).split(), "sleep", "infinity"],
        "readinessProbe": {"exec": {"command": ["test", "-d", f"/model/{model}/"]}, "periodSeconds": 1},
        "resources": SMALL,
        "volumeMounts": mounts,
    }
    cache = {"name": "cache", "hostPath": {"path": "/var/lib/cachd", "type": "Directory"}}
    spec = {
        "securityContext": {"runAsUser": 2000, "runAsGroup": 2000},
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [cache, {"name": "model", "emptyDir": {}}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "holds"}, "spec": spec}


def script_of_pods(name: str) -> str:
    """A script of docs/pods.md by its first word, as it stands."""
    (script,) = re.findall(rf"```shell\n(# {name}: .*?)```", PODS.read_text(), re.DOTALL)
    return str(script)
