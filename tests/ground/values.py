"""What tests of values share: constants, and strategies for refs and hostile text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import strategies as st

from cachd.errors import Invalid
from cachd.model import (
    Digest,
    File,
    Manifest,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHA256 = "00ff" * 16
LONG = "n" * 96


def code_of(call: Callable[[], object]) -> str:
    """The code of the Invalid that `call` ends in."""
    with pytest.raises(Invalid) as refusal:
        call()
    assert refusal.value.detail
    return refusal.value.code


sha256s = st.binary(min_size=32, max_size=32).map(bytes.hex)
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


def file(
    path: str = "model.safetensors",
    size: int = 5,
    *,
    origin: str = "https://host/x",
    digest: str | None = f"sha256:{SHA256}",
    validator: str | None = None,
) -> File:
    return File(path, size, origin, Digest.parse(digest) if digest else None, validator)


BASE = "hf://org/model"


def manifest(*files: File, base: str = BASE, revision: str = COMMIT) -> Manifest:
    return Manifest(base, revision, files)
