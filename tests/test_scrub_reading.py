"""A blob is read completely, and compared with its digest or with the hashes of its parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cachd.errors import DiskFailed
from cachd.model import Digest, Extent, File
from cachd.store.digests import PartHash, in_order
from cachd.store.ingest.part_lines import line_of, parts_of
from cachd.store.reads import Reads
from cachd.store.scrub import READ_BYTES, Replaced, quick_check, verify_blob
from tests.ground.disks import FuseDisk
from tests.ground.models import noise
from tests.ground.stored import DIGESTS, sha256

CONTENT = noise(2 * READ_BYTES + 5000)
PARTS = [Extent(0, READ_BYTES - 100), Extent(READ_BYTES - 100, READ_BYTES + 7)]
PARTS.append(Extent(READ_BYTES + 7, len(CONTENT)))


def file_of(content: bytes, digest: Digest | None) -> File:
    return File("a", len(content), "https://host/a", digest, "etag")


@pytest.fixture
def blob(tmp_path: Path) -> Path:
    place = tmp_path / "blob"
    place.write_bytes(CONTENT)
    return place


def write_parts(blob: Path, parts: list[Extent]) -> Path:
    """Write the part hashes of CONTENT beside a blob."""
    lines = []
    for part in parts:
        hashed = PartHash(None)
        hashed.update(memoryview(CONTENT[part.start : part.stop]))
        lines.append(line_of(part, hashed))
    parts_of(blob).write_text("".join(lines))
    return parts_of(blob)


def flip(blob: Path, at: int) -> None:
    with blob.open("r+b") as opened:
        opened.seek(at)
        opened.write(bytes([CONTENT[at] ^ 1]))


def verified(blob: Path, file: File, **how: object) -> tuple[str | None, int]:
    """What is wrong with a blob, and how many bytes were read."""
    took: list[int] = []
    wrong = verify_blob(blob, file, Reads(), took.append, **how)  # type: ignore[arg-type]
    return wrong, sum(took)


@pytest.mark.parametrize("algorithm", DIGESTS)
@pytest.mark.parametrize("size", [0, 1, READ_BYTES, READ_BYTES + 1])
def test_an_intact_blob_is_read_once_and_found_intact(tmp_path: Path, algorithm: str, size: int) -> None:
    content = CONTENT[:size] if algorithm == "sha256" else CONTENT[: size % 1000]
    (tmp_path / "blob").write_bytes(content)
    file = file_of(content, DIGESTS[algorithm](content))
    assert verified(tmp_path / "blob", file) == (None, len(content))


@pytest.mark.parametrize("at", [0, READ_BYTES - 1, READ_BYTES, len(CONTENT) - 1])
def test_one_wrong_bit_is_found_wherever_it_is(blob: Path, at: int) -> None:
    flip(blob, at)
    wrong, read = verified(blob, file_of(CONTENT, sha256(CONTENT)))
    assert (wrong, read) == (f"it hashes to {sha256(blob.read_bytes())}", len(CONTENT))


def test_another_digest_is_computed_from_the_same_bytes(blob: Path) -> None:
    beside, stated = in_order(Digest("sha256", "0" * 64), len(CONTENT)), DIGESTS["git-sha1"](CONTENT)
    assert verified(blob, file_of(CONTENT, stated), beside=beside) == (None, len(CONTENT))
    assert beside.digest() == sha256(CONTENT)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (lambda blob: blob.unlink(), "it is gone"),
    "a directory": (lambda blob: (blob.unlink(), blob.mkdir()), "it is not a regular file"),
    "a link": (
        lambda blob: (blob.rename(f"{blob}2"), blob.symlink_to(f"{blob}2")),
        "it is not a regular file",
    ),
    "shorter": (lambda blob: os.truncate(blob, 10), f"it has 10 of {len(CONTENT)} bytes"),
    "longer": (
        lambda blob: os.truncate(blob, len(CONTENT) + 1),
        f"it has {len(CONTENT) + 1} of {len(CONTENT)} bytes",
    ),
}


@pytest.mark.parametrize(("change", "wrong"), CHANGES.values(), ids=CHANGES.keys())
def test_what_needs_no_reading_is_found_without(
    blob: Path, change: Callable[[Path], object], wrong: str
) -> None:
    file = file_of(CONTENT, sha256(CONTENT))
    assert quick_check(blob, file) is None
    change(blob)
    assert quick_check(blob, file) == wrong
    assert verified(blob, file) == (wrong, 0)


# --- without a digest ---


def test_a_blob_without_a_digest_is_compared_part_by_part(blob: Path) -> None:
    write_parts(blob, PARTS)
    file = file_of(CONTENT, None)
    assert verified(blob, file) == (None, len(CONTENT))
    for part in PARTS:
        for at in (part.start, part.stop - 1):
            flip(blob, at)
            assert verified(blob, file)[0] == f"its part at byte {part.start} has another hash"
            blob.write_bytes(CONTENT)


def test_part_hashes_may_lie_elsewhere(blob: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write_parts(blob, PARTS).rename(elsewhere)
    assert verified(blob, file_of(CONTENT, None), parts=elsewhere) == (None, len(CONTENT))


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_blob_whose_part_hashes_are_gone_cannot_be_verified(blob: Path, kept: int) -> None:
    if kept:
        write_parts(blob, PARTS[:kept])
    unknown = len(CONTENT) - (PARTS[kept - 1].stop if kept else 0)
    with pytest.raises(DiskFailed, match=f"{unknown} of {len(CONTENT)} bytes cannot be verified"):
        verified(blob, file_of(CONTENT, None))


# --- meanwhile ---


@pytest.mark.parametrize("change", [lambda blob: blob.unlink(), lambda blob: blob.rename(f"{blob}.away")])
def test_a_blob_that_goes_or_is_replaced_while_it_is_read_gives_no_result(
    blob: Path, change: Callable[[Path], object]
) -> None:
    another = blob.with_name("another")
    another.write_bytes(CONTENT)
    for replace in (False, True):
        blob.write_bytes(CONTENT)

        def took(_: int, replace: bool = replace) -> None:
            if blob.exists() and another.exists():
                change(blob)
                if replace:
                    another.rename(blob)

        with pytest.raises(Replaced):
            verify_blob(blob, file_of(CONTENT, sha256(CONTENT)), Reads(), took)


def test_each_open_happens_in_the_context_that_is_given_and_none_stays(blob: Path) -> None:
    entered: list[int] = []
    before = sorted(os.listdir("/proc/self/fd"))

    @contextmanager
    def opening() -> Iterator[None]:
        entered.append(1)
        yield

    assert verified(blob, file_of(CONTENT, sha256(CONTENT)), opening=opening) == (None, len(CONTENT))
    assert len(entered) == 3
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_blob_is_verified_where_reads_past_the_page_cache_are_refused(tmp_path: Path) -> None:
    """This disk opens a file with O_DIRECT, and refuses to read it so."""
    with FuseDisk(tmp_path) as disk:
        blob = disk.path / "blob"
        blob.write_bytes(CONTENT)
        assert verified(blob, file_of(CONTENT, sha256(CONTENT))) == (None, len(CONTENT))


def test_a_blob_that_the_disk_cannot_read_is_damaged_and_other_errors_are_the_disks(tmp_path: Path) -> None:
    with FuseDisk(tmp_path) as disk:
        blob = disk.path / "blob"
        blob.write_bytes(CONTENT)
        file = file_of(CONTENT, sha256(CONTENT))
        disk.fail("read", "EIO", "/blob")
        assert verified(blob, file)[0] == "the disk cannot read it"
        disk.heal()
        disk.fail("open", "EACCES", "/blob")
        with pytest.raises(DiskFailed):
            verified(blob, file)
        disk.heal()
