"""What the files of a shared volume say about its writers, whatever somebody made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cachd.errors import DiskFailed, InUse
from cachd.store.layout import Layout
from cachd.store.nodes import Nodes, Term, Writer, end_dead_writer, newest_number
from cachd.store.root import make_directories
from cachd.store.root_lock import take_lock
from tests.ground.stored import names_below


@pytest.fixture
def nodes(root: Path) -> Path:
    """The directory of an empty root in which processes agree."""
    make_directories(root)
    return root / ".cachd/nodes"


def took(root: Path, spec: dict[str, object] | None = None) -> Term:
    """The next term, which has not begun."""
    observer = Nodes(root)
    observer.writer()
    term = observer.take("m", spec or {}, fenced=lambda: None)
    assert term is not None
    return term


def test_a_root_without_writers_has_none(root: Path, nodes: Path) -> None:
    observer = Nodes(root)
    assert (observer.writer(), observer.seen) == (None, (0, b""))
    assert not observer.has_ended(0)
    end_dead_writer(root)
    assert names_below(nodes) == set(), "nobody was there to take over from"


def test_a_writer_that_has_not_beaten_yet_may_write(root: Path, nodes: Path) -> None:
    term = took(root, {"ref": "hf://org/m"})
    observer = Nodes(root)
    who = json.loads((nodes / "1.writer").read_text())["who"]
    assert observer.writer() == Writer(1, who, "m", {"ref": "hf://org/m"})
    assert (observer.seen, observer.has_ended(1)) == ((1, b""), False)
    assert who.startswith(f"pid {os.getpid()} on ")
    assert (term.number, term.work) == (1, ".cachd/nodes/1.work")
    term.begin()
    term.end()
    assert (observer.writer(), observer.has_ended(1)) == (None, True)
    assert json.loads((nodes / "1.ended").read_text()) == {"error": None}
    assert observer.ended_with(1) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"who": null, "name": null, "spec": [1]}'])
def test_a_writer_with_a_damaged_file_counts_all_the_same(root: Path, nodes: Path, content: str) -> None:
    (nodes / "4.writer").write_text(content)
    assert Nodes(root).writer() == Writer(4, "unknown", "", {})


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("", None),
        ("[]", None),
        ("{}", None),
        ('{"error": 1}', None),
        ('{"error": {"code": "x"}}', {"code": "x"}),
    ],
)
def test_the_error_of_a_writer_is_known_if_it_can_be_read(
    root: Path, nodes: Path, content: str, error: object
) -> None:
    assert Nodes(root).ended_with(3) is None
    (nodes / "3.ended").write_text(content)
    assert Nodes(root).ended_with(3) == error


def test_only_names_of_writers_count_as_numbers(root: Path, nodes: Path) -> None:
    for name in (
        "2.writer",
        "9.beat",
        "8.work",
        "x.writer",
        "7.writer.old",
        "1234567890123.writer",
        ".5.writer",
    ):
        (nodes / name).touch()
    assert newest_number(Layout(root)) == 2
    (nodes / "123456789012.writer").touch()
    assert newest_number(Layout(root)) == 123456789012


def test_who_is_too_late_for_a_number_has_nothing(root: Path, nodes: Path) -> None:
    slow = Nodes(root)
    slow.writer()
    first = took(root)
    descriptors = sorted(os.listdir("/proc/self/fd"))
    assert slow.take("m", {}, fenced=lambda: None) is None
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
    assert names_below(nodes) == {"1.writer"}
    first.check()
    (nodes / "2.writer").write_text("{}")
    heard: list[str] = []
    third = Nodes(root)
    third.seen = (0, b"")  # it saw the first number free, and now there are two
    assert third.take("m", {}, fenced=lambda: None) is None
    with pytest.raises(InUse, match="process 2 took over") as refusal:
        Term(root, 1, fenced=lambda: heard.append("fenced")).check()
    assert (refusal.value.code, heard) == ("fenced", ["fenced"])
    first.end()
    assert not (nodes / "1.ended").exists(), "a fenced process gives up nothing"


def test_a_term_makes_its_directories_and_beats(root: Path, nodes: Path) -> None:
    term = took(root)
    term.begin()
    try:
        assert names_below(nodes / "1.work") == {"ingest", "staging", "trash"}
        assert all(place.stat().st_mode & 0o077 == 0 for place in (nodes / "1.work").iterdir())
        beat = (nodes / "1.beat").read_bytes()
        assert (len(beat), int(beat) >= 1) == (21, True)
        term.check_if_late()
    finally:
        term.end()
    assert not (nodes / "1.work").exists()


def test_a_root_is_taken_over_from_a_writer_that_left_its_directory(root: Path, nodes: Path) -> None:
    term = took(root)
    term.begin()
    term.end()
    end_dead_writer(root)
    assert newest_number(Layout(root)) == 1, "it ended, and left nothing"
    (nodes / "1.work/ingest/sha256-a-1").mkdir(parents=True)
    end_dead_writer(root)
    assert newest_number(Layout(root)) == 2
    assert names_below(nodes) == {f"{n}.{kind}" for n in (1, 2) for kind in ("writer", "beat", "ended")}
    assert names_below(root / ".cachd/ingest") == {"sha256-a-1"}


def test_a_writer_is_dead_after_so_many_seconds_without_a_beat_and_a_pause_counts_as_two(
    root: Path, nodes: Path
) -> None:
    (nodes / "1.writer").write_text("{}")
    (nodes / "1.beat").write_text("1")
    now = 100.0
    observer = Nodes(root, clock=lambda: now)
    assert observer.writer()
    for _ in range(4):
        now += 50.0
        assert observer.writer()
    now += 1.75
    assert observer.writer()
    now += 0.25
    assert observer.writer() is None, "ten seconds"
    (nodes / "1.beat").write_text("2")
    assert observer.writer(), "it beats again"
    for _ in range(4):
        now += 2.0
        assert observer.writer()
    now += 2.0
    assert observer.writer() is None


def test_what_former_numbers_left_is_forgotten_but_for_the_last_twenty(root: Path, nodes: Path) -> None:
    for number in (1, 4, 5, 24):
        for kind in ("writer", "beat", "ended"):
            (nodes / f"{number}.{kind}").write_text("{}")
    (nodes / "x.writer").touch()
    term = took(root)
    assert term.number == 25
    term.begin()
    term.end()
    left = {name.partition(".")[0] for name in names_below(nodes)}
    assert left == {"24", "25", "x"}


def test_a_term_closes_its_lock_and_what_it_made_beside(root: Path, nodes: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    term = took(root)
    assert names_below(nodes) == {"1.writer"}, "nothing staged is left"
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    with pytest.raises(InUse):
        take_lock(Layout(root).lock)
    term.begin()
    term.end({"code": "x"})
    assert sorted(os.listdir("/proc/self/fd")) == before
    os.close(take_lock(Layout(root).lock))


def test_a_writer_that_beat_a_moment_ago_does_not_ask_whether_it_was_fenced(root: Path, nodes: Path) -> None:
    term = took(root)
    (nodes / "2.writer").write_text("{}")
    term.check_if_late()
    with pytest.raises(InUse):
        term.check()
    term.end()


def test_a_term_that_could_not_begin_is_given_up_all_the_same(root: Path, nodes: Path) -> None:
    term = took(root)
    (nodes / "1.beat").mkdir()
    with pytest.raises(DiskFailed):
        term.begin()
    term.end()
    assert json.loads((nodes / "1.ended").read_text()) == {"error": None}
    (nodes / "1.beat").rmdir()
    assert Nodes(root).writer() is None
