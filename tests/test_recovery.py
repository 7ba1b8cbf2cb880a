"""What is recovered of an earlier run or of a damaged blob, and the copy of an ingest, without the ingest."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from cachd.errors import Cancelled
from cachd.model import Digest, Extent, File
from cachd.store.digests import PartHash
from cachd.store.ingest.copies import bytes_to_copy, copy_ingest
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.journal import Recorded
from cachd.store.ingest.part_hashes import PartHashes
from cachd.store.ingest.part_lines import parts_of
from cachd.store.ingest.recovery import Recovered, copied, has_all_synced, resumed
from tests.ground.disks import FuseDisk
from tests.ground.models import noise

CONTENT = noise(4000)
FILE = File("model.bin", 4000, "https://host/model.bin", Digest("sha256", "0" * 64))
BUFFER = memoryview(bytearray(700))
A, B, C = Extent(0, 1000), Extent(1000, 2000), Extent(2000, 4000)


def hash_of(part: Extent, content: bytes = CONTENT) -> str:
    hashed = PartHash(None)
    hashed.update(memoryview(content)[part.start : part.stop])
    return hashed.hexdigest


def lines_of(*parts: Extent, wrong: bool = False) -> str:
    return "".join(f"{p.start} {p.stop} {'0' * 32 if wrong else hash_of(p)}\n" for p in parts)


def recorded(start: int, *stops: int, synced: int = 0, wrong: tuple[int, ...] = ()) -> Recorded:
    lines = ((stop, "0" * 32 if stop in wrong else hash_of(Extent(start, stop))) for stop in stops)
    return Recorded(start, tuple(lines), max(synced, start))


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFile]:
    with closing(DataFile(tmp_path, lambda: None)) as opened:
        opened.write(0, memoryview(CONTENT))
        yield opened


def opened_below(place: Path) -> list[str]:
    """The files below `place` that this process has open."""
    opened = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return [path for path in opened if path.startswith(f"{place}/")]


# --- an earlier run ---

RESUMED: dict[str, tuple[Recorded, tuple[Extent, bool] | None]] = {
    "a synced part": (recorded(0, 1000, synced=1000), (A, True)),
    "a part that is not synced": (recorded(0, 1000), (A, False)),
    "a part that is synced in part": (recorded(0, 500, 1000, synced=500), (A, False)),
    "a part synced further than it is right": (
        recorded(0, 500, 1000, synced=1000, wrong=(1000,)),
        (Extent(0, 500), True),
    ),
    "a wrong part": (recorded(1000, 2000, synced=2000, wrong=(2000,)), None),
    "a wrong line before a right one": (recorded(1000, 1500, 2000, wrong=(1500,)), (B, False)),
    "a part beyond the end of the data": (recorded(3000, 4000, 5000), (Extent(3000, 4000), False)),
    "no line": (recorded(0), None),
}


@pytest.mark.parametrize(("line", "expected"), RESUMED.values(), ids=RESUMED)
def test_the_longest_extent_with_the_right_hash_is_resumed(
    data: DataFile, line: Recorded, expected: tuple[Extent, bool] | None
) -> None:
    later = recorded(2000, 4000, synced=4000)
    found = list(resumed([line, later], data, PartHashes(None), BUFFER))
    assert [(each.part, each.is_synced) for each in found] == [*([expected] if expected else []), (C, True)]
    assert [each.hashed.hexdigest for each in found] == [hash_of(each.part) for each in found]


def test_bytes_that_cannot_be_written_again_are_missing(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as disk, closing(DataFile(disk.path, lambda: None)) as data:
        data.write(0, memoryview(CONTENT))
        disk.fail("write", "EIO")
        lines = [recorded(0, 1000), recorded(1000, 2000, synced=2000)]
        found = list(resumed(lines, data, PartHashes(None), BUFFER))
        assert [(each.part, each.is_synced) for each in found] == [(B, True)]


def test_a_cancelled_resume_is_no_loss(tmp_path: Path) -> None:
    def cancelled() -> None:
        raise Cancelled("the pull was cancelled")

    with closing(DataFile(tmp_path, cancelled)) as data, pytest.raises(Cancelled):
        list(resumed([recorded(0, 1000)], data, PartHashes(None), BUFFER))


@pytest.mark.parametrize(
    ("lines", "found", "expected"),
    [
        ([], [], False),
        ([recorded(0, 1000)], [A], False),
        ([recorded(0, 1000, synced=1000)], [A], True),
        ([recorded(0, 1000, synced=1000)], [], False),
        ([recorded(0, 1000, synced=1000)], [Extent(0, 999)], False),
        ([recorded(0, 1000, synced=500)], [Extent(0, 500)], True),
        ([recorded(0, 1000, synced=1000), recorded(1000, 2000)], [A], True),
        ([recorded(0, 1000, synced=1000), recorded(1000, 2000, synced=2000)], [A], False),
    ],
)
def test_all_that_the_journal_promised_is_there_or_not(
    lines: list[Recorded], found: list[Extent], *, expected: bool
) -> None:
    recovered = [Recovered(part, PartHash(None), is_synced=True) for part in found]
    assert has_all_synced(lines, recovered) is expected


# --- a damaged blob ---


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A blob whose second part is another."""
    blob = tmp_path / "damaged"
    blob.write_bytes(CONTENT[:1000] + bytes(1000) + CONTENT[2000:])
    parts_of(blob).write_text(lines_of(A, B, C))
    return blob


