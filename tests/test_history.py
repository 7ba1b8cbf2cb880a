"""Which snapshots a name led to before: what is kept of them, in which order, and for how long."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from cachd.model import ModelSpec, Ref, Snapshot
from cachd.store.history import Histories, History, Rollback
from cachd.store.layout import Layout
from cachd.store.root import make_directories

SPEC = ModelSpec(Ref.parse("hf://org/model"), "m")
TAGGED = ModelSpec(Ref.parse("hf://org/model@v1"), "m")


def snapshot(number: int, spec: ModelSpec = SPEC, *, layout: Layout | None = None) -> Snapshot:
    """A snapshot of the name; with `layout`, its manifest is recorded."""
    digits = f"{number:032x}"
    if layout:
        layout.manifest(digits).write_text("{}")
    return Snapshot(
        spec=spec,
        manifest=digits,
        revision=f"{number:040x}",
        size=number,
        files=1,
        verified=True,
        published_at=float(number),
        repo="org/model",
        commit=f"{number:040x}",
    )


@pytest.fixture
def layout(root: Path) -> Layout:
    make_directories(root)
    return Layout(root)


@pytest.fixture
def past(layout: Layout) -> list[Snapshot]:
    """Snapshots whose manifests are recorded, 0 to 5."""
    return [snapshot(number, layout=layout) for number in range(6)]


def published(histories: Histories, past: list[Snapshot], *numbers: int) -> None:
    """Publish these snapshots under the name, one after the other."""
    for before, after in pairwise(numbers):
        histories.replace(past[before], past[after], rolled_back_from=None)


@pytest.mark.parametrize("keep", [0, 1, 2, 9])
def test_the_newest_previous_snapshots_are_kept_and_the_next_start_knows_them(
    layout: Layout, past: list[Snapshot], keep: int
) -> None:
    histories = Histories(layout, keep)
    assert (histories.of("m"), histories.all(), histories.manifests()) == ([], [], set())
    published(histories, past, 0, 1, 2, 3)
    expected = [past[2], past[1], past[0]][:keep]
    for each in (histories, Histories(layout, keep)):
        assert each.of("m") == each.all() == expected
        assert each.manifests() == {s.manifest for s in expected}
        assert each.of("other") == []
    assert layout.previous_file("m").exists() == bool(keep)
    assert Histories(layout, 1).of("m") == expected[:1], "a lower option counts at once"


def test_a_snapshot_is_kept_once_and_never_beside_itself(layout: Layout, past: list[Snapshot]) -> None:
    histories = Histories(layout, 9)
    published(histories, past, 0, 1, 0, 1, 2, 0)
    assert histories.of("m") == [past[2], past[1]]
    histories.replace(past[0], past[0], rolled_back_from=None)
    assert histories.of("m") == [past[2], past[1]]
    histories.replace(None, past[3], rolled_back_from=None)  # the name was not ready
    assert histories.of("m") == [past[2], past[1]]


def test_a_snapshot_that_is_gone_is_no_previous_one(layout: Layout, past: list[Snapshot]) -> None:
    histories = Histories(layout, 9)
    published(histories, past, 0, 1, 2)
    layout.manifest(past[1].manifest).unlink()
    assert histories.of("m") == [past[0]]


def test_an_unchanged_history_is_not_written(layout: Layout, past: list[Snapshot]) -> None:
    histories = Histories(layout, 9)
    histories.replace(None, past[0], rolled_back_from=None)
    assert not layout.previous_file("m").exists()
    published(histories, past, 0, 1)
    before = layout.previous_file("m").stat().st_ino
    published(histories, past, 1, 1)
    assert layout.previous_file("m").stat().st_ino == before


def test_what_a_rollback_replaced_is_known_until_something_else_is_asked_for(
    layout: Layout, past: list[Snapshot]
) -> None:
    histories = Histories(layout, 9)
    assert histories.rolled_back_from("m") is None
    histories.replace(past[1], past[0], rolled_back_from=TAGGED)
    for refreshed in (past[0], past[2]):  # the same spec again, and a new revision of it
        histories.replace(past[0], refreshed, rolled_back_from=None)
        assert histories.rolled_back_from("m") == TAGGED
    histories.replace(None, past[0], rolled_back_from=None)  # a repair
    assert Histories(layout, 9).rolled_back_from("m") == TAGGED
    histories.replace(past[0], snapshot(3, TAGGED), rolled_back_from=None)
    assert histories.rolled_back_from("m") is None


def test_a_forgotten_name_leaves_only_what_others_need(layout: Layout, past: list[Snapshot]) -> None:
    histories = Histories(layout, 9)
    published(histories, past, 0, 1, 2)
    other = replace(past[3], spec=ModelSpec(SPEC.ref, "other"), address="")
    histories.replace(replace(past[1], spec=other.spec, address=""), other, rolled_back_from=None)
    assert histories.forget("m") == {past[0].manifest}
    assert (histories.of("m"), histories.forget("m")) == ([], set())
    assert not layout.previous_file("m").exists()
    assert histories.manifests() == {past[1].manifest}


def test_a_dropped_snapshot_is_in_no_history_and_the_others_stay(
    layout: Layout, past: list[Snapshot]
) -> None:
    histories = Histories(layout, 9)
    published(histories, past, 0, 1, 2)
    histories.replace(past[2], past[3], rolled_back_from=TAGGED)
    histories.begin_rollback(Rollback(past[1], past[2], TAGGED, 5.0))
    before = layout.previous_file("m").stat().st_ino
    histories.drop(past[5].manifest)
    assert layout.previous_file("m").stat().st_ino == before
    assert histories.begun_rollback("m") is not None
    histories.drop(past[1].manifest)
    for each in (histories, Histories(layout, 9)):
        assert each.of("m") == [past[2], past[0]]
        assert each.rolled_back_from("m") == TAGGED
        assert each.begun_rollbacks() == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"previous": [1], "rolled_back_from": null}'])
def test_a_history_that_cannot_be_read_is_removed_and_no_other(
    layout: Layout, past: list[Snapshot], content: str
) -> None:
    published(Histories(layout, 9), past, 0, 1)
    layout.previous_file("x").write_text(content)
    layout.rollback_file("x").write_text(content)
    histories = Histories(layout, 9)
    assert (histories.of("x"), histories.begun_rollbacks()) == ([], [])
    assert histories.of("m") == [past[0]]
    assert [p.name for p in layout.previous.iterdir()] == ["m.json"]
    assert list(layout.rollbacks.iterdir()) == []


def test_only_a_full_disk_lets_a_publish_go_on_without_its_history(
    layout: Layout, past: list[Snapshot]
) -> None:
    histories = Histories(layout, 9)
    layout.previous.rmdir()
    with pytest.raises(FileNotFoundError):
        published(histories, past, 0, 1)
    assert histories.of("m") == []


# --- rollbacks ---


def test_a_rollback_is_known_until_it_ends_and_needs_both_snapshots(
    layout: Layout, past: list[Snapshot]
) -> None:
    histories, rollback = Histories(layout, 9), Rollback(past[0], past[1], TAGGED, 7.0)
    histories.begin_rollback(rollback)
    before = layout.rollback_file("m").stat().st_ino
    histories.begin_rollback(rollback)
    assert layout.rollback_file("m").stat().st_ino == before, "it is recorded already"
    for each in (histories, Histories(layout, 9)):
        assert each.begun_rollback("m") == rollback
        assert each.begun_rollbacks() == [rollback]
        assert each.manifests() == {past[0].manifest, past[1].manifest}
    histories.begin_rollback(Rollback(past[2], None, TAGGED, 8.0))
    assert histories.manifests() == {past[2].manifest}
    assert Histories(layout, 9).begun_rollback("m") == Rollback(past[2], None, TAGGED, 8.0)
    for _ in range(2):
        histories.end_rollback("m")
        assert (histories.begun_rollback("m"), histories.manifests()) == (None, set())
        assert Histories(layout, 9).begun_rollbacks() == []


def test_a_rollback_that_failed_restores_the_history(layout: Layout, past: list[Snapshot]) -> None:
    histories = Histories(layout, 9)
    published(histories, past, 0, 1)
    histories.undo_rollback("m")  # none has begun
    histories.begin_rollback(Rollback(past[0], past[1], TAGGED, 7.0))
    histories.replace(past[1], past[0], rolled_back_from=TAGGED)
    histories.undo_rollback("m")
    for each in (histories, Histories(layout, 9)):
        assert (each.of("m"), each.rolled_back_from("m"), each.begun_rollbacks()) == ([past[0]], None, [])
    before = layout.previous_file("m").stat().st_ino
    histories.begin_rollback(Rollback(past[0], past[1], TAGGED, 7.0))
    histories.undo_rollback("m")
    assert layout.previous_file("m").stat().st_ino == before, "nothing had changed"
    histories.begin_rollback(Rollback(past[0], past[1], TAGGED, 7.0))
    histories.replace(past[1], past[0], rolled_back_from=TAGGED)
    histories.end_rollback("m")
    histories.undo_rollback("m")
    assert histories.of("m") == [past[1]], "a rollback that ended is not undone"


@pytest.mark.parametrize(
    ("member", "value"),
    [("at", 1e30), ("at", "x"), ("to", None), ("to", {}), ("rolled_back_from", None), ("replaced", {"a": 1})],
)
def test_a_rollback_that_makes_no_sense_is_removed(
    layout: Layout, past: list[Snapshot], member: str, value: object
) -> None:
    Histories(layout, 9).begin_rollback(Rollback(past[0], past[1], TAGGED, 7.0))
    path = layout.rollback_file("m")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, member: value}))
    assert Histories(layout, 9).begun_rollbacks() == []
    assert not path.exists()


def test_a_rollback_under_another_name_than_its_file_is_removed(layout: Layout, past: list[Snapshot]) -> None:
    Histories(layout, 9).begin_rollback(Rollback(past[0], past[1], TAGGED, 7.0))
    layout.rollback_file("m").rename(layout.rollback_file("other"))
    assert Histories(layout, 9).begun_rollbacks() == []
    assert list(layout.rollbacks.iterdir()) == []


def test_a_history_is_read_as_it_was_written(past: list[Snapshot]) -> None:
    for history in (History(), History((past[0], past[1]), TAGGED)):
        assert History.from_document(json.loads(json.dumps(history.as_document()))) == history
