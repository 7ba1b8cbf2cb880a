"""The listing of a bucket, from pages of each form that servers send."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import escape

import pytest

from cachd.errors import CachdError
from cachd.sources.aws import Keys
from cachd.sources.bucket_listing import BucketListing
from cachd.sources.buckets import Buckets, Service
from cachd.sources.cancel import CancelToken
from cachd.sources.objects import Listed
from tests.fetching import http
from tests.ground.raw import Asked, RawServer, reply

Query = dict[str, str]


def page(*keys: str, folders: tuple[str, ...] = (), size: int | None = 5, **fields: Any) -> bytes:
    """A page with these keys, `CommonPrefixes` and other fields."""
    stated = "" if size is None else f"<Size>{size}</Size>"
    contents = [f"<Contents><Key>{escape(key)}</Key><ETag>e</ETag>{stated}</Contents>" for key in keys]
    named = [f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in folders]
    others = [f"<{name}>{value}</{name}>" for name, value in fields.items()]
    return f"<ListBucketResult><Name>b</Name>{''.join(others + contents + named)}</ListBucketResult>".encode()


def read(
    answer: Callable[[Query], bytes], prefix: str = "m/", *, max_files: int = 99
) -> tuple[dict[str, Listed], list[Query], int]:
    """What is listed, the queries of all requests, and what was counted as progress."""
    queries: list[Query] = []

    def serve(asked: Asked) -> bytes:
        query = {name: value[0] for name, value in parse_qs(urlsplit(asked.target).query).items()}
        queries.append(query)
        return reply(asked, body=answer(query))

    token = CancelToken()
    with RawServer(serve) as server:
        service = Service(server.url, "us-east-1", is_requester_pays=False)
        listing = BucketListing(Buckets(http(), service, Keys(are_none=True)), max_files)
        return listing.read("bucket", prefix, token), queries, token.answered


def refused(answer: Callable[[Query], bytes], prefix: str = "m/", **more: int) -> CachdError:
    with pytest.raises(CachdError) as refusal:
        read(answer, prefix, **more)
    return refusal.value


@pytest.mark.parametrize("prefix", ["m", "m/"])
def test_the_objects_below_a_prefix_are_listed_by_their_paths_there(prefix: str) -> None:
    found, queries, answered = read(lambda _: page("m/x", "m/a/y", "m/", "n/z", "m//"), prefix)
    assert found == {"x": Listed("m/x", "e", 5), "a/y": Listed("m/a/y", "e", 5)}
    assert [(query["prefix"], query["list-type"]) for query in queries] == [("m/", "2")]
    assert answered == 5 + 2, "each entry, the head of the answer and a block of it"


def test_a_bucket_is_listed_without_a_prefix() -> None:
    found, queries, _ = read(lambda _: page("x", "a/y"), "")
    assert sorted(found) == ["a/y", "x"]
    assert queries[0].get("prefix", "") == ""


def test_what_tools_leave_is_left_out_and_what_has_not_ended_is_not() -> None:
    keys = ("m/x", "m/.git/config", "m/.DS_Store", "m/y.part", "m/__MACOSX/z.part")
    found, _, _ = read(lambda _: page(*keys))
    assert sorted(found) == ["__MACOSX/z.part", "x", "y.part"]


def test_an_object_without_a_size_is_one() -> None:
    found, _, _ = read(lambda _: page("m/x", "m/a/", size=None))
    assert found == {"x": Listed("m/x", "e", None)}


def test_a_listing_is_read_page_by_page_by_its_tokens() -> None:
    pages: Mapping[str, bytes] = {
        "": page("m/a", "m/b", IsTruncated="true", NextContinuationToken="1"),
        "1": page("m/c", IsTruncated="true", NextContinuationToken="2"),
        "2": page(IsTruncated="true", NextContinuationToken="3"),
        "3": page("m/d", IsTruncated="false", NextContinuationToken="4"),
    }
    found, queries, _ = read(lambda query: pages[query.get("continuation-token", "")])
    assert sorted(found) == ["a", "b", "c", "d"]
    assert [query.get("continuation-token") for query in queries] == [None, "1", "2", "3"]


@pytest.mark.parametrize("token", [None, "same"])
def test_where_no_new_token_comes_each_page_follows_the_last_key_of_the_one_before(token: str | None) -> None:
    keys = ["m/a", "m/b", "m/c", "m/d"]

    def answer(query: Query) -> bytes:
        after = query.get("marker", "")
        here = [key for key in keys if key > after][:2]
        more: dict[str, Any] = {"NextContinuationToken": token} if token else {}
        return page(*here, IsTruncated=str(keys[-1] not in here).lower(), **more)

    found, queries, _ = read(answer)
    assert sorted(found) == ["a", "b", "c", "d"]
    assert [query.get("marker") for query in queries] == [*[None] * (2 if token else 1), "m/b"]
    assert "list-type" not in queries[-1]
    assert "continuation-token" not in queries[-1]


def test_a_marker_that_the_server_names_is_taken() -> None:
    def answer(query: Query) -> bytes:
        if query.get("marker") == "m/a":
            return page("m/b", IsTruncated="true", NextMarker="m/bb")
        return page("m/c") if "marker" in query else page("m/a", IsTruncated="true")

    found, queries, _ = read(answer)
    assert sorted(found) == ["a", "b", "c"]
    assert [query.get("marker") for query in queries] == [None, "m/a", "m/bb"]


@pytest.mark.parametrize(
    ("fields", "pages"),
    [
        ({"MaxKeys": "2"}, 2),
        ({"MaxKeys": "3"}, 1),
        ({"MaxKeys": "3", "NextContinuationToken": "same"}, 2),
        ({"MaxKeys": "2", "IsTruncated": "false"}, 1),
        ({}, 1),
    ],
)
def test_a_page_that_does_not_say_whether_more_follows_is_full_or_names_what_follows(
    fields: dict[str, Any], pages: int
) -> None:
    _, queries, _ = read(
        lambda query: (
            page("m/c") if query.keys() & {"marker", "continuation-token"} else page("m/a", "m/b", **fields)
        )
    )
    assert len(queries) == pages


def test_a_page_of_a_thousand_keys_may_not_be_the_last() -> None:
    keys = [f"m/{number:04}" for number in range(1000)]
    _, queries, _ = read(lambda query: page("m/z") if "marker" in query else page(*keys), max_files=2000)
    assert len(queries) == 2
    _, queries, _ = read(lambda query: page(*keys[:999]), max_files=2000)
    assert len(queries) == 1


def test_a_server_that_repeats_its_entries_and_says_that_more_follow_is_refused() -> None:
    error = refused(lambda _: page("m/a", IsTruncated="true"))
    assert (error.code, "repeats its entries" in error.detail) == ("origin_protocol", True)
    assert refused(lambda _: page(IsTruncated="true")).code == "origin_protocol"


def test_folders_that_are_listed_in_place_of_their_objects_are_listed_one_by_one() -> None:
    tree = {
        "m/": page("m/x", folders=("m/a/", "m/b/", "n/", "m/")),
        "m/a/": page("m/a/y", folders=("m/a/c/",)),
        "m/b/": page(),
        "m/a/c/": page("m/a/c/z", folders=("m/a/c/",)),
    }
    found, queries, answered = read(lambda query: tree[query["prefix"]])
    assert sorted(found) == ["a/c/z", "a/y", "x"]
    assert [query["prefix"] for query in queries] == ["m/", "m/a/", "m/b/", "m/a/c/"]
    assert answered == 3 + 6 + 2 * 4


def test_a_folder_whose_objects_are_listed_is_not_listed_again() -> None:
    _, queries, _ = read(lambda _: page("m/a/b/x", folders=("m/a/", "m/a/b/")))
    assert len(queries) == 1


def test_so_many_folders_are_listed_one_by_one_and_no_more() -> None:
    def answer(query: Query) -> bytes:
        depth = query["prefix"].count("/")
        return page(folders=(query["prefix"] + "a/" * (1 if depth < 9 else 0),)) if depth else b""

    folders = tuple(f"m/{number:04}/" for number in range(1001))
    assert "1000 folders" in refused(lambda _: page(folders=folders)).detail
    assert len(read(answer)[1]) == 9
    long = f"m/{'x' * 1021}/"
    assert len(long) == 1024
    assert read(lambda query: page(folders=(long,) if query["prefix"] == "m/" else ()))[0] == {}
    assert refused(lambda _: page(folders=(f"m/{'x' * 1022}/",))).code


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        (("m/x", "m/x"), "bad_manifest"),
        (("m/x/y", "m/x"), "bad_manifest"),
        (("m/../x",), "unsafe_path"),
    ],
)
def test_keys_that_are_no_files_of_one_model_are_refused(keys: tuple[str, ...], code: str) -> None:
    assert refused(lambda _: page(*keys)).code == code


def test_as_many_files_as_allowed_are_listed_and_one_more_is_refused() -> None:
    assert len(read(lambda _: page("m/a", "m/b"), max_files=2)[0]) == 2
    assert refused(lambda _: page("m/a", "m/b"), max_files=1).code == "too_many_files"


@pytest.mark.parametrize("document", [b"<html/>", b"<ListBucketResult/>"])
def test_a_document_that_is_no_listing_is_refused(document: bytes) -> None:
    assert refused(lambda _: document).code == "origin_protocol"
