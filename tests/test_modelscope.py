"""Models of ModelScope, against a scripted one (tests/ground/modelscope.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cachd.errors import CachdError
from cachd.model import Extent, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.modelscope import ModelScopeSource
from cachd.sources.secrets import Secret
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.fetching import http
from tests.ground.models import noise
from tests.ground.modelscope import ModelScope
from tests.ground.origin import Status

Engines = Callable[..., Engine]


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(CachdError) as refusal:
        call()
    return str(refusal.value.code)


FILES = {
    "configuration.json": b"{}",
    "model.safetensors": noise(3000),
    "sub/a b+&.txt": noise(50, 2),
    "m-Q8_0.gguf": noise(700, 3),
}


@pytest.fixture
def scripted() -> Iterator[ModelScope]:
    with ModelScope() as started:
        yield started


@pytest.mark.parametrize("revision", [None, "master", "v1.0", "feature/new"])
def test_a_model_of_modelscope_is_published_with_its_own_digests(
    scripted: ModelScope, root: Path, engine: Engines, revision: str | None
) -> None:
    scripted.add("org/m", FILES, revision=revision or "master")
    ref = "ms://org/m" + (f"@{revision.replace('/', '%2F')}" if revision else "")
    snapshot = engine(ms_endpoint=scripted.url).pull(ref, name="m")
    assert dict(snapshot.verified_by) == {"sha256": len(FILES)}
    assert {p: (root / "models/m" / p).read_bytes() for p in FILES} == FILES
    assert snapshot.repo == "m"


def test_the_weights_of_a_modelscope_model_can_be_chosen(scripted: ModelScope, engine: Engines) -> None:
    scripted.add("org/m", FILES)
    snapshot = engine(ms_endpoint=scripted.url).pull("ms://org/m:Q8_0", name="m")
    assert (snapshot.files, snapshot.left_out and snapshot.left_out.bytes) == (3, 3000)


def test_a_new_revision_keeps_the_blobs_that_did_not_change(scripted: ModelScope, engine: Engines) -> None:
    scripted.add("org/m", FILES)
    opened = engine(ms_endpoint=scripted.url)
    first = opened.pull("ms://org/m", name="m")
    scripted.add("org/m", {**FILES, "configuration.json": b"{...}"})
    sent = scripted.cdn.bytes_sent()
    second = opened.begin(first.spec, refresh=True).done.result(PATIENCE_SECONDS)
    assert second.revision != first.revision
    assert scripted.cdn.bytes_sent() == sent


def test_a_file_that_was_listed_stays_as_it_was(scripted: ModelScope) -> None:
    scripted.add("org/m", FILES)
    source = ModelScopeSource(http(), endpoint=scripted.url, token=Secret(None))
    file = source.resolve(Ref.parse("ms://org/m"), CancelToken()).files[0]
    scripted.add("org/m", {**FILES, file.path: b"[]"})
    buffer = bytearray(10)
    with source.open(file, Extent(0, file.size), CancelToken()) as body:
        assert buffer[: body.readinto(memoryview(buffer))] == FILES[file.path]


def test_what_is_not_there_or_private_is_told(scripted: ModelScope, tmp_path: Path, engine: Engines) -> None:
    scripted.add("org/m", FILES)
    scripted.add("org/private", FILES, private=True)
    opened = engine(ms_endpoint=scripted.url)
    for ref in ("ms://org/absent", "ms://org/m@v9", "ms://org/private"):
        assert code_of(lambda ref=ref: opened.pull(ref, name="x")) == "repo_not_found"
    assert code_of(lambda: opened.pull("ms://datasets/org/it", name="x")) == "bad_ref"
    for status, expected in ((401, "source_unauthorized"), (403, "source_forbidden")):
        scripted.fault("*", Status(status), 1)
        assert code_of(lambda: opened.pull("ms://org/m", name="x")) == expected


def test_the_token_goes_to_modelscope_and_not_to_its_storage(
    scripted: ModelScope, tmp_path: Path, engine: Engines
) -> None:
    scripted.add("org/private", FILES, private=True)
    (tmp_path / "token").write_text(scripted.token)
    opened = engine(ms_endpoint=scripted.url, ms_token_file=tmp_path / "token")
    assert opened.pull("ms://org/private", name="m").files == len(FILES)
    assert scripted.cdn.requests
    assert all("cookie" not in seen.headers for seen in scripted.cdn.requests)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"<html>login</html>", "origin_protocol"),
        (b'{"Code": 200, "Data": {"Files": [1]}}', "origin_protocol"),
        (
            b'{"Code": 200, "Data": {"Files": [{"Path": "a", "Size": "1", "Type": "blob"}]}}',
            "origin_protocol",
        ),
        (b'{"Code": 10010205001, "Message": "record not found"}', "repo_not_found"),
        (b'{"Code": 200, "Data": {"Files": []}}', "revision_not_found"),
    ],
)
def test_an_answer_that_is_no_list_is_refused(scripted: ModelScope, body: bytes, expected: str) -> None:
    scripted.add("org/m", FILES)
    scripted.fault("*", Status(200, body=body))
    source = ModelScopeSource(http(), endpoint=scripted.url, token=Secret(None))
    assert code_of(lambda: source.resolve(Ref.parse("ms://org/m"), CancelToken())) == expected


def test_a_file_without_a_digest_is_unverified(scripted: ModelScope, engine: Engines) -> None:
    scripted.add("org/m", FILES)
    scripted.states_digests = False
    assert engine(ms_endpoint=scripted.url).pull("ms://org/m", name="m").verified is False
