"""`formats: safe` of `sources`: pickles with safetensors beside them are left out, all others refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cachd.errors import Forbidden, Invalid
from cachd.model import ModelSpec
from cachd.policy.safe_formats import unsafe
from cachd.report.outcomes import outcome_of
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.weights import gguf, index, safetensors, torch_archive

Engines = Callable[..., Engine]
SAFE = ({"prefix": "hf://org/", "formats": "safe"},)
BOTH = {
    "config.json": b"{}",
    "model.safetensors": safetensors(),
    "pytorch_model.bin": torch_archive(),
    "pytorch_model.bin.index.json": index("pytorch_model.bin"),
    "training_args.bin": torch_archive(10),
    "original/consolidated.00.pth": torch_archive(20),
}


@pytest.mark.parametrize(
    ("paths", "spare", "needed"),
    [
        (list(BOTH), sorted(set(BOTH) - {"config.json", "model.safetensors"}), []),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], [], ["pytorch_model.bin"]),
        (["a/model.safetensors", "b/model.pt"], [], ["b/model.pt"]),
        (["model.ckpt", "model.safetensors", "x.PKL"], ["model.ckpt", "x.PKL"], []),
        (["m.gguf", "model.onnx", "openvino_model.bin", "openvino_model.xml", "a.txt"], [], []),
        (["m.pth.part1of2", "m.pth.part2of2"], [], ["m.pth.part1of2", "m.pth.part2of2"]),
    ],
)
def test_pickles_are_told_by_their_names(paths: list[str], spare: list[str], needed: list[str]) -> None:
    found = unsafe(paths)
    assert (list(found.spare), list(found.needed)) == (spare, needed)


def test_pickles_beside_safetensors_are_left_out_and_never_fetched(hub: Hub, engine: Engines) -> None:
    hub.add("org/both", BOTH)
    opened = engine(hf_endpoint=hub.url, sources=SAFE)
    ready = opened.pull("hf://org/both")
    assert [file.path for file in opened.store.manifests.of(ready).files] == [
        "config.json",
        "model.safetensors",
    ]
    assert ready.left_out is not None
    assert (ready.left_out.files, ready.findings) == (4, ())


def test_a_model_of_pickles_alone_is_refused_for_good_before_a_byte_is_fetched(
    hub: Hub, engine: Engines
) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": torch_archive()})
    opened = engine(hf_endpoint=hub.url, sources=SAFE)
    with pytest.raises(Forbidden) as refusal:
        opened.pull("hf://org/old")
    assert refusal.value.code == "unsafe_format"
    assert "'pytorch_model.bin'" in refusal.value.detail
    assert "hf://org/" in str(refusal.value.hint)
    assert outcome_of(refusal.value).is_final
    assert hub.cdn.bytes_sent() == 0
    assert opened.pull("hf://org/old", name="config", exclude=("*.bin",)).files == 1


def test_other_formats_and_other_sources_are_pulled_as_ever(hub: Hub, engine: Engines) -> None:
    hub.add("org/gguf", {"m.gguf": gguf()})
    hub.add("trusted/old", {"pytorch_model.bin": torch_archive()})
    hub.add("org/trusted", {"pytorch_model.bin": torch_archive()})
    entries = (*SAFE, {"prefix": "hf://org/trusted", "formats": "all"})
    opened = engine(hf_endpoint=hub.url, sources=entries)
    for ref in ("hf://org/gguf", "hf://trusted/old", "hf://org/trusted"):
        assert opened.pull(ref).files == 1


def test_a_request_for_safe_formats_is_as_strict_as_an_entry_of_sources(hub: Hub, engine: Engines) -> None:
    hub.add("org/both", BOTH)
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": torch_archive()})
    opened = engine(hf_endpoint=hub.url)
    ready = opened.pull("hf://org/both", formats="safe")
    assert [file.path for file in opened.store.manifests.of(ready).files] == [
        "config.json",
        "model.safetensors",
    ]
    assert ready.spec.formats == "safe"
    sent = hub.cdn.bytes_sent()
    with pytest.raises(Forbidden, match=r"pytorch_model\.bin") as refusal:
        opened.pull("hf://org/old", formats="safe")
    assert (refusal.value.code, hub.cdn.bytes_sent()) == ("unsafe_format", sent)
    assert "the request says formats: safe" in str(refusal.value.hint)


def test_no_request_weakens_an_entry_of_sources(hub: Hub, engine: Engines) -> None:
    hub.add("org/old", {"pytorch_model.bin": torch_archive()})
    opened = engine(hf_endpoint=hub.url, sources=SAFE)
    with pytest.raises(Forbidden):
        opened.pull("hf://org/old", formats="all")


def test_only_safe_and_all_are_formats() -> None:
    with pytest.raises(Invalid) as refusal:
        ModelSpec.asked("hf://org/model", formats="pickle")
    assert refusal.value.code == "bad_formats"
