"""Makes the models that the clients load."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conformance.clients import ADAPTER, EMBEDDINGS, ONNX, TENSORS
from tests.ground.models import digests, minilm, safetensors_model

_ADAPTER = """
import sys
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, BertConfig
small = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
adapted = get_peft_model(AutoModel.from_config(small), LoraConfig(target_modules=["query", "value"], r=2))
adapted.peft_config["default"].base_model_name_or_path = "org/base"
adapted.save_pretrained(sys.argv[1])
"""
_ONNX = """
import sys
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
weights = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 64])
graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weights])
onnx.save_model(helper.make_model(graph), sys.argv[1] + "/model.onnx", save_as_external_data=True,
                location="model.onnx_data", size_threshold=0)
"""
_SCRIPTS = {ADAPTER: _ADAPTER, ONNX: _ONNX}


def model(repo: str, place: Path, python: str) -> dict[str, bytes | Path]:
    """The files of a model by path. `python`: an interpreter that has the library that makes it."""
    place.mkdir(parents=True)
    if repo == EMBEDDINGS:
        place = minilm()
    elif repo == TENSORS:
        safetensors_model(place, shards=2, shard_bytes=1 << 20, seed=4)
    else:
        subprocess.run([python, "-c", _SCRIPTS[repo], str(place)], check=True, env={"HF_HUB_OFFLINE": "1"})
    return {path: place / path for path in digests(place)}
