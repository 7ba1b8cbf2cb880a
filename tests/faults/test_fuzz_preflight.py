"""Generated nonsense in the files that a preflight reads: it ends in findings, soon and in little memory."""

from __future__ import annotations

import json
import posixpath
import struct
import tracemalloc
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.model.finding import Finding, Level
from cachd.policy.copies import copied
from cachd.preflight.codes import Code
from cachd.preflight.examine import Preflight
from tests.faults.test_fuzz import cut_up, spoiled
from tests.ground.chance import examples
from tests.ground.contents import examined
from tests.ground.weights import gguf, index, safetensors, torch_archive
from tests.test_preflight import ADAPTER, CODE, LLAMA, PIPELINE, SENTENCES, TEXT, doc

SLOWEST = timedelta(seconds=20)
HEADER = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]},
    "b": {"dtype": "F32", "shape": [], "data_offsets": [12, 16]},
}
PIECES = (
    b"{",
    b"[",
    b'"',
    b"\xff" * 8,
    bytes(8),
    b"\x7f" + b"\xff" * 7,
    b"-",
    b"1e999",
    b"PK\x03\x04",
    b"\x80\x02",
)
DOCUMENTS: dict[str, tuple[dict[str, bytes], Any]] = {
    "config.json": (dict(TEXT), LLAMA | CODE | {"dtype": None, "architectures": ["A", "B"]}),
    "tokenizer_config.json": (dict(TEXT), CODE | {"auto_map": {"AutoTokenizer": ["a.B", None]}}),
    "model_index.json": (dict(PIPELINE), json.loads(PIPELINE["model_index.json"])),
    "modules.json": (dict(SENTENCES), json.loads(SENTENCES["modules.json"])),
    "adapter_config.json": (dict(ADAPTER), {"base_model_name_or_path": "org/base", "r": 8}),
    "model.safetensors.index.json": (dict(TEXT), json.loads(index("a.safetensors", "b.safetensors"))),
}


def looked_at(files: dict[str, bytes]) -> Preflight:
    """What a preflight finds. Its findings can be written and read again."""
    found = examined(files)
    for finding in found.findings:
        assert finding.code in set(Code)
        assert Finding.from_document(json.loads(json.dumps(finding.as_document()))) == finding
    return found


@pytest.mark.parametrize("path", DOCUMENTS)
@examples(60, slowest=SLOWEST)
@given(data=st.data())
def test_a_spoiled_document_ends_in_findings(path: str, data: st.DataObject) -> None:
    files, good = DOCUMENTS[path]
    looked_at({**files, path: data.draw(spoiled(good)).encode()})


@pytest.mark.parametrize("path", DOCUMENTS)
@examples(30, slowest=SLOWEST)
@given(data=st.data())
def test_bytes_in_the_place_of_a_document_end_in_findings(path: str, data: st.DataObject) -> None:
    files, good = DOCUMENTS[path]
    looked_at({**files, path: data.draw(cut_up(json.dumps(good).encode(), PIECES) | st.binary())})


@examples(150, slowest=SLOWEST)
@given(text=spoiled(HEADER))
def test_a_spoiled_safetensors_header_ends_in_findings(text: str) -> None:
    content = struct.pack("<Q", len(text.encode())) + text.encode() + bytes(16)
    found = looked_at({"model.safetensors": content})
    if found.weights_bytes is not None:  # so it counts as right
        assert found.weights_bytes == 16


@pytest.mark.parametrize(
    ("path", "good"),
    [
        ("m.safetensors", safetensors(100)),
        ("m.gguf", gguf(split=(0, 2))),
        ("pytorch_model.bin", torch_archive()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@examples(100, slowest=SLOWEST)
@given(data=st.data())
def test_cut_up_weights_end_in_findings(path: str, good: bytes, data: st.DataObject) -> None:
    looked_at({path: data.draw(cut_up(good, PIECES))})


def tensors(count: int) -> bytes:
    """A safetensors file of so many tensors."""
    named = {
        f"model.layers.{n}.self_attn.q_proj.weight": {
            "dtype": "BF16",
            "shape": [1],
            "data_offsets": [2 * n, 2 * n + 2],
        }
        for n in range(count)
    }
    text = doc(named)
    return struct.pack("<Q", len(text)) + text + bytes(2 * count)


HOSTILE = {
    "a nested config": ({**TEXT, "config.json": b"[" * (2 << 20)}, Code.config),
    "nested maps": ({**TEXT, "config.json": b'{"a":' * 400_000}, Code.config),
    "a huge number": ({**TEXT, "config.json": b'{"a": ' + b"9" * 1_900_000 + b"}"}, Code.config),
    "a header of 2^63 bytes": ({"m.safetensors": struct.pack("<Q", 1 << 63) + bytes(99)}, Code.safetensors),
    "many tensors of one name": (
        {"m.safetensors": struct.pack("<Q", 5_000_001) + b'{"w":1,' + b'"w":1,' * 833_333 + bytes(9)},
        Code.safetensors,
    ),
    "a nested header": (
        {"m.safetensors": struct.pack("<Q", 4 << 20) + b'{"w":{"shape":' + b"[" * (4 << 20)},
        Code.safetensors,
    ),
    "many small shards": ({f"{n}.safetensors": b"x" * 9 for n in range(8_000)}, Code.safetensors),
    "a GGUF of 2^63 pairs": (
        {"m.gguf": struct.pack("<4sIQQ", b"GGUF", 3, 1 << 63, 1 << 63) + bytes(99)},
        Code.not_examined,
    ),
    "a GGUF with an endless string": (
        {"m.gguf": struct.pack("<4sIQQQ", b"GGUF", 3, 1, 1, 1 << 63) + bytes(99)},
        Code.gguf,
    ),
    "an index of very many names": (
        {"model.safetensors.index.json": index(*(f"{n}" for n in range(100_000)))},
        Code.shards,
    ),
}


@pytest.mark.parametrize(("files", "code"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_model_costs_little_memory_and_gives_a_finding(files: dict[str, bytes], code: Code) -> None:
    tracemalloc.start()
    try:
        found = looked_at(files)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert code in {each.code for each in found.notable}
    assert most < 32 << 20


def test_a_model_of_very_many_tensors_is_examined_up_to_a_limit() -> None:
    """One of 20,000 is right; the JSON of more than 4,000,000 tokens is not read to its end."""
    assert looked_at({"m.safetensors": tensors(20_000)}).tensors == 20_000
    endless = b'{"w":{"shape":[' + b"[]," * 2_100_000
    found = looked_at({"m.safetensors": struct.pack("<Q", len(endless)) + endless})
    assert [each.code for each in found.notable if each.level is Level.warning][-1] == Code.not_examined


ONNX_NAMES = st.lists(
    st.text("aA.onx_dt/0\u0130\n", max_size=40)
    | st.sampled_from(["m.onnx", "a/m.ONNX", "m.onnx_data", "weights.pb"]),
    max_size=30,
    unique=True,
)


@examples(150, slowest=SLOWEST)
@given(names=ONNX_NAMES, length=st.sampled_from([0, 1, 4000]))
def test_any_names_are_judged_soon_whether_to_copy_them(names: list[str], length: int) -> None:
    """A file is copied only if it is listed, and a graph lies beside it."""
    listed = [*names, "m.onnx" + "_data" * length, "m.onnx.data" + "1" * length]
    chosen = copied(listed, None)
    assert set(chosen) <= set(listed)
    folders = {posixpath.dirname(name) for name in listed if name.lower().endswith(".onnx")}
    assert {posixpath.dirname(name) for name in chosen} <= folders
