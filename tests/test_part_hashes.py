"""The hashes of the parts of a file, their lines, and the digest that comes of them, without an ingest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachd.model import Digest, Extent, File
from cachd.store.digests import PartHash, checksum, digest_of
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.file_digest import FileDigest
from cachd.store.ingest.part_hashes import PartHashes
from cachd.store.ingest.part_lines import line_of, parts_of, read_parts
from tests.ground.models import noise

A, B, C = Extent(0, 10), Extent(10, 20), Extent(20, 30)
MIB = 1 << 20
CONTENT = noise(3 * MIB)
SHA256, CRC = Digest("sha256", "0" * 64), Digest("crc32", "0" * 8)
GIT, LONG_CRC = Digest("git-sha1", "0" * 40), Digest("crc64nvme", "0" * 16)


def hash_of(parts: PartHashes | None, content: bytes) -> PartHash:
    made = (parts or PartHashes(None)).new()
    made.update(memoryview(content))
    return made


# --- parts ---


def test_a_part_is_recorded_once_however_much_it_grows() -> None:
    parts, one, two = PartHashes(None), PartHash(None), PartHash(None)
    parts.record(Extent(0, 5), one)
    parts.record(C, two)
    parts.record(A, one)
    assert parts.extents() == {A, C}
    assert parts.in_order() == [(A, one), (C, two)]
    parts.forget([A, B])
    assert parts.in_order() == [(C, two)]
    parts.replace({B: one})
    assert parts.in_order() == [(B, one)]


def test_a_new_hash_is_of_the_algorithm_of_the_file() -> None:
    plain, checked = PartHashes(None).new(), PartHashes(checksum(LONG_CRC)).new()
    for hashed in (plain, checked):
        hashed.update(memoryview(b"123456789"))
    assert plain.hexdigest == hash_of(None, b"123456789").hexdigest
    assert checked.hexdigest == digest_of(LONG_CRC, memoryview(b"123456789")).hex


OVERLAPS: dict[str, tuple[list[Extent], list[Extent]]] = {
    "none": ([], []),
    "side by side": ([C, A, B], [A, B, C]),
    "with a gap": ([C, A], [A, C]),
    "by one byte": ([A, Extent(9, 20), C], [C]),
    "twice the same": ([A, A, B], [B]),
    "one in another": ([Extent(0, 30), B], []),
    "one in another, and one after it": ([Extent(0, 20), Extent(5, 6), C], [C]),
    "two that begin where another ends": ([A, Extent(10, 30), B], [A]),
    "a chain": ([Extent(0, 12), Extent(11, 25), Extent(20, 30)], []),
    "one that reaches far, and two in it": (
        [Extent(0, 25), Extent(5, 10), C, Extent(30, 40)],
        [Extent(30, 40)],
    ),
}


@pytest.mark.parametrize(("recorded", "alone"), OVERLAPS.values(), ids=OVERLAPS)
def test_parts_that_overlap_another_are_left_out(recorded: list[Extent], alone: list[Extent]) -> None:
    parts = PartHashes(None)
    for part in recorded:
        parts.record(part, parts.new())
    found = parts.without_overlaps()
    assert list(found) == alone
    assert parts.lines() == "".join(line_of(part, hashed) for part, hashed in found.items())


# --- lines ---


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "received"
    assert list(read_parts(path, 30)) == []
    one, two = hash_of(None, b"1"), hash_of(None, b"2")
    path.write_text(line_of(A, one) + line_of(C, two))
    assert list(read_parts(path, 30)) == [(A, one.hexdigest), (C, two.hexdigest)]
    assert list(read_parts(path, 29)) == [(A, one.hexdigest)], "the other ends beyond the file"
    assert parts_of(tmp_path / "abc") == tmp_path / "abc.parts"


HASH = "0123456789abcdef"


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        (f"0 10 {HASH}", True),
        (f"0 10 {HASH * 2}", True),
        (f"0 10 {HASH}\r", True),
        (f"0 10 {HASH} ", False),
        (f"0  10 {HASH}", False),
        (f"0 10 {HASH}0", False),
        (f"0 10 {HASH[1:]}", False),
        (f"0 10 {HASH.upper()}", False),
        (f"10 10 {HASH}", False),
        (f"11 10 {HASH}", False),
        (f"9 10 {HASH}", True),
        (f"0 31 {HASH}", False),
        (f"-1 10 {HASH}", False),
        (f"0 {'0' * 17}9 {HASH}", True),
        (f"0 {'0' * 18}9 {HASH}", False),
        (f"0 \u0661 {HASH}", False),
        ("", False),
    ],
)
def test_a_line_that_is_none_is_skipped_and_the_next_is_read(
    tmp_path: Path, line: str, *, is_right: bool
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(f"{line}\n20 30 {HASH}".encode())
    *first, last = read_parts(path, 30)
    assert (bool(first), last) == (is_right, (C, HASH))


# --- the digest of a file ---


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFile]:
    with closing(DataFile(tmp_path, lambda: None)) as opened:
        opened.write(0, memoryview(CONTENT))
        yield opened


def digest_over(data: DataFile, kind: Digest | None, size: int = 3 * MIB) -> FileDigest:
    return FileDigest(File("model.bin", size, "https://host/model.bin", kind), data)


@pytest.mark.parametrize("buffer", [MIB, MIB - 1, 5 * MIB])
@pytest.mark.parametrize("kind", [SHA256, GIT])
def test_a_digest_in_order_follows_the_bytes_that_are_here(data: DataFile, kind: Digest, buffer: int) -> None:
    digest, view = digest_over(data, kind), memoryview(bytearray(buffer))
    assert [digest.takes_from(at) for at in (0, 1)] == [True, False]
    digest.follow(0, view)
    assert (digest.hashed, digest.behind(0), digest.behind(5)) == (0, 0, 5)
    digest.follow(2 * MIB, view)
    assert (digest.hashed, digest.behind(3 * MIB), digest.is_complete) == (2 * MIB, MIB, False)
    assert [digest.takes_from(at) for at in (0, 2 * MIB)] == [False, True]
    with pytest.raises(ValueError, match=r"model.bin: digest asked for at 2097152 of 3145728 bytes"):
        digest.digest()
    digest.take(memoryview(CONTENT)[2 * MIB :])
    assert (digest.is_complete, digest.behind(3 * MIB)) == (True, 0)
    assert digest.digest() == digest_of(kind, memoryview(CONTENT))
    sha256 = digest_of(SHA256, memoryview(CONTENT))
    assert digest.sha256() == (sha256 if kind is GIT else None)
    assert digest.read_sha256() == sha256
    digest.begin()
    assert (digest.hashed, digest.is_complete) == (0, False)


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1])
def test_a_sha256_is_read_of_a_file_of_any_size(data: DataFile, size: int) -> None:
    expected = hashlib.sha256(CONTENT[:size]).hexdigest()
    assert digest_over(data, None, size).read_sha256() == Digest("sha256", expected)


def test_one_call_follows_sixty_four_mebibytes_at_most(tmp_path: Path) -> None:
    with closing(DataFile(tmp_path, lambda: None)) as data:
        data.set_size(65 * MIB)
        digest = digest_over(data, SHA256, 65 * MIB)
        for hashed in (64, 65, 65):
            digest.follow(65 * MIB, memoryview(bytearray(MIB)))
            assert digest.hashed == hashed * MIB


@pytest.mark.parametrize("kind", [CRC, LONG_CRC, None])
@pytest.mark.parametrize("parts", list(itertools.combinations([(0, 1), (1, 2), (2, 3)], 2)), ids=str)
def test_without_an_order_parts_cover_the_file_and_what_they_lack_is_read(
    data: DataFile, kind: Digest | None, parts: list[tuple[int, int]]
) -> None:
    digest, view = digest_over(data, kind), memoryview(bytearray(1000))
    for start, stop in parts:
        extent = Extent(start * MIB, stop * MIB)
        digest.parts.record(extent, hash_of(digest.parts, CONTENT[extent.start : extent.stop]))
    digest.take(memoryview(b"not in order"))
    digest.follow(3 * MIB - 1, view)
    assert (digest.hashed, digest.takes_from(0)) == (0, False)
    assert [digest.behind(at) for at in (3 * MIB - 1, 3 * MIB)] == [0, 3 * MIB]
    digest.follow(3 * MIB, view)
    assert digest.is_complete
    assert digest.digest() == (digest_of(kind, memoryview(CONTENT)) if kind else None)
    assert digest.sha256() is None
    assert sum(part.size for part in digest.parts.extents()) == 3 * MIB


def test_parts_that_are_others_on_the_disk_are_spoiled(data: DataFile) -> None:
    digest, view = digest_over(data, None), memoryview(bytearray(MIB))
    first, second = Extent(0, MIB), Extent(MIB, 3 * MIB)
    for part in (first, second):
        digest.parts.record(part, hash_of(None, CONTENT[part.start : part.stop]))
    assert digest.spoiled(view) == frozenset()
    data.write(2 * MIB, memoryview(bytes(1) if CONTENT[2 * MIB] else b"\1"))
    assert digest.spoiled(view) == {second}
