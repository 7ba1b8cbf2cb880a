"""Defines the code of each check of a preflight, and the meaning of its findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class Code(StrEnum):
    """The codes of findings, in the order in which they are shown."""

    loaders = "loaders"
    memory = "memory"
    config = "config"
    tokenizer = "tokenizer"
    shards = "shards"
    content = "content"
    safetensors = "safetensors"
    gguf = "gguf"
    pickle = "pickle"
    remote_code = "remote_code"
    pipeline = "pipeline"
    modules = "modules"
    adapter = "adapter"
    not_examined = "not_examined"


class Mode(StrEnum):
    """What a pull does with the findings of its preflight.

    `warn`: keeps those that are not ok with the snapshot. `strict`: also fails if one is `refused`. `off`:
    makes no preflight.
    """

    warn = "warn"
    strict = "strict"
    off = "off"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a check examines, and when its finding is a warning or refused; empty: never."""

    checks: str
    warning: str = ""
    refused: str = ""


MEANINGS: Mapping[Code, Meaning] = MappingProxyType(
    {
        Code.loaders: Meaning(
            "which engines and libraries take this layout: vllm, sglang, tgi, transformers, diffusers,"
            " sentence-transformers, llama.cpp, onnxruntime, peft",
        ),
        Code.memory: Meaning("how many bytes the tensors take; a GPU needs more than that"),
        Code.config: Meaning(
            "`config.json` beside safetensors or PyTorch weights",
            "there is none",
            "it is not JSON, or too large or too deep to read",
        ),
        Code.tokenizer: Meaning("a tokenizer beside the weights of a language model", "there is none"),
        Code.shards: Meaning(
            "whether each shard that an index or a number names is here",
            "the index names none of the weights beside it",
            "a shard is missing",
        ),
        Code.content: Meaning(
            "whether files are what their names say", refused="a file is a pointer, a web page or cut off"
        ),
        Code.safetensors: Meaning(
            "each safetensors header: length, JSON, types, and offsets that cover the file exactly",
            refused="a header is wrong",
        ),
        Code.gguf: Meaning(
            "each GGUF header, and the numbers of its splits", refused="a header or a number is wrong"
        ),
        Code.pickle: Meaning(
            "weights that are Python pickles, which can run code when they are loaded",
            "no safetensors are beside them",
        ),
        Code.remote_code: Meaning(
            "the Python files that `auto_map` names",
            "they are in another repository",
            "a file is missing",
        ),
        Code.pipeline: Meaning(
            "the components in `model_index.json` of diffusers", refused="one has no files, or it is not JSON"
        ),
        Code.modules: Meaning(
            "the modules in `modules.json` of sentence-transformers",
            refused="one has no configuration, or it is not JSON",
        ),
        Code.adapter: Meaning(
            "`adapter_config.json`, and the base model that the adapter needs",
            "it names no base model",
            "the adapter's weights are missing, or it is not JSON",
        ),
        Code.not_examined: Meaning(
            "whether all headers were read", "the model has more or larger headers than a preflight reads"
        ),
    }
)


def table() -> list[tuple[str, str, str, str]]:
    """Code, what is checked, when it is a warning, and when it is refused, for the documentation."""
    return [(code.value, m.checks, m.warning, m.refused) for code, m in MEANINGS.items()]
