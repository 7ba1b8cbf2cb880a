"""What a preflight finds in models of every layout, and in models that no engine would load."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cachd.model.finding import Finding, Level
from cachd.preflight.codes import MEANINGS, Code
from cachd.preflight.examine import Preflight
from tests.ground import models
from tests.ground.contents import examined
from tests.ground.weights import gguf, index, lfs_pointer, safetensors, torch_archive

Files = Mapping[str, bytes]
REFUSED, WARNING = Level.refused, Level.warning
SAFETENSORS = Code.safetensors


def doc(value: object) -> bytes:
    return json.dumps(value).encode()


def header(tensors: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = tensors if isinstance(tensors, bytes) else doc(tensors)
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list[Any], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [*offsets]}


LLAMA = {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
TEXT: Files = {
    "config.json": doc(LLAMA),
    "tokenizer.json": b"{}",
    "model.safetensors": header(
        {"w": tensor("BF16", [2, 3], 0, 12), "b": tensor("F32", [1], 12, 16)}, bytes(16)
    ),
}
PIPELINE: Files = {
    "model_index.json": doc(
        {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "scheduler": ["diffusers", "PNDMScheduler"],
            "safety_checker": [None, None],
        }
    ),
    "unet/config.json": b"{}",
    "unet/diffusion_pytorch_model.safetensors": safetensors(100),
    "unet/diffusion_pytorch_model.fp16.safetensors": safetensors(50),
    "scheduler/scheduler_config.json": b"{}",
}
SENTENCES: Files = {
    **TEXT,
    "config.json": doc({"architectures": ["BertModel"]}),
    "modules.json": doc(
        [
            {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ]
    ),
    "1_Pooling/config.json": b"{}",
}
ADAPTER: Files = {
    "adapter_config.json": doc({"base_model_name_or_path": "org/base"}),
    "adapter_model.safetensors": safetensors(100),
}

LAYOUTS: dict[str, tuple[Files, tuple[str, ...], int | None]] = {
    "a language model": (TEXT, ("vllm", "sglang", "tgi", "transformers"), 16),
    "pickles": (
        {**TEXT, "pytorch_model.bin": torch_archive(), "model.safetensors": TEXT["model.safetensors"]},
        ("vllm", "sglang", "tgi", "transformers"),
        16,
    ),
    "a model that writes no text": (
        {**TEXT, "config.json": doc({"architectures": ["ViTModel"]})},
        ("transformers",),
        16,
    ),
    "diffusers": (PIPELINE, ("diffusers",), 100),
    "sentence-transformers": (SENTENCES, ("transformers", "sentence-transformers"), 16),
    "an adapter": (ADAPTER, ("peft",), 100),
    "GGUF of two quantisations": (
        {"m-Q8_0.gguf": gguf(tensors=9), "m-Q4_0.gguf": gguf(tensors=4), "mmproj-F16.gguf": gguf()},
        ("llama.cpp",),
        4096,
    ),
    "a split GGUF": (
        {f"m-0000{n + 1}-of-00002.gguf": gguf(split=(n, 2)) for n in range(2)},
        ("llama.cpp",),
        6144,
    ),
    "ONNX": ({"onnx/model.onnx": b"\x08\x07", "config.json": b"{}"}, ("onnxruntime",), None),
    "Mistral's own": (
        {"params.json": b"{}", "consolidated.safetensors": safetensors(90), "tekken.json": b"{}"},
        ("vllm",),
        90,
    ),
}


@pytest.mark.parametrize(("files", "loaders", "size"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_good_model_of_each_layout_fits_its_loaders(
    files: Files, loaders: tuple[str, ...], size: int | None
) -> None:
    found = examined(files)
    assert found.loaders == loaders
    assert found.weights_bytes == size
    assert found.notable == ()
    assert found.level is Level.ok


def test_the_facts_of_a_model_are_those_of_its_headers_and_configuration() -> None:
    found = examined(TEXT)
    assert found.architectures == ("LlamaForCausalLM",)
    assert found.dtype == "bfloat16"
    assert (found.tensors, found.by_type) == (2, {"BF16": 12, "F32": 4})
    assert examined(ADAPTER).base_model == "org/base"


def test_a_generated_model_of_several_shards_is_right(tmp_path: Path) -> None:
    made = models.safetensors_model(tmp_path / "m", shards=3, shard_bytes=8192, seed=1)
    files = {p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    found = examined(files)
    assert found.notable == ()
    assert found.weights_bytes == 3 * (8192 - 8 - models.HEADER_BYTES)
    (shards,) = [each for each in found.findings if each.code == "shards"]
    assert dict(shards.numbers) == {"shards": 3}


CODE = {"auto_map": {"AutoModel": "modeling_x.X", "AutoConfig": "sub.configuration_x.C"}}
GOOD = {"w": tensor("U8", [4], 0, 4)}


def of_header(tensors: object, data: bytes = b"1234") -> Files:
    return {**TEXT, "model.safetensors": header(tensors, data)}


WRONG: dict[str, tuple[Files, Code, Level, str]] = {
    "no config": (
        {path: content for path, content in TEXT.items() if path != "config.json"},
        Code.config,
        WARNING,
        "no config.json beside 'model.safetensors'",
    ),
    "a config that is no JSON": ({**TEXT, "config.json": b"{,}"}, Code.config, REFUSED, "not JSON"),
    "a config that is a list": (
        {**TEXT, "config.json": b"[]"},
        Code.config,
        REFUSED,
        "not a JSON object",
    ),
    "a nested config": ({**TEXT, "config.json": b"[" * 10**6}, Code.config, REFUSED, "nested deeper"),
    "a huge config": ({**TEXT, "config.json": b" " * 3 * 10**6}, Code.config, REFUSED, "3000000 bytes"),
    "a config of many values": (
        {**TEXT, "config.json": b"[" + b"1," * 10**5 + b"1]"},
        Code.config,
        REFUSED,
        "tokens",
    ),
    "no tokenizer": (
        {path: content for path, content in TEXT.items() if path != "tokenizer.json"},
        Code.tokenizer,
        WARNING,
        "no tokenizer",
    ),
    "a missing shard": (
        {**TEXT, "model.safetensors.index.json": index("model.safetensors", "b.safetensors")},
        Code.shards,
        REFUSED,
        "names 1 shards that are not here: 'b.safetensors'",
    ),
    "a stale index": (
        {**TEXT, "model.safetensors.index.json": index("b.safetensors")},
        Code.shards,
        WARNING,
        "'b.safetensors'",
    ),
    "a gap": ({"m-00001-of-00003.gguf": gguf(split=(0, 3))}, Code.shards, REFUSED, "2 of the 3 files"),
    "a pointer": ({**TEXT, "tokenizer.model": lfs_pointer(b"x")}, Code.content, REFUSED, "Git LFS"),
    "a page": ({**TEXT, "other.safetensors": b"<!doctype html><p>"}, Code.content, REFUSED, "a page"),
    "a cut-off pickle": (
        {**TEXT, "pytorch_model.bin": torch_archive()[:-200]},
        Code.content,
        REFUSED,
        "the directory at the end of its archive is missing",
    ),
    "an empty file": ({**TEXT, "model.safetensors": b""}, SAFETENSORS, REFUSED, "0 bytes"),
    "a header longer than the file": (
        {**TEXT, "model.safetensors": struct.pack("<Q", 900) + b"{}"},
        SAFETENSORS,
        REFUSED,
        "its header has 900 bytes, and the file 10",
    ),
    "a header of 2^63 bytes": (
        {**TEXT, "model.safetensors": struct.pack("<Q", 1 << 63) + b"{}"},
        SAFETENSORS,
        REFUSED,
        "9223372036854775808 bytes, and at most 100000000",
    ),
    "a header that is no JSON": (of_header(b"{,}"), SAFETENSORS, REFUSED, "not JSON"),
    "a header that is a list": (of_header([1]), SAFETENSORS, REFUSED, "not a JSON object"),
    "a tensor that is a number": (of_header({"w": 4}), SAFETENSORS, REFUSED, "not a JSON object"),
    "a header nested deeply": (of_header(b'{"w":' * 500), SAFETENSORS, REFUSED, "deeper than 8"),
    "an unknown type": (of_header({"w": tensor("Q4", [4], 0, 4)}), SAFETENSORS, REFUSED, "'Q4'"),
    "no type": (of_header({"w": {"shape": [4]}}), SAFETENSORS, REFUSED, "the type None"),
    "offsets the wrong way round": (
        of_header({"w": tensor("U8", [4], 4, 0)}),
        SAFETENSORS,
        REFUSED,
        "the offsets [4, 0]",
    ),
    "one offset": (of_header({"w": tensor("U8", [4], 4)}), SAFETENSORS, REFUSED, "offsets [4]"),
    "a negative offset": (
        of_header({"w": tensor("U8", [4], -4, 0)}),
        SAFETENSORS,
        REFUSED,
        "sizes",
    ),
    "a size that is a fraction": (
        of_header({"w": tensor("U8", [0.5], 0, 4)}),
        SAFETENSORS,
        REFUSED,
        "shape that is no list",
    ),
    "a shape of very many sizes": (
        of_header({"w": tensor("U8", [2**62] * 65, 0, 4)}),
        SAFETENSORS,
        REFUSED,
        "at most 64 sizes",
    ),
    "bytes that are not those of the shape": (
        of_header({"w": tensor("BF16", [4], 0, 4)}),
        SAFETENSORS,
        REFUSED,
        "has 4 bytes, and BF16 [4] takes 8",
    ),
    "tensors that overlap": (
        of_header({"w": tensor("U8", [3], 0, 3), "v": tensor("U8", [2], 2, 4)}),
        SAFETENSORS,
        REFUSED,
        "overlap",
    ),
    "a gap between tensors": (
        of_header({"w": tensor("U8", [1], 0, 1), "v": tensor("U8", [2], 2, 4)}),
        SAFETENSORS,
        REFUSED,
        "leave a gap",
    ),
    "bytes after the last tensor": (
        of_header(GOOD, b"12345"),
        SAFETENSORS,
        REFUSED,
        "4 bytes, and 5",
    ),
    "bytes that are missing": (of_header(GOOD, b"123"), SAFETENSORS, REFUSED, "4 bytes, and 3"),
    "no GGUF": ({"m.gguf": b"GGML" + bytes(99)}, Code.gguf, REFUSED, "malformed"),
    "a GGUF that ends in its header": ({"m.gguf": gguf()[:99]}, Code.gguf, REFUSED, "after 99 bytes"),
    "a cut-off GGUF": ({"m.gguf": gguf()[:-2000]}, Code.gguf, REFUSED, "or more, and the file has"),
    "a split under a wrong name": (
        {"m-00001-of-00002.gguf": gguf(split=(1, 2)), "m-00002-of-00002.gguf": gguf(split=(1, 2))},
        Code.gguf,
        REFUSED,
        "it is split 2 of 2",
    ),
    "pickles alone": (
        {"config.json": b"{}", "pytorch_model.bin": torch_archive()},
        Code.pickle,
        WARNING,
        "'pytorch_model.bin'",
    ),
    "an old pickle": (
        {"config.json": b"{}", "sub/model.pt": b"\x80\x02}q\x00."},
        Code.pickle,
        WARNING,
        "'sub/model.pt'",
    ),
    "code that is missing": (
        {**TEXT, "config.json": doc(LLAMA | CODE), "modeling_x.py": b""},
        Code.remote_code,
        REFUSED,
        "'sub/configuration_x.py', which is not here",
    ),
    "code of a tokenizer": (
        {**TEXT, "tokenizer_config.json": doc({"auto_map": {"AutoTokenizer": ["tok.T", None]}})},
        Code.remote_code,
        REFUSED,
        "'tok.py'",
    ),
    "code elsewhere": (
        {**TEXT, "config.json": doc(LLAMA | {"auto_map": {"AutoModel": "org/code--modeling_x.X"}})},
        Code.remote_code,
        WARNING,
        "'org/code'",
    ),
    "a missing component": (
        {path: content for path, content in PIPELINE.items() if not path.startswith("scheduler/")},
        Code.pipeline,
        REFUSED,
        "1 component of the pipeline have no files: 'scheduler'",
    ),
    "a pipeline that is no JSON": (
        {**PIPELINE, "model_index.json": b"x"},
        Code.pipeline,
        REFUSED,
        "JSON",
    ),
    "a missing module": (
        {path: content for path, content in SENTENCES.items() if not path.startswith("1_")},
        Code.modules,
        REFUSED,
        "'1_Pooling/config.json', which is not here",
    ),
    "modules that are no list": (
        {**SENTENCES, "modules.json": b"{}"},
        Code.modules,
        REFUSED,
        "no list",
    ),
    "an adapter without weights": (
        {"adapter_config.json": ADAPTER["adapter_config.json"]},
        Code.adapter,
        REFUSED,
        "neither adapter_model.safetensors",
    ),
    "an adapter of nothing": (
        {**ADAPTER, "adapter_config.json": b"{}"},
        Code.adapter,
        WARNING,
        "no base",
    ),
    "more headers than are read": (
        {f"{n}.safetensors": safetensors(1) for n in range(10_100)},
        Code.not_examined,
        WARNING,
        "files were not examined, such as",
    ),
}


@pytest.mark.parametrize(("files", "code", "level", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_an_engine_would_trip_over_is_a_finding(
    files: Files, code: Code, level: Level, says: str
) -> None:
    found = examined(files)
    (finding,) = [each for each in found.notable if each.code == code]
    assert finding.level is level
    assert says in finding.detail
    assert finding.hint or code is Code.memory
    assert found.level is (REFUSED if found.refused else WARNING)


def test_every_code_has_a_finding_here() -> None:
    warned = {code for _, code, level, _ in WRONG.values() if level is WARNING}
    refused = {code for _, code, level, _ in WRONG.values() if level is REFUSED}
    assert {code for code, meaning in MEANINGS.items() if meaning.warning} == warned
    assert {code for code, meaning in MEANINGS.items() if meaning.refused} == refused
    assert set(MEANINGS) == set(Code)


def test_code_that_is_here_is_ok_and_says_that_engines_must_allow_it() -> None:
    files = {"config.json": doc(LLAMA | CODE), "modeling_x.py": b"", "sub/configuration_x.py": b""}
    found = examined({**TEXT, **files})
    (finding,) = [each for each in found.findings if each.code == Code.remote_code]
    assert finding.level is Level.ok
    assert "--trust-remote-code" in finding.hint


@pytest.mark.parametrize("number", [b"Infinity", b"-Infinity", b"NaN"])
def test_numbers_that_python_writes_into_a_config_are_read(number: bytes) -> None:
    config = b'{"architectures": ["MambaForCausalLM"], "limit": [0.0, ' + number + b"]}"
    found = examined({**TEXT, "config.json": config})
    assert found.architectures == ("MambaForCausalLM",)
    assert found.notable == ()


def test_weights_that_are_no_pickles_are_not_called_so() -> None:
    """whisper.cpp and CTranslate2 have formats of their own in a `.bin`."""
    assert examined({"config.json": b"{}", "model.bin": b"lmgg" + bytes(99)}).notable == ()


def test_a_layout_that_no_known_engine_takes_is_no_fault() -> None:
    found = examined({"README.md": b"x"})
    assert (found.loaders, found.notable) == ((), ())


def test_many_findings_of_a_kind_are_counted() -> None:
    found = examined({f"{n}.safetensors": b"" for n in range(3000)})
    bad = [each for each in found.findings if each.code == SAFETENSORS]
    assert len(bad) == 21
    assert bad[-1].detail == "2980 more"


def test_a_finding_is_read_back_as_it_was_written() -> None:
    for finding in examined({**TEXT, "model.safetensors": b""}).findings:
        assert Finding.from_document(json.loads(json.dumps(finding.as_document()))) == finding


def test_the_level_of_a_model_is_that_of_its_worst_finding() -> None:
    both = examined({"config.json": b"[", "pytorch_model.bin": torch_archive()})
    assert {each.level for each in both.notable} == {WARNING, REFUSED}
    assert both.level is REFUSED
    assert Preflight((), (), None, 0, None, {}, None, ()).level is Level.ok
