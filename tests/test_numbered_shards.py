"""Sets of numbered weights and indexes of shards, by names and content alone: gaps, widths and bounds."""

from __future__ import annotations

import json

import pytest

from cachd.errors import Invalid
from cachd.policy.numbered import Gap, gaps
from cachd.policy.prefixes import Prefix
from cachd.policy.safe_formats import Unsafe, unsafe
from cachd.policy.shards import MAX_SHOWN, Named, is_index, named, others
from cachd.policy.short_tasks import SHORT_CPU_SECONDS, ShortTasks
from cachd.policy.verdicts import Rule, Verdicts

# --- numbered sets ---

GAPS: list[tuple[list[str], list[Gap]]] = [
    (
        ["m-00001-of-00003.safetensors"],
        [
            Gap(
                ("m-00001-of-00003.safetensors",),
                3,
                2,
                ("m-00002-of-00003.safetensors", "m-00003-of-00003.safetensors"),
            )
        ],
    ),
    (["m-0-of-2.gguf"], [Gap(("m-0-of-2.gguf",), 2, 1, ("m-1-of-2.gguf",))]),
    (["m-2-of-2.gguf"], [Gap(("m-2-of-2.gguf",), 2, 1, ("m-1-of-2.gguf",))]),
    (["m-0-of-2.bin", "m-2-of-2.bin"], [Gap(("m-0-of-2.bin", "m-2-of-2.bin"), 2, 1, ("m-1-of-2.bin",))]),
    (["m.gguf.part2of2"], [Gap(("m.gguf.part2of2",), 2, 1, ("m.gguf.part1of2",))]),
    (["m.gguf-part1of2"], [Gap(("m.gguf-part1of2",), 2, 1, ("m.gguf-part2of2",))]),
    (
        ["a/m_1-of-2.fp16.safetensors"],
        [Gap(("a/m_1-of-2.fp16.safetensors",), 2, 1, ("a/m_2-of-2.fp16.safetensors",))],
    ),
    (
        [f"m-{n:02}-of-10.bin" for n in range(1, 10)],
        [Gap(tuple(f"m-{n:02}-of-10.bin" for n in range(1, 10)), 10, 1, ("m-10-of-10.bin",))],
    ),
    (["consolidated.00.pth"], []),
    (["consolidated.01.pth"], [Gap(("consolidated.01.pth",), 2, 1, ("consolidated.00.pth",))]),
    (
        ["x/consolidated.00.safetensors", "x/consolidated.03.safetensors"],
        [
            Gap(
                ("x/consolidated.00.safetensors", "x/consolidated.03.safetensors"),
                4,
                2,
                ("x/consolidated.01.safetensors", "x/consolidated.02.safetensors"),
            )
        ],
    ),
    (["m.gguf-split-a"], [Gap(("m.gguf-split-a",), 2, 1, ("m.gguf-split-b",))]),
    (["m.gguf-split-a", "m.gguf-split-b"], []),
    (["m.gguf-split-c"], [Gap(("m.gguf-split-c",), 3, 2, ("m.gguf-split-a", "m.gguf-split-b"))]),
    (["m-3-of-2.bin", "m-1-of-0.bin", "m-0-of-0.bin", "m-1-of-2.txt"], []),
]


@pytest.mark.parametrize(("paths", "expected"), GAPS)
def test_a_set_that_lacks_files_is_found_with_their_names(paths: list[str], expected: list[Gap]) -> None:
    assert gaps(paths, most=5) == expected
    assert gaps(reversed(paths), most=5) == expected


def test_only_some_of_the_absent_files_are_named_and_sets_are_sorted() -> None:
    found = gaps(["z-1-of-9.bin", "a-1-of-9.bin", "consolidated.05.pth"], most=2)
    assert [gap.present[0] for gap in found] == ["a-1-of-9.bin", "consolidated.05.pth", "z-1-of-9.bin"]
    assert [(gap.missing, len(gap.absent)) for gap in found] == [(8, 2), (5, 2), (8, 2)]


# --- indexes ---

INDEX = "a/model.safetensors.index.json"


def read(document: object, *paths: str, index: str = INDEX) -> Named:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    return named(index, [raw[at : at + 7] for at in range(0, len(raw), 7)], set(paths))


def test_an_index_names_shards_beside_it() -> None:
    weights = {"x": "1.safetensors", "y": "2.safetensors", "z": "1.safetensors", "o": "../o.bin"}
    document = {"metadata": {"total": 5, "weight_map": "none"}, "weight_map": weights}
    assert read(document) == Named(("a/1.safetensors", "a/2.safetensors", "o.bin"), 0)
    assert read(document, "a/1.safetensors") == Named(("a/2.safetensors", "o.bin"), 1)
    complete = read(document, "a/1.safetensors", "a/2.safetensors", "o.bin")
    assert complete == Named((), 3)
    leaves = {"weight_map": {"x": "../../o.bin"}}
    assert read(leaves, "o.bin") == Named(("../o.bin",), 0)
    assert read({"weight_map": {"x": "1.bin"}}, "1.bin", index="m.bin.index.json") == Named((), 1)


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"no json",
        {},
        {"metadata": {}},
        {"weight_map": ["x"]},
        {"weight_map": {"x": ["1"]}},
        {"weight_map": {"x": {"y": "1"}}},
        {"other": {"weight_map": {"x": "1"}}},
    ],
)
def test_what_is_no_index_names_nothing(document: object) -> None:
    assert read(document) == Named()


