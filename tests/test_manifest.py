"""What the files of a model and its manifest may be."""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import Invalid
from cachd.model import (
    Digest,
    Manifest,
    check_path,
)
from tests.ground.chance import examples
from tests.ground.values import BASE, COMMIT, SHA256, code_of, file, hostile, manifest, sha256s

# --- files ---

GOOD_PATHS = [
    "a",
    "a/b",
    "1_Pooling/config.json",
    ".gitattributes",
    "a b",
    "é",
    "e\u0301",
    "A.bin",
    "..a",
    "a..",
]
RESERVED = [
    ".ready",
    "MANIFEST.json",
    "blobs",
    ".incomplete",
    "CACHEDIR.TAG",
    "data",
    "journal",
    "about.json",
]
LONGEST = ["x" * 255, "é" * 127, "/".join(["d" * 255] * 4), "a/" * 511 + "a", "x\u2215y"]


@pytest.mark.parametrize("path", GOOD_PATHS + RESERVED + LONGEST, ids=lambda p: ascii(p)[:40])
def test_a_path_inside_the_model_is_accepted(path: str) -> None:
    assert file(path).path == path


ESCAPES = ["../x", "/x", "//x", "a/../../x", "a/..", "..", ".", "./a", "a/./b", "a//b", "a/", "", "/"]
RUN_BY_GIT = [".git/hooks/x", "a/.GIT", ".git"]
WINDOWS = ["C:\\x", "C:/x", "c:x", "\\\\host\\share", "a\\..\\x", "..\\x"]
INVISIBLE = [
    "a\0b",
    "a\nb",
    "a\r",
    "a\x7f",
    "a\u202eb",
    "\ufeffa",
    "a\u200db",
    "\ud800",
    "a/\udcff.bin",
    "\x9b",
]
TOO_LONG = ["x" * 256, "é" * 128, "a/" + "x" * 256, "/".join(["d" * 250] * 5), "a/" * 512 + "a"]


@pytest.mark.parametrize(
    "path", ESCAPES + RUN_BY_GIT + WINDOWS + INVISIBLE + TOO_LONG, ids=lambda p: ascii(p)[:40]
)
def test_a_path_that_could_lie_elsewhere_is_refused(path: str) -> None:
    assert code_of(lambda: file(path)) == "unsafe_path"


@examples(150)
@given(hostile)
def test_no_hostile_path_passes(path: str) -> None:
    try:
        check_path(path)
    except Invalid:
        assert code_of(lambda: check_path(path)) == "unsafe_path"
        return
    assert posixpath.normpath(f"/model/{path}") == f"/model/{path}"
    assert path.encode().decode() == path
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") or c == "\\" for c in path)
    assert max(len(part.encode()) for part in path.split("/")) <= 255


@pytest.mark.parametrize("size", [-1, -(1 << 63)])
def test_a_negative_size_is_refused(size: int) -> None:
    assert code_of(lambda: file(size=size)) == "bad_manifest"


@pytest.mark.parametrize("size", [1.5, 5.0, "5", None])
def test_a_size_that_is_no_whole_number_is_refused(size: Any) -> None:
    assert code_of(lambda: file(size=size)) == "bad_manifest"


def test_a_size_beyond_any_disk_is_still_a_size() -> None:
    assert file(size=1 << 63).size == 1 << 63


def test_a_strong_digest_names_the_blob_whatever_its_origin() -> None:
    one, other = file("a", origin="https://host/a"), file("b", origin="https://mirror/b", validator='"tag"')
    assert one.blob == other.blob == Digest("sha256", SHA256)


@pytest.mark.parametrize("digest", [None, "crc32c:00000000", "crc64nvme:0000000000000000"])
def test_a_weak_checksum_never_makes_two_files_one(digest: str | None) -> None:
    told: dict[str, Any] = {"origin": "s3://b/a", "digest": digest, "validator": '"1"'}
    blob = file(**told).blob
    assert blob.algorithm == "origin"
    assert file("renamed", **told).blob == blob
    for changed in ({"origin": "s3://b/b"}, {"validator": '"2"'}, {"validator": None}, {"size": 6}):
        assert file(**{**told, **changed}).blob != blob


