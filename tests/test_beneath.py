"""A file is opened by exactly the path that was checked: no link is followed, and nothing else is opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Changed, Invalid
from cachd.sources.beneath import open_directory, open_file


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Two directories below the root, a file in the inner one, and links beside both."""
    inner = tmp_path.resolve() / "outer/inner"
    inner.mkdir(parents=True)
    (inner / "file").write_bytes(b"content")
    (inner / "link").symlink_to("file")
    (inner / "to-directory").symlink_to(".")
    (inner.parent / "linked").symlink_to("inner")
    os.mkfifo(inner / "pipe")
    return inner


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_a_file_and_a_directory_are_opened_and_nothing_else_stays_open(place: Path) -> None:
    before = descriptors()
    for path, read in ((place / "file", lambda fd: os.read(fd, 99)), (place, os.listdir)):
        opened = open_file(path) if path.is_file() else open_directory(path)
        try:
            assert len(descriptors() - before) == 1
            assert read(opened) == (b"content" if path.is_file() else os.listdir(path))
            assert not os.get_inheritable(opened)
        finally:
            os.close(opened)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("open_it", "below", "expected"),
    [
        (open_file, "link", Changed),
        (open_file, "../linked/file", Changed),
        (open_file, "file/below", Changed),
        (open_file, "pipe", Invalid),
        (open_file, "../inner", Invalid),
        (open_directory, "to-directory", Changed),
        (open_directory, "../linked", Changed),
        (open_directory, "link", Changed),
    ],
)
def test_a_link_or_what_is_no_file_is_refused_and_nothing_stays_open(
    place: Path, open_it: Callable[[Path], int], below: str, expected: type[Exception]
) -> None:
    before = descriptors()
    path = Path(os.path.normpath(place / below))
    with pytest.raises(expected) as refusal:
        open_it(path)
    assert str(path) in str(refusal.value)
    assert descriptors() == before


@pytest.mark.parametrize(
    ("open_it", "below", "number"),
    [
        (open_file, "absent", errno.ENOENT),
        (open_file, "absent/below", errno.ENOENT),
        (open_directory, "absent", errno.ENOENT),
        (open_directory, "file", errno.ENOTDIR),
        (open_directory, "pipe", errno.ENOTDIR),
    ],
)
def test_what_is_not_there_is_an_error_that_names_its_path(
    place: Path, open_it: Callable[[Path], int], below: str, number: int
) -> None:
    before = descriptors()
    with pytest.raises(OSError, match=r"absent|file|pipe") as refusal:
        open_it(place / below)
    assert (refusal.value.errno, refusal.value.filename) == (number, str(place / below))
    assert descriptors() == before
