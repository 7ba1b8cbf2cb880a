"""`cachd preflight REF`: what engines would find in a model that is not here, by headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from cachd.model import Ref
from cachd.model.finding import Level
from cachd.preflight import remote
from cachd.preflight.codes import Code
from cachd.preflight.examine import Preflight, examine
from cachd.preflight.remote import SourceContents
from cachd.sources.cancel import CancelToken
from cachd.sources.web import WebSource
from tests.fetching import http
from tests.ground.contents import examined
from tests.ground.origin import IgnoreRange, Late, Origin
from tests.ground.site import Ground, assert_problem, timed
from tests.ground.weights import gguf, index, lfs_pointer, safetensors, torch_archive
from tests.test_preflight import PIPELINE, TEXT

MIB = 1 << 20
Files = Mapping[str, bytes]


def at_source(origin: Origin, files: Files) -> tuple[Preflight, SourceContents]:
    """What a preflight finds by ranged reads of an origin that has these files."""
    source, token = WebSource(http(ca_file=origin.ca_file)), CancelToken()
    manifest = source.resolve(Ref.parse(origin.add_model("model", files)), token)
    contents = SourceContents(manifest, source, token)
    origin.forget()
    return examine(contents), contents


@pytest.mark.parametrize(
    "files",
    [
        TEXT,
        PIPELINE,
        {"m-Q4_K_M.gguf": gguf()},
        {"config.json": b"{}", "pytorch_model.bin": torch_archive()},
        {**TEXT, "model.safetensors": lfs_pointer(b"weights")},
        {**TEXT, "model.safetensors": safetensors(100) + b"more"},
        {**TEXT, "model.safetensors.index.json": index("model-00001-of-00002.safetensors")},
        {**TEXT, "model.safetensors": safetensors(3 * MIB), "empty.safetensors": b""},
    ],
    ids=["text", "pipeline", "gguf", "pickle", "pointer", "cut", "index", "large"],
)
def test_the_findings_at_the_source_are_those_of_the_same_files_here(origin: Origin, files: Files) -> None:
    found, contents = at_source(origin, files)
    assert found == examined(files)
    asked = sum(seen.method == "GET" for seen in origin.requests)
    assert (asked, origin.bytes_sent()) == (contents.requests, contents.bytes)


def test_only_the_head_of_large_weights_is_read(origin: Origin) -> None:
    found, contents = at_source(origin, {**TEXT, "model.safetensors": safetensors(40 * MIB)})
    assert found.level is Level.ok
    assert contents.bytes < MIB


def test_a_model_of_many_files_is_examined_by_a_bounded_number_of_requests(origin: Origin) -> None:
    shards = {f"w{n:04}.safetensors": safetensors(10) for n in range(remote.MAX_REQUESTS + 40)}
    found, contents = at_source(origin, shards)
    assert contents.requests == remote.MAX_REQUESTS
    unread = [each for each in found.findings if each.code == Code.not_examined]
    assert [dict(each.numbers) for each in unread] == [{"files": 80}], "their heads, and their headers"


def test_a_header_that_is_longer_than_the_budget_is_not_read_to_its_end(origin: Origin) -> None:
    length = remote.MAX_BYTES + MIB
    claimed = length.to_bytes(8, "little") + b" " * length
    found, contents = at_source(origin, {"model.safetensors": claimed})
    assert contents.bytes <= remote.MAX_BYTES
    assert Code.not_examined in [each.code for each in found.findings]


def test_an_origin_that_never_answers_a_read_ends_with_the_time_of_the_caller(ground: Ground) -> None:
    ref = ground.origin.add_model("silent", TEXT)
    ground.origin.fault("/silent/model.safetensors", Late(), methods=("GET",))
    asked = {"ref": ref, "seconds": 2}
    answer, seconds = timed(lambda: ground.node.ask("POST", "/v1/preflight", asked))
    assert answer.status == 200
    assert Code.not_examined in [each["code"] for each in answer.document["findings"]]
    assert seconds < 40, "long before the origin answers"


def test_an_origin_that_sends_only_complete_files_is_asked_for_small_ones(origin: Origin) -> None:
    files = {**TEXT, "big.safetensors": safetensors(3 * MIB)}
    for path in files:
        origin.fault(f"/model/{path}", IgnoreRange(), times=9)
    found, _ = at_source(origin, files)
    assert found.architectures == ("LlamaForCausalLM",)
    (unread,) = [each for each in found.findings if each.code == Code.not_examined]
    assert "big.safetensors" in unread.detail


def test_nothing_is_asked_for_after_a_cancel(origin: Origin) -> None:
    source, token = WebSource(http(ca_file=origin.ca_file)), CancelToken()
    manifest = source.resolve(Ref.parse(origin.add_model("model", TEXT)), token)
    origin.forget()
    token.cancel()
    found = examine(SourceContents(manifest, source, token))
    assert [each.code for each in found.notable] == [Code.not_examined]
    assert origin.requests == []


def test_the_command_examines_a_ref_and_pulls_nothing(ground: Ground) -> None:
    ground.hub.add("org/distant", {**TEXT, "model.safetensors": safetensors(100) + b"more"})
    ended = ground.node.cli("preflight", "org/distant", "-o", "json")
    assert ended.returncode == 1, ended.stderr
    document = json.loads(ended.stdout)
    assert (document["name"], document["level"]) == ("org--distant", "refused")
    assert ground.node.cli("preflight", "org/distant", "--exclude", "*.safetensors").returncode == 0
    assert_problem(ground.node.ask("GET", "/v1/models/org--distant"), 404, "no_such_model")
    assert ground.node.cli("preflight", "org/absent").returncode not in (0, 1)
