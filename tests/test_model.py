"""What a name, a ref, a digest, a file and a manifest may be, and what is refused with which code."""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cachd.errors import CachdError, Invalid, TooBig
from cachd.model import (
    NAME_PATTERN,
    Digest,
    Extent,
    File,
    Manifest,
    ModelSpec,
    Ref,
    check_name,
    check_path,
    quoted,
    snapshot_of,
)
from cachd.model.default_name import default_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = "00ff" * 16
LONG = "n" * 96

settings.register_profile("repeatable", deadline=None, database=None, derandomize=True)
settings.load_profile("repeatable")


def code_of(call: Callable[[], object]) -> str:
    """The code of the Invalid that `call` ends in."""
    with pytest.raises(Invalid) as refusal:
        call()
    assert refusal.value.detail
    return refusal.value.code


# --- names ---


@pytest.mark.parametrize("name", ["a", "Llama-3.1-8B", "org--model", "0", "a.b_c-d", LONG, "model.bin"])
def test_a_plain_name_is_accepted(name: str) -> None:
    assert check_name(name) == name


CLIMBING = ["../../etc", "a/../../b", "/abs", "a//b", ".", "..", "a\\..\\b", "%2e%2e%2f", "a..b"]
ODD = ["", "a\0b", "a\nb", "a\n", " a", "a ", "a b", "-a", ".a", "_a", "x" * 97, "x" * 300, "é"]
LOOK_ALIKES = ["a\u2215b", "a\u2044b", "\u202eb", "a\u200bb", "\uff0e\uff0e"]


@pytest.mark.parametrize("name", CLIMBING + ODD + LOOK_ALIKES, ids=ascii)
def test_any_other_name_is_refused(name: str) -> None:
    assert code_of(lambda: check_name(name)) == "bad_name"


@given(st.text(max_size=120))
def test_a_name_that_passes_is_one_component_of_a_path_and_of_a_url(name: str) -> None:
    try:
        check_name(name)
    except Invalid:
        return
    assert re.fullmatch(NAME_PATTERN, name)
    assert posixpath.normpath(f"/root/{name}") == f"/root/{name}"
    assert quoted(name) == name


# --- refs that are accepted ---

ACCEPTED = {
    "hf://org/model": ("hf://org/model", None, "org--model"),
    "hf://org/model@main": ("hf://org/model", "main", "org--model"),
    "hf://org/model@refs/pr/1": ("hf://org/model", "refs/pr/1", "org--model"),
    "hf://org/model@feature%2Fnew": ("hf://org/model", "feature/new", "org--model"),
    "hf://org/model@v1.0+cu12": ("hf://org/model", "v1.0+cu12", "org--model"),
    f"hf://org/model@{COMMIT}": ("hf://org/model", COMMIT, "org--model"),
    "hf://Qwen/Qwen2.5-0.5B_x": ("hf://Qwen/Qwen2.5-0.5B_x", None, "Qwen--Qwen2.5-0.5B_x"),
    "s3://bucket/llama/": ("s3://bucket/llama/", None, "bucket--llama"),
    "s3://bucket/llama": ("s3://bucket/llama", None, "bucket--llama"),
    "s3://my.bucket-1/a/b c?#%+é/": ("s3://my.bucket-1/a/b c?#%+é/", None, "my.bucket-1--a--b-c-HASH"),
    "https://host/dir/": ("https://host/dir/", None, "host--dir"),
    "https://HOST:8443/model.bin": ("https://host:8443/model.bin", None, "host-8443--model.bin"),
    "http://[::1]:80/model.bin": ("http://[::1]:80/model.bin", None, "1-80--model.bin-HASH"),
    "https://host/%7Euser/model%20one.bin": (
        "https://host/%7Euser/model%20one.bin",
        None,
        "host--user--model-one.bin-HASH",
    ),
    "file:///mnt/share/llama": ("file:///mnt/share/llama", None, "mnt--share--llama"),
    "file:///mnt/share/llama/": ("file:///mnt/share/llama/", None, "mnt--share--llama"),
}


@pytest.mark.parametrize(("text", "told"), ACCEPTED.items(), ids=ACCEPTED.keys())
def test_a_ref_has_a_base_a_revision_and_a_default_name(text: str, told: tuple[str, str | None, str]) -> None:
    ref = Ref.parse(text)
    base, revision, name = told
    assert (ref.base, ref.revision) == (base, revision)
    assert HASH.sub("-HASH", default_name(ref)) == name