def test_an_empty_index_names_nothing_and_one_that_is_nested_deeply_is_refused() -> None:
    assert read({"weight_map": {}}) == Named()
    with pytest.raises(Invalid):
        read(b'{"a":' + b"[" * 10_000)


def test_the_absent_shards_of_a_hostile_index_are_bounded() -> None:
    many = read({"weight_map": {str(n): f"{n:04}" for n in range(MAX_SHOWN + 1)}})
    assert len(many.absent) == MAX_SHOWN
    (long,) = read({"weight_map": {"x": "y" * 2000}}).absent
    assert len(long) == 1000


def test_an_index_is_known_by_its_name_and_so_are_the_weights_that_could_explain_it() -> None:
    for name in ("model.safetensors.index.json", "x/pytorch_model.bin.index.fp16.json", "A.H5.INDEX.JSON"):
        assert is_index(name)
    for name in (
        "model.index.json",
        "safetensors.index.json/x",
        "model.safetensors",
        "model.gguf.index.json",
    ):
        assert not is_index(name)
    paths = ["a/m.safetensors", "a/b/m.safetensors", "m.safetensors", "a/M.SAFETENSORS", "a/m.bin"]
    adapters = ["a/adapter_model.safetensors", "a/optimizer.safetensors", "a/training_args.safetensors"]
    assert others(INDEX, [*paths, *adapters]) == ["a/M.SAFETENSORS", "a/m.safetensors"]
    assert others("a/no-index.json", paths) == []


# --- pickles ---


@pytest.mark.parametrize(
    ("paths", "spare", "needed"),
    [
        (["m.safetensors", "m.bin"], ["m.bin"], []),
        (["m.bin"], [], ["m.bin"]),
        (["a/m.safetensors", "m.bin"], [], ["m.bin"]),
        (["m.safetensors", "x.pkl", "y.PICKLE"], ["x.pkl", "y.PICKLE"], []),
        (["x.joblib", "config.json"], [], ["x.joblib"]),
        (["pytorch_model.bin.index.json", "m.bin"], [], ["m.bin"]),
        (["m.safetensors", "pytorch_model.bin.index.json"], ["pytorch_model.bin.index.json"], []),
        (["optimizer.pt"], ["optimizer.pt"], []),
        (["m.safetensors", "original/consolidated.00.pth"], ["original/consolidated.00.pth"], []),
        (["original/consolidated.00.pth"], [], ["original/consolidated.00.pth"]),
        (["m.gguf", "m.onnx", "m.safetensors"], [], []),
    ],
)
def test_pickles_are_spare_beside_safetensors_and_needed_otherwise(
    paths: list[str], spare: list[str], needed: list[str]
) -> None:
    assert unsafe(paths) == Unsafe(tuple(spare), tuple(needed))


# --- verdicts ---


def verdicts(**rules: bool) -> Verdicts:
    prefixes = {"hub": "hf://", "org": "hf://org/", "bad": "hf://org/bad", "share": "file:///mnt/"}
    made = {Prefix.parse(prefixes[name]): allowed for name, allowed in rules.items()}
    return Verdicts({prefix: Rule(allowed, prefix, opens=allowed) for prefix, allowed in made.items()})


def test_the_longest_prefix_decides_and_what_none_covers_is_allowed() -> None:
    some = verdicts(hub=False, org=True, bad=False)
    refusals = {base: some.refusal(base) for base in ("hf://org/good", "hf://org/bad", "hf://other/m")}
    assert refusals["hf://org/good"] is None
    assert str(refusals["hf://org/bad"]) == "hf://org/bad"
    assert str(refusals["hf://other/m"]) == "hf://"
    assert some.refusal("file:///mnt/m") is None
    assert some.allows_host("hf://org/good")
    assert not some.allows_host("hf://other/m")
    assert not verdicts(hub=True).allows_host("hf://other/m"), "the scheme alone allows no host"
    assert verdicts(share=True, org=True).opened == (str(Prefix.parse("file:///mnt/")),)
    assert verdicts(share=False).opened == ()


# --- short tasks ---


def test_as_many_short_tasks_are_enough_as_wait_while_one_uses_the_cpu() -> None:
    tasks = ShortTasks()
    for number in range(16):
        assert not tasks.are_enough(99, 0.0), number
        tasks.ended(0.004 if number else 0.003, 0.001, 10.0)
    assert not tasks.are_enough(2, 10.0)
    assert tasks.are_enough(3, 10.0), "one, and two for the seconds that the quickest waited"
    assert tasks.seconds_left(10.0) == pytest.approx(0.05)
    assert not tasks.are_enough(3, 10.05), "none has ended for too long"
    assert tasks.seconds_left(11.0) == 0
    tasks.ended(1.0, SHORT_CPU_SECONDS, 12.0)
    assert tasks.are_enough(99, 12.0)
    tasks.ended(1.0, SHORT_CPU_SECONDS * 1.01, 12.0)
    assert not tasks.are_enough(99, 12.0), "a long task is none of these"