# --- manifests ---


def test_a_manifest_is_sorted_and_its_id_tells_base_revision_and_files() -> None:
    a, b = file("a"), file("b", digest=f"sha256:{'1' * 64}")
    one = manifest(b, a)
    assert [f.path for f in one.files] == ["a", "b"]
    assert one == manifest(a, b)
    assert re.fullmatch(r"[0-9a-f]{32}", one.id)
    others = [
        manifest(a),
        manifest(a, b, base="hf://org/other"),
        manifest(a, b, revision="f" * 40),
        manifest(a, file("b", digest=f"sha256:{'2' * 64}")),
        manifest(a, file("c", digest=f"sha256:{'1' * 64}")),
        manifest(a, file("b", size=6, digest=f"sha256:{'1' * 64}")),
    ]
    assert len({one.id, *(other.id for other in others)}) == 7


def test_equal_content_is_counted_once() -> None:
    assert manifest(file("a"), file("b"), file("c", digest=f"sha256:{'1' * 64}")).size == 10


def test_an_empty_file_is_a_file() -> None:
    assert manifest(file(size=0)).size == 0


def test_a_manifest_without_files_is_refused() -> None:
    assert code_of(manifest) == "no_files"


def test_a_manifest_of_too_many_files_is_refused() -> None:
    assert code_of(lambda: manifest(*[file()] * 100_001)) == "too_many_files"


@pytest.mark.parametrize(
    "paths",
    [("a", "a"), ("a", "a/b"), ("a/b/c", "a"), ("a/b", "a/b/c/d"), ("a", "b", "a")],
    ids=" ".join,
)
def test_a_path_twice_or_as_file_and_directory_is_refused(paths: tuple[str, ...]) -> None:
    files = [file(path, digest=f"sha256:{i:064x}") for i, path in enumerate(paths)]
    with pytest.raises(Invalid) as refusal:
        manifest(*files)
    assert refusal.value.code == "bad_manifest"
    assert repr(paths[0]) in refusal.value.detail or repr(paths[1]) in refusal.value.detail


@pytest.mark.parametrize(
    "paths", [("A.bin", "a.bin"), ("é", "e\u0301"), ("a", "ab/c"), ("a.b", "a/b")], ids=ascii
)
def test_paths_that_only_look_alike_are_kept_apart(paths: tuple[str, ...]) -> None:
    assert {f.path for f in manifest(*map(file, paths)).files} == set(paths)


def test_one_digest_with_two_sizes_is_refused() -> None:
    assert code_of(lambda: manifest(file("a", 5), file("b", 6))) == "bad_manifest"


@pytest.mark.parametrize(
    "revision",
    ["..", "../../../ready", "", "main", "a" * 39, "a" * 65, "A" * 40, f"{'a' * 39}/", "0" * 39 + "\n"],
    ids=ascii,
)
def test_a_revision_that_is_no_commit_is_refused_because_it_names_a_directory(revision: str) -> None:
    assert code_of(lambda: manifest(file(), revision=revision)) == "bad_manifest"


@pytest.mark.parametrize("revision", [COMMIT, SHA256])
def test_a_revision_of_40_or_64_digits_is_accepted(revision: str) -> None:
    assert manifest(file(), revision=revision).revision == revision


def test_a_manifest_is_verified_when_every_file_has_a_digest() -> None:
    assert manifest(file("a"), file("b", digest="crc32c:00000000")).has_all_digests
    assert not manifest(file("a"), file("b", digest=None)).has_all_digests


