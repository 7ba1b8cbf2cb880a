"""A writer on an allowed share, who wants a file published that lies outside of it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from cachd.errors import CachdError, Changed, Invalid
from cachd.model import Extent, File, Ref
from cachd.policy.address_policy import AddressPolicy
from cachd.sources.beneath import open_file
from cachd.sources.cancel import CancelToken
from cachd.sources.shared_volume import SharedVolumeSource

SECRET, PLAIN = b"hidden", b"public"
TRIES = 3000
PATIENCE_SECONDS = 60.0


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A share with a file of the size of the secret beside the share."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/x").write_bytes(SECRET)
    (tmp_path / "share/model").mkdir(parents=True)
    (tmp_path / "share/model/x").write_bytes(PLAIN)
    return tmp_path / "share"


def share(place: Path) -> SharedVolumeSource:
    return SharedVolumeSource(AddressPolicy([f"file://{place}/"]), stall_seconds=PATIENCE_SECONDS)


SWAP = """
import os, sys
at, link, kept = sys.argv[1:]
print(flush=True)
while True:
    os.rename(at, kept); os.rename(link, at); os.rename(at, link); os.rename(kept, at)
"""


@contextmanager
def swapped(at: Path, link: Path, kept: Path) -> Iterator[None]:
    """What is at a path and a link take turns there without end while inside, by another process."""
    with subprocess.Popen([sys.executable, "-c", SWAP, at, link, kept], stdout=subprocess.PIPE) as swapping:
        assert swapping.stdout is not None
        swapping.stdout.readline()
        try:
            yield
        finally:
            swapping.kill()


def read_by(source: SharedVolumeSource, file: File) -> bytes:
    """What the source gives of the file; nothing when it refuses."""
    got = bytearray(file.size)
    with suppress(CachdError), source.open(file, Extent(0, file.size), CancelToken()) as body:
        body.readinto(memoryview(got))
    return bytes(got)


def read_while_swapped(place: Path, at: str, outside: str) -> set[bytes]:
    """What is read of model/x while `at` and a link to `outside` take turns."""
    link = place / "link"
    link.symlink_to(place.parent / outside)
    secret = mark_of(place.parent / "secret/x")
    file = File("x", len(SECRET), f"file://{place}/model/x", None, secret)
    source = share(place)
    with swapped(place / at, link, place / "kept"):
        return {read_by(source, file) for _ in range(TRIES)}


def test_a_file_that_is_swapped_for_a_link_out_of_the_share_is_never_read_through_it(place: Path) -> None:
    """The link's target has the inode's size and time that were listed, so that no other check helps."""
    assert SECRET not in read_while_swapped(place, "model/x", "secret/x")


def test_a_directory_that_is_swapped_for_a_link_out_of_the_share_is_never_read_through_it(
    place: Path,
) -> None:
    """Promised: A file of a shared volume is read by the path that was checked, whatever a writer swaps
    meanwhile."""
    assert SECRET not in read_while_swapped(place, "model", "secret")


def test_checksums_that_are_a_link_out_of_the_share_are_not_read(place: Path) -> None:
    (place / "model/SHA256SUMS").symlink_to(place.parent / "secret/x")
    with pytest.raises(CachdError) as refusal:
        share(place).resolve(Ref.parse(f"file://{place}/model"), CancelToken())
    assert refusal.value.code == "path_refused"
    assert SECRET.decode() not in str(refusal.value)


def test_checksums_of_3_gib_that_take_no_space_are_refused_unread(place: Path) -> None:
    with (place / "model/SHA256SUMS").open("wb") as opened:
        os.truncate(opened.fileno(), 3 << 30)
    with pytest.raises(Invalid) as refusal:
        share(place).resolve(Ref.parse(f"file://{place}/model"), CancelToken())
    assert refusal.value.code == "document_too_large"


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(place: Path) -> None:
    source = share(place)
    (file,) = source.resolve(Ref.parse(f"file://{place}/model"), CancelToken()).files
    (place / "model/x").unlink()
    os.mkfifo(place / "model/x")
    began = time.monotonic()
    with pytest.raises(Invalid) as refusal:
        source.open(file, Extent(0, file.size), CancelToken())
    assert refusal.value.code == "unsafe_path"
    assert time.monotonic() - began < PATIENCE_SECONDS / 2


@pytest.mark.parametrize("component", ["file", "folder", "folder above"])
def test_a_path_with_a_link_in_it_opens_nothing(tmp_path: Path, component: str) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/x").write_bytes(SECRET)
    (tmp_path / "link").symlink_to({"file": "a/b/x", "folder": "a/b", "folder above": "a"}[component])
    path = tmp_path / {"file": "link", "folder": "link/x", "folder above": "link/b/x"}[component]
    with pytest.raises(Changed):
        open_file(path)
    os.close(open_file(tmp_path / "a/b/x"))


def test_an_absent_file_and_one_that_may_not_be_read_raise_what_open_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as absent:
        open_file(tmp_path / "no/x")
    assert absent.value.filename == str(tmp_path / "no/x")
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "x")


def mark_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
