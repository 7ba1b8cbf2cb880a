"""The files of a commit, from what the Hub or a mirror says about them: siblings, tree, headers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from huggingface_hub.hf_api import BlobLfsInfo, RepoSibling

from cachd.errors import CachdError
from cachd.model import File, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.hub_listing import HubListing
from cachd.sources.secrets import Secrets
from tests.fetching import http
from tests.ground.raw import Asked, RawServer, reply

COMMIT, GIT, SHA = "c" * 40, "d" * 40, "e" * 64
TREE = f"/api/models/org/m/tree/{COMMIT}"
MIB = 1 << 20
Pages = Mapping[str, Any]


def sibling(path: str, size: int | None = 5, git: str | None = GIT, sha256: str | None = None) -> RepoSibling:
    lfs = BlobLfsInfo(size=size or 0, sha256=sha256, pointer_size=1) if sha256 else None
    return RepoSibling(rfilename=path, size=size, blob_id=git, lfs=lfs)


def entry(path: str, size: Any = 5, oid: str = GIT, **more: Any) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": size, "oid": oid, **more}


def folder(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path}


def page(asked: Asked, document: object, following: str = "") -> bytes:
    link = [f'Link: <{following}>; rel="next"'] if following else []
    return reply(asked, "200 OK", *link, body=json.dumps(document).encode())


def mirror(pages: Pages, others: Callable[[Asked], bytes]) -> Callable[[Asked], bytes]:
    """A mirror that has these pages, by path, each of them its entries or these with the next page's URL."""

    def answer(asked: Asked) -> bytes:
        found = pages.get(asked.target)
        if found is None:
            return others(asked)
        return page(asked, *found) if isinstance(found, tuple) else page(asked, found)

    return answer


def absent(asked: Asked) -> bytes:
    return reply(asked, "404 Not Found")


def listed(
    siblings: Sequence[RepoSibling],
    pages: Pages | None = None,
    *,
    others: Callable[[Asked], bytes] = absent,
    asked: list[Asked] | None = None,
) -> dict[str, File]:
    """The files that are found, by path. `asked` gets the requests."""
    with RawServer(mirror(pages or {}, others)) as server:
        try:
            return {file.path: file for file in listing(server.url).files(siblings)}
        finally:
            if asked is not None:
                asked += server.asked


def listing(url: str) -> HubListing:
    secrets = Secrets({"Authorization": "Bearer hf_x"})
    return HubListing(http(), url, secrets, Ref.parse("hf://org/m"), COMMIT, CancelToken())


def digests(found: Mapping[str, File]) -> dict[str, tuple[int, str]]:
    return {path: (file.size, str(file.digest)) for path, file in found.items()}


def refused(*arguments: Any, **more: Any) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        listed(*arguments, **more)
    return refusal.value


# --- siblings ---


def test_siblings_with_size_and_digest_need_no_request() -> None:
    asked: list[Asked] = []
    siblings = [
        sibling("config.json"),
        sibling("a/model.safetensors", 7, sha256=SHA),
        sibling("large.txt", 10 * MIB),
        sibling("empty.txt", 0),
        sibling("folder/", None, None),
    ]
    found = listed(siblings, asked=asked)
    assert digests(found) == {
        "config.json": (5, f"git-sha1:{GIT}"),
        "a/model.safetensors": (7, f"sha256:{SHA}"),
        "large.txt": (10 * MIB, f"git-sha1:{GIT}"),
        "empty.txt": (0, f"git-sha1:{GIT}"),
    }
    file = found["a/model.safetensors"]
    assert (file.origin, file.base) == (f"hf://org/m@{COMMIT}/a/model.safetensors", "hf://org/m")
    assert asked == []


