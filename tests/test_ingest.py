"""An ingest: its parts, its journal, and what the next life resumes of them."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import xxhash

from cachd.errors import (
    Cancelled,
    Corrupt,
    DiskFailed,
)
from cachd.model import Extent, File
from cachd.store.disk_store import DiskStore
from cachd.store.ingest import Ingest
from cachd.transfer.download import turn
from cachd.transfer.download.part import Part
from tests.ground.models import noise
from tests.ground.stored import (
    CONTENT,
    DIGESTS,
    FILE,
    KIB,
    MIB,
    PARTS,
    commit,
    file_of,
    ingest_directory,
    left_by_an_earlier_life,
    names_below,
    overwrite,
    sha256,
    write,
)


def test_a_new_ingest_lacks_everything_and_has_blocks_for_what_is_allocated_alone(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(0, len(CONTENT))]
        assert (ingest.prefix, ingest.behind, ingest.resumed) == (0, 0, 0)
        assert store.content.allocated(FILE) == ingest.allocated == 0
        ingest.allocate(Extent(0, len(CONTENT)))
        assert store.content.allocated(FILE) == ingest.allocated >= len(CONTENT)
        assert stat.S_IMODE(ingest.directory.stat().st_mode) == 0o700


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_parts_come_in_any_order_and_the_digest_follows_the_prefix(
    store: DiskStore, order: tuple[int, ...]
) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        for number in order:
            write(ingest, CONTENT, PARTS[number])
            ingest.follow(memoryview(bytearray(1000)))
            assert not ingest.behind
        assert ingest.is_received
        assert ingest.is_hashed
        assert ingest.digest() == FILE.digest


class _Noting(Ingest):
    """Notes whether an extent had its part hash when its bytes were counted as received."""

    def received(self, extent: Extent) -> None:
        self.noted = [*getattr(self, "noted", []), extent in self.parts]
        super().received(extent)


def test_a_part_has_its_hash_before_its_last_byte_counts_as_received(tmp_path: Path) -> None:
    """Once all bytes are received, another thread may complete a digest that is joined from part hashes."""
    with closing(_Noting(tmp_path / "it", File("it", 200, "http://host/it"))) as ingest:
        part, content = Part(Extent(0, 200)), memoryview(noise(200))
        part.hash = ingest.part_hash()
        for begin in (0, 100):
            turn.write(SimpleNamespace(ingest=ingest), part, content[begin : begin + 100])  # type: ignore[arg-type]
        assert ingest.noted == [False, True]


def test_a_digest_is_not_to_be_had_before_the_whole_is_hashed(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *PARTS[:2])
        ingest.follow(memoryview(bytearray(KIB)))
        with pytest.raises(ValueError, match="digest asked"):
            ingest.digest()


def test_an_ingest_is_not_sealed_before_it_is_hashed(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, *PARTS)
        with pytest.raises(ValueError, match="sealed before"):
            ingest.seal()
        assert stat.S_IMODE((ingest.directory / "data").stat().st_mode) == 0o600


def test_finished_parts_are_resumed_and_landed_bytes_are_not(
    store: DiskStore, next_life: Callable[[], DiskStore]
) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, PARTS[0], PARTS[2])
        ingest.write(PARTS[1].start, memoryview(CONTENT[PARTS[1].start : PARTS[1].stop]))
        ingest.received(PARTS[1])
    with closing(next_life().content.begin(FILE)) as resumed:
        assert resumed.gaps() == [PARTS[1]]
        assert resumed.resumed == PARTS[0].size + PARTS[2].size
    commit(next_life(), FILE, CONTENT)
    assert store.content.path(FILE.blob).read_bytes() == CONTENT


def test_a_file_of_one_part_is_kept_with_no_sync_and_no_journal(store: DiskStore) -> None:
    assert names_below(left_by_an_earlier_life(store)) == {"data", "about.json", "received"}
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == []


def keep_begun(ingest: Ingest, *stops: int) -> None:
    """Write the first part of CONTENT so far, and keep it at each of these."""
    hashed, reached = ingest.part_hash(), 0
    for stop in stops:
        piece = memoryview(CONTENT[reached:stop])
        ingest.write(reached, piece)
        hashed.update(piece)
        ingest.received(Extent(0, stop))
        ingest.keep(Extent(0, stop), hashed)
        reached = stop


def test_a_digest_that_is_far_behind_is_taken_in_steps_that_a_cancel_can_end(store: DiskStore) -> None:
    content = bytes(65 * MIB)
    with closing(store.content.begin(file_of(content))) as ingest:
        write(ingest, content)
        ingest.follow(memoryview(bytearray(MIB)))
        assert ingest.behind == MIB


def test_a_resume_that_is_cancelled_in_mid_file_loses_nothing(
    store: DiskStore, next_life: Callable[[], DiskStore]
) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        write(ingest, CONTENT, PARTS[0], PARTS[2])

    def cancelled() -> None:
        raise Cancelled("while it is read back")

    again = next_life()
    with pytest.raises(Cancelled):
        again.content.begin(FILE, cancelled)
    with closing(again.content.begin(FILE)) as resumed:
        assert resumed.resumed == PARTS[0].size + PARTS[2].size


@pytest.mark.parametrize("algorithm", ["sha256", "crc64nvme", "crc32c", None])
def test_what_was_kept_of_a_part_is_resumed_in_every_life_and_the_rest_of_it_is_missing(
    store: DiskStore, algorithm: str | None
) -> None:
    digest = DIGESTS[algorithm](CONTENT) if algorithm else None
    file = File("model.bin", len(CONTENT), "https://host/model.bin", digest, '"tag"')
    with closing(store.content.begin(file)) as ingest:
        keep_begun(ingest, KIB, 3 * KIB)
    about = (ingest.directory / "about.json").stat()
    for _ in range(3):
        with closing(store.content.begin(file)) as ingest:
            assert (ingest.gaps(), ingest.resumed) == ([Extent(3 * KIB, 10 * KIB)], 3 * KIB)
            # A life that is killed while it begins must not take away what makes the others' lines believed.
            assert (ingest.directory / "about.json").stat().st_mtime_ns == about.st_mtime_ns
    commit(store, file, CONTENT)
    assert store.content.path(file.blob).read_bytes() == CONTENT


def test_of_what_was_kept_the_longest_that_is_right_is_believed(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        keep_begun(ingest, KIB, 2 * KIB, 3 * KIB)
    overwrite(ingest_directory(store) / "data", 2 * KIB + 5, b"!")
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(2 * KIB, 10 * KIB)]
    commit(store, FILE, CONTENT)


def test_a_part_that_goes_on_has_one_hash_however_often_it_was_kept(store: DiskStore) -> None:
    """The table of a blob's parts has no line for each time."""
    file = File("model.bin", len(CONTENT), "https://host/model.bin", None, '"tag"')
    with closing(store.content.begin(file)) as ingest:
        keep_begun(ingest, KIB, 2 * KIB, 3 * KIB, 4 * KIB)
        write(ingest, CONTENT, *PARTS[1:])
        ingest.follow(memoryview(bytearray(KIB)))
        assert [line.split()[:2] for line in ingest.part_lines().splitlines()] == [
            [str(part.start), str(part.stop)] for part in PARTS
        ]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": lambda data: overwrite(data, PARTS[1].start + 7, bytes([CONTENT[PARTS[1].start + 7] ^ 1])),
    "zeros": lambda data: overwrite(data, PARTS[1].start, bytes(PARTS[1].size)),
    "other bytes": lambda data: overwrite(data, PARTS[1].start, noise(100, 9)),
    "the bytes of another part": lambda data: overwrite(data, PARTS[1].start, CONTENT[: PARTS[1].size]),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_journal_line_is_not_believed_when_its_bytes_are_others(
    store: DiskStore, damage: Callable[[Path], object]
) -> None:
    damage(left_by_an_earlier_life(store, *PARTS) / "data")
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [PARTS[1]]
    commit(store, FILE, CONTENT)


