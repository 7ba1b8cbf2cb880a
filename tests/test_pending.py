"""The records of pulls that a restart resumes, and of those that failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cachd.model import ModelSpec, Ref
from cachd.store.layout import Layout
from cachd.store.pending import FailedPull, PendingPull, PendingPulls
from cachd.store.root import make_directories

SPEC = ModelSpec(Ref.parse("hf://org/model@v1"), "m", ("*.safetensors",))
OTHER = ModelSpec(Ref.parse("s3://bucket/x/"), "other")


@pytest.fixture
def layout(root: Path) -> Layout:
    make_directories(root)
    return Layout(root)


@pytest.fixture
def pending(layout: Layout) -> PendingPulls:
    return PendingPulls(layout)


def names(layout: Layout) -> set[str]:
    return {path.name for path in layout.pending.iterdir()}


def failed(spec: ModelSpec, at: str) -> FailedPull:
    return FailedPull(spec, replace=True, pins=True, ended={"code": "not_found", "ended_at": at})


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("pins", [False, True])
def test_a_pull_is_resumed_as_it_was_asked_for(pending: PendingPulls, replace: bool, pins: bool) -> None:
    pending.remember(SPEC, replace=replace, pins=pins)
    assert pending.all() == [PendingPull(SPEC, replace=replace, pins=pins, began=0)]


def test_a_pull_takes_its_name_and_pins_nothing_unless_told_otherwise(
    pending: PendingPulls, layout: Layout
) -> None:
    pending.remember(SPEC)
    (before,) = pending.all()
    assert (before.replace, before.pins) == (True, False)
    path = layout.pending_file("m")
    document = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in document.items() if k not in ("replace", "pins")}))
    assert pending.all() == [before], "an older version wrote neither"


def test_processes_that_died_during_a_pull_are_counted_until_one_does_not(
    pending: PendingPulls, layout: Layout
) -> None:
    pending.remember(SPEC)
    for count in (1, 2):
        pending.begins("m")
        assert [each.began for each in pending.all()] == [count]
    pending.ends_well("m")
    pending.ends_well("m")
    assert [each.began for each in pending.all()] == [0]
    pending.begins("m")
    pending.remember(SPEC)
    assert [each.began for each in pending.all()] == [0], "it was asked for anew"
    for content, count in (("-3", 0), ("x", 0), ("", 0), ("7", 7), ("1" * 21, 0)):
        layout.began("m").write_text(content)
        assert [each.began for each in pending.all()] == [count]


def test_a_pull_that_failed_is_shown_until_it_is_asked_for_again(
    pending: PendingPulls, layout: Layout
) -> None:
    ends: list[Callable[[], None]] = [lambda: pending.remember(SPEC), lambda: pending.forget("m")]
    for again in ends:
        pending.remember(SPEC)
        pending.begins("m")
        pending.fail(failed(SPEC, "2026"))
        assert (names(layout), pending.all()) == ({"m.failed"}, [])
        assert pending.failed() == [failed(SPEC, "2026")]
        again()
        assert pending.failed() == []
    assert names(layout) == set()


def test_a_failure_may_be_forgotten_without_the_pull_that_runs(pending: PendingPulls, layout: Layout) -> None:
    pending.fail(failed(SPEC, "2026"))
    layout.pending_file("m").write_text(json.dumps({**SPEC.as_document()}))
    for _ in range(2):
        pending.forget_failure("m")
        assert (pending.failed(), [each.spec for each in pending.all()]) == ([], [SPEC])


def test_forgetting_leaves_nothing_and_touches_no_other(pending: PendingPulls, layout: Layout) -> None:
    for spec in (SPEC, OTHER):
        pending.remember(spec)
        pending.begins(spec.name)
    for _ in range(2):
        pending.forget("m")
        assert names(layout) == {"other.json", "other.began"}


def test_failures_are_listed_oldest_first(pending: PendingPulls) -> None:
    pending.fail(failed(SPEC, "2026-02"))
    pending.fail(failed(OTHER, "2026-01"))
    assert [each.spec.name for each in pending.failed()] == ["other", "m"]


def test_what_cannot_be_read_is_removed_and_nothing_else(pending: PendingPulls, layout: Layout) -> None:
    pending.remember(SPEC)
    pending.fail(failed(OTHER, "2026"))
    for suffix in ("json", "failed"):
        for number, content in enumerate(("", "{", "[]", "{}", json.dumps({"ref": "nonsense"}))):
            (layout.pending / f"{number}.{suffix}").write_text(content)
    assert [each.spec for each in pending.all()] == [SPEC]
    assert [each.spec for each in pending.failed()] == [OTHER]
    assert names(layout) == {"m.json", "other.failed"}