@pytest.mark.parametrize(
    "unclear",
    [
        sibling("x.txt", None),
        sibling("x.txt", git=None),
        sibling("x.txt", 10 * MIB + 1),
        sibling("x.gguf"),
        sibling("x.txt", sha256="e" * 63),
    ],
    ids=["no size", "no id", "so large that it may be in LFS", "of LFS by its suffix", "a strange digest"],
)
def test_a_file_that_is_not_clear_is_looked_up_in_the_tree_and_no_other_file_is_added(
    unclear: RepoSibling,
) -> None:
    tree = [entry(unclear.rfilename, 9, lfs={"oid": SHA}), entry("other", 1)]
    asked: list[Asked] = []
    found = listed([unclear, sibling("y")], {f"{TREE}?recursive=true": tree}, asked=asked)
    assert digests(found) == {unclear.rfilename: (9, f"sha256:{SHA}"), "y": (5, f"git-sha1:{GIT}")}
    assert [each.headers["authorization"] for each in asked] == ["Bearer hf_x"]


@pytest.mark.parametrize("count", [1000, 1001])
def test_more_than_a_thousand_siblings_may_not_be_all(count: int) -> None:
    siblings = [sibling(f"f{number}") for number in range(count)]
    found = listed(siblings, {f"{TREE}?recursive=true": [entry("more")]})
    assert len(found) == (1000 if count == 1000 else 1002)
    assert ("more" in found) is (count > 1000)


@pytest.mark.parametrize("path", [".gitattributes", ".gitignore"])
def test_a_repository_without_a_file_but_those_of_git_is_refused(path: str) -> None:
    error = refused([sibling(path)])
    assert (error.code, path in error.detail) == ("no_files", True)
    error = refused([])
    assert (error.code, "none" in error.detail) == ("no_files", True)
    assert set(listed([sibling(path), sibling("x")])) == {path, "x"}
    assert set(listed([], {f"{TREE}?recursive=true": [entry("x")]})) == {"x"}


# --- tree ---


@pytest.mark.parametrize(
    ("fields", "digest"),
    [
        ({"lfs": {"oid": SHA}}, f"sha256:{SHA}"),
        ({"lfs": {"sha256": SHA.upper()}}, f"sha256:{SHA}"),
        ({"lfs": {"oid": f"sha256:{SHA}"}}, f"sha256:{SHA}"),
        ({"lfs": None}, f"git-sha1:{GIT}"),
        ({}, f"git-sha1:{GIT}"),
    ],
)
def test_a_tree_states_a_digest_in_one_of_several_forms(fields: dict[str, Any], digest: str) -> None:
    tree = [entry("x", **fields), {"path": "y", "size": 1, "oid": GIT}]
    found = listed([], {f"{TREE}?recursive=true": tree})
    assert digests(found) == {"x": (5, digest), "y": (1, f"git-sha1:{GIT}")}


def test_a_tree_is_read_page_by_page() -> None:
    first, second = f"{TREE}?recursive=true", f"{TREE}?recursive=true&cursor=2"
    pages = {first: ([entry("x")], second), second: [entry("y"), entry("x", 9)]}
    asked: list[Asked] = []
    assert {path: file.size for path, file in listed([], pages, asked=asked).items()} == {"x": 5, "y": 5}
    assert [(each.target, each.headers["authorization"]) for each in asked] == [
        (first, "Bearer hf_x"),
        (second, "Bearer hf_x"),
    ]


def test_directories_of_which_nothing_is_listed_are_asked_for() -> None:
    pages = {
        f"{TREE}?recursive=true": [entry("a/b/x"), folder("a"), folder("a/b"), folder("c d"), folder("e")],
        f"{TREE}/c%20d?recursive=true": [entry("c d/y"), folder("c d/f")],
        f"{TREE}/e?recursive=true": [],
        f"{TREE}/c%20d/f?recursive=true": [entry("c d/f/z"), folder("c d/f")],
    }
    asked: list[Asked] = []
    assert set(listed([], pages, asked=asked)) == {"a/b/x", "c d/y", "c d/f/z"}
    assert sorted(each.target for each in asked) == sorted(pages)


FIRST = f"{TREE}?recursive=true"


