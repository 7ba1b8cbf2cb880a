"""The data of an ingest, and what is written down about its source, without the ingest."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cachd.errors import Cancelled, DiskFailed
from cachd.kernel.content_time import content_time
from cachd.model import Digest, Extent, File
from cachd.store.digests import PartHash
from cachd.store.ingest.about import About
from cachd.store.ingest.data_file import DataFile
from tests.ground.disks import FuseDisk
from tests.ground.models import noise

CONTENT = noise(10_000)
SHA256 = Digest("sha256", "1" * 64)
FILE = File("model.bin", 10_000, "https://host/model.bin", SHA256, validator='"v1"', base="https://host/")


class Checks:
    """The check of a data file: counts, and refuses once it is told to."""

    count = 0
    is_refused = False

    def __call__(self) -> None:
        self.count += 1
        if self.is_refused:
            raise Cancelled("the pull was cancelled")


@pytest.fixture
def check() -> Checks:
    return Checks()


@pytest.fixture
def data(tmp_path: Path, check: Checks) -> Iterator[DataFile]:
    with closing(DataFile(tmp_path, check)) as opened:
        opened.write(0, memoryview(CONTENT))
        yield opened


def hash_of(content: bytes) -> str:
    hashed = PartHash(None)
    hashed.update(memoryview(content))
    return hashed.hexdigest


# --- data ---


def test_a_new_file_is_of_its_owner_alone_and_one_that_was_sealed_is_written_to_again(
    data: DataFile, tmp_path: Path
) -> None:
    assert data.path == tmp_path / "data"
    assert stat.S_IMODE(data.path.stat().st_mode) == 0o600
    data.seal()
    status = data.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o444
    assert status.st_mtime == content_time(10_000, lambda at, count: CONTENT[at : at + count])
    with closing(DataFile(tmp_path, lambda: None)) as again:
        again.write(0, memoryview(b"more"))
    assert data.path.read_bytes() == b"more" + CONTENT[4:]
    assert stat.S_IMODE(data.path.stat().st_mode) == 0o600


def test_a_size_takes_no_blocks_and_an_extent_does(tmp_path: Path) -> None:
    with closing(DataFile(tmp_path, lambda: None)) as data:
        data.set_size(8 << 20)
        assert (data.path.stat().st_size, data.allocated) == (8 << 20, 0)
        data.allocate(Extent(1 << 20, 3 << 20))
        assert data.allocated == data.path.stat().st_blocks * 512
        assert 2 << 20 <= data.allocated < 4 << 20


def test_bytes_are_read_from_where_they_are_and_not_beyond_the_end(data: DataFile) -> None:
    for at, count in ((0, 10_000), (9_999, 1), (5, 7), (10_000, 0)):
        view = memoryview(bytearray(count))
        data.read(at, view)
        assert view == CONTENT[at : at + count]
    for at, count in ((9_999, 2), (10_000, 1)):
        with pytest.raises(DiskFailed, match="data ends at 10000"):
            data.read(at, memoryview(bytearray(count)))


@pytest.mark.parametrize("buffer", [1_000, 4_096, 10_000, 20_000])
def test_an_extent_is_hashed_in_pieces_each_after_a_check(data: DataFile, check: Checks, buffer: int) -> None:
    hashed, view = PartHash(None), memoryview(bytearray(buffer))
    data.hash_on(hashed, Extent(100, 9_100), view)
    assert hashed.hexdigest == hash_of(CONTENT[100:9_100])
    assert check.count == -(-9_000 // buffer)
    data.hash_on(hashed, Extent(9_100, 10_000), view)
    assert hashed.hexdigest == hash_of(CONTENT[100:]), "it goes on where it ended"
    check.is_refused = True
    with pytest.raises(Cancelled):
        data.hash_on(hashed, Extent(0, 1), view)


@pytest.mark.parametrize("buffer", [999, 20_000])
def test_bytes_are_written_again_as_they_are(tmp_path: Path, buffer: int) -> None:
    with FuseDisk(tmp_path) as disk, closing(DataFile(disk.path, lambda: None)) as data:
        data.write(0, memoryview(CONTENT))
        disk.fail("write", "EIO")
        with pytest.raises(DiskFailed):
            data.write_again(Extent(3_000, 7_000), memoryview(bytearray(buffer)))
        disk.heal()
        before = len(disk.records())
        data.write_again(Extent(3_000, 7_000), memoryview(bytearray(buffer)))
        written = [record for record in disk.records()[before:] if record[0] == "write"]
        assert sum(len(piece) for record in written for piece in record if isinstance(piece, bytes)) == 4_000
        assert data.path.read_bytes() == CONTENT


def test_a_sync_that_fails_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as disk, closing(DataFile(disk.path, lambda: None)) as data:
        data.write(0, memoryview(CONTENT))
        data.sync()
        disk.fail("fsync", "EIO")
        for sync in (data.sync, data.seal):
            with pytest.raises(DiskFailed):
                sync()


def test_a_closed_file_is_closed_and_may_be_closed_twice(tmp_path: Path) -> None:
    data = DataFile(tmp_path, lambda: None)
    for _ in range(2):
        data.close()
    assert str(data.path) not in {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"x")
    (tmp_path / "data").symlink_to("elsewhere")
    with pytest.raises(OSError, match="data"):
        DataFile(tmp_path, lambda: None)
    assert (tmp_path / "elsewhere").read_bytes() == b"x"
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o644


# --- about ---

STATED: dict[str, Any] = {
    "origin": FILE.origin,
    "size": 10_000,
    "blob": str(SHA256),
    "validator": '"v1"',
    "base": "https://host/",
}
OTHER = File("model.bin", 10_000, "https://other/model.bin", SHA256, base="https://other/")


def about_of(place: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((place / "about.json").read_text())
    return document


@pytest.mark.parametrize("way", ["note", "write", "begin"])
def test_whose_bytes_they_are_is_written_down(tmp_path: Path, way: str) -> None:
    (tmp_path / "about.json").write_text("of an earlier run")
    getattr(About(tmp_path, FILE), way)()
    assert about_of(tmp_path) == STATED
    assert stat.S_IMODE((tmp_path / "about.json").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["about.json"]


NOT_RESUMED: dict[str, object] = {
    "another blob": {**STATED, "blob": f"sha256:{'2' * 64}"},
    "another size": {**STATED, "size": 9_999},
    "no blob": {"size": 10_000},
    "no size": {"blob": str(SHA256)},
    "a list": [],
    "a number": 7,
}


@pytest.mark.parametrize("document", NOT_RESUMED.values(), ids=NOT_RESUMED)
def test_what_was_written_for_another_file_is_not_resumed(tmp_path: Path, document: object) -> None:
    (tmp_path / "about.json").write_text(json.dumps(document))
    before, about = (tmp_path / "about.json").read_text(), About(tmp_path, FILE)
    assert about.resume() is False
    assert about.is_of_one_source
    assert (tmp_path / "about.json").read_text() == before


@pytest.mark.parametrize("content", [None, "", "{", "[" * 100_000, " " * (20 << 20)])
def test_what_cannot_be_read_is_not_resumed(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "about.json").write_text(content)
    assert About(tmp_path, FILE).resume() is False


def test_bytes_of_the_same_source_prove_that_it_has_the_file_and_of_two_they_do_not(tmp_path: Path) -> None:
    About(tmp_path, FILE).begin()
    same = About(tmp_path, FILE)
    assert (same.resume(), same.is_of_one_source) == (True, True)
    same.comes_from(FILE)
    assert (same.is_of_one_source, about_of(tmp_path)) == (True, STATED)
    for _ in range(2):
        same.comes_from(OTHER)
    assert (same.is_of_one_source, about_of(tmp_path)) == (False, {**STATED, "base": None})
    for file in (FILE, OTHER):
        again = About(tmp_path, file)
        assert (again.resume(), again.is_of_one_source) == (True, False)


def test_a_resume_from_another_source_is_written_down(tmp_path: Path) -> None:
    About(tmp_path, FILE).begin()
    other = About(tmp_path, OTHER)
    assert (other.resume(), other.is_of_one_source) == (True, False)
    assert about_of(tmp_path) == {**STATED, "origin": OTHER.origin, "validator": None, "base": None}
