"""What a ref may be, what its default name is, and what is refused with which code."""

from __future__ import annotations

import json
import posixpath
import re
import unicodedata
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachd.errors import Invalid
from cachd.model import (
    Digest,
    Ref,
    check_name,
)
from cachd.model.default_name import default_name
from tests.ground.chance import examples
from tests.ground.values import COMMIT, SHA256, code_of, hostile, refs

# --- refs that are accepted ---

ACCESS_POINT = "arn:aws:s3:eu-west-1:123456789012:accesspoint/models"
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
    "s3://bucket/": ("s3://bucket/", None, "bucket"),
    f"s3://{ACCESS_POINT}/llama/": (
        f"s3://{ACCESS_POINT}/llama/",
        None,
        "arn-aws-s3-eu-west-1-123456789012-accesspoint--models--llama-HASH",
    ),
    f"s3://{ACCESS_POINT.replace('t/m', 't:m')}/x": (
        f"s3://{ACCESS_POINT}/x",
        None,
        "arn-aws-s3-eu-west-1-123456789012-accesspoint--models--x-HASH",
    ),
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
    f"hf://org/model@{'r' * 201}": "bad_revision",
    # buckets
    "s3://": "bad_ref",
    "s3://bucket": "bad_ref",
    "s3://bucket//": "bad_ref",
    "s3://bucket/x//": "bad_ref",
    f"s3://{ACCESS_POINT}": "bad_ref",
    f"s3://{ACCESS_POINT}//x": "bad_ref",
    "s3://arn:aws:s3:eu-west-1:12:accesspoint/models/x": "bad_ref",
    "s3://arn:aws:sqs:eu-west-1:123456789012:queue/x": "bad_ref",
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


@given(refs)
def test_a_ref_survives_its_text(text: str) -> None:
    ref = Ref.parse(text)
    assert str(ref) == text
    assert Ref.parse(str(ref)) == ref


hostile_refs = st.builds(
    lambda scheme, rest: scheme + rest,
    st.sampled_from(
        ["hf://", "hf://org/model@", "s3://", "s3://bucket/", "https://", "https://h/", "file:///"]
    ),
    hostile,
)


@examples(150)
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
        assert posixpath.normpath(f"/top/{decoded}") == f"/top/{decoded}".rstrip("/")
        assert "@" not in ref.location.partition("/")[0]
        assert "\0" not in decoded
    name = default_name(ref)
    assert check_name(name) == name