@pytest.mark.parametrize(
    ("pages", "detail"),
    [
        ({FIRST: ([entry("x")], FIRST)}, "goes on with a page that was there before"),
        ({FIRST: ([entry("x")], f"{TREE}?cursor=2")}, "is listed, and a page of it is not there"),
        ({FIRST: [folder("a")]}, "is listed, and a page of it is not there"),
        ({FIRST: ([entry("x")], "http://127.0.0.1:1/")}, "continues at another origin, 127.0.0.1:1"),
        ({FIRST: {"a": "b"}}, "is not a tree"),
        ({FIRST: ["x"]}, "is not a tree"),
    ],
)
def test_a_tree_that_contradicts_itself_is_refused(pages: Pages, detail: str) -> None:
    error = refused([], pages)
    assert error.code == "origin_protocol"
    assert detail in error.detail
    assert "not a tree" in detail or error.hint == "hf_endpoint is not a faithful mirror"


def test_a_tree_that_is_nested_too_deeply_is_refused() -> None:
    error = refused([], others=lambda asked: reply(asked, body=b"[" * 100 + b"]" * 100))
    assert error.code not in ("origin_protocol", "no_files")


@pytest.mark.parametrize("status", ["500 X", "401 X", "429 X"])
def test_a_tree_that_cannot_be_read_is_no_tree_that_is_not_there(status: str) -> None:
    assert refused([], others=lambda asked: reply(asked, status)).origin_status == int(status[:3])


def test_a_tree_of_more_than_a_thousand_pages_is_refused() -> None:
    def endless(asked: Asked) -> bytes:
        number = int(asked.target.partition("cursor=")[2] or 0)
        return page(asked, [], f"{TREE}?recursive=true&cursor={number + 1}")

    asked: list[Asked] = []
    assert refused([], others=endless, asked=asked).code == "too_many_files"
    assert len(asked) == 1000


# --- headers ---


def lacking(path: str = "x") -> list[RepoSibling]:
    return [sibling(path, None, None)]


def told(*lines: str, status: str = "200 OK", length: int | None = 7) -> Callable[[Asked], bytes]:
    """A mirror without a tree that answers every request for a file so."""

    def answer(asked: Asked) -> bytes:
        if asked.target.startswith("/api/"):
            return absent(asked)
        return reply(asked, status, *lines, body=b"content", length=length)

    return answer


@pytest.mark.parametrize(
    ("lines", "digest"),
    [
        ((f'X-Linked-ETag: "{SHA}"', "X-Linked-Size: 9"), (9, f"sha256:{SHA}")),
        ((f'X-Linked-ETag: W/"{SHA}"', "X-Linked-Size: 9"), (9, f"sha256:{SHA}")),
        ((f'X-Linked-ETag: "{GIT}"',), (7, f"git-sha1:{GIT}")),
        ((f'ETag: "{GIT}"', "X-Repo-Commit: x"), (7, f"git-sha1:{GIT}")),
        ((f'ETag: "{GIT}"',), (7, "None")),
        (("X-Repo-Commit: x",), (7, "None")),
        ((), (7, "None")),
    ],
)
def test_the_headers_of_a_file_say_its_size_and_its_digest(lines: tuple[str, ...], digest: Any) -> None:
    asked: list[Asked] = []
    assert digests(listed(lacking("a b"), others=told(*lines), asked=asked)) == {"a b": digest}
    assert [(each.method, each.target) for each in asked] == [
        ("GET", FIRST),
        ("HEAD", f"/org/m/resolve/{COMMIT}/a%20b"),
    ]
    assert asked[1].headers["authorization"] == "Bearer hf_x"


@pytest.mark.parametrize("status", ["405 X", "501 X"])
def test_a_mirror_that_knows_no_head_is_asked_for_the_first_byte(status: str) -> None:
    def answer(asked: Asked) -> bytes:
        if asked.method == "HEAD":
            return reply(asked, status)
        stated = "Content-Range: bytes 0-0/7"
        return absent(asked) if asked.target.startswith("/api/") else reply(asked, "206 X", stated, body=b"x")

    assert digests(listed(lacking(), others=answer)) == {"x": (7, "None")}


