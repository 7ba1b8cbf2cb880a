"""The clients: what to install, and the script that loads a model as a user of the client would.

A script gets MODEL, a directory or a repository id, and the `pod` of tests/ground. It raises unless it has
loaded the model.
"""

from __future__ import annotations

from dataclasses import dataclass

EMBEDDINGS, ADAPTER, ONNX, TENSORS = "org/embeddings", "org/adapter", "org/onnx", "org/tensors"

PLAIN, HUB = "plain", "Hub"
OFFLINE, NO_NETWORK, ONLINE = "offline", "no network", "online"


@dataclass(frozen=True, slots=True)
class Client:
    """One row of the table.

    `packages`: what pip installs; the first one's version is shown. `repo`: the model that it loads.
    `faults`: the client's own faults, by (view, network); each is documented in the table instead of a time.
    """

    name: str
    packages: tuple[str, ...]
    repo: str
    script: str
    views: tuple[str, ...] = (PLAIN, HUB)
    faults: dict[tuple[str, str], str] | None = None

    @property
    def shown(self) -> str:
        """The package whose version the table shows."""
        return self.packages[0].partition("=")[0].partition("<")[0]


_TENSORS_OF = """
import glob, os
from safetensors import safe_open
def tensors(directory):
    for shard in sorted(glob.glob(os.path.join(directory, "*.safetensors"))):
        with safe_open(shard, framework="numpy") as opened:
            for name in opened.keys():
                opened.get_slice(name).get_shape()
                yield name
"""
_SNAPSHOT = """
import os
from huggingface_hub import hf_hub_download, snapshot_download
model = os.environ["MODEL"]
if os.path.isdir(model):
    config = os.path.join(model, "config.json")
else:
    config = hf_hub_download(model, "config.json")
    assert os.path.exists(os.path.join(snapshot_download(model), "config.json"))
open(config).read()
"""
_SAFETENSORS = (
    _TENSORS_OF
    + """
model = os.environ["MODEL"]
if not os.path.isdir(model):
    from huggingface_hub import snapshot_download
    model = snapshot_download(model)
assert list(tensors(model))
"""
)
_TRANSFORMERS = """
import os
from transformers import AutoModel, AutoTokenizer
model = os.environ["MODEL"]
tokens = AutoTokenizer.from_pretrained(model)("what every pod reads", return_tensors="pt")
assert AutoModel.from_pretrained(model)(**tokens).last_hidden_state.shape[-1] == 384
"""
_SENTENCE_TRANSFORMERS = """
import os
from sentence_transformers import SentenceTransformer
assert SentenceTransformer(os.environ["MODEL"], device="cpu").encode("what every pod reads").shape == (384,)
"""
_PEFT = """
import os
from peft import PeftConfig, PeftModel
from transformers import AutoModel, BertConfig
config = PeftConfig.from_pretrained(os.environ["MODEL"])
assert config.base_model_name_or_path
small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
PeftModel.from_pretrained(AutoModel.from_config(small), os.environ["MODEL"])
"""
_ONNX = """
import os
import onnx
model = os.environ["MODEL"]
if not os.path.isdir(model):
    from huggingface_hub import snapshot_download
    model = snapshot_download(model)
path = os.path.join(model, "model.onnx")
onnx.checker.check_model(path)
assert onnx.load(path).graph.initializer[0].raw_data
"""

LIGHT = (
    Client("huggingface_hub", ("huggingface_hub",), TENSORS, _SNAPSHOT),
    Client("safetensors", ("safetensors", "huggingface_hub", "numpy"), TENSORS, _SAFETENSORS),
)
_TORCH = ("transformers", "torch", "numpy")
ALL = (
    Client(
        "huggingface_hub 0.23",
        ("huggingface_hub==0.23.0",),
        TENSORS,
        _SNAPSHOT,
        faults={(HUB, ONLINE): "its own fault: `snapshot_download` writes refs/main; set HF_HUB_OFFLINE=1"},
    ),
    Client("huggingface_hub 0.36", ("huggingface_hub==0.36.0",), TENSORS, _SNAPSHOT),
    *LIGHT,
    Client("transformers", _TORCH, EMBEDDINGS, _TRANSFORMERS),
    Client("sentence-transformers", ("sentence-transformers", *_TORCH), EMBEDDINGS, _SENTENCE_TRANSFORMERS),
    Client("peft", ("peft", *_TORCH), ADAPTER, _PEFT),
    Client("onnx", ("onnx", "huggingface_hub"), ONNX, _ONNX),
)
NOT_TRIED = ("vLLM", "SGLang", "TGI", "TEI", "llama.cpp", "diffusers", "TensorRT-LLM", "Triton")