HASH = re.compile(r"-[0-9a-f]{8}$")
SAME_ENDS = [
    ("file:///x/llama/main/", "file:///x/qwen/main/"),
    ("s3://one/v1/", "s3://two/v1/"),
    ("https://a/m.gguf", "https://b/m.gguf"),
    ("https://host:1/m.gguf", "https://host:2/m.gguf"),
    ("s3://bucket/a--b/c", "s3://bucket/a/b--c"),
    ("s3://bucket/a-/b", "s3://bucket/a/-b"),
    ("s3://bucket/é/m", "s3://bucket/è/m"),
    ("https://host/a%20b", "https://host/a-b"),
    ("file:///a..b/m", "file:///a.b/m"),
    ("file:///_m/x", "file:///m/x"),
    (f"s3://bucket/{'a' * 100}/m", f"s3://bucket/{'a' * 101}/m"),
    (f"s3://bucket/one/{'a' * 90}", f"s3://bucket/two/{'a' * 90}"),
]


@pytest.mark.parametrize("refs", SAME_ENDS, ids=[" ".join(pair)[:60] for pair in SAME_ENDS])
def test_two_refs_have_two_default_names(refs: tuple[str, str]) -> None:
    names = {default_name(Ref.parse(ref)) for ref in refs}
    assert len(names) == 2
    assert {check_name(name) for name in names} == names


PATTERNS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "none": ((), (), "org--model"),
    "one file": (("m-Q4.gguf",), (), "org--model--m-Q4.gguf"),
    "one file below": (("Q4/m.gguf",), (), "org--model--Q4--m.gguf"),
    "a directory": (("Q4/",), (), "org--model-HASH"),
    "a wildcard": (("*Q4*",), (), "org--model-HASH"),
    "two files": (("a", "b"), (), "org--model-HASH"),
    "one left out": ((), ("a",), "org--model-HASH"),
    "an odd file": (("é.gguf",), (), "org--model--.gguf-HASH"),
    "a file that climbs": (("../x",), (), "org--model--.--x-HASH"),
}


