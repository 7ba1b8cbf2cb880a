"""What a start makes of a root before it reads a model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from cachd.errors import DiskFailed, Invalid
from cachd.store.layout import Layout
from cachd.store.opening import FORMAT, check_disk, check_format, prepare
from cachd.store.root import make_directories
from tests.ground.stored import names_below
from tests.ground.synced import synced

NAME = f"sha256-{'0a' * 32}-9"


@pytest.fixture
def layout(root: Path) -> Layout:
    make_directories(root)
    return Layout(root)


def test_a_new_root_gets_its_format_and_the_tags_of_backup_tools(layout: Layout) -> None:
    check_format(layout)
    prepare(layout)
    assert layout.format.read_text() == FORMAT == "cachd 1\n"
    check_format(layout)
    tags = layout.root / "CACHEDIR.TAG", layout.hub / "CACHEDIR.TAG"
    before = [tag.stat().st_ino for tag in (*tags, layout.format)]
    assert all(tag.read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55") for tag in tags)
    prepare(layout)
    assert [tag.stat().st_ino for tag in (*tags, layout.format)] == before
    for top in (layout.models, layout.ready, layout.staging):
        assert not [name for name in names_below(top) if "probe" in name]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("cachd 2\n", "of a newer cachd"),
        ("cachd 10\n", "of a newer cachd"),
        ("cachd 0\n", "no format of cachd"),
        ("cachd 01\n", "no format of cachd"),
        ("cachd 1", "no format of cachd"),
        ("", "no format of cachd"),
        ("x" * 4097, "no format of cachd"),
    ],
)
def test_another_format_is_refused(layout: Layout, content: str, says: str) -> None:
    layout.format.write_text(content)
    with pytest.raises(Invalid, match=says) as refusal:
        check_format(layout)
    assert refusal.value.code == "bad_format"
    assert layout.format.read_text() == content


def test_only_what_is_left_half_done_is_removed(layout: Layout) -> None:
    kept, emptied, renamed = (layout.ingests / name for name in (NAME, f"{NAME}0", "sha256-0a"))
    for ingest in (kept, renamed):
        ingest.mkdir()
        (ingest / "data").write_bytes(b"x")
    emptied.mkdir()
    (layout.ingests / "file").write_bytes(b"x")
    (layout.staging / "tree/sub").mkdir(parents=True)
    (layout.staging / "file").write_bytes(b"x")
    (layout.staging / "link").symlink_to(kept)
    for probe in (layout.staging / "probe", layout.ready / ".probe", layout.models / ".probe"):
        probe.write_bytes(b"left by a crash")
    (layout.trash / "gone").write_bytes(b"x")
    prepare(layout)
    assert names_below(layout.ingests) == {NAME}
    assert (kept / "data").read_bytes() == b"x"
    assert names_below(layout.staging) == names_below(layout.ready) == set()
    assert names_below(layout.models) == {".trees", ".holds"}
    assert names_below(layout.trash) == {"gone"}, "the store empties it"


def test_entries_of_earlier_versions_are_renamed_unless_there_are_newer_ones(layout: Layout) -> None:
    private = layout.format.parent
    (private / "wishes").mkdir()
    (private / "wishes/m.json").write_text("old")
    (private / "wishes/n.json").write_text("old")
    layout.pending_file("n").write_text("new")
    (private / "uses.json").write_text("old")
    (private / "verified.json").write_text("old")
    layout.scrub_log.write_text("new")
    (private / "suspended").symlink_to(layout.models)
    prepare(layout)
    assert layout.pending_file("m").read_text() == layout.usage_log.read_text() == "old"
    assert layout.pending_file("n").read_text() == layout.scrub_log.read_text() == "new"
    assert [(private / name).exists() for name in ("wishes", "uses.json", "verified.json")] == [False] * 3
    assert (private / "suspended").is_symlink(), "cachd made no link"


def test_the_directories_that_a_publish_relies_on_are_durable(layout: Layout) -> None:
    with synced() as paths:
        prepare(layout)
    first = (layout.root, layout.models, layout.format.parent)
    assert paths[:5] == [*map(str, first), str(layout.format.with_name(".format.new")), str(first[2])]


@pytest.mark.parametrize("count", [0, 1, 21])
def test_entries_that_cachd_did_not_make_are_told_and_left_alone(layout: Layout, count: int) -> None:
    for name in ("cache", "lost+found"):
        (layout.root / name).mkdir()
    foreign = [f"x{number:02}" for number in range(count)]
    for name in foreign:
        (layout.root / name).touch()
    with capture_logs() as logs:
        prepare(layout)
    told = [(each["names"], each["count"]) for each in logs if "names" in each]
    assert told == ([(foreign[:20], count)] if count else [])
    assert names_below(layout.root) >= {*foreign, "cache", "lost+found"}


def test_a_tag_that_cannot_be_written_keeps_no_daemon_from_its_start(layout: Layout) -> None:
    for directory in (layout.root, layout.hub):
        (directory / ".CACHEDIR.TAG.new").mkdir()
    prepare(layout)
    assert not (layout.root / "CACHEDIR.TAG").exists()


@pytest.mark.parametrize("obstacle", ["ready", "models"])
def test_a_root_whose_directories_do_not_share_links_is_refused_and_no_probe_stays(
    layout: Layout, obstacle: str
) -> None:
    (layout.root / obstacle / ".probe").mkdir()
    with pytest.raises(DiskFailed) as refusal:
        prepare(layout)
    assert (refusal.value.code, str(layout.root) in refusal.value.detail) == ("no_hard_links", True)
    assert names_below(layout.staging) | (names_below(layout.root / obstacle) - {".trees", ".holds"}) == {
        ".probe"
    }
    (layout.root / obstacle / ".probe").rmdir()
    prepare(layout)


def test_a_disk_has_at_least_the_size_that_is_intended(root: Path) -> None:
    status = os.statvfs(root)
    size = status.f_blocks * status.f_frsize
    check_disk(root, at_least=size)
    with pytest.raises(DiskFailed) as refusal:
        check_disk(root, at_least=size + 1)
    assert refusal.value.code == "disk_too_small"
    with pytest.raises(DiskFailed):
        check_disk(root / "absent", at_least=0)
