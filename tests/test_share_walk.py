"""The walk below a directory of a shared volume: what it yields, in which order, and what it leaves out."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.errors import Forbidden, Invalid, NotFound
from cachd.model import Unusable
from cachd.sources.share_walk import Found, Walk, unreadable


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "top").mkdir()
    return tmp_path / "top"


def within(top: Path) -> Callable[[Path], Path]:
    """Resolves links, and refuses what leaves `top`."""

    def check(path: Path) -> Path:
        real = Path(os.path.realpath(path))
        if top not in (real, *real.parents):
            raise Forbidden(f"{path} leaves {top}", code="path_refused")
        return real

    return check


def walked(top: Path, *, max_files: int = 1000) -> list[Found | Unusable | None]:
    return list(Walk(top, within(top), max_files).found())


def shown(top: Path) -> list[str | None]:
    """The paths that are found, None for each directory. All of them can be used."""
    each = walked(top)
    assert not [found for found in each if isinstance(found, Unusable)]
    return [found.shown if isinstance(found, Found) else None for found in each]


def errors(top: Path) -> dict[str, Exception]:
    return {found.path: found.error for found in walked(top) if isinstance(found, Unusable)}


def put(top: Path, *paths: str) -> None:
    for path in paths:
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_bytes(b"x")


def test_the_files_of_a_directory_come_before_those_below_it_and_all_in_order(top: Path) -> None:
    put(top, "a/z", "a/y", "b", "c/d/x", "c/e", "d")
    assert shown(top) == [None, "b", "d", None, "a/y", "a/z", None, "c/e", None, "c/d/x"]
    (found,) = (each for each in walked(top) if isinstance(each, Found) and each.shown == "c/d/x")
    assert (found.path, found.real) == (top / "c/d/x", top / "c/d/x")
    assert found.status.st_size == 1


def test_an_empty_directory_is_a_directory_without_a_file(top: Path) -> None:
    assert shown(top) == [None]
    (top / "a").mkdir()
    assert shown(top) == [None, None]


def test_a_link_is_the_file_or_the_directory_that_it_leads_to(top: Path) -> None:
    put(top, "a/x")
    (top / "l").symlink_to("a/x")
    (top / "m").symlink_to("a")
    found = {each.shown: each for each in walked(top) if isinstance(each, Found)}
    assert sorted(found) == ["a/x", "l", "m/x"]
    assert {name: (each.path, each.real) for name, each in found.items()} == {
        "a/x": (top / "a/x", top / "a/x"),
        "l": (top / "l", top / "a/x"),
        "m/x": (top / "m/x", top / "a/x"),
    }


def test_what_tools_keep_beside_a_model_is_left_out(top: Path) -> None:
    put(top, ".git/config", "x", "a/.DS_Store", "a/.cache/huggingface/y", "a/.cache/z", ".gitattributes")
    assert [each for each in shown(top) if each] == [".gitattributes", "x", "a/.cache/z"]


@pytest.mark.parametrize("is_of_kubernetes", [True, False])
def test_behind_the_link_of_a_kubelet_no_name_with_two_dots_is_listed(
    top: Path, is_of_kubernetes: bool
) -> None:
    put(top, "..2026/config.json")
    if is_of_kubernetes:
        (top / "..data").symlink_to("..2026")
        (top / "config.json").symlink_to("..data/config.json")
        assert shown(top) == [None, "config.json"]
    else:
        put(top, "..data/x")
        assert shown(top) == [None, None, "..2026/config.json", None, "..data/x"]


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("x.part", "x.part"),
        ("a/x.gguf.aria2", "a/x.gguf"),
        (".x.gguf.ABCdef", ".x.gguf.ABCdef"),
        ("a/.git/x.part", None),
    ],
)
def test_a_download_that_has_not_ended_cannot_be_used(top: Path, path: str, named: str | None) -> None:
    put(top, path, "y")
    found = errors(top)
    assert list(found) == ([named] if named else [])
    assert all(getattr(error, "code", "") == "incomplete_model" for error in found.values())


def test_what_is_no_file_cannot_be_used(top: Path) -> None:
    put(top, "a/x")
    os.mkfifo(top / "a/pipe")
    (top / "gone").symlink_to("nowhere")
    (top / "up").symlink_to("a/..")
    (top / "a/loop").symlink_to("../a")
    (top / "a/self").symlink_to("self")
    (top / "out").symlink_to("/etc/hostname")
    (top / "bad\nname").write_bytes(b"x")
    found = errors(top)
    told = {path: (type(error), error.code) for path, error in found.items() if hasattr(error, "code")}
    assert told == {
        "a/pipe": (Invalid, "unsafe_path"),
        "gone": (NotFound, "file_not_found"),
        "up": (Invalid, "unsafe_path"),
        "a/loop": (Invalid, "unsafe_path"),
        "a/self": (Invalid, "unsafe_path"),
        "out": (Forbidden, "path_refused"),
        "bad\nname": (Invalid, told["bad\nname"][1]),
    }
    assert "is a link, and nothing is where it leads" in str(found["gone"])
    assert all("leads back to itself" in str(found[path]) for path in ("up", "a/loop"))
    assert "neither a file nor a directory" in str(found["a/pipe"])
    assert [each.shown for each in walked(top) if isinstance(each, Found)] == ["a/x"]


def test_a_directory_may_be_reached_twice_if_it_does_not_contain_itself(top: Path) -> None:
    put(top, "a/b/x")
    (top / "a/c").symlink_to("b")
    assert [each for each in shown(top) if each] == ["a/b/x", "a/c/x"]


def test_so_many_entries_are_listed_and_one_more_is_refused(top: Path) -> None:
    put(top, "a/x", "a/y", "z")
    assert len(walked(top, max_files=4)) == 5
    with pytest.raises(Invalid) as refused:
        walked(top, max_files=3)
    assert refused.value.code == "too_many_files"


def test_a_top_that_is_no_directory_or_is_not_there_is_an_error(top: Path) -> None:
    put(top, "x")
    with pytest.raises((NotADirectoryError, FileNotFoundError)):
        walked(top / "nowhere")
    with pytest.raises((NotADirectoryError, Forbidden)):
        list(Walk(top / "x", within(top), 9).found())


def test_what_may_not_be_read_is_named_with_the_reason(top: Path) -> None:
    error = unreadable(top, PermissionError(errno.EACCES, "Permission denied"))
    assert (type(error), error.code, f"{top}: Permission denied" in error.detail) == (
        Forbidden,
        "source_forbidden",
        True,
    )