@pytest.mark.parametrize(("include", "exclude", "name"), PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns_are_part_of_the_default_name(
    include: tuple[str, ...], exclude: tuple[str, ...], name: str
) -> None:
    found = default_name(Ref.parse("hf://org/model"), include, exclude)
    assert HASH.sub("-HASH", found) == name
    assert default_name(Ref.parse("hf://org/model@v2"), include, exclude) == found, "whatever the revision"
    assert default_name(Ref.parse("hf://org/model"), include[::-1], exclude) == found


def test_other_patterns_of_one_model_have_another_default_name() -> None:
    asked = [
        ((), ()),
        (("*",), ()),
        ((), ("*",)),
        (("*Q4*",), ()),
        (("*Q5*",), ()),
        (("a",), ()),
        (("a", "b"), ()),
    ]
    assert len({default_name(Ref.parse("hf://org/model"), *patterns) for patterns in asked}) == len(asked)


def test_only_a_whole_commit_pins_a_ref() -> None:
    assert Ref.parse(f"hf://org/model@{COMMIT}").is_pinned
    assert not Ref.parse("hf://org/model@main").is_pinned
    assert not Ref.parse("hf://org/model").is_pinned
    assert not Ref.parse("s3://bucket/prefix/").is_pinned


def test_the_digest_of_one_file_stands_in_the_fragment() -> None:
    ref = Ref.parse(f"https://host/model.bin#sha256={SHA256.upper()}")
    assert ref.digest == Digest("sha256", SHA256)
    assert str(ref) == f"https://host/model.bin#sha256={SHA256}"
    assert ref.base == "https://host/model.bin"


# --- refs that are refused ---

REFUSED = {
    # A3, A4: repositories
    "": "unknown_scheme",
    "org/model": "unknown_scheme",
    "gopher://host/x": "unknown_scheme",
    "HF://org/model": "unknown_scheme",
    "oci://registry/model": "unknown_scheme",
    " hf://org/model": "unknown_scheme",
    "hf://model": "bad_ref",
    "hf://a/b/c": "bad_ref",
    "hf:///model": "bad_ref",
    "hf://org/": "bad_ref",
    "hf://org--x/y": "bad_ref",
    "hf://org/a--b": "bad_ref",
    "hf://-org/model": "bad_ref",
    "hf://org/-model": "bad_ref",
    "hf://org/model.git": "bad_ref",
    "hf://org/model.": "bad_ref",
    "hf://../model": "bad_ref",
    "hf://org/..": "bad_ref",
    "hf://org/a..b": "bad_ref",
    "hf://org/a\\b": "bad_ref",
    "hf://org/%2e%2e": "bad_ref",
    "hf://org\u2215model/x": "bad_ref",
    "hf://org/mo\u202edel": "bad_ref",
    "hf://org/mo\0del": "bad_ref",
    "hf://org/model\n": "bad_ref",
    f"hf://org/{'m' * 97}": "bad_ref",
    # A6: revisions
    "hf://org/model@": "bad_revision",
    "hf://org/model@../main": "bad_revision",
    "hf://org/model@refs/../../x": "bad_revision",
    "hf://org/model@/abs": "bad_revision",
    "hf://org/model@a//b": "bad_revision",
    "hf://org/model@a%2F%2Fb": "bad_revision",
    "hf://org/model@a%2F..%2Fb": "bad_revision",
    "hf://org/model@a%252Fb": "bad_revision",
    "hf://org/model@%2e%2e": "bad_revision",
    "hf://org/model@-rf": "bad_revision",
    "hf://org/model@.hidden": "bad_revision",
    "hf://org/model@main?x=1": "bad_revision",
    "hf://org/model@0123abc": "bad_revision",
    f"hf://org/model@{COMMIT[:39]}": "bad_revision",
    f"hf://org/model@{'r' * 201}": "bad_revision",
    # buckets
    "s3://": "bad_ref",
    "s3://bucket": "bad_ref",
    "s3://bucket/": "bad_ref",
    "s3://bucket//": "bad_ref",
    "s3://Bucket/x": "bad_ref",
    "s3://b/x": "bad_ref",
    "s3://user@bucket/x": "bad_ref",
    "s3://bucket//x": "bad_ref",
    "s3://bucket/a//b": "bad_ref",
    "s3://bucket/../other": "bad_ref",
    "s3://bucket/a/./b": "bad_ref",
    "s3://bucket/a\\b": "bad_ref",
    "s3://bucket/a\tb": "bad_ref",
    # A7: URLs
    "https://host": "bad_ref",
    "https://host/": "bad_ref",
    "https:///x": "bad_ref",
    "https://host:99999/x": "bad_ref",
    "https://host:port/x": "bad_ref",
    "https://[::1/x": "bad_ref",
    "https://host/a/../b": "bad_ref",
    "https://host/a/%2e%2e/b": "bad_ref",
    "https://host/a%2f..%2fb": "bad_ref",
    "https://host/a%5cb": "bad_ref",
    "https://host/a%00b": "bad_ref",
    "https://host/a//b": "bad_ref",
    "https://good\\@evil/x": "bad_ref",
    "https://host/x\r\nHost: evil": "bad_ref",
    f"https://host/{'x' * 2048}": "bad_ref",
    "https://user:pw@host/x": "url_secrets",
    "https://token@host/x": "url_secrets",
    "https://host/x?X-Amz-Signature=1": "url_query",
    "https://host/x#main": "bad_ref",
    "https://host/x#md5=00": "bad_ref",
    "https://host/x#sha256=": "bad_digest",
    "https://host/x#sha256=0123": "bad_digest",
    f"https://host/x#sha256={'g' * 64}": "bad_digest",
    "file://": "bad_ref",
    "file:///": "bad_ref",
    "file://host/etc/shadow": "bad_ref",
    "file:///mnt/../etc/shadow": "bad_ref",
    "file:///mnt/%2e%2e/etc": "bad_ref",
}


@pytest.mark.parametrize(("text", "code"), REFUSED.items(), ids=map(ascii, REFUSED))
def test_a_wrong_ref_is_refused(text: str, code: str) -> None:
    assert code_of(lambda: Ref.parse(text)) == code


def test_a_digest_for_a_directory_is_refused_because_nothing_would_check_it() -> None:
    assert code_of(lambda: Ref.parse(f"https://host/dir/#sha256={SHA256}")) == "bad_ref"


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host/x",
        "https://hunter2@host/x",
        "https://host/x?token=hunter2",
        "https://host/x#hunter2",
        "gopher://user:hunter2@host/x",
        "https://host:port/x?sig=hunter2",
        "https://host/../x?sig=hunter2",
        "s3://hunter2@b/x",
        "ftp://host/x?sig=hunter2#hunter2",
        "hf://org/model@main?token=hunter2",
        "hf://hunter2@org/model",
    ],
)
def test_a_refusal_repeats_no_secret(text: str) -> None:
    with pytest.raises(Invalid) as refusal:
        Ref.parse(text)
    assert "hunter2" not in json.dumps(refusal.value.as_document())


