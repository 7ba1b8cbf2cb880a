"""Repositories of the Hub and of its mirrors: kinds, revisions, renames, what mirrors lack, who may read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import get_session, hf_hub_download

from cachd.errors import CachdError, Forbidden, NotFound, Unavailable
from cachd.model import Extent, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.huggingface import HubSource
from cachd.sources.secrets import Secret
from tests.conftest import PATIENCE_SECONDS, Engine
from tests.fetching import http
from tests.ground.hub import Hub
from tests.ground.models import noise
from tests.ground.origin import Fault, Reply, Seen, Status

Engines = Callable[..., Engine]


@dataclass(frozen=True)
class _Elsewhere(Fault):
    """An answer whose next page is at another origin."""

    url: str

    def reply(self, _seen: Seen, reply: Reply) -> Reply:
        return reply.tagged(Link=f'<{self.url}/api/next>; rel="next"')


FILES = {
    "config.json": b"{}",
    "model.safetensors": noise(3000),
    "sub/a b+c.bin": noise(500, 2),
    "empty.txt": b"",
}


def source(hub: Hub, token: str | None = None, place: Path | None = None) -> HubSource:
    secret = Secret(None)
    if token and place:
        (place / "token").write_text(token)
        secret = Secret(place / "token")
    return HubSource(http(), endpoint=hub.url, token=secret)


def listed(hub: Hub, ref: str) -> dict[str, str]:
    """The digest of each file, as the source states it."""
    manifest = source(hub).resolve(Ref.parse(ref), CancelToken())
    return {file.path: str(file.digest) for file in manifest.files}


# --- revisions ---


@pytest.mark.parametrize("revision", ["main", "v1.0", "feature/new/thing", "refs/pr/7", "refs/convert/gguf"])
def test_a_branch_a_tag_and_a_pull_request_are_revisions(
    hub: Hub, root: Path, engine: Engines, revision: str
) -> None:
    hub.add("org/m", {"old": b"old"})
    commit = hub.add("org/m", FILES, revision="other")
    hub.tag("org/m", revision, commit)
    if revision == "main":
        commit = hub.add("org/m", FILES)
    ref = f"hf://org/m@{revision.replace('/', '%2F')}"
    assert engine(hf_endpoint=hub.url).pull(ref, name="m").revision == commit
    found = hf_hub_download(
        "org/m", "config.json", revision=revision, cache_dir=root / "hub", local_files_only=True
    )
    assert Path(found).read_bytes() == b"{}"


# --- shortened commits ---


@pytest.mark.parametrize("kind", ["", "datasets/", "kernels/"])
def test_a_shortened_commit_is_the_commit_that_begins_so(
    hub: Hub, root: Path, engine: Engines, kind: str
) -> None:
    commit = hub.add(f"{kind}org/m", FILES)
    hub.add(f"{kind}org/m", {"config.json": b"[]"})
    opened = engine(hf_endpoint=hub.url)
    for digits in (7, 39):
        snapshot = opened.pull(f"hf://{kind}org/m@{commit[:digits]}", name=f"m{digits}")
        assert snapshot.revision == commit
        found = hf_hub_download(
            "org/m",
            "config.json",
            repo_type=kind.removesuffix("s/") or "model",
            revision=commit[:digits],
            cache_dir=root / "hub",
            local_files_only=True,
        )
        assert Path(found).read_bytes() == b"{}"


@pytest.mark.parametrize("name", ["20260102", "deadbeef"])
def test_a_branch_or_a_tag_may_look_like_a_shortened_commit(hub: Hub, name: str) -> None:
    commit = hub.add("org/m", FILES)
    hub.add("org/m", {"other": b""})
    hub.tag("org/m", name, commit)
    assert listed(hub, f"hf://org/m@{name}") == listed(hub, f"hf://org/m@{commit}")
    hub.add("org/n", FILES, revision=name)
    assert len(listed(hub, f"hf://org/n@{name}")) == len(FILES)


def test_a_mirror_that_answers_with_another_commit_is_refused(hub: Hub) -> None:
    commit = hub.add("org/m", FILES)
    hub.add("org/m", {"other": b""})
    hub.always_main = True
    for lacks in (set[str](), {"refs"}):
        hub.lacks = lacks
        for digits in (7, 40):
            with pytest.raises(Unavailable) as refusal:
                listed(hub, f"hf://org/m@{commit[:digits]}")
            assert refusal.value.code == "origin_protocol"


def test_a_shortened_commit_that_is_not_there_is_refused_with_those_that_begin_so(hub: Hub) -> None:
    commit = hub.add("org/m", FILES)
    hub.add("org/m", {"other": b""})
    hub.lacks, hub.page_size = {"shortened"}, 1
    for asked, lacks, hint in (
        (commit[:7], {"shortened"}, f"commits of main that begin so: {commit}; "),
        (f"{commit[:7]}000000", {"shortened"}, "check the digits"),
        (commit[:7], {"shortened", "commits"}, "all 40 digits"),
        ("0123abc", set[str](), "check the digits"),
    ):
        hub.lacks = lacks
        with pytest.raises(NotFound) as refusal:
            listed(hub, f"hf://org/m@{asked}")
        assert refusal.value.code == "revision_not_found"
        assert asked in refusal.value.detail
        assert hint in refusal.value.hint


# --- kinds ---


@pytest.mark.parametrize("kind", ["datasets", "kernels"])
def test_a_repository_of_another_kind_has_a_view_of_its_kind(
    hub: Hub, root: Path, engine: Engines, kind: str
) -> None:
    hub.add("org/it", {"a.txt": b"the model"})
    hub.add(f"{kind}/org/it", FILES)
    opened = engine(hf_endpoint=hub.url)
    snapshot = opened.pull(f"hf://{kind}/org/it", name="it")
    opened.pull("hf://org/it", name="model")
    assert (snapshot.verified, snapshot.repo, snapshot.files) == (True, f"{kind}/org/it", len(FILES))
    for path, content in FILES.items():
        found = hf_hub_download(
            "org/it", path, repo_type=kind.removesuffix("s"), cache_dir=root / "hub", local_files_only=True
        )
        assert Path(found).read_bytes() == content
    assert sorted(p.name for p in (root / "hub").glob("*--*")) == sorted(
        [f"{kind}--org--it", "models--org--it"]
    )
    assert not hub.leaked


# --- mirrors that answer less ---


@pytest.mark.parametrize(
    "lacks",
    [{"blobs"}, {"lfs"}, {"blobs", "tree"}, {"lfs", "tree"}, {"blobs", "lfs"}],
    ids=lambda lacks: "+".join(sorted(lacks)),
)
def test_a_mirror_that_leaves_out_sizes_or_digests_is_asked_otherwise(hub: Hub, lacks: set[str]) -> None:
    hub.add("org/m", FILES)
    expected = listed(hub, "hf://org/m")
    hub.lacks, hub.page_size = lacks, 2
    assert listed(hub, "hf://org/m") == expected
    assert expected["model.safetensors"].startswith("sha256:")


def test_a_mirror_that_states_no_digest_of_a_large_file_has_it_unverified(
    hub: Hub, root: Path, engine: Engines
) -> None:
    """A git id of a listing may be that of an LFS pointer, so it is no digest of the file."""
    hub.add("org/m", FILES)
    hub.lacks = {"lfs", "tree", "linked"}
    snapshot = engine(hf_endpoint=hub.url).pull("hf://org/m", name="m")
    assert dict(snapshot.verified_by) == {"none": 2, "git-sha1": 2}
    assert {p: (root / "models/m" / p).read_bytes() for p in FILES} == FILES


def test_a_tree_that_continues_elsewhere_gets_no_token(hub: Hub, tmp_path: Path) -> None:
    with Hub() as other:
        hub.add("org/m", FILES)
        hub.lacks, hub.page_size = {"blobs"}, 2
        page = "/api/models/org/m/tree/"
        hub.fault("*", _Elsewhere(other.url), when=lambda seen: seen.path.startswith(page))
        with pytest.raises(Unavailable) as refusal:
            source(hub, hub.token, tmp_path).resolve(Ref.parse("hf://org/m"), CancelToken())
        assert refusal.value.code == "origin_protocol"
        assert not other.requests


def test_a_page_in_place_of_a_tree_is_refused(hub: Hub) -> None:
    hub.add("org/m", FILES)
    hub.lacks = {"blobs"}
    page = "/api/models/org/m/tree/"
    hub.fault("*", Status(200, body=b"<html>"), when=lambda seen: seen.path.startswith(page))
    assert refused(source(hub), "hf://org/m").code == "origin_protocol"


# --- renamed ---


def read(root: Path, repo: str) -> bytes:
    """What a Hub client finds of a repository in the view, offline."""
    found = hf_hub_download(repo, "model.safetensors", cache_dir=root / "hub", local_files_only=True)
    return Path(found).read_bytes()


def test_the_view_of_a_renamed_repository_carries_both_names(hub: Hub, root: Path, engine: Engines) -> None:
    hub.add("old/name", FILES)
    hub.rename("old/name", "new/name")
    opened = engine(hf_endpoint=hub.url)
    snapshot = opened.pull("hf://old/name", name="m")
    assert {p: (root / "models/m" / p).read_bytes() for p in FILES} == FILES
    assert read(root, "old/name") == read(root, "new/name") == FILES["model.safetensors"]
    assert (snapshot.repo, snapshot.renamed_to) == ("old/name", "new/name")
    other = {**FILES, "model.safetensors": noise(70, 9)}
    hub.add("new/name", other)
    opened.pull("hf://new/name", name="n")
    assert (read(root, "old/name"), read(root, "new/name")) == (FILES["model.safetensors"], noise(70, 9))
    opened.pulls.delete("n", force=True)
    opened.begin(snapshot.spec, refresh=True).done.result(PATIENCE_SECONDS)
    assert read(root, "old/name") == read(root, "new/name") == noise(70, 9)
    opened.pulls.delete("m", force=True)
    assert list((root / "hub").glob("models--*")) == []


def test_a_mirror_of_an_entry_gives_no_repository_another_name(hub: Hub, root: Path, engine: Engines) -> None:
    """Else the operator of one prefix could put models where pods look for those of others."""
    hub.add("mine/name", FILES)
    hub.rename("mine/name", "theirs/name")
    entry = {"prefix": "hf://mine/", "endpoint": hub.url, "allow": True}
    engine(sources=[entry]).pull("hf://mine/name", name="m")
    assert [p.name for p in (root / "hub").glob("models--*")] == ["models--mine--name"]


# --- who may read ---


@pytest.fixture
def gated(hub: Hub) -> Hub:
    hub.add("org/gated", FILES, gated=True)
    return hub


def refused(source: HubSource, ref: str = "hf://org/gated") -> CachdError:
    """The error of a resolve, or else of the first file."""

    def first_file() -> None:
        file = source.resolve(Ref.parse(ref), CancelToken()).files[0]
        source.open(file, Extent(0, file.size), CancelToken()).close()

    with pytest.raises(CachdError) as refusal:
        first_file()
    return refusal.value


def test_a_gated_repository_without_a_token_says_so(gated: Hub) -> None:
    error = refused(source(gated))
    assert (error.code, "no token is set" in error.detail) == ("gated", True)
    assert "set a token" in error.hint


def test_a_gated_repository_of_a_mirror_without_a_list_says_so(gated: Hub) -> None:
    gated.lacks = {"blobs", "tree"}
    assert "no token is set" in refused(source(gated)).detail


def test_a_gated_repository_with_a_wrong_token_says_so(gated: Hub, tmp_path: Path) -> None:
    error = refused(source(gated, "hf_wrong", tmp_path))
    assert (error.code, "refused the token" in error.detail) == ("source_unauthorized", True)


def test_a_gated_repository_whose_terms_are_not_accepted_says_so(gated: Hub, tmp_path: Path) -> None:
    gated.revoke("org/gated")
    error = refused(source(gated, gated.token, tmp_path))
    assert (error.code, "no access yet" in error.detail) == ("gated", True)
    assert "accept its terms" in error.hint


def test_a_private_repository_without_a_token_says_so(hub: Hub) -> None:
    hub.add("org/private", FILES, private=True)
    error = refused(source(hub), "hf://org/private")
    assert (error.code, "no token is set" in error.detail) == ("source_unauthorized", True)


def test_a_mirror_that_redirects_to_a_hub_that_wants_a_token_says_so(gated: Hub, tmp_path: Path) -> None:
    with Hub() as mirror:
        mirror.add("org/gated", FILES)
        mirror.redirects_to = gated.url
        error = refused(source(mirror, mirror.token, tmp_path))
        assert isinstance(error, Forbidden)
        assert error.code == "source_redirected"
        assert gated.url.partition("//")[2] in error.detail
        assert "hf_endpoint" in error.hint
        assert gated.requests
        assert all("authorization" not in seen.headers for seen in gated.requests)


def test_another_source_does_not_close_the_session_in_which_a_thread_asks(
    hub: Hub, root: Path, engine: Callable[..., Engine]
) -> None:
    """The Hub endpoint has a source of its own for each token that it checks."""
    hub.add("org/one", {"config.json": b"{}"})
    engine(hf_endpoint=hub.url).pull("hf://org/one")
    session = get_session()
    other = root.with_name("other")
    other.mkdir(mode=0o755)
    engine(hf_endpoint=hub.url, root=other).pull("hf://org/one")
    assert get_session() is session
    assert not session.is_closed
