"""Makes the models that the clients load: tiny, with random weights, by the clients' own libraries."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.conformance.clients import (
    ADAPTER,
    ARRANGED,
    EMBEDDINGS,
    GGUF,
    ONNX,
    OWN_CODE,
    PIPELINE,
    TENSORS,
    TEXT,
    TRITON,
    VERSION,
)
from tests.ground.models import digests, safetensors_model

_SECONDS = 1800
_PROGRAMS = Path(__file__).parent / "makers"
MAKERS = {  # of each repository: the program, and the environment that it runs in
    TEXT: ("text", "torch"),
    EMBEDDINGS: ("embeddings", "torch"),
    PIPELINE: ("pipeline", "torch"),
    ADAPTER: ("adapter", "torch"),
    OWN_CODE: ("remote_code", "torch"),
    ONNX: ("onnx_model", "onnx"),
    GGUF: ("gguf_model", "hub-2.4"),
    TRITON: ("triton_repository", "hub-2.4"),
    VERSION: ("triton_version", "hub-2.4"),
    ARRANGED: ("triton_model", "hub-2.4"),
}


def model(repo: str, place: Path, python: str = "") -> dict[str, bytes | Path]:
    """The files of a model by path, which are made in `place` if it is not there.

    `python`: an interpreter of the environment that `MAKERS` names.
    """
    if not place.exists():
        staged = place.with_name(f"{place.name}.new")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        _make(repo, staged, python)
        staged.rename(place)
    return {path: place / path for path in digests(place)}


def _make(repo: str, place: Path, python: str) -> None:
    if repo == TENSORS:
        safetensors_model(place, shards=2, shard_bytes=1 << 20, seed=4)
    else:
        program = _PROGRAMS / f"{MAKERS[repo][0]}.py"
        subprocess.run([python, program, place], check=True, env={"HF_HUB_OFFLINE": "1"}, timeout=_SECONDS)