def test_data_that_lost_its_tail_is_believed_as_far_as_it_goes(store: DiskStore) -> None:
    os.truncate(left_by_an_earlier_life(store, *PARTS) / "data", PARTS[1].stop)
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [PARTS[2]]
    commit(store, FILE, CONTENT)


def test_data_that_grew_is_cut_to_the_size_of_its_file(store: DiskStore) -> None:
    overwrite(left_by_an_earlier_life(store, *PARTS) / "data", len(CONTENT), noise(100))
    commit(store, FILE, CONTENT)
    assert store.content.path(FILE.blob).read_bytes() == CONTENT


HASH = xxhash.xxh3_128(CONTENT[4 * KIB : 8 * KIB]).hexdigest()
GARBAGE_LINES = {
    "torn": f"4096 8192 {HASH[:9]}",
    "torn at a number": "4096 81",
    "empty": "",
    "binary": "\0\0\0\0\xff\xfe",
    "words": "four eight hash",
    "signs": f"-4096 +8192 {HASH}",
    "backwards": f"8192 4096 {HASH}",
    "nothing": f"4096 4096 {HASH}",
    "beyond the end": f"4096 99999999 {HASH}",
    "a number too long": f"{'9' * 5000} {'9' * 5001} {HASH}",
    "four words": f"4096 8192 {HASH} 1",
    "another hash": f"4096 8192 {'0' * 32}",
    "another digit script": f"\u0664 8192 {HASH}",
}