def test_a_head_without_a_size_is_followed_by_a_get() -> None:
    def answer(asked: Asked) -> bytes:
        if asked.target.startswith("/api/"):
            return absent(asked)
        return reply(asked, body=b"content", length=None if asked.method == "HEAD" else -1)

    assert digests(listed(lacking(), others=answer)) == {"x": (7, "None")}


def test_a_file_that_is_refused_is_an_error_of_its_status() -> None:
    assert refused(lacking(), others=told(status="403 X")).code == "source_forbidden"
    assert refused(lacking(), others=told(status="404 X")).code == "file_not_found"


def test_a_size_that_nothing_states_is_the_one_that_was_listed_or_an_error() -> None:
    closing = told("Connection: close", length=None)
    siblings = [sibling("x.gguf", 8, None)]
    assert digests(listed(siblings, others=closing)) == {"x.gguf": (8, "None")}
    error = refused(lacking(), others=closing)
    assert (error.code, "without its size" in error.detail) == ("origin_protocol", True)


def test_a_redirect_within_its_origin_is_followed_five_times_at_most() -> None:
    def answer(hops: int, asked: Asked) -> bytes:
        if asked.target.startswith("/api/"):
            return absent(asked)
        number = int(asked.target.rpartition("/hop")[2]) if "/hop" in asked.target else 0
        if number < hops:
            return reply(asked, "302 Found", f"Location: /hop{number + 1}")
        return reply(asked, "200 OK", f'X-Linked-ETag: "{SHA}"', body=b"content")

    for hops, digest in ((1, f"sha256:{SHA}"), (4, f"sha256:{SHA}"), (5, "None")):
        found = listed(lacking(), others=lambda asked, hops=hops: answer(hops, asked))
        assert digests(found) == {"x": (7, digest)}


@pytest.mark.parametrize("is_head_stated", [True, False])
def test_a_file_that_is_stored_at_another_origin_has_the_size_that_this_one_states(
    is_head_stated: bool,
) -> None:
    def store(asked: Asked) -> bytes:
        if asked.method == "HEAD" and not is_head_stated:
            return reply(asked, length=None)
        return reply(asked, body=b"content")

    with RawServer(store) as other:
        lines = (f"Location: {other.url}/x", f'X-Linked-ETag: "{SHA}"')
        found = listed(lacking(), others=told(*lines, status="302 Found", length=0))
        assert digests(found) == {"x": (7, f"sha256:{SHA}")}
        assert all("authorization" not in asked.headers for asked in other.asked)
        assert [asked.method for asked in other.asked] == (["HEAD"] if is_head_stated else ["HEAD", "GET"])
        before = len(other.asked)
        found = listed(lacking(), others=told(*lines, "X-Linked-Size: 9", status="302 Found", length=0))
        assert digests(found) == {"x": (9, f"sha256:{SHA}")}
        assert len(other.asked) == before, "the first answer says it all"


# --- commits ---


def commits(answer: Callable[[Asked], bytes], beginning: str) -> tuple[list[str], int]:
    """The commits that are found, and the number of requests."""
    with RawServer(answer) as server:
        return listing(server.url).commits(beginning), len(server.asked)


def test_the_commits_of_main_that_begin_so_are_found_on_all_pages() -> None:
    first = "/api/models/org/m/commits/main"
    ids = ["abc" + "0" * 37, "abd" + "0" * 37, "abc", "abc" + "1" * 37]
    pages = {
        first: ([{"id": each} for each in ids[:2]], f"{first}?p=1"),
        f"{first}?p=1": [{"id": each} for each in ids[2:]] + [{"title": "no id"}],
    }
    assert commits(mirror(pages, absent), "abc") == ([ids[0], ids[3]], 2)
    assert commits(mirror(pages, absent), "f") == ([], 2)


def test_commits_are_looked_for_on_twenty_pages_at_most() -> None:
    def endless(asked: Asked) -> bytes:
        return page(asked, [{"id": "a" * 40}], f"/api/models/org/m/commits/main?p={asked.request}")

    assert commits(endless, "a") == (["a" * 40] * 20, 20)
