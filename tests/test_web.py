"""The source of web servers: single files, and directories with SHA256SUMS."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import replace

import pytest

from cachd.errors import CachdError, Changed
from cachd.model import Digest, Extent, Ref
from cachd.sources.cancel import CancelToken
from cachd.sources.probe import COUNTED_BYTES
from cachd.sources.web import WebSource
from tests.fetching import EITHER, HEX, SOON_SECONDS, http, read, refused, resolve
from tests.ground.checksums import sha256sums
from tests.ground.models import noise
from tests.ground.origin import (
    ChangeETag,
    Chunked,
    Late,
    Origin,
    Status,
)


def web() -> WebSource:
    return WebSource(http())


def listed(origin: Origin, **files: bytes) -> str:
    """A directory with SHA256SUMS; its URL."""
    for name, content in files.items():
        origin.add(f"/model/{name}", content)
    origin.add("/model/SHA256SUMS", sha256sums(files))
    return f"{origin.url}/model/"


def test_a_directory_is_what_its_sums_list(origin: Origin) -> None:
    manifest = resolve(web(), listed(origin, **{"a.bin": b"a", "sub/b c.bin": b"bc"}))
    assert {f.path: (f.size, str(f.digest)) for f in manifest.files} == {
        "a.bin": (1, f"sha256:{hashlib.sha256(b'a').hexdigest()}"),
        "sub/b c.bin": (2, f"sha256:{hashlib.sha256(b'bc').hexdigest()}"),
    }
    assert all(read(web().open(f, Extent(0, f.size), CancelToken()), f.size) for f in manifest.files)


def test_the_revision_of_a_directory_is_its_sums(origin: Origin) -> None:
    first = resolve(web(), listed(origin, a=b"a"))
    assert resolve(web(), listed(origin, a=b"a")) == replace(first)
    assert resolve(web(), listed(origin, a=b"A")).revision != first.revision


def test_a_directory_without_sums_is_refused_with_the_way_to_make_them(origin: Origin) -> None:
    origin.add("/model/a.bin", b"a")
    error = refused(lambda: resolve(web(), f"{origin.url}/model/"), "no_checksums")
    assert "sha256sum" in error.hint


def test_a_file_that_only_the_sums_know_is_not_found(origin: Origin) -> None:
    url = listed(origin, a=b"a", b=b"b")
    origin.remove("/model/b")
    refused(lambda: resolve(web(), url), "file_not_found")


@pytest.mark.parametrize("number", [1, 8, 9, 50])
def test_every_file_of_a_directory_is_asked_about_once(origin: Origin, number: int) -> None:
    files = {f"{n:02}.bin": noise(n + 1) for n in range(number)}
    manifest = resolve(web(), listed(origin, **files))
    assert {f.path: f.size for f in manifest.files} == {name: len(files[name]) for name in files}
    asked = [seen.path for seen in origin.requests if seen.method == "HEAD"]
    assert sorted(asked) == [f"/model/{name}" for name in files]


def test_a_directory_is_not_asked_about_any_further_when_one_of_its_files_is_refused(origin: Origin) -> None:
    url = listed(origin, **{f"{n:03}.bin": b"x" for n in range(400)})
    origin.remove("/model/000.bin")
    refused(lambda: resolve(web(), url), "file_not_found")
    assert len([seen for seen in origin.requests if seen.method == "HEAD"]) < 200


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "..\\x", "C:\\x", "a//b", "x\u202ey"], ids=ascii)
def test_a_listed_path_that_leaves_the_model_is_refused_before_it_is_asked_for(
    origin: Origin, path: str
) -> None:
    url = listed(origin, good=b"good")
    origin.add("/model/SHA256SUMS", f"{HEX}  {path}\n{HEX}  good\n".encode())
    refused(lambda: resolve(web(), url), "unsafe_path")
    assert not {seen.path for seen in origin.requests} - {"/model/SHA256SUMS", "/model/good"}


def test_one_file_has_the_digest_of_its_ref_or_of_its_origin_or_none(origin: Origin) -> None:
    true = hashlib.sha256(b"x").digest()
    told = {"Repr-Digest": f"sha-512=:AAAA:, sha-256=:{base64.b64encode(true).decode()}:"}
    url = origin.add("/x", b"x", headers=told)
    assert resolve(web(), url).files[0].digest == Digest("sha256", true.hex())
    of_ref = Digest("sha256", "0" * 64)
    assert resolve(web(), f"{url}#sha256={of_ref.hex}").files[0].digest == of_ref
    for wrong in ("sha-256=:AAAA:", "sha-256=:A:", "sha-256=AAAA", "md5=:AAAA:"):
        origin.add("/x", b"x", headers={"Repr-Digest": wrong})
        assert resolve(web(), url).files[0].digest is None


def test_the_revision_of_one_file_moves_with_its_validator(origin: Origin) -> None:
    url = origin.add("/x", b"x", etag="1")
    first = resolve(web(), url)
    assert resolve(web(), url).revision == first.revision
    origin.add("/x", b"x", etag="2")
    assert resolve(web(), url).revision != first.revision


def test_a_file_without_a_validator_is_itself_only_once(origin: Origin) -> None:
    url = origin.add("/x", b"x", etag=None, last_modified=False)
    first, second = resolve(web(), url), resolve(web(), url)
    assert first.files[0].blob != second.files[0].blob
    assert read(web().open(first.files[0], Extent(0, 1), CancelToken()), 1) == b"x"
    assert not {"if-match", "if-unmodified-since"} & origin.requests[-1].headers.keys()


def test_the_bytes_of_a_file_that_does_not_say_its_length_are_counted_up_to_a_bound(origin: Origin) -> None:
    url, long = origin.add("/x", noise(100_000)), origin.add("/long", noise(COUNTED_BYTES + 1))
    for path in ("/x", "/long"):
        origin.fault(path, Chunked(), methods=EITHER)
    source = web()
    file = resolve(source, url).files[0]
    assert read(source.open(file, Extent(0, file.size), CancelToken()), file.size) == noise(100_000)
    refused(lambda: resolve(source, long), "size_unknown")


def test_a_percent_encoded_path_is_decoded_once(origin: Origin) -> None:
    origin.add("/a%20b c", b"x")
    manifest = resolve(web(), f"{origin.url}/a%2520b%20c")
    assert manifest.files[0].path == "a%20b c"
    assert read(web().open(manifest.files[0], Extent(0, 1), CancelToken()), 1) == b"x"


def test_head_is_asked_no_more_where_it_was_wrong(origin: Origin) -> None:
    files = {f"{number:02}": noise(number + 1) for number in range(20)}
    ref, source = listed(origin, **files), web()
    origin.fault("*", Status(403), methods=("HEAD",))
    manifest = resolve(source, ref)
    assert {file.path: file.size for file in manifest.files} == {name: len(files[name]) for name in files}
    assert len([seen for seen in origin.requests if seen.method == "HEAD"]) <= 8, "one for each thread"
    origin.forget()
    assert resolve(source, ref) == manifest
    assert {seen.method for seen in origin.requests} == {"GET"}
    assert origin.bytes_sent() <= 20 * 2 + origin.bytes_sent("/model/SHA256SUMS"), "one byte of each file"


def test_a_head_that_is_never_answered_is_waited_for_once(origin: Origin) -> None:
    source = WebSource(http(stall_seconds=SOON_SECONDS))
    url = origin.add("/x", noise(1000))
    origin.fault("/x", Late(), methods=("HEAD",))
    for _ in range(2):
        assert resolve(source, url).files[0].size == 1000
    assert [seen.method for seen in origin.requests] == ["HEAD", "GET", "GET"]


def test_a_file_that_head_describes_rightly_costs_no_other_request(origin: Origin) -> None:
    source = web()
    file = resolve(source, origin.add("/x", noise(1000))).files[0]
    read(source.open(file, Extent(0, 1000), CancelToken()), 1000)
    assert [seen.method for seen in origin.requests] == ["HEAD", "GET"]


def test_only_a_get_is_believed_that_a_file_is_empty(origin: Origin) -> None:
    url = origin.add("/x", b"x")
    origin.fault("/x", Status(200), methods=("HEAD",))
    assert resolve(web(), url).files[0].size == 1
    assert resolve(web(), origin.add("/empty", b"")).files[0].size == 0
    empty = listed(origin, empty=b"")
    origin.forget()
    assert resolve(web(), empty).files[0].size == 0
    assert [seen.method for seen in origin.requests] == ["GET", "HEAD"], "its digest says so, too"


@pytest.mark.parametrize("status", [401, 429, 503])
def test_an_origin_that_asks_to_wait_or_for_a_token_is_not_asked_twice(origin: Origin, status: int) -> None:
    url = origin.add("/x", b"x")
    origin.fault("/x", Status(status), methods=EITHER)
    with pytest.raises(CachdError) as refusal:
        resolve(web(), url)
    assert refusal.value.origin_status == status
    assert len(origin.requests) == 1


def test_a_validator_that_differs_asks_the_sums_and_the_digest_decides(origin: Origin) -> None:
    source = web()
    ref = listed(origin, a=noise(1000))
    file = resolve(source, ref).files[0]
    origin.forget()
    origin.add("/model/a", noise(1000), etag="of another backend")
    for _ in range(3):
        assert read(source.open(file, Extent(0, 1000), CancelToken()), 1000) == noise(1000)
    assert [seen.path for seen in origin.requests].count("/model/SHA256SUMS") == 1, "they are remembered"
    assert not any("if-match" in seen.headers for seen in origin.requests)
    listed(origin, a=noise(999) + b"x")
    with pytest.raises(Changed):
        web().open(file, Extent(0, 1000), CancelToken())


def test_a_weak_tag_that_differs_is_changed_though_it_marks_no_version(origin: Origin) -> None:
    source, url = web(), origin.add("/x", noise(1000), etag='W/"one"', last_modified=False)
    first, second = resolve(source, url).files[0], resolve(source, url).files[0]
    assert first.blob != second.blob
    assert read(source.open(first, Extent(5, 9), CancelToken()), 4) == noise(1000)[5:9]
    origin.add("/x", noise(1000), etag='W/"two"', last_modified=False)
    refused(lambda: source.open(first, Extent(5, 9), CancelToken()), "changed")
    origin.add("/x", noise(1000), etag=None, last_modified=False)
    assert read(source.open(first, Extent(5, 9), CancelToken()), 4) == noise(1000)[5:9]


def test_a_page_in_place_of_the_sums_is_named(origin: Origin) -> None:
    origin.add("/model/SHA256SUMS", b"\n<!doctype html><p>Sign in")
    refused(lambda: resolve(web(), f"{origin.url}/model/"), "login_page")


def test_without_a_digest_a_validator_that_differs_is_changed_with_the_way_to_publish_one(
    origin: Origin,
) -> None:
    source, url = web(), origin.add("/x", noise(1000), etag="one")
    file = resolve(source, url).files[0]
    origin.add("/x", noise(1000), etag="two")
    error = refused(lambda: source.open(file, Extent(0, 1000), CancelToken()), "changed")
    assert "SHA256SUMS" in error.hint
    stated = source.resolve(
        Ref.parse(f"{url}#sha256={hashlib.sha256(noise(1000)).hexdigest()}"), CancelToken()
    )
    origin.add("/x", noise(1000), etag="three")
    assert read(source.open(stated.files[0], Extent(0, 1000), CancelToken()), 1000) == noise(1000)


def test_the_size_that_head_states_counts_where_get_states_none(origin: Origin) -> None:
    content = noise(COUNTED_BYTES + 1)
    url, source = origin.add("/x", content), web()
    origin.fault("/x", Chunked())
    for _ in range(2):
        file = resolve(source, url).files[0]
        assert read(source.open(file, Extent(0, file.size), CancelToken()), file.size) == content
        source._probe.doubt(url)


DOCUMENTS = {
    "a page for any file": ("text/html; charset=utf-8", "/x", True),
    "a page that is asked for": ("text/html", "/x.html", False),
    "an error in place of weights": ("application/json", "/x.safetensors", True),
    "XML in place of weights": ("application/xml", "/x.GGUF", True),
    "a JSON file": ("application/json", "/config.json", False),
    "JSON without a name": ("application/json", "/download", False),
    "weights as text": ("text/plain", "/x.gguf", False),
}


@pytest.mark.parametrize(("kind", "path", "is_page"), DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_a_page_in_place_of_a_file_is_refused(origin: Origin, kind: str, path: str, is_page: bool) -> None:
    url = origin.add(path, b"x", headers={"Content-Type": kind})
    if is_page:
        refused(lambda: resolve(web(), url), "login_page")
    else:
        assert resolve(web(), url).files


def test_a_file_that_changes_after_it_was_resolved_is_changed(origin: Origin) -> None:
    url = origin.add("/x", b"old")
    file = resolve(web(), url).files[0]
    origin.fault("/x", ChangeETag("new", b"new"))
    with pytest.raises(Changed):
        web().open(file, Extent(0, 3), CancelToken())
