"""What the entries of `sources` say about a ref, its files and its requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cachd.errors import CachdError, Forbidden, Invalid
from cachd.model import Digest, File, Manifest
from cachd.sources.entries import Entry
from cachd.sources.table import Table

BAD, GOOD = Digest("sha256", "b" * 64), Digest("sha256", "a" * 64)
MODEL = "hf://org/m"
HUB = {"hf": ["https://hub.example/"]}


def table(*entries: dict[str, Any], **more: Any) -> Table:
    return Table([Entry.model_validate(each) for each in entries], **more)


def manifest(
    *paths: str, base: str = MODEL, digest: Digest | None = None, revision: str = "1" * 40
) -> Manifest:
    return Manifest(base, revision, tuple(File(path, 1, f"{base}/{path}", digest) for path in paths))


def code(call: Any, *arguments: object) -> str:
    """The code of the error that a call ends in; empty for none."""
    try:
        call(*arguments)
    except CachdError as error:
        return error.code
    return ""


# --- refs ---


@pytest.mark.parametrize(
    ("values", "is_refused"),
    [
        ({"allow": True}, False),
        ({"allow": False}, True),
        ({"refuse": True}, True),
        ({"refuse": False}, False),
        ({"refuse": ["*.bin"]}, False),
        ({"allow": ["*.bin"]}, False),
        ({"limit": 5}, False),
        ({}, False),
    ],
)
def test_an_entry_refuses_a_ref_if_it_says_so(values: dict[str, Any], is_refused: bool) -> None:
    for held in (table({"prefix": "hf://org/", **values}), table({"prefix": "hf://", **values})):
        assert code(held.check, MODEL) == ("source_refused" if is_refused else "")


def test_a_longer_prefix_that_refuses_nothing_lifts_a_refusal() -> None:
    every = {"prefix": "hf://", "refuse": True}
    for values in ({"refuse": False}, {"allow": True}):
        assert code(table(every, {"prefix": "hf://org/", **values}).check, MODEL) == ""
    for more in ({"limit": 5}, {"refuse": ["*.bin"]}):
        assert code(table(every, {"prefix": "hf://org/", **more}).check, MODEL) == "source_refused"


def test_a_list_of_organisations_allows_or_refuses_these_alone() -> None:
    allowed = table({"prefix": "hf://", "allow": ["org/", "*.json"]})
    assert [code(allowed.check, f"hf://{each}/m") for each in ("org", "other")] == ["", "source_refused"]
    refused = table({"prefix": "hf://", "refuse": ["org/"]}, {"prefix": "hf://org/", "allow": True})
    assert [code(refused.check, f"hf://{each}/m") for each in ("org", "other")] == ["source_refused", ""]


def test_the_url_of_a_hub_that_has_refused_models_is_refused_unless_it_is_allowed() -> None:
    url = "https://hub.example/org/m/resolve/main/x"
    refusing = {"prefix": "hf://org/", "refuse": True}
    assert code(table(refusing, endpoints=HUB).check, url) == "source_refused"
    own = table({**refusing, "endpoint": "https://own.example"})
    assert code(own.check, "https://own.example/x") == "source_refused"
    assert code(own.check, url) == ""
    of_s3 = table(refusing, endpoints={"s3": ["https://hub.example/"]})
    assert code(of_s3.check, url) == "", "it is no Hub"
    assert code(table({"prefix": "hf://org/", "limit": 1}, endpoints=HUB).check, url) == ""
    allowed = table(refusing, {"prefix": "https://hub.example/", "allow": True}, endpoints=HUB)
    assert code(allowed.check, url) == ""
    by_scheme = table(refusing, {"prefix": "https://", "allow": True}, endpoints=HUB)
    assert code(by_scheme.check, url) == "source_refused"
    assert code(table(refusing, endpoints={"hf": ["no url"]}).check, url) == ""


# --- files ---


@pytest.mark.parametrize(
    ("entries", "refuse", "refused"),
    [
        ([], [], ""),
        ([], ["*.bin"], "b.bin"),
        ([{"prefix": "hf://", "refuse": ["*.bin"]}], [], "b.bin"),
        ([{"prefix": "hf://", "allow": ["*.bin"]}], [], "a.json"),
        ([{"prefix": "hf://", "refuse": ["*.json"]}, {"prefix": MODEL, "refuse": ["*.bin"]}], [], "b.bin"),
        ([{"prefix": "hf://", "refuse": ["*.json"]}, {"prefix": MODEL, "refuse": False}], ["*.bin"], ""),
        ([{"prefix": "hf://", "refuse": ["*.json"]}, {"prefix": MODEL, "limit": 1}], ["*.bin"], "a.json"),
        ([{"prefix": "hf://", "allow": ["*.bin"]}, {"prefix": MODEL, "allow": True}], [], ""),
        ([{"prefix": "hf://org/mm", "refuse": ["*"]}, {"prefix": "hf://or/", "refuse": ["*"]}], [], ""),
        ([{"prefix": "hf://", "refuse": [f"sha256:{'b' * 64}"]}], [], ""),
    ],
)
def test_a_file_is_refused_by_the_patterns_of_the_longest_prefix(
    entries: list[dict[str, Any]], refuse: list[str], refused: str
) -> None:
    held = table(*entries, refuse=refuse)
    for path in ("a.json", "b.bin"):
        assert code(held.check_files, manifest(path)) == ("file_refused" if path == refused else "")


def test_where_an_entry_names_a_part_of_a_place_each_file_is_judged_by_its_own_origin() -> None:
    base = "s3://bucket/m"
    held = table(
        {"prefix": f"{base}/secret/", "refuse": True},
        {"prefix": f"{base}/text/", "allow": ["*.txt"]},
        {"prefix": f"{base}/any/", "refuse": False},
        refuse=["*.bin"],
    )
    paths = ("secret/x", "text/x", "text/x.txt", "any/x.bin", "x.bin", "x")
    found = {path: code(held.check_files, manifest(path, base=base)) for path in paths}
    assert [path for path, said in found.items() if said == "file_refused"] == ["secret/x", "text/x", "x.bin"]
    assert [path for path, said in found.items() if not said] == ["text/x.txt", "any/x.bin", "x"]


def test_a_digest_is_refused_wherever_the_file_comes_from() -> None:
    for held in (
        table(refuse=[str(BAD)]),
        table({"prefix": "s3://bkt/", "refuse": [str(BAD)]}),
    ):
        assert held.refused == {BAD}
        for check in (held.check_files, held.check_digests):
            assert code(check, manifest("x", digest=BAD)) == "refused_digest"
            assert code(check, manifest("x", revision="b" * 64)) == "refused_digest"
            assert code(check, manifest("x", digest=GOOD, revision="a" * 64)) == ""
        assert held.refused_in(manifest("x", "y", digest=BAD)) == ("x", BAD)
        assert held.refused_in(manifest("x", digest=BAD, revision="b" * 64)) == ("", BAD)
        assert held.refused_in(manifest("x", digest=GOOD)) is None
        assert code(held.check_digest, manifest("x").files[0], BAD) == "refused_digest"
        assert code(held.check_digest, manifest("x").files[0], GOOD) == ""
    assert table().refused_in(manifest("x", digest=BAD)) is None
    with pytest.raises(Invalid):
        table(refuse=["sha256:12"])


SAFE = {"prefix": "hf://", "formats": "safe"}


@pytest.mark.parametrize(
    ("entries", "asked", "is_safe"),
    [
        ([], False, False),
        ([], True, True),
        ([SAFE], False, True),
        ([SAFE, {"prefix": MODEL, "formats": "all"}], False, False),
        ([{"prefix": "s3://", "formats": "safe"}], False, False),
    ],
)
def test_only_data_is_pulled_where_the_request_or_an_entry_says_so(
    entries: list[dict[str, Any]], asked: bool, is_safe: bool
) -> None:
    held = table(*entries)
    both = manifest("model.safetensors", "pytorch_model.bin", "config.json")
    left = ["config.json", "model.safetensors"]
    kept = held.only_safe(both, asked=asked)
    assert sorted(file.path for file in kept.files) == (left if is_safe else [*left, "pytorch_model.bin"])
    for paths in (("pytorch_model.bin",), ("config.json", "x.pkl"), ("training_args.bin",)):
        if not is_safe:
            assert held.only_safe(manifest(*paths), asked=asked) == manifest(*paths)
            continue
        with pytest.raises(Forbidden) as refusal:
            held.only_safe(manifest(*paths), asked=asked)
        assert refusal.value.code == "unsafe_format"
        assert repr(paths[-1]) in refusal.value.detail
        who = "the request says" if asked else "the entry hf:// of sources says"
        assert who in refusal.value.hint


# --- requests ---


def test_anonymous_and_credentials_replace_each_other_and_an_endpoint_takes_none_over() -> None:
    signed = {"prefix": "s3://", "profile": "p", "instance_role": True, "region": "r"}
    below = "s3://bkt/x/"
    for own, held in (
        ({"anonymous": True}, {"region", "anonymous"}),
        ({"endpoint": "https://h"}, {"region", "endpoint"}),
        ({"credentials": "/x"}, {"region", "credentials", "profile", "instance_role"}),
        ({"region": "q"}, {"region", "profile", "instance_role"}),
    ):
        assert set(table(signed, {"prefix": "s3://bkt/", **own}).held(below)) == held
    for own, held in (
        ({"profile": "p"}, {"profile"}),
        ({"region": "q"}, {"region", "anonymous"}),
        ({"endpoint": "https://h"}, {"endpoint"}),
    ):
        assert (
            set(table({"prefix": "s3://", "anonymous": True}, {"prefix": "s3://bkt/", **own}).held(below))
            == held
        )


def test_what_is_held_names_its_entry() -> None:
    held = table({"prefix": "s3://", "region": "r"}, {"prefix": "s3://bkt/", "limit": 5}).held("s3://bkt/x")
    assert {name: (each.value, each.by.text, each.number) for name, each in held.items()} == {
        "region": ("r", "s3://", 0),
        "limit": (5, "s3://bkt/", 1),
    }
    assert table().held("s3://bkt/x") == {}


def test_the_longest_prefix_with_a_limit_limits_an_origin_and_none_is_no_limit() -> None:
    held = table(
        {"prefix": "s3://", "limit": 5},
        {"prefix": "s3://bkt/", "limit": 0},
        {"prefix": "s3://ckt/", "region": "r"},
        {"prefix": "s3://dkt/", "limit": 7},
    )
    assert held.limits() == {"s3://": 5, "s3://dkt/": 7}
    assert [held.limited_by(f"s3://{letter}kt/x") for letter in "bcd"] == ["s3://", "s3://", "s3://dkt/"]
    assert held.limited_by("hf://org/m") == ""


def test_a_request_carries_the_headers_and_the_query_of_its_longest_prefix(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("X-Key: one\n")
    (tmp_path / "longer").write_text("X-Key: two\n")
    (tmp_path / "query").write_text("?sig=1\n")
    held = table(
        {"prefix": "https://h/", "headers_file": str(tmp_path / "headers")},
        {"prefix": "https://h/a/", "headers_file": str(tmp_path / "longer")},
        {"prefix": "https://h/a/b/", "query_file": str(tmp_path / "query")},
    )
    found = {url: held.secrets(f"https://{url}") for url in ("h/x", "h/a/x", "h/a/b/x", "other/x")}
    assert [dict(each.headers) for each in found.values()] == [
        {"X-Key": "one"},
        {"X-Key": "two"},
        {"X-Key": "two"},
        {},
    ]
    assert [each.query for each in found.values()] == ["", "", "sig=1", ""]
    (tmp_path / "query").unlink()
    assert code(held.secrets, "https://h/a/b/x") == "bad_secret"


def test_an_entry_that_allows_a_place_opens_it_for_requests() -> None:
    policy = table(
        {"prefix": "http://nas/a/", "allow": True},
        {"prefix": "http://", "allow": ["other/"]},
        {"prefix": "http://nas/b/", "limit": 5},
    ).address_policy(["http://third/"])
    urls = ("nas/a/x", "other/x", "third/x", "nas/b/x")
    assert [code(policy.check_url, urlsplit(f"http://{url}")) for url in urls] == [
        "",
        "",
        "",
        "plaintext_refused",
    ]
