"""What is published as weights is weights, and all of them, as far as their own format says."""

from __future__ import annotations

import io
import struct
import time

import pytest

from cachd.model.leftovers import is_left_out, unfinished
from cachd.policy import gguf as headers
from cachd.policy import placeholders, weight_lengths
from tests.ground.origin import noise
from tests.ground.weights import gguf, lfs_pointer, link_as_text, safetensors, torch_archive

POINTERS = {
    "Git LFS": (lfs_pointer(b"x"), "Git LFS"),
    "Git LFS, before it had this name": (
        b"version https://hawser.github.com/spec/v1\noid sha256:0\n",
        "Git LFS",
    ),
    "git-xet": (b"# xet version 0\nfilesize = 12\nhash = '0'\n", "git-xet"),
    "git-annex": (b"/annex/objects/SHA256E-s3--0.bin\n", "git-annex"),
    "SMB": (link_as_text("../../blobs/0"), "symbolic link"),
    "Cygwin": (b"!<symlink>\xff\xfe.\0.\0", "symbolic link"),
    "NFS on Windows": (b"IntxLNK\x01a\0", "symbolic link"),
    "git on Windows": (b"../../blobs/0a1b2c", "symbolic link"),
}
WEIGHTS = (safetensors(), gguf(), torch_archive(), noise(300), b"", b"0.5 0.25\n", b"..", b"{}", b"<unk> 0.5")


@pytest.mark.parametrize(("content", "what"), POINTERS.values(), ids=POINTERS.keys())
def test_a_pointer_is_known_by_its_content(content: bytes, what: str) -> None:
    found = placeholders.pointer("a.bin", content)
    assert found is not None
    assert what in found.what
    assert found.hint


@pytest.mark.parametrize("content", WEIGHTS)
def test_weights_are_neither_a_pointer_nor_a_page(content: bytes) -> None:
    assert placeholders.pointer("a.bin", content) is None
    assert placeholders.page(content) is None


def test_a_text_is_a_pointer_only_if_nothing_else_is_in_it() -> None:
    content = lfs_pointer(b"x")
    for path in ("tokenizer.json", "a/vocab.txt", "README.md"):
        assert placeholders.pointer(path, content)
        assert placeholders.pointer(path, content.rstrip())
        assert placeholders.pointer(path, content + b"\nThis is what a pointer is.\n") is None
        assert placeholders.may_be_pointer(path, len(content))
    for content in (b"../../blobs/0a", b"# xet version 0\n", link_as_text("a")):
        assert placeholders.pointer("a.json", content) is None


@pytest.mark.parametrize(
    "begin",
    [
        b"<!DOCTYPE html>",
        b"\n <html lang=en>",
        b"\xef\xbb\xbf<?xml version='1.0'?>",
        b"<Error><Code>x",
        b"<HEAD>",
    ],
)
def test_a_page_is_known_by_its_begin(begin: bytes) -> None:
    assert placeholders.page(begin) is not None


@pytest.mark.parametrize("signature", [b"", b";chunk-signature=" + b"0a" * 32])
def test_an_upload_in_its_frames_is_known(signature: bytes) -> None:
    framed = b"".join(
        b"%x%b\r\n%b\r\n" % (len(held), signature, held) for held in (noise(5000), noise(20), b"")
    )
    assert placeholders.frames(io.BytesIO(framed))
    assert placeholders.frames(io.BytesIO(b"300\r\n" + noise(5000))) is None
    assert all(placeholders.frames(io.BytesIO(content)) is None for content in WEIGHTS)


def test_a_file_of_zeros_has_no_header() -> None:
    for path in ("a.safetensors", "a.gguf"):
        assert shortage(path, bytes(5000))
        assert shortage(path, b"")
        assert shortage(path, bytes(15) + b"x" + bytes(50)) is None


def shortage(path: str, content: bytes) -> str | None:
    return weight_lengths.shortage(path, len(content), io.BytesIO(content))


@pytest.mark.parametrize(
    ("path", "content", "least"),
    [
        ("a.safetensors", safetensors(), len(safetensors())),
        ("a.gguf", gguf(), len(gguf()) - 1023),  # the length of its last tensor is not read
        ("a.gguf", gguf(alignment=32, tensors=1), len(gguf(alignment=32, tensors=1)) - 1023),
        ("a.pt", torch_archive(), len(torch_archive()) - 18),
    ],
)
def test_weights_that_end_too_early_are_known_wherever_they_end(
    path: str, content: bytes, least: int
) -> None:
    assert shortage(path, content) is None
    begin = 8 if path.endswith("gguf") else 4
    for size in (*range(begin, min(600, least)), *range(600, least, 37), least - 1):
        assert shortage(path, content[:size]), size
    assert shortage(path, content[:least]) is None