def some() -> Manifest:
    paths = ["config.json", "model.bin", "onnx/model.onnx", "onnx/q4/model.onnx", "w[1].bin", "README.md"]
    return manifest(*(file(path, digest=f"sha256:{i:064x}") for i, path in enumerate(paths)))


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        ((), (), {f.path for f in some().files}),
        (("*.bin",), (), {"model.bin", "w[1].bin"}),
        (("*.onnx",), (), {"onnx/model.onnx", "onnx/q4/model.onnx"}),
        (("onnx/",), ("onnx/q4/",), {"onnx/model.onnx"}),
        (("onnx/*",), (), {"onnx/model.onnx", "onnx/q4/model.onnx"}),
        ((), ("*.onnx", "*.md", "w*"), {"config.json", "model.bin"}),
        (("CONFIG.json", "config.?son"), (), {"config.json"}),
        (("w[[]1].bin",), (), {"w[1].bin"}),
    ],
)
def test_patterns_choose_by_the_whole_path(
    include: tuple[str, ...], exclude: tuple[str, ...], kept: set[str]
) -> None:
    selected = some().select(include, exclude)
    assert {f.path for f in selected.files} == kept
    assert (selected.id == some().id) == (kept == {f.path for f in some().files})


@pytest.mark.parametrize(("include", "exclude"), [(("*.gguf",), ()), ((), ("*",)), (("",), ())])
def test_patterns_that_choose_nothing_are_refused(include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    assert code_of(lambda: some().select(include, exclude)) == "nothing_selected"


good_paths = st.lists(st.text("ab.é _-", min_size=1, max_size=5), min_size=1, max_size=3).map("/".join)
digests = st.none() | st.one_of(
    sha256s.map("sha256:{}".format),
    st.binary(min_size=20, max_size=20).map(lambda b: f"git-sha1:{b.hex()}"),
    st.binary(min_size=8, max_size=8).map(lambda b: f"crc64nvme:{b.hex()}"),
)
validators = st.none() | st.text(max_size=20)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    paths = draw(st.lists(good_paths, min_size=1, max_size=6, unique=True))
    sizes = st.integers(0, 1 << 50)
    files = []
    for number, path in enumerate(paths):
        try:
            told = draw(digests), draw(validators)
            files.append(
                file(path, draw(sizes), origin=f"https://h/{number}", digest=told[0], validator=told[1])
            )
        except Invalid:
            continue
    try:
        return manifest(*files, revision=draw(st.sampled_from([COMMIT, SHA256])))
    except Invalid:
        return manifest(file(digest=draw(digests)))


@given(manifests())
def test_a_manifest_survives_its_document(told: Manifest) -> None:
    read = Manifest.from_document(json.loads(json.dumps(told.as_document())))
    assert read == told
    assert (read.id, read.size) == (told.id, told.size)


FILE_DOCUMENT = json.loads(json.dumps(some().as_document()))["files"][0]
GARBAGE: list[object] = [
    {},
    {"base": BASE},
    {"base": BASE, "revision": COMMIT, "files": {}},
    {"base": BASE, "revision": COMMIT, "files": []},
    {"base": BASE, "revision": COMMIT, "files": [1]},
    {"base": BASE, "revision": COMMIT, "files": [{}]},
    {"base": BASE, "revision": COMMIT, "files": "x"},
    *(
        {"base": BASE, "revision": COMMIT, "files": [{**FILE_DOCUMENT, **wrong}]}
        for wrong in (
            {"path": 5},
            {"path": None},
            {"path": "../x"},
            {"size": "5"},
            {"size": None},
            {"size": -1},
            {"digest": 5},
            {"digest": "md5:0"},
            {"digest": ["sha256"]},
        )
    ),
]


@pytest.mark.parametrize("document", GARBAGE, ids=lambda d: json.dumps(d)[-70:])
def test_garbage_is_not_a_manifest(document: dict[str, object]) -> None:
    with pytest.raises((Invalid, KeyError, TypeError)):
        Manifest.from_document(document)
