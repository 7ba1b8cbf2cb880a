"""Headers of weights and what stands in their place, byte by byte: GGUF, safetensors, archives, pointers."""

from __future__ import annotations

import io
import json
import struct

import pytest

from cachd.policy import gguf, placeholders, weight_lengths
from tests.ground.weights import lfs_pointer

MOST = 1000


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, offset: int, dimensions: int = 1) -> bytes:
    return text(name) + struct.pack("<I", dimensions) + bytes(8 * dimensions + 4) + struct.pack("<Q", offset)


def head(
    pairs: list[bytes], tensors: list[bytes] | None = None, *, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
    infos = tensors or []
    return struct.pack("<4sIQQ", magic, version, len(infos), len(pairs)) + b"".join(pairs + infos)


def header(content: bytes, most: int = MOST) -> gguf.Header:
    return gguf.header(io.BytesIO(content), most)


SPLIT = [pair("split.no", 2, struct.pack("<H", 1)), pair("split.count", 2, struct.pack("<H", 3))]


def test_a_header_says_the_architecture_the_split_and_where_the_tensors_begin() -> None:
    pairs = [
        pair("general.architecture", 8, text("llama")),
        pair("general.alignment", 4, struct.pack("<I", 256)),
        *SPLIT,
    ]
    content = head(pairs, [tensor("a", 0), tensor("b", 512)])
    begin = -(-len(content) // 256) * 256
    found = header(content + bytes(4096))
    assert found == gguf.Header(begin + 513, begin, 2, "llama", (1, 3), 6)


def test_what_a_header_does_not_say_is_empty() -> None:
    found = header(head([]))
    assert found == gguf.Header(24, 24, 0, "", None, 0)
    assert header(head(SPLIT[:1])).split is None
    assert header(head(SPLIT[1:])).split is None
    assert header(head([pair("split.no", 4, bytes(4)), SPLIT[1]])).split is None, "a number of another size"
    assert header(head([pair("general.architecture", 8, text(b"\xff"))])).architecture == "\ufffd"


@pytest.mark.parametrize(
    "value",
    [
        *[pair("x", kind, bytes(size)) for kind, size in gguf._SIZES.items()],
        pair("x", 8, text("any")),
        pair("x", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
        pair("x", 9, struct.pack("<IQ", 5, 3) + bytes(12)),
        pair("x", 9, struct.pack("<IQ", 0, 0)),
        pair("general.alignment", 10, bytes(8)),
    ],
)
def test_each_kind_of_value_is_skipped_and_what_follows_is_read(value: bytes) -> None:
    after = pair("general.architecture", 8, text("after"))
    assert header(head([value, after])).architecture == "after"


def test_items_are_counted_and_bounded() -> None:
    strings = pair("x", 9, struct.pack("<IQ", 8, 5) + text("") * 5)
    content = head([strings], [tensor("a", 0)])
    assert header(content + bytes(99)).items == 7  # a pair, five strings and a tensor
    assert header(content + bytes(99), 7).items == 7
    with pytest.raises(OverflowError):
        header(content + bytes(99), 6)
    with pytest.raises(OverflowError):
        header(head([pair("x", 7, b"1")] * 2), 1)


MALFORMED = {
    "another magic": head([], magic=b"GGML"),
    "version 1": head([], version=1),
    "version 4": head([], version=4),
    "a key that is too long": head([pair("x" * ((1 << 16) + 1), 7, b"1")]),
    "a kind that nobody knows": head([pair("x", 13, bytes(8))]),
    "no alignment": head([pair("general.alignment", 4, bytes(4))]),
    "an alignment that is too large": head([pair("general.alignment", 4, struct.pack("<I", (1 << 20) + 1))]),
    "an array of arrays": head([pair("x", 9, struct.pack("<IQ", 9, 1) + bytes(64))]),
    "too many dimensions": head([], [tensor("a", 0, dimensions=17)]),
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_header_is_refused_and_its_length_is_unknown(content: bytes) -> None:
    with pytest.raises(ValueError, match="its header is malformed"):
        header(content)
    assert gguf.least_size(io.BytesIO(content)) is None


@pytest.mark.parametrize(
    "content",
    [
        head([], version=2),
        head([pair("x" * (1 << 16), 7, b"1")]),
        head([pair("general.alignment", 4, struct.pack("<I", 1 << 20))]),
        head([pair("general.alignment", 4, struct.pack("<I", 1))]),
        head([], [tensor("a", 0, dimensions=16)]),
    ],
)
def test_a_header_at_its_bounds_is_read(content: bytes) -> None:
    assert header(content).data_begin <= len(content)
    assert gguf.least_size(io.BytesIO(content)) is not None


def test_a_header_that_ends_anywhere_too_early_needs_one_byte_more() -> None:
    content = head([pair("x", 8, text("any")), pair("y", 5, bytes(4))], [tensor("a", 0)])
    for size in range(4, len(content)):
        assert gguf.least_size(io.BytesIO(content[:size])) == size + 1, size
        with pytest.raises(ValueError, match=f"it ends within its header, after {size} bytes"):
            header(content[:size])
    assert gguf.least_size(io.BytesIO(content)) == -(-len(content) // 32) * 32 + 1


# --- safetensors and archives ---


def safetensors(described: object, length: int | None = None, data: int = 0) -> bytes:
    raw = described if isinstance(described, bytes) else json.dumps(described).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data)


def short(content: bytes, path: str = "a.safetensors") -> str | None:
    return weight_lengths.shortage(path, len(content), io.BytesIO(content))


TWO = {
    "__metadata__": {"format": "pt", "numbers": "5"},
    "a": {"dtype": "F32", "shape": [900, 2], "data_offsets": [0, 8]},
    "b": {"dtype": "F32", "shape": [3], "data_offsets": [8, 20]},
}


def test_safetensors_need_their_header_and_every_tensor() -> None:
    complete = safetensors(TWO, data=20)
    assert short(complete) is None
    assert short(complete + b"more") is None
    described = f"its header describes {len(complete)}"
    assert short(complete[:-1]) == described
    assert short(complete, "B.SAFETENSORS") is None
    assert short(complete[:-20]) == described
    assert short(complete[:50]) == f"its header describes {len(complete) - 20}"
    assert short(complete[:7]) == "its header describes 9"
    assert short(b"") == short(bytes(16)) == "its header is missing or has only zeros"
    assert short(bytes(15) + b"1", "a.gguf") is None


@pytest.mark.parametrize(
    "content",
    [
        safetensors(b"{}", 1),
        safetensors(b"{}", 100_000_001),
        safetensors(b"no json"),
        safetensors({"a": {"data_offsets": [0]}}),
        safetensors({"a": {"shape": [0, 99]}}),
        safetensors({"a": {"data_offsets": {"x": [0, 99]}}}),
        safetensors({}),
    ],
)
def test_what_is_no_or_another_safetensors_is_left_to_the_engine(content: bytes) -> None:
    assert short(content) is None


def test_the_longest_header_is_that_of_the_library() -> None:
    assert short(safetensors(b"{}", 100_000_000)) == "its header describes 100000008"
    assert short(safetensors(b"{", 2)) == "its header describes 10"


def test_an_archive_needs_the_directory_at_its_end() -> None:
    begin, end = b"PK\x03\x04" + bytes(100), b"PK\x05\x06" + bytes(18)
    for path in ("a.bin", "a.pt", "a.pth", "a.ckpt", "a.npz"):
        assert short(begin + end, path) is None
        assert short(begin, path) == "the directory at the end of its archive is missing"
        assert short(begin[1:], path) is None, "it is no archive"
    assert short(begin + end + bytes(65_535), "a.pt") is None
    assert short(begin + end + bytes(65_536), "a.pt") is not None
    assert short(begin, "a.zip") is None


# --- what stands in the place of weights ---


def instead(path: str, content: bytes) -> str | None:
    found = placeholders.found(path, len(content), io.BytesIO(content))
    return found.what if found else None


def test_a_pointer_is_a_complete_file_and_no_longer_than_its_bound() -> None:
    pointer = lfs_pointer(b"x")
    assert instead("a.bin", pointer) == instead("a.txt", pointer) == "a pointer of Git LFS"
    assert instead("a.bin", pointer + bytes(2048 - len(pointer))) == "a pointer of Git LFS"
    assert instead("a.bin", pointer + bytes(2049 - len(pointer))) is None
    assert instead("a.txt", pointer + b"more") is None
    for size, may in ((2048, True), (2049, False)):
        assert placeholders.may_be_pointer("a.bin", size) is may
        assert placeholders.may_be_pointer("a.json", size) is may
        assert not placeholders.may_be_pointer("a.py", size)


def test_a_page_or_frames_stand_only_in_the_place_of_binary_files() -> None:
    page = b"\xef\xbb\xbf \n<!DOCTYPE html>" + bytes(5000)
    framed = b"5;chunk-signature=" + b"0" * 64 + b"\r\nbytes\r\n0\r\n"
    assert instead("a.bin", page) == "a page or an error document"
    assert "chunk frames" in str(instead("a.bin", framed))
    assert "chunk frames" in str(instead("a.bin", b"5\r\nbytes\r\n"))
    for path, content in (
        ("a.txt", page),
        ("a.txt", framed),
        ("a.bin", b"5\r\nbytesxx"),
        ("a.bin", b"5\r\nby"),
    ):
        assert instead(path, content) is None
