"""Tells weights that can run code when they are loaded from those that cannot, by their names.

Files of PyTorch (`.bin`, `.pt`, `.pth`, `.ckpt`) and `.pkl` are Python pickles. Safetensors, GGUF and ONNX
have only data.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from posixpath import basename, dirname

from cachd.model.weights import format_of

_PICKLE = re.compile(r"\.(?:pkl|pickle|joblib)$", re.I)
_TORCH = re.compile(r"\.(?:bin|pt|pth|ckpt)(?:\.part\d+of\d+)?$", re.I | re.A)
_INDEX = re.compile(r"\.bin\.index(?:\.[\w-]+)?\.json$", re.I | re.A)
_OF_TORCH = ("bin", "original", "training")


@dataclass(frozen=True, slots=True)
class Unsafe:
    """The pickles of a model, sorted.

    `spare`: those that no engine needs, because safetensors are beside them or only a training wrote them,
    and the indexes of such files. `needed`: all others.
    """

    spare: tuple[str, ...]
    needed: tuple[str, ...]


def unsafe(paths: Sequence[str]) -> Unsafe:
    """The pickles among the files of a model."""
    safe = {dirname(path) for path in paths if path.lower().endswith(".safetensors")}
    spare: list[str] = []
    needed: list[str] = []
    for path in sorted(paths):
        of = format_of(path)
        if _INDEX.search(basename(path)):
            (spare if dirname(path) in safe else needed).append(path)
        elif _PICKLE.search(path) or (_TORCH.search(path) and of in _OF_TORCH):
            is_spare = dirname(path) in safe or of == "training" or (of == "original" and "" in safe)
            (spare if is_spare else needed).append(path)
    return Unsafe(tuple(spare), tuple(path for path in needed if not _INDEX.search(path)))
