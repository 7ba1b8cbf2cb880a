"""Small files of weights in their real formats, and what people find in their place."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from pathlib import Path

from tests.ground.origin import noise


def weights_of(root: Path, name: str) -> bytes:
    """The weights of a published model of one safetensors file."""
    return (root / "models" / name / "model.safetensors").read_bytes()


def index(*shards: object) -> bytes:
    """An index of shards, such as model.safetensors.index.json."""
    return json.dumps({"weight_map": {f"layer.{n}": shard for n, shard in enumerate(shards)}}).encode()


def safetensors(size: int = 3000) -> bytes:
    """One tensor of so many bytes."""
    header = {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + noise(size)


def gguf(
    *, tensors: int = 3, tensor_bytes: int = 1024, alignment: int = 64, split: tuple[int, int] | None = None
) -> bytes:
    """A GGUF of version 3 with pairs of several types. `split`: its number, from 0, and their count."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    pairs = [
        string("general.alignment") + struct.pack("<II", 4, alignment),
        string("general.name") + struct.pack("<I", 8) + string("a model"),
        string("general.is_good") + struct.pack("<IB", 7, 1),
        string("tokens") + struct.pack("<IIQ", 9, 8, 2) + string("[UNK]") + string("a"),
        string("scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<ff", 0.5, 1.5),
    ]
    for key, value in zip(("split.no", "split.count"), split or (), strict=bool(split)):
        pairs.append(string(key) + struct.pack("<IH", 2, value))
    infos = [
        string(f"layer.{n}") + struct.pack("<IQIQ", 1, tensor_bytes // 4, 0, n * tensor_bytes)
        for n in range(tensors)
    ]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(infos), len(pairs)) + b"".join(pairs + infos)
    return head + bytes(-len(head) % alignment) + noise(tensors * tensor_bytes)


def torch_archive(size: int = 3000) -> bytes:
    """A ZIP archive, as `torch.save` writes it."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
        archive.writestr("archive/data/0", noise(size))
    return held.getvalue()


def lfs_pointer(content: bytes) -> bytes:
    """What a clone without git-lfs has in the place of a file."""
    digest = hashlib.sha256(content).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()


def link_as_text(target: str) -> bytes:
    """A symbolic link as a mount of SMB without `mfsymlinks` shows it (Minshall+French)."""
    plain = target.encode()
    text = b"XSym\n%04d\n%b\n%b\n" % (len(plain), hashlib.md5(plain).hexdigest().encode(), plain)
    return text.ljust(1067)
