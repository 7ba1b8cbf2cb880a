"""The Hub endpoint answers real clients from ready models, without a request to the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ground.hub import Hub
from tests.ground.hub_client import Reader, endpoint_node, get, hf, script
from tests.ground.models import noise
from tests.ground.node import Node

FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": noise(9 << 20),
    "sub/a b+c.bin": noise(500, 2),
    "empty.txt": b"",
}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        yield started


@pytest.fixture
def node(hub: Hub, tmp_path: Path) -> Iterator[Node]:
    with endpoint_node(tmp_path / "root", hub) as started:
        yield started


@pytest.fixture
def commit(hub: Hub, node: Node) -> str:
    """The commit of org/model, which is ready on the node, of which the Hub then knows no request."""
    commit = hub.add("org/model", FILES)
    node.pull("hf://org/model")
    assert node.ready("org--model").status == 200
    hub.forget()
    hub.cdn.forget()
    return commit


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a download. huggingface_hub keeps its own notes in .cache."""
    files = (path for path in directory.rglob("*") if path.is_file())
    found = {str(path.relative_to(directory)): path.read_bytes() for path in files}
    return {path: content for path, content in found.items() if not path.startswith(".cache")}


def test_hf_download_gets_a_ready_model_without_a_request_to_the_hub(
    hub: Hub, node: Node, commit: str, tmp_path: Path
) -> None:
    ended = hf(node, tmp_path / "home", "download", "org/model", "--local-dir", str(tmp_path / "got"))
    assert ended.returncode == 0, ended.stderr
    assert contents(tmp_path / "got") == FILES
    assert hub.requests == hub.cdn.requests == []


LISTING = """
import json, sys
from huggingface_hub import HfApi, snapshot_download, hf_hub_download
api = HfApi()
info = api.model_info("org/model", files_metadata=True)
refs = api.list_repo_refs("org/model")
tree = list(api.list_repo_tree("org/model", recursive=True))
below = [each.path for each in api.list_repo_tree("org/model", path_in_repo="sub")]
some = api.get_paths_info("org/model", ["config.json", "sub", "absent.txt"])
path = snapshot_download("org/model", allow_patterns=["*.json"])
print(json.dumps({
    "sha": info.sha,
    "sizes": {each.rfilename: each.size for each in info.siblings},
    "sha256": {each.rfilename: each.lfs.sha256 for each in info.siblings if each.lfs},
    "branches": {each.name: each.target_commit for each in refs.branches},
    "tree": sorted(each.path for each in tree),
    "blobs": {each.path: each.blob_id for each in tree if hasattr(each, "blob_id")},
    "below": below,
    "some": sorted(each.path for each in some),
    "exists": [api.file_exists("org/model", "config.json"), api.file_exists("org/model", "absent.json")],
    "path": path,
}))
"""


def test_huggingface_hub_lists_what_the_hub_lists(hub: Hub, node: Node, commit: str, tmp_path: Path) -> None:
    here = script(node, tmp_path / "here", LISTING)
    assert here.returncode == 0, here.stderr
    assert hub.requests == []
    there = script(node, tmp_path / "there", LISTING, HF_ENDPOINT=hub.url)
    found, expected = json.loads(here.stdout), json.loads(there.stdout)
    assert Path(found.pop("path")).name == Path(expected.pop("path")).name == commit
    assert found == expected


def test_a_tree_comes_in_pages_of_the_length_that_is_asked_for(node: Node, commit: str) -> None:
    at, found = "/api/models/org/model/tree/main?recursive=true&limit=2", []
    for _ in range(3):
        page = get(node, at)
        found.append([each["path"] for each in json.loads(page.body)])
        if "link" not in page.headers:
            break
        at = page.headers["link"].partition(">")[0].partition("/api/")[2].join(["/api/", ""])
    assert found == [["config.json", "empty.txt"], ["model.safetensors", "sub"], ["sub/a b+c.bin"]]


def test_a_file_has_the_headers_that_clients_read(node: Node, commit: str) -> None:
    head = get(node, "/org/model/resolve/main/model.safetensors", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["x-repo-commit"] == commit
    assert head.headers["x-linked-size"] == head.headers["content-length"] == str(9 << 20)
    assert head.headers["etag"] == head.headers["x-linked-etag"]
    assert head.headers["accept-ranges"] == "bytes"
    odd = get(node, f"/org/model/resolve/{commit}/sub/a%20b%2Bc.bin")
    assert odd.body == FILES["sub/a b+c.bin"]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-1048580", 5, (1 << 20) + 5),
        ("bytes=9437180-", 9437180, 9 << 20),
        ("bytes=-7", (9 << 20) - 7, 9 << 20),
        ("bytes=9000000-99999999999", 9000000, 9 << 20),
    ],
)
def test_a_range_of_a_ready_file(node: Node, commit: str, asked: str, start: int, stop: int) -> None:
    got = get(node, "/org/model/resolve/main/model.safetensors", Range=asked)
    assert (got.status, got.body) == (206, FILES["model.safetensors"][start:stop])
    assert got.headers["content-range"] == f"bytes {start}-{stop - 1}/{9 << 20}"


def test_a_range_behind_the_end_is_refused_and_an_unknown_one_is_ignored(node: Node, commit: str) -> None:
    behind = get(node, "/org/model/resolve/main/model.safetensors", Range="bytes=9437184-")
    assert (behind.status, behind.headers["content-range"]) == (416, "bytes */9437184")
    assert get(node, "/org/model/resolve/main/config.json", Range="lines=1-2").status == 200