@pytest.mark.parametrize("line", GARBAGE_LINES.values(), ids=GARBAGE_LINES.keys())
@pytest.mark.parametrize("end", ["\n", ""], ids=["whole line", "cut off"])
def test_a_garbage_line_is_passed_over_and_swallows_no_other(store: DiskStore, line: str, end: str) -> None:
    journal = left_by_an_earlier_life(store, PARTS[0]) / "journal"
    with journal.open("ab") as opened:
        opened.write(line.encode("latin-1", errors="replace") + end.encode())
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(4 * KIB, 10 * KIB)]
        write(ingest, CONTENT, PARTS[2])
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [PARTS[1]]


@pytest.mark.parametrize(
    "about",
    [
        None,
        b"",
        b"{",
        b"[]",
        b"5",
        b"{}",
        b"\xff\xfe",
        json.dumps({"blob": str(sha256(b"other")), "size": len(CONTENT)}).encode(),
        json.dumps({"blob": str(FILE.blob), "size": len(CONTENT) + 1}).encode(),
    ],
    ids=str,
)
def test_what_was_written_for_another_blob_or_size_is_begun_anew(
    store: DiskStore, about: bytes | None
) -> None:
    directory = left_by_an_earlier_life(store, *PARTS)
    if about is None:
        (directory / "about.json").unlink()
    else:
        (directory / "about.json").write_bytes(about)
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.gaps() == [Extent(0, len(CONTENT))]
        write(ingest, CONTENT, PARTS[0])
    with closing(store.content.begin(FILE)) as ingest:
        assert ingest.resumed == PARTS[0].size, "and no line of the old journal is believed with the new"
    commit(store, FILE, CONTENT)


def test_a_link_in_place_of_the_data_is_not_followed(store: DiskStore, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"keep me")
    (tmp_path / "victim").chmod(0o444)
    ingest_directory(store).mkdir()
    (ingest_directory(store) / "data").symlink_to(tmp_path / "victim")
    with suppress(DiskFailed):
        store.content.begin(FILE).close()
    assert (tmp_path / "victim").read_bytes() == b"keep me"
    assert stat.S_IMODE((tmp_path / "victim").stat().st_mode) == 0o444


def test_many_streams_write_one_ingest(store: DiskStore) -> None:
    content = noise(4 * MIB)
    file = file_of(content)
    parts = [Extent(start, start + 64 * KIB) for start in range(0, len(content), 64 * KIB)]
    with closing(store.content.begin(file)) as ingest, concurrent.futures.ThreadPoolExecutor(8) as streams:
        list(streams.map(lambda part: write(ingest, content, part), parts))
        assert ingest.is_received
    with closing(store.content.begin(file)) as resumed:
        assert resumed.gaps() == []
        resumed.follow(memoryview(bytearray(MIB)))
        store.content.commit(resumed)
    assert store.content.path(file.blob).read_bytes() == content


def test_an_ingest_leaves_no_descriptor_however_it_ends(store: DiskStore) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    left_by_an_earlier_life(store, PARTS[0])
    store.content.begin(FILE).discard()
    commit(store, FILE, CONTENT)
    wrong = File("wrong", 5, "https://host/wrong", sha256(b"right"))
    with pytest.raises(Corrupt):
        commit(store, wrong, b"wrong")
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_sync_whose_ingest_another_thread_has_discarded_is_no_failure_of_the_disk(store: DiskStore) -> None:
    with closing(store.content.begin(FILE)) as ingest:
        ingest.allocate(Extent(0, len(CONTENT)))
        hashed = ingest.part_hash()
        part = PARTS[0]
        ingest.write(part.start, memoryview(CONTENT[part.start : part.stop]))
        hashed.update(memoryview(CONTENT[part.start : part.stop]))
        ingest.keep(part, hashed)
        shutil.rmtree(ingest.directory)
        ingest.finish(part)
        with pytest.raises(DiskFailed):
            ingest.finish(part)
