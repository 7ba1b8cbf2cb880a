"""What pods see of a published model, under names, filters and branches."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from cachd.errors import (
    CachdError,
    DiskFailed,
    InUse,
)
from cachd.model import ModelSpec, Ref
from cachd.store.disk_store import DiskStore
from cachd.store.history import Rollback
from cachd.store.permit import Permit
from tests.ground import mount
from tests.ground.kill import base_as_another_user, killed_at_every_step
from tests.ground.models import digests, noise
from tests.ground.stored import (
    KIB,
    ONE,
    SMALL,
    TWO,
    A,
    B,
    C,
    assert_nothing_left,
    assert_only,
    assert_whole,
    blobs_of,
    fetched_anew,
    hexes,
    hub,
    keep,
    manifest_of,
    names_below,
    publish,
    refs_of,
    shown,
    swept_bytes,
)
from tests.ground.synced import synced

# --- publish ---


def test_a_published_model_is_in_both_views_and_its_ready_file_says_what_it_is(
    store: DiskStore, root: Path
) -> None:
    snapshot = publish(store, ONE, now=1_700_000_000.0)
    assert_whole(root, "org--model", ONE, commit=A)
    assert refs_of(root) == {"main": A}
    assert (hub(root) / "refs/main").read_bytes() == A.encode(), "without a newline"
    told = json.loads((root / "ready/org--model.json").read_text())
    assert told["ref"] == "hf://org/model"
    assert told["manifest"] == snapshot.manifest
    assert told["bytes"] == sum({len(c): len(c) for c in ONE.values()}.values())
    assert (told["files"], told["verified"]) == (5, True)
    assert told["published_at"] == "2023-11-14T22:13:20+00:00"
    assert told["hub"] == {"repo": "org/model", "commit": A, "revision": "main", "refs": ["main"]}
    assert (root / told["path"]).is_dir()
    assert store.names.get("org--model") == snapshot


def test_a_ready_file_that_tells_no_file_is_one_of_before_and_its_model_stays_ready(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore]
) -> None:
    publish(store, {"model.gguf": noise(1000)})
    path = root / "ready/org--model.json"
    told = json.loads(path.read_text())
    assert told.pop("file") == "models/org--model/model.gguf"
    path.write_text(json.dumps(told))
    snapshot = next_life().names.get("org--model")
    assert snapshot is not None
    assert snapshot.file is None


def test_a_model_costs_the_disk_its_size_once(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    links = {path: (root / "models/org--model" / path).stat().st_nlink for path in ONE}
    assert links == {path: 5 if "safetensors" in path else 3 for path in ONE}


def test_what_is_published_is_found_again_by_the_next_daemon(
    store: DiskStore, next_life: Callable[[], DiskStore]
) -> None:
    published = [
        publish(store, ONE, "hf://org/model@v1", "mine"),
        publish(store, SMALL, "s3://bucket/small/", revision="f" * 64),
    ]
    store = next_life()
    assert store.names.all() == published
    assert [store.manifests.of(s).id for s in published] == [s.manifest for s in published]


def test_publishing_twice_changes_nothing(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    before = {path: path.lstat().st_ino for path in sorted(root.rglob("*safetensors"))}
    publish(store, ONE)
    assert {path: path.lstat().st_ino for path in sorted(root.rglob("*safetensors"))} == before
    assert_whole(root, "org--model", ONE, commit=A)
    assert store.sweep_snapshots() == 0


def test_reserved_looking_names_collide_with_nothing(store: DiskStore, root: Path) -> None:
    files = {
        name: noise(10, number)
        for number, name in enumerate(
            [
                ".ready",
                "MANIFEST.json",
                "blobs/x",
                ".incomplete",
                "CACHEDIR.TAG",
                "refs/main",
                "...",
            ]
        )
    }
    publish(store, files)
    assert_whole(root, "org--model", files, commit=A)


def test_the_links_of_a_blob_that_was_fetched_anew_follow_it(store: DiskStore, root: Path) -> None:
    publish(store, ONE)
    fetched_anew(store, ONE["model.safetensors"])
    publish(store, ONE)
    assert_whole(root, "org--model", ONE, commit=A)


def test_a_file_beside_one_fetched_anew_is_never_touched_whatever_its_name(
    store: DiskStore, root: Path
) -> None:
    files = {"x": noise(100, 1), ".x.new": noise(100, 2), "y/z": noise(100, 3), "y/.z.new": noise(100, 4)}
    publish(store, files)
    for content in files.values():
        fetched_anew(store, content)
        publish(store, files)
        assert_whole(root, "org--model", files, commit=A)


def test_the_longest_names_and_the_deepest_path_are_published_replaced_and_removed(
    store: DiskStore, root: Path
) -> None:
    files = {"n" * 255: noise(10, 1), "/".join(["d" * 255] * 4): noise(10, 2), "a/" * 511 + "a": noise(10, 3)}
    publish(store, files)
    for content in files.values():
        fetched_anew(store, content)
    publish(store, files)
    assert_whole(root, "org--model", files, commit=A)
    store.withdraw("org--model")
    assert_nothing_left(root)


def test_a_process_killed_at_any_step_of_a_publish_leaves_a_model_whole_or_absent() -> None:
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            keep(store, SMALL)

        def published(root: Path) -> None:
            with DiskStore(root) as store:
                publish(store, SMALL)

        for root in killed_at_every_step(base, published):
            if (root / "ready/org--model.json").exists():
                assert_whole(root, "org--model", SMALL, commit=A)
            with DiskStore(root) as store:
                assert mount.names(root) == {s.name for s in store.names.all()}
                assert mount.left_over(root) == []
                publish(store, SMALL)
                assert_whole(root, "org--model", SMALL, commit=A)
                assert refs_of(root) == {"main": A}
                store.withdraw("org--model")
                assert_nothing_left(root)


def test_a_process_killed_at_any_step_of_a_new_revision_leaves_the_old_the_new_or_none() -> None:
    old, new = SMALL, {**SMALL, "dir/model.bin": noise(KIB, 2)}
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            publish(store, old, "hf://org/model@v1", "mine", revision=A)
            keep(store, new)

        def moved(root: Path) -> None:
            with DiskStore(root) as store:
                publish(store, new, "hf://org/model@v2", "mine", revision=B)

        for root in killed_at_every_step(base, moved):
            with suppress(FileNotFoundError):
                ready = json.loads((root / "ready/mine.json").read_text())
                assert_whole(root, "mine", {A: old, B: new}[ready["revision"]], commit=ready["revision"])
            with DiskStore(root) as store:
                for snapshot in store.names.all():
                    assert_whole(root, "mine", {A: old, B: new}[snapshot.commit], commit=snapshot.commit)
                moved_again = publish(store, new, "hf://org/model@v2", "mine", revision=B)
                store.sweep_snapshots()
                assert_whole(root, "mine", new, commit=B)
                assert_only(root, {"mine": moved_again}, new)


def test_each_step_of_a_publish_and_of_a_withdrawal_is_durable_before_the_next(
    store: DiskStore, root: Path
) -> None:
    first, second = manifest_of(SMALL), manifest_of({**SMALL, "x": b"y"})
    keep(store, {**SMALL, "x": b"y"})
    staged = ["staging/.m.json.new", "staging"]
    hub_places = ["hub/.locks", "F", "F", "F/.no_exist", "F/.no_exist/A"]
    hub_places += [f"F/.no_exist/A/{each}" for each in ("1_Pooling/.config.json.new", "1_Pooling", "", "")]
    assert durable_steps(root, lambda: publish(store, SMALL, name="m")) == [
        *("blobs/sha256", "blobs", f"manifests/.{first.id}.json.new", "manifests"),
        *(f"staging/{first.id}.hold", "models/.holds"),
        *(f"staging/{first.id}/dir", f"staging/{first.id}", "models/.trees"),
        *("staging/A/dir", "staging/A", "F/snapshots", "F/trees/.A.json.new", "F/trees"),
        *(each.rstrip("/") for each in hub_places),
        *("F", "hub", "F", "F/refs/.main.new", "F/refs"),
        *(*staged, "models", "ready"),
    ]
    assert durable_steps(root, lambda: publish(store, {**SMALL, "x": b"y"}, name="m", now=2.0)) == [
        *("blobs/sha256", "blobs", f"manifests/.{second.id}.json.new", "manifests"),
        *(f"staging/{second.id}.hold", "models/.holds"),
        *(f"staging/{second.id}/dir", f"staging/{second.id}", "models/.trees"),
        *("F/snapshots/A/dir", "F/snapshots/A", "F/snapshots", "F/trees/.A.json.new", "F/trees"),
        *("F", "hub", *staged, "ready", "models", "ready"),
    ]
    assert names_below(root / ".cachd/staging") == set()
    assert durable_steps(root, lambda: store.withdraw("m")) == [
        *("ready", "staging", "F/refs", "models", "F/trees/.A.json.new", "F/trees", "F/snapshots/A"),
        *("models/.trees", "blobs/sha256", "manifests", "trash"),
    ]


def durable_steps(root: Path, work: Callable[[], object]) -> list[str]:
    """What `work` syncs, in order: paths below the root, with F for the Hub folder and A for its commit."""
    with synced() as paths:
        work()
    below = [path.removeprefix(f"{root}/").removeprefix(".cachd/") for path in paths]
    return [path.replace("hub/models--org--model", "F").replace(A, "A") for path in below]


@pytest.mark.parametrize("obstacle", [".cachd/staging/m.link", "ready/m.json"])
def test_a_publish_that_fails_before_the_name_changes_leaves_the_snapshot_of_before_ready(
    store: DiskStore, root: Path, obstacle: str
) -> None:
    before = publish(store, SMALL, name="m", revision=A, now=2.0)
    (root / obstacle).unlink(missing_ok=True)
    (root / obstacle).mkdir()
    with pytest.raises(DiskFailed):
        publish(store, ONE, name="m", revision=B, now=3.0)
    assert store.names.get("m") == before
    assert refs_of(root) == {"main": A}
    if "staging" in obstacle:
        assert names_below(root / ".cachd/staging") == {"m.link"}, "what was staged for the name is gone"
    (root / obstacle).rmdir()
    publish(store, ONE, name="m", revision=B, now=3.0)
    assert_whole(root, "m", ONE, commit=B)


def test_a_publish_that_fails_after_the_ready_file_is_gone_leaves_no_name_ready(
    store: DiskStore, root: Path
) -> None:
    publish(store, SMALL, name="m", revision=A)
    (root / "models/m").unlink()
    (root / "models/m").mkdir()
    with pytest.raises(DiskFailed):
        publish(store, ONE, name="m", revision=B, now=2.0)
    assert (store.names.get("m"), (root / "ready/m.json").exists(), refs_of(root)) == (None, False, {})


def test_a_publish_ends_a_rollback_that_was_cut_off_before_the_name_changes(
    store: DiskStore, root: Path
) -> None:
    ready = publish(store, SMALL, name="m", revision=A)
    store.history.begin_rollback(Rollback(ready, ready, ready.spec, 1.5))
    (root / "models/m").unlink()
    (root / "models/m").mkdir()
    with pytest.raises(DiskFailed):
        publish(store, ONE, name="m", revision=B, now=2.0)
    assert store.history.begun_rollbacks() == []


def test_a_name_that_moves_to_another_repository_leaves_no_branch_in_the_first(
    store: DiskStore, root: Path
) -> None:
    publish(store, SMALL, "hf://org/one", "m")
    publish(store, SMALL, "hf://org/two", "m", now=2.0)
    assert (refs_of(root, "org/one"), refs_of(root, "org/two")) == ({}, {"main": A})


def test_a_snapshot_is_published_later_than_the_others_of_its_folder_whatever_the_clock_says(
    store: DiskStore, root: Path
) -> None:
    old = publish(store, SMALL, name="old", revision=A, now=5.0)
    new = publish(store, ONE, name="new", revision=B, now=1.0)
    assert old.published_at == 5.0
    assert new.published_at == pytest.approx(5.000001, abs=1e-7)
    assert refs_of(root) == {"main": B}
    assert publish(store, SMALL, "hf://org/other", "other", now=1.0).published_at == 1.0
    assert publish(store, TWO, name="newest", revision=C, now=6.0).published_at == 6.0


PINNED = ModelSpec(Ref.parse("hf://org/model"), "m")
TAG = ModelSpec(Ref.parse("hf://org/model@v1"), "m")


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize(
    ("is_pinned", "spec", "files", "is_refused"),
    [
        (True, PINNED, SMALL, False),
        (True, PINNED, ONE, True),
        (True, TAG, SMALL, True),
        (False, PINNED, ONE, False),
        (False, TAG, SMALL, False),
    ],
)
def test_a_pull_moves_no_name_that_is_pinned_to_something_else(
    store: DiskStore,
    is_pinned: bool,
    spec: ModelSpec,
    files: dict[str, bytes],
    is_refused: bool,
    is_damaged: bool,
) -> None:
    publish(store, SMALL, name="m")
    keep(store, files)
    if is_pinned:
        store.pins.add("m")
    if is_damaged:
        file = manifest_of(SMALL).files[0]
        store.quarantine(file, "wrong", store.content.inode(file.blob), now=1.5)
        keep(store, SMALL)
    with pytest.raises(InUse) if is_refused else nullcontext():
        store.publish(spec, manifest_of(files), now=2.0, permit=Permit())


def test_a_free_name_may_be_pinned_before_its_first_pull(store: DiskStore) -> None:
    store.pins.add("m")
    keep(store, SMALL)
    assert store.publish(PINNED, manifest_of(SMALL), now=2.0, permit=Permit()).name == "m"


# --- names, filters, branches ---


def test_two_names_share_one_snapshot_until_the_last_is_gone(store: DiskStore, root: Path) -> None:
    one, other = publish(store, ONE, name="one"), publish(store, ONE, name="other")
    assert one.manifest == other.manifest
    assert store.withdraw("one") == 0
    assert_whole(root, "other", ONE, commit=A)
    assert refs_of(root) == {"main": A}
    assert store.withdraw("other") > 0
    assert_nothing_left(root)


def test_a_name_moves_to_a_new_revision_and_what_it_replaced_is_swept(store: DiskStore, root: Path) -> None:
    publish(store, ONE, revision=A)
    new = publish(store, TWO, revision=B)
    assert_whole(root, "org--model", TWO, commit=B)
    assert refs_of(root) == {"main": B}
    assert (hub(root) / "snapshots" / A).is_dir(), "pods may read it still"
    assert store.sweep_snapshots() == swept_bytes(ONE, TWO)
    assert_only(root, {"org--model": new}, TWO)
    assert_whole(root, "org--model", TWO, commit=B)


def test_two_filters_of_one_commit_share_its_hub_directory(store: DiskStore, root: Path) -> None:
    weights = {path: content for path, content in ONE.items() if "safetensors" in path}
    texts = {path: content for path, content in ONE.items() if path not in weights} | {
        "twin.safetensors": ONE["twin.safetensors"]
    }
    publish(store, weights, name="weights")
    publish(store, texts, name="texts")
    together = hub(root) / "snapshots" / A
    assert digests(together) == shown(ONE)
    listing = json.loads((hub(root) / "trees" / f"{A}.json").read_text())
    assert set(listing["files"]) == set(ONE)
    store.withdraw("weights")
    assert digests(together) == shown(texts) == digests(root / "models/texts")
    assert set(json.loads((hub(root) / "trees" / f"{A}.json").read_text())["files"]) == set(texts)
    assert refs_of(root) == {"main": A}
    store.withdraw("texts")
    assert_nothing_left(root)


def test_a_branch_moves_back_when_the_newest_snapshot_of_it_goes(store: DiskStore, root: Path) -> None:
    publish(store, ONE, name="old", revision=A, now=1.0)
    publish(store, TWO, name="new", revision=B, now=2.0)
    publish(store, SMALL, "hf://org/model@v1", "tagged", revision=C, now=3.0)
    assert refs_of(root) == {"main": B, "v1": C}
    store.withdraw("new")
    assert refs_of(root) == {"main": A, "v1": C}
    store.withdraw("old")
    assert refs_of(root) == {"v1": C}
    assert_whole(root, "tagged", SMALL, commit=C)


def test_main_names_a_commit_asked_for_by_its_number_if_nothing_else_is_main(
    store: DiskStore, root: Path
) -> None:
    publish(store, SMALL, f"hf://org/model@{A}", revision=A)
    assert refs_of(root) == {"main": A}
    assert_whole(root, "org--model", SMALL, commit=A)


def test_no_branch_names_a_commit_that_is_gone(store: DiskStore, root: Path) -> None:
    kept = publish(store, ONE, "hf://org/model@v1", "kept", revision=B)
    publish(store, SMALL, "hf://org/model@main", "gone", revision=A)
    publish(store, SMALL, f"hf://org/model@{A}", "gone", revision=A)
    store.withdraw("gone")
    assert_only(root, {"kept": kept}, ONE)


def test_a_branch_may_take_the_place_of_one_with_a_slash(store: DiskStore, root: Path) -> None:
    publish(store, ONE, "hf://org/model@v1", "kept", revision=A)
    publish(store, SMALL, "hf://org/model@feature/x", "mine", revision=B)
    assert refs_of(root) == {"v1": A, "feature/x": B}
    store.withdraw("mine")
    publish(store, SMALL, "hf://org/model@feature", "mine", revision=B)
    assert refs_of(root) == {"v1": A, "feature": B}


@pytest.mark.parametrize(("first", "second"), [("a", "a/b"), ("a/b", "a")])
def test_a_branch_that_cannot_stand_beside_another_is_refused_and_the_other_stays(
    store: DiskStore, root: Path, next_life: Callable[[], DiskStore], first: str, second: str
) -> None:
    publish(store, ONE, f"hf://org/model@{first}", "first", revision=A, now=2.0)
    with pytest.raises(CachdError):
        publish(store, SMALL, f"hf://org/model@{second}", "second", revision=B, now=1.0)
    assert refs_of(root) == {first: A}
    assert_whole(root, "first", ONE, commit=A)
    assert [snapshot.name for snapshot in next_life().names.all()] == ["first"]


def test_blobs_shared_with_another_model_survive(store: DiskStore, root: Path) -> None:
    publish(store, ONE, "hf://org/one", revision=A)
    publish(store, TWO, "hf://org/two", revision=B)
    assert store.withdraw("org--one") == swept_bytes(ONE, TWO) == 20 * KIB
    assert_whole(root, "org--two", TWO, commit=B, repo="org/two")
    assert blobs_of(root) == hexes(TWO)


def test_names_that_differ_in_case_alone_are_two_models(store: DiskStore, root: Path) -> None:
    publish(store, ONE, name="Model", revision=A)
    publish(store, TWO, name="model", revision=B)
    assert_whole(root, "Model", ONE, commit=A)
    assert_whole(root, "model", TWO, commit=B)


def test_many_threads_publish_and_withdraw_at_once(store: DiskStore, root: Path) -> None:
    models = {f"m{number}": {"shared": noise(KIB), "own": noise(KIB, 2 + number)} for number in range(8)}
    keep(store, models["m0"])

    def turn(name: str) -> None:
        ref = f"hf://org/{name}"
        with store.content.claim(manifest_of(models[name])):
            publish(store, models[name], ref)
            if int(name[1:]) % 2:
                store.withdraw(f"org--{name}")
                publish(store, models[name], ref)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        list(threads.map(turn, models))
    for name, files in models.items():
        assert_whole(root, f"org--{name}", files, commit=A, repo=f"org/{name}")