def salvaged(damaged: Path, place: Path, *gaps: Extent) -> tuple[list[Extent], bytes]:
    """The parts that are copied into a data file of ones, and its bytes."""
    place.mkdir()
    with closing(DataFile(place, lambda: None)) as data:
        data.write(0, memoryview(b"\1" * 4000))
        found = list(copied(damaged, FILE, lambda: [*gaps], data, PartHashes(None)))
        assert all(each.hashed.hexdigest == hash_of(each.part) and not each.is_synced for each in found)
        return [each.part for each in found], data.path.read_bytes()


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([Extent(0, 4000)], [A, C]),
        ([Extent(0, 1000), Extent(2000, 4000)], [A, C]),
        ([Extent(0, 999), Extent(2000, 4000)], [C]),
        ([Extent(1, 1000), Extent(2001, 4000)], []),
        ([Extent(0, 1000), Extent(2000, 3999)], [A]),
        ([], []),
    ],
)
def test_intact_parts_fill_gaps_and_replace_no_received_byte(
    damaged: Path, tmp_path: Path, gaps: list[Extent], expected: list[Extent]
) -> None:
    found, content = salvaged(damaged, tmp_path / "ingest", *gaps)
    assert found == expected
    kept = bytearray(b"\1" * 4000)
    for part in expected:
        kept[part.start : part.stop] = CONTENT[part.start : part.stop]
    assert content == kept
    assert opened_below(tmp_path) == []


def test_of_a_shorter_blob_its_complete_parts_are_copied(damaged: Path, tmp_path: Path) -> None:
    os.truncate(damaged, 3000)
    assert salvaged(damaged, tmp_path / "ingest", Extent(0, 4000))[0] == [A]
    damaged.unlink()
    with pytest.raises(FileNotFoundError):
        salvaged(damaged, tmp_path / "again", Extent(0, 4000))


@pytest.mark.parametrize(
    ("match", "error", "expected"),
    [("/damaged", "EIO", []), ("/damaged.parts", "EIO", []), ("/damaged.parts", "EACCES", None)],
)
def test_what_the_disk_cannot_read_of_a_blob_counts_as_damaged(
    tmp_path: Path, match: str, error: str, expected: list[Extent] | None
) -> None:
    with FuseDisk(tmp_path) as disk:
        blob = disk.path / "damaged"
        blob.write_bytes(CONTENT)
        parts_of(blob).write_text(lines_of(A, B, C))
        disk.fail("read", error, match)
        if expected is None:
            with pytest.raises(PermissionError):
                salvaged(blob, tmp_path / "ingest", Extent(0, 4000))
        else:
            assert salvaged(blob, tmp_path / "ingest", Extent(0, 4000))[0] == expected


