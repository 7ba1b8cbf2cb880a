"""The models of the cases, and the pods that use them: those of the examples, with another engine."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.ground.models import safetensors_model
from tests.kube.cluster import NodeHub
from tests.kube.image import ENGINE
from tests.kube.programs import PROJECT

Object = dict[str, Any]
QWEN = {"ref": "hf://Qwen/Qwen2.5-0.5B-Instruct", "name": "qwen-instruct", "required": True}
OTHER = {"ref": "hf://org/other", "name": "other"}
BIG = {"ref": "hf://org/big", "name": "big"}
SHAPES = {QWEN["ref"]: (2, 4 << 20), OTHER["ref"]: (1, 1 << 20), BIG["ref"]: (4, 24 << 20)}
WRAPPER = PROJECT / "daemonset/examples/vllm/wrapper/vllm.yaml"
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


def consumer() -> Object:
    """The Deployment of the example that holds by the engine's own shell, with an engine that only loads.

    All else is as the example has it, but for what a node without GPU cannot give.
    """
    deployment: Object = copy.deepcopy(yaml.safe_load(WRAPPER.read_text()))
    pod = deployment["spec"]["template"]["spec"]
    (engine,) = pod["containers"]
    engine["image"] = ENGINE
    for container in (*pod["initContainers"], engine):
        container["resources"] = SMALL
    return deployment
