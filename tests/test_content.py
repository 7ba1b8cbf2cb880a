"""Blobs: what a commit and a put make, and what they refuse."""

from __future__ import annotations

import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import xxhash

from cachd.errors import (
    Corrupt,
    NoSpace,
)
from cachd.model import Extent, File, Manifest
from cachd.store.disk_store import DiskStore
from tests.ground.disks import fill
from tests.ground.kill import base_as_another_user, killed_at_every_step
from tests.ground.models import noise
from tests.ground.stored import (
    CONTENT,
    DIGESTS,
    FILE,
    KIB,
    MIB,
    PARTS,
    assert_nothing_left,
    commit,
    cut,
    keep,
    manifest_of,
    names_below,
    write,
)


@pytest.mark.parametrize("algorithm", DIGESTS)
@pytest.mark.parametrize("content", [b"", b"x", noise(5000)], ids=["empty", "a byte", "5000 bytes"])
def test_a_commit_makes_a_read_only_blob_of_the_right_bytes(
    store: DiskStore, algorithm: str, content: bytes
) -> None:
    file = File("model.bin", len(content), "https://host/model.bin", DIGESTS[algorithm](content))
    assert not store.content.has(file)
    commit(store, file, content)
    assert store.content.has(file)
    path = store.content.path(file.blob)
    status = path.lstat()
    assert path.read_bytes() == content
    assert (stat.S_IMODE(status.st_mode), status.st_nlink) == (0o444, 1)
    assert names_below(store.layout.root / ".cachd/ingest") == set()


@pytest.mark.parametrize("algorithm", DIGESTS)
def test_a_commit_of_a_wrong_byte_raises_corrupt_and_leaves_nothing(store: DiskStore, algorithm: str) -> None:
    right = noise(5000)
    wrong = bytes([right[0] ^ 1]) + right[1:]
    file = File("model.bin", len(right), "https://host/model.bin", DIGESTS[algorithm](right))
    with pytest.raises(Corrupt) as refusal:
        commit(store, file, wrong)
    assert refusal.value.facts == {
        "file": "model.bin",
        "expected": str(file.digest),
        "got": str(DIGESTS[algorithm](wrong)),
    }
    assert not store.content.has(file)
    assert_nothing_left(store.layout.root)


def test_a_blob_whose_source_has_no_digest_keeps_the_hashes_of_its_parts(store: DiskStore) -> None:
    file = File("model.bin", len(CONTENT), "https://host/model.bin", None, '"tag"')
    with closing(store.content.begin(file)) as ingest:
        write(ingest, CONTENT, *PARTS)
        ingest.follow(memoryview(bytearray(KIB)))
        store.content.commit(ingest)
    path = store.content.path(file.blob)
    assert path.with_name(f"{path.name}.parts").read_text().splitlines() == [
        f"{p.start} {p.stop} {xxhash.xxh3_128(CONTENT[p.start : p.stop]).hexdigest()}" for p in PARTS
    ]
    store.content.removal.free(Manifest("https://host/model.bin", "0" * 64, (file,)))
    assert_nothing_left(store.layout.root)


@pytest.mark.parametrize(
    ("algorithm", "known_by"),
    [
        ("crc64nvme", lambda content: DIGESTS["crc64nvme"](content).hex),
        ("crc32c", lambda content: xxhash.xxh3_128(content).hexdigest()),
        ("sha256", lambda content: xxhash.xxh3_128(content).hexdigest()),
    ],
)
def test_a_part_is_hashed_once_more_only_where_its_checksum_is_too_short_to_know_it_by(
    store: DiskStore, algorithm: str, known_by: Callable[[bytes], str]
) -> None:
    file = File("model.bin", len(CONTENT), "s3://b/model.bin", DIGESTS[algorithm](CONTENT))
    part = PARTS[1]
    with closing(store.content.begin(file)) as ingest:
        write(ingest, CONTENT, part)
        journal = (ingest.directory / "journal").read_text()
    assert journal == f"{part.start} {part.stop} {known_by(CONTENT[part.start : part.stop])}\n"


@pytest.mark.parametrize("algorithm", ["crc64nvme", "crc32c", "crc32"])
def test_a_checksum_is_joined_from_parts_resumed_received_and_read_back(
    store: DiskStore, algorithm: str
) -> None:
    file = File("model.bin", len(CONTENT), "s3://b/model.bin", DIGESTS[algorithm](CONTENT))
    with closing(store.content.begin(file)) as ingest:
        write(ingest, CONTENT, PARTS[1])
    with closing(store.content.begin(file)) as ingest:
        assert ingest.resumed == PARTS[1].size
        write(ingest, CONTENT, PARTS[2])
        torn = CONTENT[: PARTS[0].stop]  # landed by a stream that never finished the part
        ingest.write(0, memoryview(torn))
        ingest.received(PARTS[0])
        assert ingest.behind == len(CONTENT)
        ingest.follow(memoryview(bytearray(KIB)))
        assert ingest.digest() == file.digest


