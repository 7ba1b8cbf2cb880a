"""Copies that share blocks, on file systems that can do it, that cannot, and that are full."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachd.kernel.clones import can_clone, clone
from cachd.kernel.content_time import content_time, time_of
from tests.ground.disks import FuseDisk, fill, loop
from tests.ground.models import noise

CONTENT = noise(100_000)
TIME_NS = 1_700_000_000_123_456_789


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module", params=["xfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that shares blocks, and one that does not; the name says which."""
    with loop(tmp_path_factory.mktemp("disk"), request.param) as mounted:
        yield mounted


def test_a_clone_is_sealed_and_has_the_time_of_its_source(disk: Path) -> None:
    source, target = disk / "source", disk / "target"
    source.write_bytes(CONTENT)
    os.utime(source, ns=(TIME_NS, TIME_NS))
    before, shares = descriptors(), disk.name == "xfs"
    assert can_clone(disk / "probe") is shares
    assert clone(source, target) is shares
    assert descriptors() == before
    assert sorted({*os.listdir(disk)} - {"lost+found"}) == ["source", *(["target"] if shares else [])]
    if shares:
        status = target.stat()
        assert (target.read_bytes(), stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (
            CONTENT,
            0o444,
            TIME_NS,
        )
    with pytest.raises(FileNotFoundError):
        clone(disk / "absent", disk / "other")
    for path in (source, target):
        path.unlink(missing_ok=True)


def test_on_a_full_disk_nobody_can_say(disk: Path) -> None:
    source = disk / "source"
    source.write_bytes(CONTENT)
    filler = fill(disk)
    try:
        assert can_clone(disk / "probe") in ((None, True) if disk.name == "xfs" else (None,))
        assert not list(disk.glob("probe*"))
    finally:
        filler.unlink()
        source.unlink()


@pytest.mark.parametrize(("error", "answer"), [("ENOSPC", None), ("EDQUOT", None), ("EIO", False)])
def test_a_probe_that_cannot_be_made_says_no_or_nothing(
    tmp_path: Path, error: str, answer: bool | None
) -> None:
    with FuseDisk(tmp_path) as broken:
        broken.fail("create", error)
        assert can_clone(broken.path / "probe") is answer
        broken.heal()
        (broken.path / "source").write_bytes(CONTENT)
        broken.fail("create", error)
        if answer is None:
            with pytest.raises(OSError, match="target"):
                clone(broken.path / "source", broken.path / "target")
        else:
            assert not clone(broken.path / "source", broken.path / "target")
        broken.heal()
        assert os.listdir(broken.path) == ["source"]


# --- times ---

MIB = 1 << 20


def time_and_reads(size: int) -> tuple[int, list[tuple[int, int]]]:
    reads: list[tuple[int, int]] = []

    def read(at: int, count: int) -> bytes:
        reads.append((at, count))
        return bytes(count)

    return content_time(size, read), reads


@pytest.mark.parametrize("size", [0, 1, MIB])
def test_a_small_content_is_read_completely(size: int) -> None:
    assert time_and_reads(size)[1] == [(0, size)]


@pytest.mark.parametrize("size", [MIB + 1, 10**12])
def test_of_a_large_content_samples_are_read_from_the_first_byte_to_the_last(size: int) -> None:
    found, reads = time_and_reads(size)
    assert (len(reads), {count for _, count in reads}) == (64, {4096})
    starts = [at for at, _ in reads]
    assert (starts[0], starts[-1] + 4096, starts == sorted(starts)) == (0, size, True)
    steps = {b - a for a, b in itertools.pairwise(starts)}
    assert max(steps) - min(steps) <= 1
    assert found != time_and_reads(size + 1)[0], "the size counts, too"


@pytest.mark.parametrize(
    ("digits", "expected"),
    [
        ("00000000", 315_619_200),
        ("00000001ff", 315_619_201),
        ("40000000", 315_619_200),
        ("3fffffff", 1_389_361_023),
    ],
)
def test_a_time_is_between_1980_and_2014(digits: str, expected: int) -> None:
    assert time_of(digits) == expected


def test_the_time_of_a_content_is_the_same_in_every_version() -> None:
    sha256 = hashlib.sha256(b"7\ncontent").hexdigest()
    assert content_time(7, lambda _at, _count: b"content") == time_of(sha256)
