"""Which files of a repository `weights` chooses, and which repositories are refused as incomplete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from cachd.errors import Invalid
from cachd.model import ModelSpec, Snapshot, Typed
from cachd.model.weights import choices, chosen
from cachd.policy.numbered import gaps
from tests.conftest import Engine
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import Origin
from tests.ground.site import Ground, assert_problem
from tests.ground.values import code_of
from tests.ground.weights import index

Engines = Callable[..., Engine]


def numbered(name: str, of: int, *numbers: int) -> dict[str, bytes]:
    """The files of a numbered set that are there."""
    stem, _, suffix = name.rpartition(".")
    return {f"{stem}-{n:05}-of-{of:05}.{suffix}": noise(100, n) for n in numbers}


# --- numbered sets ---

INCOMPLETE = {
    "half of a GGUF": (numbered("m-Q4_K_M.gguf", 2, 1), "m-Q4_K_M-00002-of-00002.gguf"),
    "the other half of a GGUF": (numbered("q/m.gguf", 2, 2), "q/m-00001-of-00002.gguf"),
    "a gap": (numbered("model.safetensors", 4, 1, 2, 4), "model-00003-of-00004.safetensors"),
    "the last one": (numbered("pytorch_model.bin", 3, 1, 2), "pytorch_model-00003-of-00003.bin"),
    "of pt": (numbered("m.pt", 2, 2), "m-00001-of-00002.pt"),
    "numbered from 0": (numbered("m.safetensors", 3, 0, 2), "m-00001-of-00003.safetensors"),
    "of two widths": (
        {"m-00001-of-000003.safetensors": b"1", "m-00003-of-000003.safetensors": b"3"},
        "m-00002-of-000003.safetensors",
    ),
    "without zeros": (
        {"m-1-of-11.safetensors": b"1", "m-10-of-11.safetensors": b"10"},
        "m-2-of-11.safetensors",
    ),
    "of raw parts": ({"m.Q6_K.gguf.part1of2": b"1"}, "m.Q6_K.gguf.part2of2"),
    "of a component": (
        {"model.safetensors": b"m", **numbered("unet/diffusion.fp16.safetensors", 2, 1)},
        "unet/diffusion.fp16-00002-of-00002.safetensors",
    ),
    "in upper case": (
        {"M-00001-OF-00002.GGUF": b"x", "M-00001-of-00002.GGUF": b"1"},
        "M-00002-of-00002.GGUF",
    ),
}


@pytest.mark.parametrize(("files", "missing"), INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_a_numbered_set_with_a_gap_is_refused_before_its_bytes_are_fetched(
    hub: Hub, root: Path, engine: Engines, files: dict[str, bytes], missing: str
) -> None:
    hub.add("org/part", {"config.json": b"{}", **files})
    with pytest.raises(Invalid) as refusal:
        engine(hf_endpoint=hub.url).pull("hf://org/part")
    assert refusal.value.code == "incomplete_model"
    assert repr(missing) in refusal.value.detail
    assert hub.cdn.bytes_sent() == 0
    assert list((root / "ready").iterdir()) == []


def test_a_gap_is_refused_whatever_the_source(origin: Origin, tmp_path: Path, engine: Engines) -> None:
    half = numbered("m.gguf", 2, 1)
    url = origin.add_model("half", half)
    (tmp_path / "share").mkdir()
    for path, content in half.items():
        (tmp_path / "share" / path).write_bytes(content)
    opened = engine(allow=("127.0.0.0/8", "http://127.0.0.1/", f"file://{tmp_path}/share/"))
    for ref in (url, f"{url}m-00001-of-00002.gguf", f"file://{tmp_path}/share", f"file://{tmp_path}/share/"):
        assert code_of(lambda ref=ref: opened.pull(ref, name="half")) == "incomplete_model"


def test_a_gap_that_the_patterns_leave_out_is_none(hub: Hub, engine: Engines) -> None:
    hub.add("org/part", {**numbered("a.gguf", 2, 1), **numbered("b.gguf", 2, 1, 2)})
    opened = engine(hf_endpoint=hub.url)
    assert opened.pull("hf://org/part", name="b", include=("b-*",)).files == 2
    assert opened.pull("hf://org/part", name="one", include=("b-00001-of-00002.gguf",)).files == 1
    assert opened.pull("hf://org/part", name="a", include=("a-*",), exclude=("*-00002-of-*",)).files == 1


def test_a_gap_in_weights_that_were_not_chosen_is_none(hub: Hub, engine: Engines) -> None:
    hub.add("org/part", {**numbered("m-Q4_K_M.gguf", 2, 1), "m-Q8_0.gguf": noise(50)})
    opened = engine(hf_endpoint=hub.url)
    assert opened.pull("hf://org/part", name="q8", weights="gguf:Q8_0").files == 1
    assert code_of(lambda: opened.pull("hf://org/part", name="q4", weights="Q4_K_M")) == "incomplete_model"


def test_complete_sets_have_no_gap() -> None:
    complete = {
        **numbered("a.safetensors", 3, 1, 2, 3),
        **numbered("zero.safetensors", 3, 0, 1, 2),
        **numbered("both.safetensors", 2, 0, 1, 2),
        **numbered("one.gguf", 1, 1),
        **numbered("beyond.bin", 2, 1, 2, 7),
        **numbered("data.parquet", 5, 0),
        **{f"wide-{n}-of-12.safetensors": b"" for n in range(1, 13)},
        "Qwen-1-of-my-favourites.gguf": b"",
        "x-00001-of-00000.gguf": b"",
    }
    assert gaps(complete, most=5) == []


def test_a_set_of_a_billion_files_costs_no_list_of_them() -> None:
    (gap,) = gaps(["m-00001-of-999999999.gguf"], most=2)
    assert (gap.missing, gap.absent) == (
        999_999_998,
        ("m-00002-of-999999999.gguf", "m-00003-of-999999999.gguf"),
    )


# --- indexes ---

SHARDS = [*numbered("model.safetensors", 13, *range(1, 14))]


def test_a_stale_index_beside_a_complete_file_is_a_warning(ground: Ground) -> None:
    files = {"gptq_model-4bit.safetensors": noise(500), "config.json": b"{}"}
    ground.hub.add("org/stale", {**files, "model.safetensors.index.json": index(*SHARDS)})
    ground.node.pull("hf://org/stale")
    ready = ground.node.ready("org--stale").document
    (warning,) = ready["warnings"]
    assert "names 13 shards" in warning
    assert "'gptq_model-4bit.safetensors'" in warning
    assert ground.show("org--stale")["ready"]["warnings"] == [warning]
    assert warning in ground.node.cli("show", "org--stale").stdout
    assert "WARNINGS" in ground.node.cli("ls", "-o", "wide").stdout.splitlines()[0]
    again = ground.node.cli("pull", "hf://org/stale", "--wait", "--refresh").stdout
    assert again.splitlines()[-1].endswith("/org--stale")
    assert ground.node.ready("org--stale").document["warnings"] == [warning]


REFUSED = {
    "some of its shards are there": ({SHARDS[0]: b"1", SHARDS[1]: b"2", "x.safetensors": b"x"}, SHARDS[2]),
    "no weights": ({"config.json": b"{}"}, SHARDS[0]),
    "weights of another format": ({"pytorch_model.bin": b"x"}, SHARDS[0]),
    "weights of another folder": ({"sub/model.safetensors": b"x"}, SHARDS[0]),
    "an adapter": ({"adapter_model.safetensors": b"x"}, SHARDS[0]),
}


def test_an_index_of_which_a_part_is_there_is_not_stale(hub: Hub, engine: Engines) -> None:
    files = {"a.safetensors": b"a", "other.safetensors": b"o"}
    hub.add("org/m", {**files, "model.safetensors.index.json": index("a.safetensors", "b.safetensors")})
    opened = engine(hf_endpoint=hub.url)
    assert code_of(lambda: opened.pull("hf://org/m", name="m")) == "incomplete_model"


@pytest.mark.parametrize(("files", "missing"), REFUSED.values(), ids=REFUSED.keys())
def test_an_index_that_nothing_explains_is_refused(
    hub: Hub, root: Path, engine: Engines, files: dict[str, bytes], missing: str
) -> None:
    hub.add("org/m", {**files, "model.safetensors.index.json": index(*SHARDS)})
    with pytest.raises(Invalid) as refusal:
        engine(hf_endpoint=hub.url).pull("hf://org/m", exclude=("none",))
    assert (refusal.value.code, repr(missing) in refusal.value.detail) == ("incomplete_model", True)
    assert list((root / "ready").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin.index.json", "unet/x.safetensors.index.fp16.json", "flax_model.msgpack.index.json"],
)
def test_an_index_of_any_format_is_read(hub: Hub, engine: Engines, name: str) -> None:
    hub.add("org/m", {"config.json": b"{}", name: index("gone.one")})
    opened = engine(hf_endpoint=hub.url)
    assert code_of(lambda: opened.pull("hf://org/m")) == "incomplete_model"
    assert opened.pull("hf://org/m", name="without", exclude=("*gone.one",)).files == 2


# --- the choice ---

KEPT = ["config.json", "tokenizer.json", "modeling_it.py", "README.md"]
TRANSFORMERS = [
    *KEPT,
    *numbered("model.safetensors", 2, 1, 2),
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    *numbered("pytorch_model.bin", 2, 1, 2),
    "pytorch_model.bin.index.json",
    "training_args.bin",
    "optimizer.pt",
    "consolidated.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "onnx/model_q4.onnx",
    "onnx/config.json",
    "openvino_model.xml",
    "openvino_model.bin",
    "coreml/m.mlpackage/Data/weights/weight.bin",
    "flax_model.msgpack",
    "tf_model.h5",
    "m-Q4_K_M.gguf",
    "2_Dense/config.json",
    "2_Dense/pytorch_model.bin",
]
QUANTS = [
    *KEPT,
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-UD-Q4_K_XL.gguf",
    *numbered("Q8_0/m-Q8_0.gguf", 2, 1, 2),
    *numbered("BF16/m.gguf", 2, 1, 2),
    "m.Q6_K.gguf.part1of2",
    "m.Q6_K.gguf.part2of2",
    "mmproj-F32.gguf",
    "mmproj-F16.gguf",
    "imatrix.gguf",
]
CHOICES = {
    "safetensors": (
        TRANSFORMERS,
        [
            *numbered("model.safetensors", 2, 1, 2),
            "model.safetensors.index.json",
            "2_Dense/config.json",
            "2_Dense/pytorch_model.bin",
        ],
    ),
    "safetensors:fp16": (
        TRANSFORMERS,
        ["model.fp16.safetensors", "model.safetensors.index.json", *TRANSFORMERS[-2:]],
    ),
    "bin": (
        TRANSFORMERS,
        [*numbered("pytorch_model.bin", 2, 1, 2), "pytorch_model.bin.index.json", *TRANSFORMERS[-2:]],
    ),
    "onnx": (
        TRANSFORMERS,
        ["onnx/model.onnx", "onnx/model.onnx_data", "onnx/config.json", "2_Dense/config.json"],
    ),
    "onnx:q4": (
        TRANSFORMERS,
        ["onnx/model_q4.onnx", "onnx/model.onnx_data", "onnx/config.json", "2_Dense/config.json"],
    ),
    "original": (
        TRANSFORMERS,
        [
            "consolidated.safetensors",
            "original/consolidated.00.pth",
            "original/params.json",
            "2_Dense/config.json",
        ],
    ),
    "openvino": (TRANSFORMERS, ["openvino_model.xml", "openvino_model.bin", "2_Dense/config.json"]),
    "gguf:Q4_K_M": (QUANTS, ["m-Q4_K_M.gguf", "mmproj-F16.gguf"]),
    "gguf:q4_k_m": (QUANTS, ["m-Q4_K_M.gguf", "mmproj-F16.gguf"]),
    "Q4_K_M": (QUANTS, ["m-Q4_K_M.gguf", "mmproj-F16.gguf"]),
    "gguf:Q4_K_XL": (QUANTS, ["m-UD-Q4_K_XL.gguf", "mmproj-F16.gguf"]),
    "gguf:Q8_0": (QUANTS, [*numbered("Q8_0/m-Q8_0.gguf", 2, 1, 2), "mmproj-F16.gguf"]),
    "gguf:BF16": (QUANTS, [*numbered("BF16/m.gguf", 2, 1, 2), "mmproj-F16.gguf"]),
    "gguf:Q6_K": (QUANTS, ["m.Q6_K.gguf.part1of2", "m.Q6_K.gguf.part2of2", "mmproj-F16.gguf"]),
    "gguf": (QUANTS, [*(p for p in QUANTS[4:] if p not in ("mmproj-F32.gguf", "imatrix.gguf"))]),
}


@pytest.mark.parametrize("weights", CHOICES)
def test_weights_keep_one_form_and_what_is_no_weights(weights: str) -> None:
    paths, kept = CHOICES[weights]
    assert chosen(paths, weights) == {*KEPT, *kept}
    assert chosen(sorted(chosen(paths, weights)), weights) == {*KEPT, *kept}, "chosen again, as by a repair"


def test_a_diffusion_pipeline_keeps_components_in_the_form_that_they_have() -> None:
    kept = [
        "model_index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/config.json",
        "safety_checker/pytorch_model.bin",
    ]
    gone = ["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin", "v1-5.ckpt"]
    assert chosen(kept + gone, "safetensors") == {*kept}


def test_a_model_in_its_makers_form_alone_is_its_safetensors() -> None:
    paths = ["params.json", "consolidated.safetensors", "tekken.json"]
    assert chosen(paths, "safetensors") == {*paths}


@pytest.mark.parametrize(
    "weights", ["", "pickle", "gguf:", "gguf:a b", "all:x", ":Q4", "safetensors:fp16:x", "gguf:" + "x" * 65]
)
def test_what_is_no_form_of_weights_is_refused(weights: str) -> None:
    assert code_of(lambda: chosen(["a.gguf"], weights)) == "bad_weights"


@pytest.mark.parametrize(
    ("asked", "there"),
    [
        ("gguf:Q5_K_M", "gguf:Q4_K_M, gguf:Q4_K_S"),
        ("safetensors", "gguf:Q4_K_M"),
        ("gguf:F32", "gguf:Q8_0"),  # only the projector has it
    ],
)
def test_a_form_that_is_not_there_is_refused_with_those_that_are(asked: str, there: str) -> None:
    with pytest.raises(Invalid) as refusal:
        chosen(QUANTS, asked)
    assert refusal.value.code == "no_such_weights"
    assert there in refusal.value.hint


def test_a_tag_that_is_no_quantisation_of_the_repository_may_be_a_revision(hub: Hub, engine: Engines) -> None:
    hub.add("org/m", {"m-Q8_0.gguf": b"8", "m-F16.gguf": b"16"})
    with pytest.raises(Invalid) as refusal:
        engine(hf_endpoint=hub.url).pull("hf://org/m:Q4_K_M", name="m")
    assert refusal.value.hint == "it has gguf:F16, gguf:Q8_0; if Q4_K_M is a revision, write @Q4_K_M"


def test_choices_are_the_forms_that_a_source_has() -> None:
    assert choices(TRANSFORMERS) == [
        *("bin", "coreml", "flax", "gguf:Q4_K_M", "onnx", "onnx:q4", "openvino", "original"),
        *("safetensors", "safetensors:fp16", "tf"),
    ]
    assert choices(["tokenizer.model", "config.json"]) == []


# --- what is asked for, and what is said about it ---


def pulled(engine: Engine, ref: str, **asked: object) -> Snapshot:
    return engine.pull(ref, **asked)


def test_what_was_left_out_is_told_and_survives_a_restart(hub: Hub, root: Path, engine: Engines) -> None:
    weights = {"model.safetensors": noise(3000), "pytorch_model.bin": noise(5000), "m-Q8_0.gguf": noise(700)}
    hub.add("org/both", {"config.json": b"{}", **weights})
    opened = engine(hf_endpoint=hub.url)
    snapshot = pulled(opened, "hf://org/both", weights="safetensors")
    assert (snapshot.files, snapshot.size) == (2, 3002)
    assert snapshot.left_out is not None
    assert (snapshot.left_out.files, snapshot.left_out.bytes) == (2, 5700)
    assert snapshot.left_out.weights == ("bin", "gguf:Q8_0")
    manifest = opened.store.manifests.of(snapshot)
    assert manifest.left_out == snapshot.left_out
    document = json.loads((root / f"ready/{snapshot.name}.json").read_text())
    assert document["left_out"] == {"files": 2, "bytes": 5700, "weights": ["bin", "gguf:Q8_0"]}
    assert document["weights"] == "safetensors"
    assert hub.cdn.bytes_sent() == 3000


def test_a_repair_keeps_what_was_left_out(hub: Hub, root: Path, engine: Engines) -> None:
    hub.add("org/both", {"model.safetensors": noise(3000), "pytorch_model.bin": noise(5000)})
    opened = engine(hf_endpoint=hub.url)
    snapshot = pulled(opened, "hf://org/both", weights="safetensors")
    manifest = opened.store.manifests.of(snapshot)
    assert snapshot.spec.select(manifest).left_out == snapshot.left_out


def test_the_api_and_the_commands_take_weights(ground: Ground) -> None:
    files = {"m-Q4_K_M.gguf": noise(400), "m-Q8_0.gguf": noise(800, 2), "config.json": b"{}"}
    ground.hub.add("org/quants", files)
    answer = ground.node.ask("POST", "/v1/models", {"ref": "hf://org/quants", "weights": "gguf:Q4_K_M"})
    assert answer.document["name"] == "org--quants--gguf-Q4_K_M"
    assert answer.document["pull"]["weights"] == "gguf:Q4_K_M"
    ready = ground.node.ready("org--quants--gguf-Q4_K_M").document
    assert (ready["files"], ready["left_out"]["bytes"]) == (2, 800)
    printed = ground.node.cli("pull", "org/quants:Q8_0", "--wait").stdout
    assert printed.splitlines()[-1].endswith("/org--quants--gguf-Q8_0/m-Q8_0.gguf")
    printed = ground.node.cli("pull", "org/quants", "--weights", "gguf:Q8_0", "--name", "q8", "--wait").stdout
    assert printed.splitlines()[-1].endswith("/q8/m-Q8_0.gguf")
    assert "800 bytes" in ground.node.cli("show", "org--quants--gguf-Q4_K_M").stdout
    taken = ground.node.ask("POST", "/v1/models", {"ref": "hf://org/quants", "name": "q8"})
    assert_problem(taken, 409, "name_taken")
    assert "weights gguf:Q8_0" in taken.document["detail"]
    absent = ground.node.ask("POST", "/v1/models", {"ref": "org/quants:Q2_K"})
    assert_problem(ground.node.ready(absent.document["name"]), 400, "no_such_weights")
    wrong = ground.node.ask("POST", "/v1/models", {"ref": "hf://org/quants", "weights": "pickle"})
    assert_problem(wrong, 400, "bad_weights")


@pytest.mark.parametrize(
    ("files", "file"),
    [
        (["m-Q8_0.gguf", "mmproj-F16.gguf"], "m-Q8_0.gguf"),
        ([*numbered("q/m-Q8_0.gguf", 2, 1, 2)], "q/m-Q8_0-00001-of-00002.gguf"),
        (["small-Q8_0.gguf", "large-Q8_0.gguf"], None),
    ],
)
def test_a_model_of_one_quantisation_is_one_file(
    hub: Hub, engine: Engines, files: list[str], file: str | None
) -> None:
    hub.add("org/m", {"README.md": b"#", **{path: noise(60, n) for n, path in enumerate(files)}})
    assert engine(hf_endpoint=hub.url).pull("hf://org/m", name="m", weights="gguf:Q8_0").file == file


def test_show_and_resolve_advise_to_choose_where_a_source_has_its_weights_twice(ground: Ground) -> None:
    ground.hub.add("org/twice", {"model.safetensors": noise(400), "pytorch_model.bin": noise(500)})
    ground.node.pull("hf://org/twice")
    advice = ground.node.ready("org--twice").document["advice"]
    assert "in 2 forms: bin, safetensors" in advice
    assert advice in ground.node.cli("show", "org--twice").stdout
    assert ground.node.ask("POST", "/v1/resolve", {"ref": "org/twice"}).document["advice"] == advice
    assert "in 2 forms: bin, safetensors" in ground.node.cli("resolve", "org/twice").stderr
    ground.node.pull("hf://org/twice", name="once", weights="safetensors")
    assert ground.node.ready("once").document["advice"] is None


def names(specs: Iterable[ModelSpec]) -> list[str]:
    return [spec.name for spec in specs]


def test_weights_are_part_of_what_is_asked() -> None:
    asked = [ModelSpec.asked("org/m", weights=weights) for weights in (None, "all", "bin", "gguf:Q4_K_M")]
    assert names(asked) == ["org--m", "org--m", "org--m--bin", "org--m--gguf-Q4_K_M"]
    assert asked[3] == ModelSpec.asked("hf://org/m:Q4_K_M")
    assert asked[3].is_of_same_model(ModelSpec.asked("org/m:q4_k_m", "x"))
    assert not asked[3].is_of_same_model(asked[2])
    assert [ModelSpec.from_document(spec.as_document()) for spec in asked] == asked
    assert str(asked[3]) == "hf://org/m (weights gguf:Q4_K_M)"
    assert code_of(lambda: ModelSpec.asked("org/m:Q4_K_M", weights="bin")) == "bad_ref"
    assert ModelSpec.asked("org/m:Q4_K_M", weights="gguf:Q4_K_M") == asked[3]
    assert Typed.parse("org/m:Q4_K_M@v1") == Typed.parse("org/m@v1:Q4_K_M")
