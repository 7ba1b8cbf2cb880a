"""The pages of a file in memory: how many there are, and what loading it brings."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachd.errors import DiskFailed
from cachd.kernel.calls import resident_bytes
from cachd.model import Extent
from cachd.store.reads import Reads
from cachd.store.residency import load, resident
from tests.ground.disks import FuseDisk
from tests.ground.models import noise

PAGE, SIZE = mmap.PAGESIZE, (1 << 20) + 5


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of which the last page alone is in memory."""
    path = tmp_path / "file"
    path.write_bytes(noise(SIZE))
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        os.pread(opened.fileno(), 5, SIZE - 5)
        if resident_bytes(opened.fileno(), 0, SIZE) != PAGE:
            pytest.skip("this file system keeps the pages of a file")
    return path


@contextmanager
def descriptors_stay() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_load_brings_what_is_not_in_memory_and_says_how_much(file: Path) -> None:
    reads = Reads()
    with descriptors_stay():
        assert resident(file, reads) == PAGE
        assert load(file, Extent(SIZE - 5, SIZE), reads) == 0
        assert load(file, Extent(0, 4 * PAGE), reads) == 4 * PAGE
        assert resident(file, reads) >= 5 * PAGE
        load(file, Extent(0, SIZE), reads)
        assert resident(file, reads) == SIZE
        assert load(file, Extent(0, SIZE), reads) == 0


def test_each_open_happens_in_its_context_and_each_file_is_closed(file: Path) -> None:
    opens: list[str] = []

    @contextmanager
    def opening() -> Iterator[None]:
        opens.append("begins")
        yield
        opens.append("ends")

    with descriptors_stay():
        resident(file, Reads(), opening)
        load(file, Extent(0, SIZE), Reads(), opening)
    assert opens == ["begins", "ends"] * 2


def test_of_a_file_that_is_gone_nothing_is_in_memory_and_it_cannot_be_loaded(tmp_path: Path) -> None:
    with descriptors_stay():
        assert resident(tmp_path / "absent", Reads()) == 0
        with pytest.raises(DiskFailed):
            load(tmp_path / "absent", Extent(0, 1), Reads())


def test_a_load_reads_what_readahead_leaves_out_and_fails_with_the_disk(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as disk:
        path = disk.path / "file"
        path.write_bytes(noise(SIZE))
        disk.fail("read", "EIO", "/file")
        with path.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            missing = SIZE - resident_bytes(opened.fileno(), 0, SIZE)
        if not missing:
            pytest.skip("this file system keeps the pages of a file")
        with descriptors_stay(), pytest.raises(DiskFailed):
            load(path, Extent(0, SIZE), Reads())