# --- round trips of refs ---

words = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.]{0,8}[A-Za-z0-9_]", fullmatch=True).filter(
    lambda w: ".." not in w and not w.endswith(".git")
)
revisions = st.from_regex(
    r"[G-Zg-z][A-Za-z0-9._+-]{0,9}(/[A-Za-z0-9][A-Za-z0-9._+-]{0,9}){0,2}", fullmatch=True
)
plain_revisions = revisions.filter(lambda r: ".." not in r)
parts_of_urls = st.text("abcXYZ019-_~!$&'()*+,;=:@", min_size=1, max_size=8)
paths_of_urls = st.lists(parts_of_urls | st.just("%20") | st.just("%C3%A9"), min_size=1, max_size=4).map(
    "/".join
)
hosts = st.sampled_from(["host", "a.example", "10.0.0.1", "[::1]", "[2001:db8::7]", "host:1", "[::1]:65535"])
sha256s = st.binary(min_size=32, max_size=32).map(bytes.hex)

refs = st.one_of(
    st.builds(
        lambda o, m, r: f"hf://{o}/{m}{r}",
        words,
        words,
        st.just("") | plain_revisions.map(lambda r: "@" + r.replace("/", "%2F")),
    ),
    st.builds(lambda p, end: f"s3://bucket/{p}{end}", paths_of_urls, st.sampled_from(["", "/"])),
    st.builds(
        lambda scheme, h, p, d: f"{scheme}://{h}/{p}{d}",
        st.sampled_from(["http", "https"]),
        hosts,
        paths_of_urls,
        st.just("") | st.just("/") | sha256s.map("#sha256={}".format),
    ),
    st.builds(lambda p, end: f"file:///{p}{end}", paths_of_urls, st.sampled_from(["", "/"])),
)


@given(refs)
def test_a_ref_survives_its_text(text: str) -> None:
    ref = Ref.parse(text)
    assert str(ref) == text
    assert Ref.parse(str(ref)) == ref


HOSTILE = [
    *(
        "..",
        ".",
        "/",
        "//",
        "\\",
        "%2e",
        "%2E%2e",
        "%2f",
        "%5c",
        "%00",
        "%252e",
        "\0",
        "\n",
        "\r\n",
        "\t",
        " ",
    ),
    *("@", ":", "?", "#", "#sha256=", SHA256, "user:pw@", "[", "]", "[::1]", ":99999", ":0", "~", "-", "--"),
    *(
        "\u2215",
        "\u2044",
        "\uff0f",
        "\u202e",
        "\u200b",
        "\ud800",
        "\uff0e",
        "é",
        "e\u0301",
        "C:",
        "\\\\host\\",
    ),
    *(
        "hf://",
        "s3://",
        "https://",
        "file://",
        "http://",
        "org/model",
        "host/",
        "etc/passwd",
        "refs/",
        COMMIT,
    ),
    *(".git", "a", "B", "0", "main", "bucket/"),
]
hostile = st.lists(st.sampled_from(HOSTILE) | st.text(max_size=2), max_size=9).map("".join)
hostile_refs = st.builds(
    lambda scheme, rest: scheme + rest,
    st.sampled_from(
        ["hf://", "hf://org/model@", "s3://", "s3://bucket/", "https://", "https://h/", "file:///"]
    ),
    hostile,
)


