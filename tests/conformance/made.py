"""Makes the models that the clients load: tiny, with random weights, by the clients' own libraries."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.conformance.clients import ADAPTER, EMBEDDINGS, GGUF, ONNX, OWN_CODE, PIPELINE, TENSORS, TEXT
from tests.ground.models import digests, safetensors_model

_PROGRAMS = Path(__file__).parent / "makers"
MAKERS = {  # of each repository: the program, and the environment that it runs in
    TEXT: ("text", "torch"),
    EMBEDDINGS: ("embeddings", "torch"),
    PIPELINE: ("pipeline", "torch"),
    ADAPTER: ("adapter", "torch"),
    OWN_CODE: ("remote_code", "torch"),
    ONNX: ("onnx_model", "onnx"),
    GGUF: ("gguf_model", "hub-2.4"),
}


def model(repo: str, place: Path, python: str = "") -> dict[str, bytes | Path]:
    """The files of a model by path. `python`: an interpreter of the environment that `MAKERS` names."""
    place.mkdir(parents=True)
    if repo == TENSORS:
        safetensors_model(place, shards=2, shard_bytes=1 << 20, seed=4)
    else:
        program = _PROGRAMS / f"{MAKERS[repo][0]}.py"
        subprocess.run([python, program, place], check=True, env={"HF_HUB_OFFLINE": "1"}, timeout=600)
    return {path: place / path for path in digests(place)}
