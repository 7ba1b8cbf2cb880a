"""What a new writer of a shared volume takes over from the work directories of former ones, and what not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import InUse
from cachd.store.layout import Layout
from cachd.store.root import make_directories
from cachd.store.takeover import Takeover, formers_in, move_ingests

HASH = "0" * 32
INGEST = "sha256-" + "1" * 64 + "-8"
OTHER = "sha256-" + "2" * 64 + "-8"


def work_of(root: Path, number: int) -> Layout:
    layout = Layout(root, f".cachd/nodes/{number}.work")
    for directory in (layout.ingests, layout.staging, layout.trash):
        directory.mkdir(parents=True, exist_ok=True)
    return layout


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "cache"
    root.mkdir(mode=0o755)
    make_directories(root)
    work_of(root, 5)
    return root


def begun(layout: Layout, name: str = INGEST, content: bytes = b"received", *, at: float = 1000.0) -> Path:
    """A partial download with one line for all its bytes."""
    ingest = layout.ingests / name
    ingest.mkdir()
    (ingest / "data").write_bytes(content)
    (ingest / "received").write_text(f"0 {len(content)} {HASH}\n")
    os.utime(ingest / "data", (at, at))
    return ingest


def ended(root: Path, number: int) -> None:
    (root / f".cachd/nodes/{number}.ended").touch()


def taken(root: Path, *, reserve_free: int = 0) -> Layout:
    """Take over as writer 5; its layout."""
    layout = work_of(root, 5)
    Takeover(layout, 5, lambda: None, reserve_free=reserve_free).run()
    assert formers_in(layout.ingests.parent) == []
    assert list(layout.staging.iterdir()) == []
    return layout


def contents(layout: Layout) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in layout.ingests.glob("*/data")}


@pytest.mark.parametrize("has_ended", [False, True])
def test_a_download_is_moved_if_its_writer_has_ended_and_else_copied(root: Path, *, has_ended: bool) -> None:
    ingest = begun(work_of(root, 3))
    inode = (ingest / "data").stat().st_ino
    if has_ended:
        ended(root, 3)
    with (ingest / "data").open("rb"):  # or the copy could get the same inode
        layout = taken(root)
        found = layout.ingests / INGEST
        assert contents(layout) == {INGEST: b"received"}
        assert ((found / "data").stat().st_ino == inode) is has_ended
    assert (found / "received").read_text() == f"0 8 {HASH}\n"
    assert not (root / ".cachd/nodes/3.work").exists()


def test_what_a_former_writer_cannot_use_goes_before_its_downloads_are_copied(root: Path) -> None:
    former = work_of(root, 3)
    begun(former)
    (former.staging / "large").write_bytes(b"1")
    (former.trash / "large").write_bytes(b"1")
    with capture_logs(processors=[lambda _logger, _method, entry: {**entry, "left": left(root)}]) as logged:
        taken(root)
    assert [(entry["event"], entry["left"]) for entry in logged] == [("partial download taken over", [])]


def left(root: Path) -> list[Path]:
    """What is in the staging and trash directories of the former writers that writer 5 has taken over."""
    return [
        *root.glob(".cachd/nodes/5.work/former-*/staging/*"),
        *root.glob(".cachd/nodes/5.work/former-*/trash/*"),
    ]


def test_writers_with_higher_numbers_keep_what_they_have(root: Path) -> None:
    later = begun(work_of(root, 6))
    own = begun(work_of(root, 5), OTHER)
    layout = taken(root)
    assert (later.exists(), own.exists(), contents(layout)) == (True, True, {OTHER: b"received"})


@pytest.mark.parametrize(
    ("times", "kept"),
    [((1000.0, 1001.0), b"of 4...."), ((1001.0, 1000.0), b"of 3...."), ((1000.0, 1000.0), b"of 4....")],
)
def test_of_one_download_of_two_writers_the_newest_is_kept(
    root: Path, times: tuple[float, float], kept: bytes
) -> None:
    for number, at in zip((3, 4), times, strict=True):
        begun(work_of(root, number), content=b"of %d...." % number, at=at)
    assert contents(taken(root)) == {INGEST: kept}


def test_a_download_of_the_new_writer_is_not_replaced(root: Path) -> None:
    begun(work_of(root, 5), content=b"my own..")
    begun(work_of(root, 3), at=2000.0)
    begun(Layout(root), content=b"of one that used the root alone")
    assert contents(taken(root)) == {INGEST: b"my own.."}


def test_downloads_of_a_process_that_used_the_root_alone_are_moved(root: Path) -> None:
    begun(Layout(root))
    assert contents(taken(root)) == {INGEST: b"received"}
    assert list(Layout(root).ingests.iterdir()) == []


def test_what_was_left_half_done_goes_to_the_trash_under_names_of_its_own(root: Path) -> None:
    common = Layout(root)
    for place in (common.staging, common.trash):
        (place / "left").write_text(place.name)
    former = work_of(root, 3)
    (former.staging / "tree/below").mkdir(parents=True)
    (former.trash / "file").write_text("x")
    layout = taken(root)
    assert {path.read_text() for path in layout.trash.iterdir()} == {"staging", "trash"}
    assert [*common.staging.iterdir(), *common.trash.iterdir()] == []


def test_a_download_that_cannot_be_copied_is_dropped_and_the_others_are_not(root: Path) -> None:
    former = work_of(root, 3)
    (begun(former, OTHER) / "data").unlink()
    begun(former)
    with capture_logs() as logs:
        layout = taken(root)
    assert contents(layout) == {INGEST: b"received"}
    assert [(each["event"], each["ingest"]) for each in logs] == [
        ("partial download taken over", INGEST),
        ("partial download not taken over", OTHER),
    ]
    assert not (layout.ingests / OTHER).exists()


def test_without_space_every_copy_is_dropped_and_what_is_moved_stays(root: Path) -> None:
    begun(work_of(root, 3))
    begun(work_of(root, 4), OTHER)
    ended(root, 4)
    with capture_logs() as logs:
        layout = taken(root, reserve_free=1 << 60)
    assert contents(layout) == {OTHER: b"received"}
    assert ("partial download dropped: no space to take it over", INGEST) in [
        (each["event"], each["ingest"]) for each in logs
    ]


def test_what_an_interrupted_takeover_had_fenced_is_taken_over(root: Path) -> None:
    """Writer 4 had fenced writer 3 when it died; a directory of another name is nobody's."""
    fenced = work_of(root, 4).ingests.parent / "former-3.4-1"
    (fenced / "ingest").mkdir(parents=True)
    ingest = fenced / "ingest" / INGEST
    ingest.mkdir()
    (ingest / "data").write_bytes(b"received")
    (ingest / "received").write_text(f"0 8 {HASH}\n")
    ended(root, 3)
    inode = (ingest / "data").stat().st_ino
    layout = taken(root)
    assert contents(layout) == {INGEST: b"received"}
    assert (layout.ingests / INGEST / "data").stat().st_ino == inode, "its own writer has ended"
    for name in ("former-", "former-x", "later-3.4-1"):
        (layout.ingests.parent / name).mkdir()
    (layout.ingests.parent / "former-12").mkdir()
    assert [path.name for path in formers_in(layout.ingests.parent)] == ["former-12"]


@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_a_writer_that_was_replaced_takes_nothing_more(root: Path, allowed: int) -> None:
    common, layout = Layout(root), work_of(root, 5)
    begun(common)
    (common.staging / "left").touch()
    former = work_of(root, 3).ingests.parent
    asked = 0

    def check() -> None:
        nonlocal asked
        asked += 1
        if asked > allowed:
            raise InUse("a later writer is at work")

    with pytest.raises(InUse):
        Takeover(layout, 5, check, reserve_free=0).run()
    is_there = [former.exists(), (common.ingests / INGEST).exists(), (common.staging / "left").exists()]
    assert is_there == [allowed < 1, allowed < 2, True]


def test_downloads_are_moved_one_by_one_unless_they_are_there(root: Path) -> None:
    source, target, asked = work_of(root, 3), work_of(root, 4), []
    for name in (INGEST, OTHER):
        begun(source, name)
    begun(target, OTHER, b"its own.")
    move_ingests(source, target, lambda: asked.append(1))
    assert (contents(target), len(asked)) == ({INGEST: b"received", OTHER: b"its own."}, 1)
    assert [path.name for path in source.ingests.iterdir()] == [OTHER]
    move_ingests(source, target)
