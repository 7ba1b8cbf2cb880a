"""What each answer of ModelScope means, and what it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cachd.errors import CachdError, Forbidden, Invalid, NotFound, Unavailable
from cachd.model import Digest, Extent, File, Manifest, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.modelscope import ModelScopeSource
from cachd.sources.secrets import Secret
from tests.fetching import HEX, http, read, refused
from tests.ground.raw import RawServer, reply

COMMIT = "c" * 40


def entry(**fields: Any) -> dict[str, Any]:
    return {"Type": "blob", "Path": "x", "Size": 2, "Sha256": HEX, "Revision": COMMIT, **fields}


def listing(*entries: object, code: int = 200) -> bytes:
    return json.dumps({"Code": code, "Data": {"Files": entries}}).encode()


def resolved(
    answer: bytes, status: str = "200 OK", ref: str = "ms://org/m", token: Path | None = None
) -> Manifest:
    with RawServer(lambda asked: reply(asked, status, body=answer)) as server:
        source = ModelScopeSource(http(), endpoint=f"{server.url}/", token=Secret(token))
        return source.resolve(Ref.parse(ref), CancelToken())


@pytest.mark.parametrize(
    ("fields", "origin", "digest"),
    [
        ({}, f"ms://org/m@{COMMIT}/x", HEX),
        ({"Sha256": HEX.upper()}, f"ms://org/m@{COMMIT}/x", HEX),
        ({"Sha256": None}, f"ms://org/m@{COMMIT}/x", None),
        ({"Sha256": "e" * 63}, f"ms://org/m@{COMMIT}/x", None),
        ({"Revision": "short"}, "ms://org/m@feature%2Fnew/x", HEX),
        ({"Revision": None}, "ms://org/m@feature%2Fnew/x", HEX),
    ],
)
def test_a_file_is_pinned_at_the_commit_that_changed_it(
    fields: dict[str, Any], origin: str, digest: str | None
) -> None:
    answer = listing(entry(**fields), {"Type": "tree", "Path": "sub"})
    (file,) = resolved(answer, ref="ms://org/m@feature%2Fnew").files
    assert (file.path, file.size, file.origin) == ("x", 2, origin)
    assert file.digest == (Digest("sha256", digest) if digest else None)


def test_the_revision_is_that_of_the_files_in_any_order() -> None:
    one, two = entry(), entry(Path="y")
    revision = resolved(listing(one, two)).revision
    assert resolved(listing(two, one)).revision == revision
    assert resolved(listing(one, entry(Path="z"))).revision != revision


@pytest.mark.parametrize(
    ("status", "answer", "kind", "code", "detail"),
    [
        (404, b"", NotFound, "repo_not_found", "has no revision 'master'"),
        (401, b"", Forbidden, "source_unauthorized", "no token is set"),
        (403, b"", Forbidden, "source_forbidden", "no token is set"),
        (500, b"", Unavailable, "origin_failed", "500"),
        (429, b"", Unavailable, "rate_limited", "429"),
        (200, b"<html>", Unavailable, "origin_protocol", "is not a list of files: "),
        (200, b"[]", Unavailable, "origin_protocol", "AttributeError"),
        (200, b'{"Code": 200}', Unavailable, "origin_protocol", "KeyError"),
        (200, listing("x"), Unavailable, "origin_protocol", "TypeError"),
        (200, b'{"Code": 7, "Message": "model does not exist"}', NotFound, "repo_not_found", "is private"),
        (200, b'{"Code": 7, "Message": "too busy"}', Unavailable, "origin_failed", "answered 7"),
        (200, b'{"Code": 7}', Unavailable, "origin_failed", "answered 7"),
        (200, listing(), NotFound, "revision_not_found", "has no files"),
        (200, listing({"Type": "tree", "Path": "a"}), NotFound, "revision_not_found", "has no files"),
        (200, listing(entry(Size="2")), Unavailable, "origin_protocol", "without its path or size"),
        (200, listing(entry(Size=True)), Unavailable, "origin_protocol", "without its path or size"),
        (200, listing(entry(Path=None)), Unavailable, "origin_protocol", "without its path or size"),
    ],
)
def test_an_answer_that_lists_no_files_is_an_error_that_says_why(
    status: int, answer: bytes, kind: type[CachdError], code: str, detail: str
) -> None:
    error = refused(lambda: resolved(answer, f"{status} X"), code)
    assert type(error) is kind
    assert detail in error.detail
    assert error.hint or code in ("origin_failed", "rate_limited", "origin_protocol")


def test_a_token_is_sent_and_is_named_when_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hunter2")
    error = refused(lambda: resolved(b"", "401 X", token=tmp_path / "token"), "source_unauthorized")
    assert "the token was not accepted" in error.detail
    with RawServer(lambda asked: reply(asked, body=listing(entry()))) as server:
        for token, cookie in ((tmp_path / "token", "m_session_id=hunter2"), (None, None)):
            ModelScopeSource(http(), endpoint=server.url, token=Secret(token)).resolve(
                Ref.parse("ms://org/m"), CancelToken()
            )
            assert server.asked[-1].headers.get("cookie") == cookie
    assert urlsplit(server.asked[0].target).path == "/api/v1/models/org/m/repo/files"
    assert parse_qs(urlsplit(server.asked[0].target).query) == {"Revision": ["master"], "Recursive": ["true"]}


@pytest.mark.parametrize("location", ["m", "org/m/x"])
def test_a_model_of_modelscope_has_an_organisation_and_a_name(location: str) -> None:
    ref = Ref("ms", location)
    source = ModelScopeSource(http(), endpoint="http://127.0.0.1:9", token=Secret(None))
    error = refused(lambda: source.resolve(ref, CancelToken()), "bad_ref")
    assert isinstance(error, Invalid)


def test_a_file_is_asked_for_at_its_commit() -> None:
    with RawServer(lambda asked: reply(asked, body=b"ok")) as server:
        source = ModelScopeSource(http(), endpoint=server.url, token=Secret(None))
        file = File("a b/x", 2, "ms://org/m@feature%2Fnew/a b/x", None)
        assert read(source.open(file, Extent(0, 2), CancelToken()), 2) == b"ok"
    asked = urlsplit(server.asked[0].target)
    assert asked.path == "/api/v1/models/org/m/repo"
    assert parse_qs(asked.query) == {"Revision": ["feature/new"], "FilePath": ["a b/x"]}