def test_who_resumes_another_file_gets_the_complete_one(node: Node, commit: str) -> None:
    path, complete = "/org/model/resolve/main/model.safetensors", FILES["model.safetensors"]
    etag = get(node, path, "HEAD").headers["etag"]
    same = get(node, path, Range="bytes=100-", If_Range=etag)
    assert (same.status, same.body) == (206, complete[100:])
    for other in (f"W/{etag}", '"of-the-file-before"', "Tue, 01 Dec 2026 00:00:00 GMT"):
        got = get(node, path, Range="bytes=100-", If_Range=other)
        assert (got.status, got.body) == (200, complete)


def test_what_does_not_exist_is_answered_as_the_hub_does(hub: Hub, node: Node, commit: str) -> None:
    absent = get(node, "/org/model/resolve/main/absent.json", "HEAD")
    assert (absent.status, absent.headers["x-error-code"]) == (404, "EntryNotFound")
    assert absent.headers["x-repo-commit"] == commit
    assert get(node, "/api/models/org/model/tree/main/nowhere").headers["x-error-code"] == "EntryNotFound"
    assert hub.requests == []
    revision = get(node, "/api/models/org/model/revision/nowhere")
    assert (revision.status, revision.headers["x-error-code"]) == (404, "RevisionNotFound")
    repository = get(node, "/api/models/org/nothing")
    assert (repository.status, repository.headers["x-error-code"]) == (404, "RepoNotFound")
    for odd in ("/api/models/a--b/c", "/api/models/../etc/revision/main", "/x/y/resolve/main/../../passwd"):
        assert get(node, odd).status == 404
    for none in ("/", "/api/whoami-v2", "/api/datasets/org/model", "/org/model/raw/main/config.json"):
        assert get(node, none).status == 404
    assert get(node, "/api/models/org/model", "DELETE").status == 404


def test_a_refusal_of_the_hub_is_remembered(hub: Hub, node: Node) -> None:
    assert get(node, "/api/models/org/nothing").status == 404
    asked = len(hub.requests)
    assert asked
    assert {get(node, "/org/nothing/resolve/main/config.json", "HEAD").status for _ in range(20)} == {404}
    assert len(hub.requests) == asked


def test_what_the_operator_refuses_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    hub.add("org/model", FILES)
    with endpoint_node(
        tmp_path / "root", hub, sources=[{"prefix": "hf://org/model", "refuse": True}]
    ) as node:
        got = get(node, "/api/models/org/model")
        assert (got.status, got.headers["x-error-code"]) == (404, "RepoNotFound")
    assert hub.requests == []


def test_a_model_that_a_client_reads_is_not_removed(hub: Hub, tmp_path: Path) -> None:
    size = 64 << 20  # more than the socket's buffers take
    hub.add("org/large", {"model.safetensors": noise(size)})
    with endpoint_node(tmp_path / "root", hub) as node:
        node.pull("hf://org/large")
        assert node.ready("org--large").status == 200
        with Reader(node, "/org/large/resolve/main/model.safetensors") as reader:
            first = reader.read(1000)
            refused = node.ask("DELETE", "/v1/models/org--large")
            assert (refused.status, refused.document["code"]) == (409, "in_use")
            assert first + reader.read() == noise(size)


def test_a_model_of_another_source_has_the_repository_that_its_hub_id_says(
    hub: Hub, node: Node, tmp_path: Path
) -> None:
    place = tmp_path / "share" / "m"
    place.mkdir(parents=True)
    (place / "model.bin").write_bytes(noise(3000))
    node.configure(**{**node.options, "allow": ["127.0.0.0/8", f"file://{tmp_path}/share/"]})
    node.stop()
    node.start()
    answer = node.pull(f"file://{place}/", name="m", hub_id="acme/m")
    assert answer.status == 202, answer.document
    assert node.ready("m").status == 200
    got = get(node, "/acme/m/resolve/main/model.bin")
    assert (got.status, got.body) == (200, noise(3000))
    absent = get(node, "/acme/m/resolve/main/config.json")
    assert (absent.status, absent.headers["x-error-code"]) == (404, "EntryNotFound")
    assert hub.requests == []


def test_a_file_that_a_selection_left_out_is_pulled_alone(hub: Hub, node: Node) -> None:
    commit = hub.add("org/model", {**FILES, "other.bin": noise(4000, 5)})
    node.pull("hf://org/model", exclude=["other.bin", "sub/*"])
    assert node.ready("org--model").status == 200
    got = get(node, f"/org/model/resolve/{commit}/other.bin")
    assert (got.status, got.body) == (200, noise(4000, 5))
    gone = get(node, f"/org/model/resolve/{commit}/nowhere.xyz")
    assert (gone.status, gone.headers["x-error-code"]) == (404, "EntryNotFound")
    assert hub.cdn.bytes_sent(hub.cdn_path("org/model", "sub/a b+c.bin")) == 0


def test_many_requests_for_one_file_that_is_pulled_alone_count_as_one_pull(hub: Hub, node: Node) -> None:
    hub.add("org/model", {**FILES, "other.bin": noise(9 << 20, 5)})
    hub.add("org/second", FILES)
    node.pull("hf://org/model", exclude=["other.bin"])
    assert node.ready("org--model").status == 200
    hold = hub.cdn.hold(hub.cdn_path("org/model", "other.bin"), after=0)
    try:
        asked = [get(node, "/org/model/resolve/main/other.bin", "HEAD").status for _ in range(130)]
        assert set(asked) == {307}
        assert get(node, "/api/models/org/second").status == 200
    finally:
        hold.release()