def test_weights_without_a_tensor_need_their_header_alone() -> None:
    header = b'{"__metadata__": {"format": "pt"}}'
    content = struct.pack("<Q", len(header)) + header
    assert shortage("a.safetensors", content) is None
    assert shortage("a.safetensors", content[:-1])


@pytest.mark.parametrize("suffix", ["safetensors", "gguf", "pt", "bin", "npz", "onnx"])
def test_what_is_in_another_form_is_left_to_the_engine(suffix: str) -> None:
    for content in (
        noise(10),
        noise(3000),
        b"w" * 1000,
        struct.pack("<Q", 20) + b"no JSON at all, none" + noise(9),
    ):
        assert shortage(f"a.{suffix}", content) is None


def test_a_hostile_header_costs_no_time() -> None:
    began = time.monotonic()
    many = 1 << 40
    for content in (
        struct.pack("<4sIQQ", b"GGUF", 3, many, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, many),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 8, many),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<QcIIQ", 1, b"k", 9, 9, many),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", many),
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + struct.pack("<QcI", 1, b"t", 1 << 31),
    ):
        assert headers.least_size(io.BytesIO(content + noise(100))) is None
    deep = b'{"a":' + b"[" * 2000
    assert shortage("a.safetensors", struct.pack("<Q", len(deep)) + deep) is None
    assert time.monotonic() - began < 10


LEFT = [
    ".git",
    ".git/config",
    "a/.git/hooks/x",
    ".cache/huggingface/trees/a",
    "a/.cache/huggingface",
    "._a",
    "b/._a.bin",
    ".DS_Store",
    "__MACOSX/._a",
    "Thumbs.db",
    "@eaDir/a",
    ".snapshot/a",
    ".nfs0123456789abcdef01",
    ".Trash-1000/a",
]
KEPT = [
    "a.bin",
    ".gitattributes",
    ".cache/other",
    ".keep",
    "_a",
    "a._b",
    "git/config",
    "snapshots/a",
    ".github/a",
]
COMPLETE = [
    "a.gguf",
    "m.gguf.part1of2",
    "aria2",
    "part",
    "a.partial.bin",
    ".a.safetensors.index.json",
    "part/a",
    "a.bin.20260131",
    "a.st",
    "a.json.abcdef",
    "x.deadbeef",
    "tmp",
    f"sha256-{'0a' * 32}",
]
BEGUN = {
    "a.gguf.aria2": "a.gguf",
    "b/a.gguf.aria2": "b/a.gguf",
    "a.gguf.part": "a.gguf.part",
    "a.crdownload": "a.crdownload",
    "._____temp/a.safetensors": "._____temp/a.safetensors",
    ".a.safetensors.x1Y2z3": ".a.safetensors.x1Y2z3",
    ".a.gguf.icloud": ".a.gguf.icloud",
    "a.gguf.lftp-pget-status": "a.gguf",
    "b/a.gguf.st": "b/a.gguf",
}
BEGUN |= {
    path: path
    for path in (
        "a.safetensors.6eF5b5da",
        "b/a.json.Ab012345",
        "a.gguf.part.minio",
        ".azDownload-0e7b3f6e-5c1d-4a77-9a80-3f2b1c0d9e8f-a.gguf",
        ".syncthing.a.gguf.tmp",
        "~syncthing~a.gguf.tmp",
        f"sha256-{'0a' * 32}-partial",
        f"sha256-{'0a' * 32}-partial-12",
        ".rsync-partial/a.gguf",
        "a.gguf.s3fetch_tmp",
        "a.safetensors.tmp",
        "a.onnx.temp",
    )
}


def test_what_is_left_out_and_what_is_not_complete_is_known_by_its_path() -> None:
    assert [path for path in LEFT + KEPT if is_left_out(path)] == LEFT
    assert {path: unfinished(path) for path in BEGUN} == BEGUN
    assert not any(unfinished(path) for path in (*KEPT, *COMPLETE))