# --- the copy of an ingest ---


@pytest.fixture
def ingest(tmp_path: Path) -> Path:
    """An ingest with three lines: one in `received`, one that overlaps it and one more in `journal`."""
    place = tmp_path / "ingest"
    place.mkdir()
    (place / "data").write_bytes(CONTENT)
    (place / "received").write_text(lines_of(Extent(2000, 3000)))
    (place / "journal").write_text(lines_of(Extent(100, 1000), Extent(500, 1500)))
    (place / "about.json").write_text("about")
    return place


def test_the_copy_of_an_ingest_has_the_recorded_bytes_and_all_lines_in_one_file(
    ingest: Path, tmp_path: Path
) -> None:
    target = tmp_path / "copy"
    copy_ingest(ingest, target)
    assert sorted(os.listdir(target)) == ["about.json", "data", "received"]
    expected = lines_of(Extent(2000, 3000), Extent(100, 1000), Extent(500, 1500))
    assert ((target / "received").read_text(), (target / "about.json").read_text()) == (expected, "about")
    content = (target / "data").read_bytes()
    assert content == bytes(100) + CONTENT[100:1500] + bytes(500) + CONTENT[2000:3000]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (target, target / "data")] == [0o700, 0o600]
    assert bytes_to_copy(ingest) == 2400
    (ingest / "owners").write_text("owners")
    copy_ingest(ingest, tmp_path / "again")
    assert (tmp_path / "again/owners").read_text() == "owners"
    assert opened_below(tmp_path) == []


BYTES: dict[str, tuple[list[Extent], int]] = {
    "none": ([], 0),
    "one": ([A], 1000),
    "side by side": ([B, A], 2000),
    "twice the same": ([A, A], 1000),
    "one in another": ([C, Extent(2500, 3000)], 2000),
    "by one byte": ([A, Extent(999, 1001)], 1001),
}


@pytest.mark.parametrize(("parts", "expected"), BYTES.values(), ids=BYTES)
def test_bytes_to_copy_are_counted_once(ingest: Path, parts: list[Extent], expected: int) -> None:
    (ingest / "received").unlink()
    (ingest / "journal").write_text(lines_of(*parts))
    assert bytes_to_copy(ingest) == expected


@pytest.mark.parametrize("ask", [bytes_to_copy, lambda at: copy_ingest(at, at.with_name("copy"))])
def test_an_ingest_without_data_cannot_be_copied(ingest: Path, ask: Callable[[Path], object]) -> None:
    (ingest / "data").unlink()
    with pytest.raises(FileNotFoundError):
        ask(ingest)


def test_the_copy_of_large_and_of_shorter_data_is_what_is_there(ingest: Path, tmp_path: Path) -> None:
    content = noise(9 << 20)
    (ingest / "data").write_bytes(content)
    (ingest / "received").write_text(f"0 {9 << 20} {'0' * 32}\n")
    copy_ingest(ingest, tmp_path / "copy")
    assert (tmp_path / "copy/data").read_bytes() == content


@pytest.mark.parametrize(("error", "is_copied"), [("EOPNOTSUPP", True), ("EIO", False)])
def test_bytes_are_copied_here_where_the_file_server_does_not_copy_them(
    ingest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str, *, is_copied: bool
) -> None:
    number = getattr(errno, error)

    def refused(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refused)
    if is_copied:
        copy_ingest(ingest, tmp_path / "copy")
        assert (tmp_path / "copy/data").read_bytes()[100:1500] == CONTENT[100:1500]
    else:
        with pytest.raises(OSError, match="Input/output"):
            copy_ingest(ingest, tmp_path / "copy")
    assert opened_below(tmp_path) == []
