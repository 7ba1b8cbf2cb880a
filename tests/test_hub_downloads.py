"""Which downloads of huggingface_hub into a directory of a shared volume have not ended."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from cachd.errors import Forbidden
from cachd.sources.hub_downloads import explains, still, unfinished_in, unfinished_of

COMMIT = "a1" * 20
SMALL, LARGE = "5" * 40, "6" * 64  # the names of two blobs: one in git, one of LFS


def left_of(blobs: list[str], trees: Mapping[str, object], here: set[str]) -> list[str]:
    """What is unfinished in a repository with these blobs and trees, for a snapshot with the paths `here`."""
    found = {f"trees/{name}.json": json.dumps(tree).encode() for name, tree in trees.items()}

    def names(directory: str) -> list[str]:
        return sorted(blobs) if directory == "blobs" else [f"{name}.json" for name in sorted(trees)]

    def read(path: str, at_most: int) -> bytes:
        if path not in found:
            raise FileNotFoundError(path)
        assert len(found[path]) <= at_most
        return found[path]

    return unfinished_of(COMMIT, here, names, read)


def tree(**digests: str) -> dict[str, object]:
    """The tree of a revision whose files have these digests: large ones also have a name in git."""
    return {
        "files": {
            path: {"blob_id": SMALL, "lfs_sha256": digest} if len(digest) == 64 else {"blob_id": digest}
            for path, digest in digests.items()
        }
    }


@pytest.mark.parametrize(
    ("blobs", "trees", "here", "left"),
    [
        ([LARGE], {}, set(), []),
        ([f"{LARGE}.incomplete"], {}, {"w"}, [f"{LARGE}.incomplete"]),
        ([f"{LARGE}.1f.incomplete"], {}, {"w"}, [f"{LARGE}.1f.incomplete"]),
        ([f"{LARGE}.1f.incomplete", LARGE], {}, {"w"}, []),
        ([f"{LARGE}.lock"], {}, {"w"}, []),
        # Its own tree says whether a path of it is absent.
        ([f"{LARGE}.incomplete"], {COMMIT: tree(w=LARGE)}, {"c"}, [f"{LARGE}.incomplete"]),
        ([f"{LARGE}.incomplete"], {COMMIT: tree(w=LARGE)}, {"c", "w"}, []),
        ([f"{LARGE}.incomplete"], {COMMIT: tree(v=LARGE, w=LARGE)}, {"w"}, [f"{LARGE}.incomplete"]),
        ([f"{LARGE}.incomplete"], {COMMIT: tree(c=SMALL)}, set(), []),
        ([f"{SMALL}.incomplete"], {COMMIT: tree(c=SMALL)}, set(), [f"{SMALL}.incomplete"]),
        ([f"{SMALL}.incomplete"], {COMMIT: tree(w=LARGE)}, set(), []),
        # Without it, those of others must show that all its paths are here.
        ([f"{LARGE}.incomplete"], {"other": tree(w=LARGE)}, {"w"}, []),
        ([f"{LARGE}.incomplete"], {"other": tree(w=LARGE)}, {"c"}, [f"{LARGE}.incomplete"]),
        ([f"{LARGE}.incomplete"], {"other": tree(c=SMALL)}, {"c"}, [f"{LARGE}.incomplete"]),
        (
            [f"{LARGE}.incomplete"],
            {"other": tree(w=LARGE), "third": tree(v=LARGE)},
            {"w"},
            [f"{LARGE}.incomplete"],
        ),
        ([f"{LARGE}.incomplete"], {"other": {"files": []}, "third": tree(w=LARGE)}, {"w"}, []),
        # A tree that cannot be read is none.
        ([f"{LARGE}.incomplete"], {COMMIT: {"files": {"w": {}}}}, set(), [f"{LARGE}.incomplete"]),
    ],
)
def test_a_blob_is_unfinished_unless_it_is_for_another_revision(
    blobs: list[str], trees: dict[str, object], here: set[str], left: list[str]
) -> None:
    assert left_of(blobs, trees, here) == left


@pytest.mark.parametrize(
    ("newer", "unfinished", "is_explained"),
    [
        (set(), [SMALL, LARGE], True),
        (set(), [LARGE], True),
        ({"c"}, [LARGE], True),
        ({"c"}, [SMALL], False),
        ({"c"}, ["7" * 64], True),
        ({"c"}, [LARGE, "7" * 64], False),
        ({"c", "w"}, [LARGE], False),
        ({"c", "w"}, [], True),
        ({"other"}, [LARGE], False),
    ],
)
def test_a_newer_snapshot_explains_as_many_blobs_of_a_kind_as_it_lacks(
    newer: set[str], unfinished: list[str], *, is_explained: bool
) -> None:
    names = [f"{digest}.1f.incomplete" for digest in unfinished]
    assert explains(newer, {"c": SMALL, "w": LARGE}, names) is is_explained


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A directory of `hf download --local-dir` with one file that is complete."""
    notes = tmp_path / ".cache/huggingface/download/sub"
    notes.mkdir(parents=True)
    (notes / "w.metadata").write_text(f"{COMMIT}\n{LARGE}\n1790000000.0\n")
    return tmp_path


def left_in(top: Path) -> list[str]:
    return [path for path, _ in unfinished_in(top, lambda path: path)]


def test_a_download_into_a_directory_is_unfinished_until_a_note_has_its_digest(top: Path) -> None:
    notes = top / ".cache/huggingface/download"
    assert left_in(top) == []
    (notes / f"sub/h.{LARGE}.incomplete").write_bytes(b"left over")
    before = os.listdir("/proc/self/fd")
    assert left_in(top) == []
    assert os.listdir("/proc/self/fd") == before, "no note stays open"
    (notes / f"sub/h.{'7' * 64}.1f.incomplete").write_bytes(b"half")
    (notes / "sub/readme.lock").write_bytes(b"")
    ((path, error),) = unfinished_in(top, lambda path: path)
    assert path == f".cache/huggingface/download/sub/h.{'7' * 64}.1f.incomplete"
    assert error.code == "incomplete_model"
    assert error.hint
    assert str(top) in error.detail
    assert "h.777" in error.detail


@pytest.mark.parametrize("note", [b"", b"one line", b"\n\n", b"x" * 1025 + b"\n" + LARGE.encode()])
def test_a_note_that_is_none_completes_nothing(top: Path, note: bytes) -> None:
    notes = top / ".cache/huggingface/download/sub"
    (notes / "w.metadata").write_bytes(note)
    (notes / f"h.{LARGE}.incomplete").write_bytes(b"half")
    assert left_in(top) == [f".cache/huggingface/download/sub/h.{LARGE}.incomplete"]


def test_a_note_may_have_1024_bytes(top: Path) -> None:
    notes = top / ".cache/huggingface/download/sub"
    (notes / "w.metadata").write_text(f"{COMMIT}\n{LARGE}\n".ljust(1024, "0"))
    (notes / f"h.{LARGE}.incomplete").write_bytes(b"half")
    assert left_in(top) == []


def test_a_directory_that_is_absent_or_refused_has_no_downloads(tmp_path: Path, top: Path) -> None:
    assert left_in(tmp_path / "absent") == []
    (top / f".cache/huggingface/download/h.{'7' * 64}.incomplete").write_bytes(b"half")

    def refuse(path: Path) -> Path:
        raise Forbidden(str(path))

    assert list(unfinished_in(top, refuse)) == []


def test_the_error_names_the_directory_and_the_file() -> None:
    error = still(Path("/share/model"), "x" * 300)
    assert error.detail.startswith("/share/model is incomplete: 'xxx")
    assert "x" * 130 not in error.detail