def test_parts_that_overlap_are_hashed_as_the_disk_has_them(store: DiskStore) -> None:
    file = File("model.bin", len(CONTENT), "s3://b/model.bin", DIGESTS["crc64nvme"](CONTENT))
    with closing(store.content.begin(file)) as ingest:
        write(ingest, bytes(len(CONTENT)), Extent(0, PARTS[1].start + 1), Extent(5 * KIB, 6 * KIB))
        write(ingest, CONTENT, *PARTS)
        ingest.follow(memoryview(bytearray(KIB)))
        assert ingest.digest() == file.digest


def test_a_blob_of_another_size_is_not_here(store: DiskStore) -> None:
    commit(store, FILE, CONTENT)
    cut(store.content.path(FILE.blob), 5)
    assert not store.content.has(FILE)
    commit(store, FILE, CONTENT)
    assert store.content.path(FILE.blob).read_bytes() == CONTENT


def test_what_is_missing_is_one_file_a_blob(store: DiskStore) -> None:
    manifest = manifest_of({"a": CONTENT, "b": CONTENT, "c": b"c", "d": b"d"})
    keep(store, {"d": b"d"})
    assert sorted(len(CONTENT) if f.size > 1 else f.size for f in store.content.missing(manifest)) == [
        1,
        len(CONTENT),
    ]


def test_a_process_killed_at_any_step_of_a_commit_leaves_what_the_next_can_finish() -> None:
    with base_as_another_user() as base:
        DiskStore(base).close()

        def committed(root: Path) -> None:
            with DiskStore(root) as store:
                commit_in_parts(store)

        for root in killed_at_every_step(base, committed):
            with DiskStore(root) as store:
                if store.content.has(FILE):
                    assert store.content.path(FILE.blob).read_bytes() == CONTENT
                else:
                    commit(store, FILE, CONTENT)
                assert store.content.path(FILE.blob).read_bytes() == CONTENT
                store.content.removal.free(manifest_of({"model.bin": CONTENT}))
                assert_nothing_left(root)


def commit_in_parts(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *PARTS)
        ingest.follow(memoryview(bytearray(64 * KIB)))
        store.content.commit(ingest)


@pytest.mark.parametrize("algorithm", DIGESTS)
def test_a_small_file_is_put_as_a_read_only_blob_and_a_wrong_one_is_not(
    store: DiskStore, algorithm: str
) -> None:
    right = noise(5000)
    wrong = bytes([right[0] ^ 1]) + right[1:]
    file = File("config.json", len(right), "https://host/config.json", DIGESTS[algorithm](right))
    with pytest.raises(Corrupt) as refusal:
        store.content.put(file, memoryview(wrong))
    assert refusal.value.facts["got"] == str(DIGESTS[algorithm](wrong))
    assert_nothing_left(store.layout.root)
    store.content.put(file, memoryview(right))
    path = store.content.path(file.blob)
    assert path.read_bytes() == right
    assert (stat.S_IMODE(path.lstat().st_mode), path.lstat().st_nlink) == (0o444, 1)
    for directory in ("ingest", "staging"):
        assert names_below(store.layout.root / ".cachd" / directory) == set()


def test_a_process_killed_at_any_step_of_a_put_leaves_a_blob_or_nothing() -> None:
    with base_as_another_user() as base:
        DiskStore(base).close()

        def put(root: Path) -> None:
            with DiskStore(root) as store:
                store.content.put(FILE, memoryview(CONTENT))

        for root in killed_at_every_step(base, put):
            with DiskStore(root) as store:
                if not store.content.has(FILE):
                    assert_nothing_left(root)
                    store.content.put(FILE, memoryview(CONTENT))
                assert store.content.path(FILE.blob).read_bytes() == CONTENT
                store.content.removal.free(manifest_of({"model.bin": CONTENT}))
                assert_nothing_left(root)


def test_a_small_file_that_finds_no_room_leaves_no_block_behind(small_disk: Callable[..., Path]) -> None:
    root = small_disk(MIB)
    with DiskStore(root) as store:
        filler = fill(root)
        with pytest.raises(NoSpace):
            store.content.put(FILE, memoryview(CONTENT))
        assert_nothing_left(root)
        filler.unlink()
        store.content.put(FILE, memoryview(CONTENT))


def test_bytes_that_no_digest_vouches_for_are_not_put(store: DiskStore) -> None:
    file = File("model.bin", 1, "https://host/model.bin", None, '"tag"')
    with pytest.raises(ValueError, match="cannot be verified"):
        store.content.put(file, memoryview(b"x"))
