"""Which names are ready, quarantined or free, and which of them exclude each other."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from cachd.errors import DiskFailed, InUse, NoSpace, NotFound
from cachd.model import Digest, ModelSpec, Ref, Snapshot
from cachd.store.catalog import Quarantine
from cachd.store.changes import Changes
from cachd.store.layout import Layout
from cachd.store.names import Names, exclude_each_other, no_such_model
from cachd.store.root import make_directories

MANY = 1000  # evicted names that are remembered


def snapshot(name: str, ref: str = "hf://org/model", *, at: float = 1.0, number: int = 1) -> Snapshot:
    spec = ModelSpec(Ref.parse(ref), name)
    return Snapshot(
        spec=spec,
        manifest=f"{number:032x}",
        revision="a" * 40,
        size=1,
        files=1,
        verified=True,
        published_at=at,
        repo=spec.repo,
        commit="a" * 40,
    )


def quarantine(of: Snapshot) -> Quarantine:
    return Quarantine(of, since=5.0, reason="wrong", inodes={Digest("sha256", "1" * 64): 7})


@pytest.fixture
def changes() -> Changes:
    return Changes()


@pytest.fixture
def names(root: Path, changes: Changes) -> Names:
    make_directories(root)
    return Names(Layout(root), changes)


def marked(changes: Changes) -> set[str]:
    """The names whose state has changed since the last call."""
    changes.wake()
    return changes.take(None)


def test_a_name_is_ready_from_its_declaration_on(names: Names, changes: Changes) -> None:
    m = snapshot("m")
    assert (names.get("m"), names.has("m"), names.known("m"), names.owner("m")) == (None, False, None, None)
    with pytest.raises(NotFound) as refusal:
        names.ready("m")
    assert (refusal.value.code, "'m'" in refusal.value.detail) == ("no_such_model", True)
    names.declared(m)
    assert (names.get("m"), names.has("m"), names.known("m"), names.owner("m")) == (m, True, m, m.spec)
    assert names.ready("m") == m
    assert names.all() == names.all_known() == names.of(m.manifest) == [m]
    assert names.in_hub_folder(m.hub_folder) == [m]
    assert names.manifests() == {m.manifest}
    assert marked(changes) == {"m"}
    names.undeclared("m")
    assert (names.get("m"), names.has("m"), names.all(), names.manifests()) == (None, False, [], set())
    assert marked(changes) == {"m"}


def test_a_quarantined_name_is_known_and_not_ready(names: Names, root: Path) -> None:
    m, other = snapshot("m"), snapshot("b", number=2)
    for each in (m, other):
        names.declared(each)
        names.record_quarantine(quarantine(each))
        names.undeclared(each.name)
    assert (names.get("m"), names.has("m"), names.known("m"), names.owner("m")) == (None, True, m, m.spec)
    assert names.quarantine_of("m") == quarantine(m)
    assert names.quarantined() == [quarantine(other), quarantine(m)]
    assert (names.all(), names.manifests()) == ([], {m.manifest, other.manifest})
    files = [root / f".cachd/quarantined/{name}.json" for name in ("m", "b")]
    assert [file.exists() for file in files] == [True, True]
    for _ in range(2):
        names.end_quarantine("m")
        assert [file.exists() for file in files] == [False, True]
        assert (names.quarantine_of("m"), names.has("m")) == (None, False)
    assert names.quarantined() == [quarantine(other)]


def test_a_quarantine_that_cannot_be_recorded_is_none_unless_the_disk_is_full(
    names: Names, root: Path
) -> None:
    (root / ".cachd/quarantined").rmdir()
    with pytest.raises(FileNotFoundError):
        names.record_quarantine(quarantine(snapshot("m")))
    assert names.quarantine_of("m") is None


def test_a_repaired_name_is_known_by_what_is_ready_now(names: Names) -> None:
    before, after = snapshot("m"), snapshot("m", number=2)
    names.record_quarantine(quarantine(before))
    names.declared(after)
    assert names.known("m") == names.get("m") == after


def test_the_newest_names_and_those_after_another_are_listed(names: Names) -> None:
    made = [snapshot(name, at=at, number=n) for n, (name, at) in enumerate((("b", 3), ("a", 1), ("c", 2)))]
    for each in made:
        names.declared(each)
    assert [s.name for s in names.newest(2)] == ["b", "c"]
    assert names.newest(0) == []
    assert [s.name for s in names.all()] == ["a", "b", "c"]
    assert (names.after("", 2), names.after("a", 9), names.after("c", 9)) == (["a", "b"], ["b", "c"], [])


def test_other_names_of_a_snapshot_count_even_if_they_wait_for_a_repair(names: Names) -> None:
    one, other, third = snapshot("one"), snapshot("other"), snapshot("third", number=3)
    for each in (one, third):
        names.declared(each)
    assert not names.has_others([one])
    names.record_quarantine(quarantine(other))
    assert names.has_others([one])
    assert not names.has_others([one, other])


def test_an_eviction_is_the_reason_until_the_name_is_there_again(names: Names, changes: Changes) -> None:
    assert not names.was_evicted("m")
    names.note_eviction("m")
    assert names.was_evicted("m")
    names.declared(snapshot("m"))
    assert not names.was_evicted("m")
    names.undeclared("m")
    assert not names.was_evicted("m"), "it was withdrawn since"
    names.note_eviction("m")
    marked(changes)
    names.forget_eviction("other")
    assert marked(changes) == set()
    names.forget_eviction("m")
    assert (names.was_evicted("m"), marked(changes)) == (False, {"m"})


def test_a_name_that_waits_for_its_repair_was_not_evicted(names: Names) -> None:
    names.note_eviction("m")
    names.record_quarantine(quarantine(snapshot("m")))
    assert not names.was_evicted("m")


def test_so_many_evictions_are_remembered_and_the_oldest_is_forgotten(names: Names, changes: Changes) -> None:
    for number in range(MANY):
        names.note_eviction(str(number))
    assert (names.was_evicted("0"), marked(changes)) == (True, set())
    names.note_eviction("one more")
    assert [names.was_evicted(name) for name in ("0", "1", "one more")] == [False, True, True]
    assert marked(changes) == {"0"}


def test_whoever_may_write_no_more_changes_nothing(root: Path, changes: Changes) -> None:
    make_directories(root)

    def fenced() -> None:
        raise InUse("another process took over", code="fenced")

    names = Names(Layout(root), changes, check=fenced)
    with pytest.raises(InUse), names.changing():
        pytest.fail("it may change nothing")
    with pytest.raises(InUse), names.changing():  # and the lock is free again
        pytest.fail("it may change nothing")


def test_an_error_of_the_disk_is_told_as_one(names: Names) -> None:
    with pytest.raises(NoSpace), names.changing():
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(DiskFailed), names.changing():
        raise OSError(errno.EIO, "broken")


# --- folders of the Hub view ---


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_hub_folder_shows_models_of_one_source(names: Names, is_damaged: bool) -> None:
    shown = snapshot("shown")
    if is_damaged:
        names.record_quarantine(quarantine(shown))
    else:
        names.declared(shown)
    names.check_hub_folder(ModelSpec(Ref.parse("hf://org/model@v1"), "m"))
    names.check_hub_folder(ModelSpec(Ref.parse("hf://org/other"), "m"))
    mirror = ModelSpec(Ref.parse("https://host/x"), "m", hub_id="org/model")
    with pytest.raises(InUse) as refusal:
        names.check_hub_folder(mirror)
    assert refusal.value.code == "hub_id_taken"
    assert "hub_id" in refusal.value.hint
    names.check_hub_folder(replace(mirror, name="shown"))  # it takes the place of the other


def test_a_name_that_would_take_the_folder_of_another_is_told_to_choose_another(names: Names) -> None:
    names.declared(replace(snapshot("m", "https://host/x"), repo="m"))
    names.declared(replace(snapshot("own", "s3://bucket/x/"), repo="taken"))
    with pytest.raises(InUse) as refusal:
        names.check_hub_folder(ModelSpec(Ref.parse("https://host/other"), "taken"))
    assert (refusal.value.code, "hub_id" in refusal.value.hint) == ("hub_id_taken", False)


def test_a_branch_that_is_a_directory_of_another_is_refused(names: Names) -> None:
    names.declared(snapshot("shown", "hf://org/model@a/b"))
    for ref, is_refused in (("a", True), ("a/b/c", True), ("a/b", False), ("ab", False), ("b", False)):
        spec = ModelSpec(Ref.parse(f"hf://org/model@{ref}"), "m")
        if not is_refused:
            names.check_hub_folder(spec)
            continue
        with pytest.raises(InUse) as refusal:
            names.check_hub_folder(spec)
        assert refusal.value.code == "branch_taken"


@pytest.mark.parametrize(
    ("branch", "other", "exclude"),
    [
        ("main", "main/x", True),
        ("main/x", "main", True),
        ("main", "main", False),
        ("main", "mainline/x", False),
        (None, "main", False),
        ("main", None, False),
        (None, None, False),
    ],
)
def test_a_branch_cannot_be_both_a_file_and_a_directory(
    branch: str | None, other: str | None, exclude: bool
) -> None:
    assert exclude_each_other(branch, other) is exclude


def test_the_error_for_an_unknown_name_names_it() -> None:
    error = no_such_model("m")
    assert (type(error), error.code, "'m'" in error.detail) == (NotFound, "no_such_model", True)
