"""Says how an engine loads a model from the mounted cache: variables, command, arguments and a pod.

The forms are those of daemonset/examples, which are tested.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cachd import __version__

_WAIT_SECONDS = 3600
_LONGEST_POD_NAME = 52
_NO_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
_OF_CACHD = {
    "securityContext": {**_NO_RIGHTS, "readOnlyRootFilesystem": True},
    "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "96Mi"}},
}
_KERNELS = {"TRITON_CACHE_DIR": "{scratch}/triton", "TORCHINDUCTOR_CACHE_DIR": "{scratch}/inductor"}
_MISTRAL = tuple(
    word
    for option in ("tokenizer-mode", "config-format", "load-format")
    for word in (f"--{option}", "mistral")
)


class EngineName(StrEnum):
    """The engines for which there is a recipe."""

    vllm = "vllm"
    sglang = "sglang"
    tgi = "tgi"
    transformers = "transformers"
    llama_cpp = "llama.cpp"


@dataclass(frozen=True, slots=True)
class Engine:
    """How an engine is started.

    In `command` and `args`, {path} is the model and {name} its name; in `env`, {scratch} is a directory to
    write to.
    """

    image: str
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    port: int | None = None
    user: str = "nobody"
    env: Mapping[str, str] | None = None
    hub_cache: str = "HF_HUB_CACHE"
    gpu: bool = True
    memory: str = "16Gi"


ENGINES: Mapping[EngineName, Engine] = {
    EngineName.vllm: Engine(
        "vllm/vllm-openai:v0.32.0",
        ("vllm", "serve", "{path}"),
        ("--served-model-name", "{name}", "--port", "8000"),
        8000,
        "vllm",
        {"VLLM_CACHE_ROOT": "{scratch}/vllm"},
    ),
    EngineName.sglang: Engine(
        "lmsysorg/sglang:v0.5.5",
        ("python3", "-m", "sglang.launch_server"),
        ("--model-path", "{path}", "--served-model-name", "{name}", "--host", "0.0.0.0", "--port", "30000"),  # noqa: S104 in a pod
        30000,
        env={**_KERNELS, "SGLANG_CACHE_DIR": "{scratch}/sglang"},
    ),
    EngineName.tgi: Engine(
        "ghcr.io/huggingface/text-generation-inference:3.3.6",
        ("text-generation-launcher",),
        ("--model-id", "{path}", "--port", "8080"),
        8080,
        env=_KERNELS,
        hub_cache="HUGGINGFACE_HUB_CACHE",
    ),
    EngineName.transformers: Engine("your-image-with-transformers", env=_KERNELS),
    EngineName.llama_cpp: Engine(
        "ghcr.io/ggml-org/llama.cpp:server-b6900",
        ("/app/llama-server",),
        ("--model", "{path}", "--alias", "{name}", "--host", "0.0.0.0", "--port", "8080"),  # noqa: S104 in a pod
        8080,
        gpu=False,
        memory="4Gi",
    ),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one engine loads one model.

    `name`: of the model. `file`: the file or directory in the plain view of the model that the engine takes;
    empty: the model's directory.
    `is_mistral`: the model has only the form of Mistral. `cache`, `link`: where the pod mounts the cache, and
    where `cachd hold` makes the link. `scratch`: where it has a directory to write to.
    """

    engine: EngineName
    name: str
    file: str = ""
    is_mistral: bool = False
    cache: str = "/cache"
    link: str = "/model"
    scratch: str = "/scratch"

    @property
    def path(self) -> str:
        """What the engine loads."""
        return "/".join(filter(None, (self.link, self.name, self.file)))

    @property
    def env(self) -> dict[str, str]:
        """The variables. With them the engine asks the Hub for nothing, and writes only into an emptyDir."""
        of = ENGINES[self.engine]
        return {
            of.hub_cache: f"{self.cache}/hub",
            "HF_HUB_OFFLINE": "1",
            "HOME": self.scratch,
            "USER": of.user,
            "HF_HOME": f"{self.scratch}/huggingface",
            **{key: value.replace("{scratch}", self.scratch) for key, value in (of.env or {}).items()},
            **({"MODEL": self.path} if not of.command else {}),
        }

    @property
    def command(self) -> list[str]:
        """The program and its first words; empty if the image has a program of its own."""
        return self._filled(ENGINES[self.engine].command)

    @property
    def args(self) -> list[str]:
        """The arguments of the program."""
        more = _MISTRAL if self.is_mistral and self.engine is EngineName.vllm else ()
        return self._filled((*ENGINES[self.engine].args, *more))

    def as_document(self) -> dict[str, object]:
        """The recipe as JSON."""
        return {
            "name": self.name,
            "engine": self.engine.value,
            "path": self.path,
            "env": self.env,
            "command": self.command,
            "args": self.args,
            "port": ENGINES[self.engine].port,
            "pod": self.pod(),
        }

    def pod(self) -> dict[str, Any]:
        """A pod that waits for the model, holds it, and runs the engine. For Kubernetes 1.29 and later."""
        name = re.sub(r"[^a-z0-9]+", "-", self.name.lower())[:_LONGEST_POD_NAME].strip("-") or "model"
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"app.kubernetes.io/name": name}},
            "spec": {
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,  # a Service named vllm would set VLLM_PORT
                **({"tolerations": [_GPU]} if ENGINES[self.engine].gpu else {}),
                "securityContext": {
                    "runAsNonRoot": True,
                    "runAsUser": 2000,
                    "runAsGroup": 2000,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
                "initContainers": [self._wait(), self._hold()],
                "containers": [self._engine()],
                "volumes": [
                    {"name": "cache", "hostPath": {"path": "/var/lib/cachd", "type": "Directory"}},
                    {"name": "model", "emptyDir": {}},
                    {"name": "scratch", "emptyDir": {}},
                    {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
                ],
            },
        }

    def _wait(self) -> dict[str, Any]:
        return {
            "name": "wait-for-model",
            "image": f"cachd:{__version__}",
            "args": ["wait", self.name, "--cache", self.cache, "--timeout", str(_WAIT_SECONDS)],
            "terminationMessagePolicy": "FallbackToLogsOnError",
            **_OF_CACHD,
            "volumeMounts": [self._cache()],
        }

    def _hold(self) -> dict[str, Any]:
        return {
            "name": "hold-model",
            "image": f"cachd:{__version__}",
            "args": ["hold", self.name, "--cache", self.cache, "--link", self.link],
            "restartPolicy": "Always",
            "startupProbe": {
                "exec": {"command": ["test", "-d", f"{self.link}/{self.name}/"]},
                "periodSeconds": 1,
                "failureThreshold": _WAIT_SECONDS,
            },
            **_OF_CACHD,
            "volumeMounts": [self._cache(), {"name": "model", "mountPath": self.link}],
        }

    def _engine(self) -> dict[str, Any]:
        of = ENGINES[self.engine]
        gpu = {"nvidia.com/gpu": "1"} if of.gpu else {}
        return {
            "name": self.engine.value.replace(".", "-"),
            "image": of.image,
            **({"command": self.command, "args": self.args} if of.command else {}),
            "env": [{"name": key, "value": value} for key, value in self.env.items()],
            **_served(of.port),
            "securityContext": _NO_RIGHTS,
            "resources": {
                "requests": {"cpu": "2", "memory": of.memory},
                "limits": {"memory": of.memory, **gpu},
            },
            "volumeMounts": [
                self._cache(),
                {"name": "model", "mountPath": self.link, "readOnly": True},
                {"name": "scratch", "mountPath": self.scratch},
                {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 a volume of the pod
            ],
        }

    def _cache(self) -> dict[str, Any]:
        return {"name": "cache", "mountPath": self.cache, "readOnly": True}

    def _filled(self, words: Sequence[str]) -> list[str]:
        return [word.replace("{path}", self.path).replace("{name}", self.name) for word in words]


_GPU = {"key": "nvidia.com/gpu", "operator": "Exists"}


def _served(port: int | None) -> dict[str, Any]:
    """The port of an engine, and its probes."""
    if port is None:
        return {}
    health = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5}
    return {
        "ports": [{"name": "http", "containerPort": port}],
        "startupProbe": {**health, "failureThreshold": 240},
        "readinessProbe": health,
    }
