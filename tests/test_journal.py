"""The journal of an ingest, without the ingest: what is noted, what is synced, and what another run reads."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed
from cachd.model import Digest, Extent, File
from cachd.store.digests import PartHash
from cachd.store.ingest.about import About
from cachd.store.ingest.data_file import DataFile
from cachd.store.ingest.journal import Journal, Recorded
from cachd.store.ingest.part_lines import line_of
from tests.ground.disks import FuseDisk
from tests.ground.pause import at_event
from tests.test_durable import os_calls

SIZE = 100
FILE = File("model.bin", SIZE, "https://host/model.bin", Digest("sha256", "0" * 64), base="https://host/")
FIRST, SECOND = Extent(0, 40), Extent(40, SIZE)


class Open:
    """A journal over a directory, and what it said it had synced."""

    def __init__(self, directory: Path, file: File = FILE) -> None:
        directory.mkdir(exist_ok=True)
        self.directory, self.about = directory, About(directory, file)
        self.data = DataFile(directory, lambda: None)
        self.synced: list[list[Extent]] = []
        self.journal = Journal(
            directory, file, self.data, self.about, lambda parts: self.synced.append([*parts])
        )

    def lines(self, name: str) -> str:
        path = self.directory / name
        return path.read_text() if path.exists() else ""

    def close(self) -> None:
        self.journal.close()
        self.data.close()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    with closing(Open(tmp_path / "ingest")) as made:
        yield made


def hashed(content: bytes = b"x") -> PartHash:
    made = PartHash(None)
    made.update(memoryview(content))
    return made


def test_a_kept_part_is_noted_at_once_and_in_the_journal_after_a_sync(opened: Open) -> None:
    one, two = hashed(b"1"), hashed(b"2")
    opened.journal.keep(FIRST, one)
    opened.journal.keep(SECOND, two)
    both = line_of(FIRST, one) + line_of(SECOND, two)
    assert (opened.lines("received"), opened.lines("journal"), opened.synced) == (both, "", [])
    for _ in range(2):
        opened.journal.sync()
    assert (opened.lines("received"), opened.lines("journal")) == (both, both)
    assert opened.synced == [[FIRST, SECOND]]


def test_a_part_that_grew_is_synced_as_it_is_by_then(opened: Open) -> None:
    grows = hashed(b"1")
    opened.journal.keep(Extent(0, 10), grows)
    short = line_of(Extent(0, 10), grows)
    grows.update(memoryview(b"2"))
    opened.journal.keep(FIRST, grows)
    opened.journal.sync()
    assert opened.lines("received") == short + line_of(FIRST, grows)
    assert (opened.lines("journal"), opened.synced) == (line_of(FIRST, grows), [[FIRST]])


def test_a_part_that_is_only_to_be_synced_is_not_noted(opened: Open) -> None:
    one = hashed()
    assert opened.journal.add_unsynced(FIRST, one) == line_of(FIRST, one)
    assert opened.lines("received") == ""
    opened.journal.sync()
    assert opened.lines("journal") == line_of(FIRST, one)


def test_the_first_sync_writes_whose_bytes_they_are(opened: Open) -> None:
    opened.journal.sync()
    assert not (opened.directory / "about.json").exists(), "nothing was kept"
    opened.journal.keep(FIRST, hashed())
    opened.journal.sync()
    assert json.loads(opened.lines("about.json"))["blob"] == str(FILE.blob)


def test_what_was_recorded_is_read_in_order_with_the_longest_synced_extent(opened: Open) -> None:
    assert list(opened.journal.recorded()) == []
    lines = {
        "received": [(40, 90, "1"), (0, 30, "2"), (0, 40, "3"), (0, 20, "4")],
        "journal": [(0, 20, "4"), (0, 30, "2"), (0, 10, "5")],
    }
    for name, some in lines.items():
        text = "".join(f"{start} {stop} {digit * 32}\n" for start, stop, digit in some)
        (opened.directory / name).write_text(text)
    first = ((10, "5" * 32), (20, "4" * 32), (20, "4" * 32), (30, "2" * 32), (30, "2" * 32), (40, "3" * 32))
    assert list(opened.journal.recorded()) == [Recorded(0, first, 30), Recorded(40, ((90, "1" * 32),), 40)]


@pytest.mark.parametrize(("left", "then"), [("0 40 abc", "0 40 abc\n\n"), ("", "")])
def test_a_line_that_a_crash_has_cut_off_is_ended(opened: Open, left: str, then: str) -> None:
    if left:
        (opened.directory / "received").write_text(left + "\n")
    opened.journal.end_torn_line()
    assert opened.lines("received") == then
    (opened.directory / "journal").write_text("0 40 abc")
    one = hashed()
    opened.journal.keep(FIRST, one)
    opened.journal.sync()
    assert opened.lines("journal") == "0 40 abc\n" + line_of(FIRST, one)


def test_a_complete_last_line_of_the_journal_is_not_ended_again(opened: Open) -> None:
    (opened.directory / "journal").write_text("0 40 abc\n")
    one = hashed()
    opened.journal.keep(FIRST, one)
    opened.journal.sync()
    assert opened.lines("journal") == "0 40 abc\n" + line_of(FIRST, one)


def test_a_new_begin_removes_the_lines_and_says_whose_bytes_come(opened: Open) -> None:
    opened.journal.keep(FIRST, hashed())
    (opened.directory / "journal").write_text("x\n")
    (opened.directory / "about.json").write_text("of another")
    opened.journal.begin()
    assert sorted(os.listdir(opened.directory)) == ["about.json", "data"]
    assert json.loads(opened.lines("about.json"))["size"] == SIZE
    opened.journal.keep(SECOND, two := hashed(b"2"))
    assert opened.lines("received") == line_of(SECOND, two)


def test_rewritten_lines_are_all_that_is_left_and_the_journal_goes_on_after_them(opened: Open) -> None:
    for part in (FIRST, SECOND):
        opened.journal.keep(part, hashed())
    opened.journal.sync()
    opened.journal.keep(SECOND, hashed())
    opened.journal.rewrite("0 40 abc\n")
    assert (opened.lines("received"), opened.lines("journal")) == ("", "0 40 abc\n")
    assert (opened.directory / "journal").stat().st_mode & 0o777 == 0o600
    opened.journal.sync()
    assert opened.lines("journal") == "0 40 abc\n", "what was kept before is not synced any more"
    opened.journal.keep(SECOND, one := hashed(b"3"))
    opened.journal.sync()
    assert opened.lines("journal") == "0 40 abc\n" + line_of(SECOND, one)


def test_a_closed_journal_has_nothing_open_and_opens_again(opened: Open) -> None:
    def descriptors() -> list[str]:
        found = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        return sorted(Path(path).name for path in found if path.startswith(str(opened.directory)))

    assert descriptors() == ["data"]
    for count in (1, 2):
        opened.journal.keep(FIRST, hashed())
        opened.journal.sync()
        assert descriptors() == ["data", "journal", "received"]
        for _ in range(2):
            opened.journal.close()
        assert descriptors() == ["data"]
        assert opened.lines("journal").count("\n") == count


def test_parts_that_are_kept_during_a_sync_are_synced_by_the_same_thread(tmp_path: Path) -> None:
    with closing(Open(tmp_path / "ingest")) as opened:
        journal = opened.journal

        def meanwhile() -> None:
            journal.keep(SECOND, hashed(b"2"))
            other = threading.Thread(target=journal.sync)
            other.start()
            other.join()
            assert opened.synced == [], "the other thread has left the work to the first"

        journal.keep(FIRST, hashed(b"1"))
        with at_event("part made durable", meanwhile) as done:
            journal.sync()
        assert done.is_set()
        assert opened.synced == [[FIRST], [SECOND]]
        journal.keep(FIRST, hashed(b"3"))
        journal.sync()
        assert len(opened.synced) == 3


SPOILT: dict[str, tuple[str, str]] = {
    "the data": ("fsync", "*/data"),
    "the journal": ("fsync", "*/journal"),
    "the names": ("fsyncdir", "/ingest"),
}


@pytest.mark.parametrize(("operation", "match"), SPOILT.values(), ids=SPOILT)
def test_a_sync_that_failed_is_final_and_lists_no_bytes(tmp_path: Path, operation: str, match: str) -> None:
    with FuseDisk(tmp_path) as disk, closing(Open(disk.path / "ingest")) as opened:
        opened.journal.keep(FIRST, hashed())
        disk.fail(operation, "EIO", match)
        with pytest.raises(DiskFailed):
            opened.journal.sync()
        disk.heal()
        assert opened.synced == []
        with pytest.raises(DiskFailed, match="earlier sync failed") as refused:
            opened.journal.sync()
        assert refused.value.facts.get("errno") == 5


def test_a_sync_of_what_another_thread_has_discarded_is_no_failure(opened: Open) -> None:
    opened.journal.keep(FIRST, hashed())
    for path in opened.directory.iterdir():
        path.unlink()
    opened.directory.rmdir()
    opened.journal.sync()
    assert opened.synced == []


def test_a_line_is_durable_after_its_bytes_and_the_first_after_the_names_of_its_file(opened: Open) -> None:
    replaced = ["fchmod", "pwrite", "fsync", "rename", "fsync"]
    opened.journal.keep(FIRST, hashed())
    names = ["fsync", "fsync"]  # of the journal, and of its directory
    with capture_logs():  # they are written, too
        assert os_calls(opened.journal.sync) == ["fdatasync", *replaced, *names, "write", "fdatasync"]
        opened.journal.keep(SECOND, hashed())
        assert os_calls(opened.journal.sync) == ["fdatasync", "write", "fdatasync"]
        assert os_calls(opened.journal.sync) == []
    rewritten = os_calls(lambda: opened.journal.rewrite("0 40 abc\n"))
    assert rewritten == ["unlink", "fsync", "fdatasync", *replaced]