@settings(max_examples=600)
@given(hostile_refs)
def test_no_hostile_ref_passes(text: str) -> None:
    try:
        ref = Ref.parse(text)
    except Invalid:
        return
    assert Ref.parse(str(ref)) == ref
    assert not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") or c == "\\" for c in str(ref))
    if ref.scheme == "hf":
        assert re.fullmatch(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+", ref.location)
        below = posixpath.normpath(f"/refs/{ref.revision or 'main'}")
        assert below == f"/refs/{ref.revision or 'main'}"
        assert len(below) > len("/refs/")
    else:
        path = ref.location.partition("/")[2]
        decoded = (path if ref.scheme == "s3" else unquote(path)).strip("/")
        assert posixpath.normpath(f"/top/{decoded}") == f"/top/{decoded}"
        assert "@" not in ref.location.partition("/")[0]
        assert "\0" not in decoded
    name = default_name(ref)
    assert check_name(name) == name


# --- digests ---


@pytest.mark.parametrize(
    ("algorithm", "digits"),
    [("sha256", 64), ("git-sha1", 40), ("sha1", 40), ("crc64nvme", 16), ("crc32c", 8), ("crc32", 8)],
)
def test_a_digest_has_exactly_the_digits_of_its_algorithm(algorithm: str, digits: int) -> None:
    assert str(Digest.parse(f"{algorithm}:{'a' * digits}")) == f"{algorithm}:{'a' * digits}"
    for wrong in (digits - 1, digits + 1):
        assert code_of(lambda wrong=wrong: Digest(algorithm, "a" * wrong)) == "bad_digest"


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "sha256",
        "sha256:",
        f"sha256:{'g' * 64}",
        f"sha256: {'0' * 63}",
        f"sha256:{'0' * 64}\n",
        "sha256:" + "\u0660" * 64,
        f"md5:{'0' * 32}",
        f"SHA256:{'0' * 64}",
        f"sha512:{'0' * 128}",
        SHA256,
        f"../sha256:{'0' * 64}",
    ],
    ids=ascii,
)
def test_any_other_digest_is_refused(text: str) -> None:
    assert code_of(lambda: Digest.parse(text)) == "bad_digest"


def test_upper_case_hex_is_folded_when_it_is_read_and_nowhere_else() -> None:
    assert Digest.parse(f"sha256:{SHA256.upper()}") == Digest("sha256", SHA256)
    assert code_of(lambda: Digest("sha256", SHA256.upper())) == "bad_digest"


def test_only_a_sha256_names_content() -> None:
    lengths = {
        "sha256": 64,
        "git-sha1": 40,
        "sha1": 40,
        "crc64nvme": 16,
        "crc32c": 8,
        "crc32": 8,
        "origin": 64,
    }
    naming = {name for name, digits in lengths.items() if Digest(name, "0" * digits).names_content}
    assert naming == {"sha256"}


# --- extents ---


@pytest.mark.parametrize(("start", "stop"), [(-1, 0), (1, 0), (-2, -1)])
def test_an_extent_that_is_no_interval_of_a_file_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="not an interval"):
        Extent(start, stop)


# --- files ---


def file(
    path: str = "model.safetensors",
    size: int = 5,
    *,
    origin: str = "https://host/x",
    digest: str | None = f"sha256:{SHA256}",
    validator: str | None = None,
) -> File:
    return File(path, size, origin, Digest.parse(digest) if digest else None, validator)


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


@settings(max_examples=600)
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

BASE = "hf://org/model"


def manifest(*files: File, base: str = BASE, revision: str = COMMIT) -> Manifest:
    return Manifest(base, revision, files)


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
def test_garbage_is_no_manifest(document: dict[str, object]) -> None:
    with pytest.raises((Invalid, KeyError, TypeError)):
        Manifest.from_document(document)


# --- specs and snapshots ---

visible = st.text(st.characters(exclude_categories=("Cc", "Cf", "Cs")), min_size=1, max_size=10)
patterns = st.lists(visible, max_size=3).map(tuple)


