"""Model specs, and what snapshots show in the view for the Hub's client."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import Invalid
from cachd.model import (
    ModelSpec,
    Ref,
    snapshot_of,
)
from tests.ground.values import COMMIT, SHA256, code_of, file, manifest, refs

visible = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs")), min_size=1, max_size=10)
patterns = st.lists(visible, max_size=3).map(tuple)


@given(refs, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,10}", fullmatch=True), patterns, patterns)
def test_a_model_spec_survives_its_document(
    ref: str, name: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    spec = ModelSpec(Ref.parse(ref), name, include, exclude)
    assert ModelSpec.from_document(json.loads(json.dumps(spec.as_document()))) == spec


@pytest.mark.parametrize(
    "wrong",
    [
        {"ref": "nothing"},
        {"ref": None},
        {"name": "../x"},
        {"name": None, "ref": 1},
        {"include": "*.bin"},
        {"exclude": None},
        {"include": [1]},
        {"exclude": [["*"]]},
    ],
    ids=json.dumps,
)
def test_garbage_is_not_a_model_spec(wrong: dict[str, object]) -> None:
    good = ModelSpec(Ref.parse("hf://org/model"), "model").as_document()
    with pytest.raises((Invalid, KeyError, TypeError)):
        ModelSpec.from_document({**good, **wrong})


def test_a_model_spec_has_an_allowed_name() -> None:
    assert code_of(lambda: ModelSpec(Ref.parse("hf://org/model"), "a/b")) == "bad_name"


def test_a_model_of_the_hub_is_shown_under_its_repository_and_any_other_under_its_name() -> None:
    hub = snapshot_of(ModelSpec(Ref.parse("hf://org/model"), "mine"), manifest(file()), 1.0)
    assert (hub.repo, hub.hub_folder, hub.commit) == ("org/model", "models--org--model", COMMIT)
    bucket = ModelSpec(Ref.parse("s3://bucket/prefix/"), "mine")
    other = snapshot_of(bucket, manifest(file(), base="s3://bucket/prefix/", revision=SHA256), 1.0)
    assert (other.repo, other.hub_folder, other.commit) == ("mine", "models--mine", SHA256[:40])


@pytest.mark.parametrize("name", ["org--model", "a--b", "a---b", "a-b--c", "127.0.0.1-8080--m"])
def test_a_name_with_two_dashes_is_one_word_in_the_hub_view_and_no_repository_of_the_hub(name: str) -> None:
    def shown(name: str) -> str:
        spec = ModelSpec(Ref.parse("s3://bucket/prefix/"), name)
        made = snapshot_of(spec, manifest(file(), base="s3://bucket/prefix/", revision=SHA256), 1.0)
        return made.hub_folder.removeprefix("models--")

    assert "--" not in shown(name)
    assert "/" not in shown(name)
    names = [name, name.replace("--", "-"), name.replace("---", "--"), "org-model"]
    assert len({shown(each) for each in names}) == len(set(names))


@pytest.mark.parametrize(
    ("ref", "revision"),
    [
        ("hf://org/model", "main"),
        ("hf://org/model@v1", "v1"),
        ("hf://org/model@refs/pr/1", "refs/pr/1"),
        (f"hf://org/model@{COMMIT}", None),
        ("s3://bucket/prefix/", "main"),
    ],
)
def test_a_hub_client_asks_for_the_branch_that_the_spec_names(ref: str, revision: str | None) -> None:
    snapshot = snapshot_of(ModelSpec(Ref.parse(ref), "mine"), manifest(file()), 1.0)
    assert snapshot.hub_revision == revision


SPLIT = [f"q4/model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("paths", "single"),
    [
        (["model.gguf"], "model.gguf"),
        (["sub/model.safetensors"], "sub/model.safetensors"),
        (SPLIT, SPLIT[0]),
        (SPLIT[:1], SPLIT[0]),
        (SPLIT[1:2], SPLIT[1]),
        (SPLIT[:2], None),
        (SPLIT[1:], None),
        ([*SPLIT, "README.md"], None),
        ([*SPLIT[:2], "q4/other-00003-of-00003.gguf"], None),
        (["model-00001-of-00001.gguf"], "model-00001-of-00001.gguf"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["a.gguf", "b.gguf"], None),
        (["a-00001-of-00002.gguf", "a-00003-of-00002.gguf"], None),
        (["a-00001-of-00000.gguf"], "a-00001-of-00000.gguf"),
        (["config.json", "model.safetensors"], None),
    ],
    ids=str,
)
def test_a_model_is_one_file_when_it_has_one_or_is_one_split_gguf(
    paths: list[str], single: str | None
) -> None:
    told = manifest(*(file(path) for path in paths))
    assert told.single_file == single
    assert snapshot_of(ModelSpec(Ref.parse("hf://org/model"), "mine"), told, 1.0).file == single
