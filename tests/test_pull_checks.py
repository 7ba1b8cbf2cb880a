"""What is checked before a model is published: that it is complete, and that nothing of it is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from cachd.errors import Forbidden, Invalid
from cachd.model import File, Manifest, ModelSpec
from cachd.preflight.codes import Mode
from cachd.sources.cancel import CancelToken
from cachd.sources.table import Table
from cachd.store.disk_store import DiskStore
from cachd.transfer.checks import (
    check_contents,
    check_numbers,
    check_preflight,
    check_shards,
    check_weights,
    selected,
)
from tests.ground.models import noise
from tests.ground.stored import commit, keep, manifest_of, sha256

SHARDS = {f"model-0000{n}-of-00004.safetensors": b"x" for n in (1, 2, 3, 4)}
INDEX = "model.safetensors.index.json"


def spec(**patterns: Any) -> ModelSpec:
    return ModelSpec.asked("hf://org/model", "m", **patterns)


def without(*numbers: int) -> dict[str, bytes]:
    return {path: content for path, content in SHARDS.items() if int(path[6:11]) not in numbers}


@pytest.mark.parametrize(
    ("files", "patterns", "missing"),
    [
        (SHARDS, {}, None),
        ({"config.json": b"{}"}, {}, None),
        (without(2), {}, "lacks 1 of the 4 files of a set: 'model-00002-of-00004.safetensors'"),
        (without(2, 3), {}, "lacks 2 of the 4 files"),
        (without(2), {"exclude": ("*00002*",)}, None),
        (without(2), {"include": ("*00001*", "*00003*")}, None),
        (without(2), {"include": ("*.safetensors",)}, "lacks 1 of the 4"),
        (without(2) | {"config.json": b"{}"}, {"include": ("config.json",)}, None),
        (without(2, 3), {"exclude": ("*00003*",)}, "lacks 1 of the 4 files"),
    ],
)
def test_a_numbered_set_of_weights_is_complete_but_for_what_the_patterns_leave_out(
    files: Mapping[str, bytes], patterns: dict[str, tuple[str, ...]], missing: str | None
) -> None:
    source, asked = manifest_of(files), spec(**patterns)
    chosen = asked.select(source)
    if missing is None:
        check_numbers(chosen, source, asked)
    else:
        with pytest.raises(Invalid, match=missing) as refusal:
            check_numbers(chosen, source, asked)
        assert refusal.value.code == "incomplete_model"


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"w{n}": shard for n, shard in enumerate(shards)}}).encode()


@pytest.mark.parametrize(
    ("files", "patterns", "warns", "missing"),
    [
        ({INDEX: index_of(*SHARDS), **SHARDS}, {}, False, None),
        ({"config.json": b"{}"}, {}, False, None),
        ({INDEX: index_of(*SHARDS), **without(2)}, {}, False, "names 1 shards"),
        ({INDEX: index_of(*SHARDS), **without(2)}, {"exclude": ("*00002*",)}, False, None),
        ({INDEX: index_of(*SHARDS)}, {}, False, "names 4 shards"),
        ({INDEX: index_of(*SHARDS), "model.safetensors": b"x"}, {}, True, None),
    ],
)
def test_an_index_names_shards_that_are_there_or_is_stale(
    store: DiskStore,
    files: Mapping[str, bytes],
    patterns: dict[str, tuple[str, ...]],
    warns: bool,
    missing: str | None,
) -> None:
    keep(store, files)
    source, asked = manifest_of(files), spec(**patterns)
    chosen = asked.select(source)
    if missing is not None:
        with pytest.raises(Invalid, match=missing) as refusal:
            check_shards(chosen, source, asked, store.content)
        assert refusal.value.code == "incomplete_model"
        return
    warnings = check_shards(chosen, source, asked, store.content)
    assert len(warnings) == warns
    assert all("the index is stale" in each and "'model.safetensors'" in each for each in warnings)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 5\n"


@pytest.mark.parametrize(
    ("path", "content", "why"),
    [
        ("config.json", b"{}", None),
        ("model.bin", noise(1000), None),
        ("model.bin", POINTER, "it is "),
        ("model.bin", b"<!DOCTYPE html><html></html>", "it is "),
        ("model.safetensors", (1000).to_bytes(8, "little") + b"{", "a copy or an upload of it broke off"),
        ("model.safetensors", (2).to_bytes(8, "little") + b"{}", None),
    ],
)
def test_weights_are_what_their_name_says(
    store: DiskStore, path: str, content: bytes, why: str | None
) -> None:
    keep(store, {path: content})
    manifest = manifest_of({path: content})
    if why is None:
        check_weights(manifest, store.content)
        return
    with pytest.raises(Invalid, match=why) as refusal:
        check_weights(manifest, store.content)
    assert refusal.value.code == "incomplete_model"
    assert f"'{path}' with {len(content)} bytes" in refusal.value.detail


def test_what_an_engine_would_refuse_is_kept_or_refused_or_not_looked_for(store: DiskStore) -> None:
    files = {"config.json": b"no json", "model.safetensors": (2).to_bytes(8, "little") + b"{}"}
    keep(store, files)
    manifest = manifest_of(files)
    assert check_preflight(manifest, store.content, Mode.off) == ()
    found = check_preflight(manifest, store.content, Mode.warn)
    assert found
    with pytest.raises(Invalid, match="an engine would refuse hf://org/model: ") as refusal:
        check_preflight(manifest, store.content, Mode.strict)
    assert refusal.value.code == "preflight_refused"


def test_a_refused_digest_is_found_by_content_if_the_source_does_not_state_it(store: DiskStore) -> None:
    file = File("a", 1, "https://host/a", None, '"etag"')
    commit(store, file, b"a")
    manifest = Manifest("https://host/a", "a" * 64, (file,))
    for refused in ([], [str(sha256(b"c"))]):
        check_contents(manifest, Table(refuse=refused), store.content, CancelToken())
    table = Table(refuse=[str(sha256(b"a"))])
    table.check_digests(manifest)
    for _ in range(2):
        with pytest.raises(Forbidden) as refusal:
            check_contents(manifest, table, store.content, CancelToken())
        assert refusal.value.code == "refused_digest"
    stated = manifest_of({"a": b"a"})
    check_contents(stated, table, store.content, CancelToken())
    with pytest.raises(Forbidden):
        table.check_digests(stated)


def test_the_table_and_the_spec_choose_the_files() -> None:
    manifest = manifest_of({"a.json": b"a", "b.bin": b"b"})
    chosen = selected(manifest, spec(exclude=("b.bin",)), Table())
    assert [file.path for file in chosen.files] == ["a.json"]
    with pytest.raises(Forbidden) as refusal:
        selected(manifest, spec(), Table(refuse=["*.bin"]))
    assert refusal.value.code == "file_refused"
    assert selected(manifest, spec(copy=("a.json",)), Table()).copied == ("a.json",)