@given(refs, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,10}", fullmatch=True), patterns, patterns)
def test_a_wish_survives_its_document(
    ref: str, name: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    spec = ModelSpec(Ref.parse(ref), name, include, exclude)
    assert ModelSpec.from_document(json.loads(json.dumps(spec.as_document()))) == spec


@pytest.mark.parametrize(
    "wrong",
    [
        {"ref": "nothing"},
        {"ref": None},
        {"name": "../x"},
        {"name": None, "ref": 1},
        {"include": "*.bin"},
        {"exclude": None},
        {"include": [1]},
        {"exclude": [["*"]]},
    ],
    ids=json.dumps,
)
def test_garbage_is_no_wish(wrong: dict[str, object]) -> None:
    good = ModelSpec(Ref.parse("hf://org/model"), "model").as_document()
    with pytest.raises((Invalid, KeyError, TypeError)):
        ModelSpec.from_document({**good, **wrong})


def test_a_wish_has_a_name_that_is_allowed() -> None:
    assert code_of(lambda: ModelSpec(Ref.parse("hf://org/model"), "a/b")) == "bad_name"


def test_a_model_of_the_hub_is_shown_under_its_repository_and_any_other_under_its_name() -> None:
    hub = snapshot_of(ModelSpec(Ref.parse("hf://org/model"), "mine"), manifest(file()), 1.0)
    assert (hub.repo, hub.hub_folder, hub.commit) == ("org/model", "models--org--model", COMMIT)
    bucket = ModelSpec(Ref.parse("s3://bucket/prefix/"), "mine")
    other = snapshot_of(bucket, manifest(file(), base="s3://bucket/prefix/", revision=SHA256), 1.0)
    assert (other.repo, other.hub_folder, other.commit) == ("mine", "models--mine", SHA256[:40])


@pytest.mark.parametrize("name", ["org--model", "a--b", "a---b", "a-b--c", "127.0.0.1-8080--m"])
def test_a_name_with_two_dashes_is_one_word_in_the_hub_view_and_no_repository_of_the_hub(name: str) -> None:
    def shown(name: str) -> str:
        spec = ModelSpec(Ref.parse("s3://bucket/prefix/"), name)
        made = snapshot_of(spec, manifest(file(), base="s3://bucket/prefix/", revision=SHA256), 1.0)
        return made.hub_folder.removeprefix("models--")

    assert "--" not in shown(name)
    assert "/" not in shown(name)
    names = [name, name.replace("--", "-"), name.replace("---", "--"), "org-model"]
    assert len({shown(each) for each in names}) == len(set(names))


@pytest.mark.parametrize(
    ("ref", "revision"),
    [
        ("hf://org/model", "main"),
        ("hf://org/model@v1", "v1"),
        ("hf://org/model@refs/pr/1", "refs/pr/1"),
        (f"hf://org/model@{COMMIT}", None),
        ("s3://bucket/prefix/", "main"),
    ],
)
def test_a_hub_client_asks_for_the_branch_the_wish_names(ref: str, revision: str | None) -> None:
    snapshot = snapshot_of(ModelSpec(Ref.parse(ref), "mine"), manifest(file()), 1.0)
    assert snapshot.hub_revision == revision


SPLIT = [f"q4/model-{number:05}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("paths", "single"),
    [
        (["model.gguf"], "model.gguf"),
        (["sub/model.safetensors"], "sub/model.safetensors"),
        (SPLIT, SPLIT[0]),
        (SPLIT[:1], SPLIT[0]),
        (SPLIT[1:2], SPLIT[1]),
        (SPLIT[:2], None),
        (SPLIT[1:], None),
        ([*SPLIT, "README.md"], None),
        ([*SPLIT[:2], "q4/other-00003-of-00003.gguf"], None),
        (["model-00001-of-00001.gguf"], "model-00001-of-00001.gguf"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], None),
        (["a.gguf", "b.gguf"], None),
        (["a-00001-of-00002.gguf", "a-00003-of-00002.gguf"], None),
        (["a-00001-of-00000.gguf"], "a-00001-of-00000.gguf"),
        (["config.json", "model.safetensors"], None),
    ],
    ids=str,
)
def test_a_model_is_one_file_when_it_has_one_or_is_one_split_gguf(
    paths: list[str], single: str | None
) -> None:
    told = manifest(*(file(path) for path in paths))
    assert told.single_file == single
    assert snapshot_of(ModelSpec(Ref.parse("hf://org/model"), "mine"), told, 1.0).file == single


# --- errors ---


def test_an_error_says_its_code_detail_mend_class_and_numbers() -> None:
    error = TooBig("it is wrong", code="wrong", hint="do it right", need=5)
    assert str(error) == "it is wrong (do it right)"
    assert error.as_document() == {
        "code": "wrong",
        "detail": "it is wrong",
        "hint": "do it right",
        "error_class": "TooBig",
        "need": 5,
    }


def test_every_class_of_error_has_a_code_of_its_own() -> None:
    def below(kind: type[CachdError]) -> list[type[CachdError]]:
        return [kind, *(each for direct in kind.__subclasses__() for each in below(direct))]

    kinds = [kind for kind in below(CachdError) if kind.__module__ == "cachd.errors"]
    assert len({kind.code for kind in kinds}) == len(kinds) >= 13
