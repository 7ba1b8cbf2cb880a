"""Files that the views show as copies, because a client refuses them through one of several hard links."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cachd.config import Model
from cachd.errors import InUse, NoSpace, TooBig
from cachd.kernel.calls import resident_bytes
from cachd.kernel.content_time import content_time
from cachd.metrics import Metrics
from cachd.model import File, Manifest, ModelSpec, Ref, Snapshot
from cachd.policy.copies import copied
from cachd.store.disk_store import DiskStore
from cachd.store.scrub import Replaced
from cachd.store.store import Store
from cachd.upkeep.warms import Warms
from tests.conftest import Engine
from tests.ground.disks import MIB, fill, loop
from tests.ground.hub import Hub
from tests.ground.kill import base_as_another_user, killed_at_every_step
from tests.ground.models import digests, noise
from tests.ground.node import Node
from tests.ground.stored import A, B, blobs_of, hub, keep, manifest_of, names_below, shown

DATA = "onnx/model.onnx_data"
FILES = {"config.json": b"{}", "onnx/model.onnx": b"graph", DATA: noise(300_000, 7)}
SPEC = ModelSpec(Ref.parse("hf://org/model"), "m")


def with_copies(files: dict[str, bytes] = FILES, *, revision: str = A, copy: bool = True) -> Manifest:
    return replace(manifest_of(files, revision=revision), copied=(DATA,) if copy else ())


def data_file() -> File:
    return next(file for file in with_copies().files if file.path == DATA)


def publish(
    store: Store, manifest: Manifest, *, name: str = "m", files: dict[str, bytes] = FILES
) -> Snapshot:
    """Publish as a pull does, with the copies staged before."""
    keep(store, files)
    spec = ModelSpec(SPEC.ref, name)
    with store.copies.staged(manifest, spec.hub_folder, lambda _: nullcontext()):
        return store.publish(spec, manifest, now=1.0)


def places(root: Path, *, commit: str = A, name: str = "m") -> list[Path]:
    return [root / "models" / name / DATA, hub(root) / "snapshots" / commit / DATA]


def assert_shown(root: Path, *, commit: str = A, name: str = "m", files: dict[str, bytes] = FILES) -> None:
    """Both views have the files; copies have one link and the time of their content; the others are links."""
    times = {place.lstat().st_mtime for place in places(root, commit=commit, name=name)}
    assert times == {content_time(len(files[DATA]), lambda at, count: files[DATA][at : at + count])}
    for place in places(root, commit=commit, name=name):
        status = place.lstat()
        assert (status.st_nlink, status.st_mode & 0o777) == (1, 0o444)
        view = place.parent.parent
        assert digests(view) == shown(files)
        assert (view / "config.json").stat().st_nlink > 1


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["model.onnx", "model.onnx_data"], ["model.onnx_data"]),
        (
            ["a/model.onnx", "a/model.onnx_data_1", "a/model.onnx.data"],
            ["a/model.onnx.data", "a/model.onnx_data_1"],
        ),
        (["unet/model.onnx", "unet/weights.pb", "weights.pb"], ["unet/weights.pb"]),
        (["model.onnx", "big.data"], ["big.data"]),
        (["model.onnx_data", "a/model.onnx"], []),
        (["model.safetensors", "model.bin", "train.data"], []),
    ],
)
def test_external_data_beside_a_graph_is_copied_without_asking(paths: list[str], expected: list[str]) -> None:
    assert copied(paths, None) == tuple(expected)


def test_patterns_replace_the_choice_by_name_and_no_pattern_copies_nothing() -> None:
    paths = ["model.onnx", "model.onnx_data", "w.bin"]
    assert copied(paths, ("*.bin",)) == ("w.bin",)
    assert copied(paths, ("*.onnx*",)) == ("model.onnx", "model.onnx_data")
    assert copied(paths, ()) == ()


def test_both_views_show_a_copy_with_one_link_also_after_a_restart(
    next_life: Callable[[], DiskStore], root: Path
) -> None:
    publish(next_life(), with_copies())
    assert_shown(root)
    store = next_life()
    assert store.check("m", now=2.0) is None
    assert_shown(root)
    assert names_below(root / ".cachd/staging") == set()


def test_a_pull_of_a_model_with_external_data_copies_it_and_pays_for_both_copies(
    small_disk: Callable[..., Path], engine: Callable[..., Engine], hub: Hub
) -> None:
    hub.add("org/model", {"model.onnx": b"graph", "model.onnx_data": noise(4 * MIB)})
    on = engine(root=small_disk(24 * MIB), hf_endpoint=hub.url)
    snapshot = on.pull("hf://org/model", name="m")
    place = on.store.layout.model("m") / "model.onnx_data"
    assert place.stat().st_nlink == 1
    now = on.store.space.capacity()
    assert now.usage.blobs >= 3 * 4 * MIB, "the blob and a copy in each view"
    assert now.reserved == 0
    (candidate,) = on.reclaim.candidates()
    assert candidate.size >= 3 * 4 * MIB, "an eviction frees all three"
    assert on.store.evict(snapshot.manifest) >= 3 * 4 * MIB
    assert on.store.space.capacity().usage.total == 0


def test_a_model_that_fits_only_without_its_copies_is_refused_before_a_byte(
    small_disk: Callable[..., Path], engine: Callable[..., Engine], hub: Hub
) -> None:
    hub.add("org/model", {"model.onnx": b"graph", "model.onnx_data": noise(4 * MIB)})
    on = engine(root=small_disk(10 * MIB), hf_endpoint=hub.url)
    with pytest.raises(TooBig):
        on.pull("hf://org/model", name="m")
    assert on.pull("hf://org/model", name="m", copy=()).files == 2
    assert (on.store.layout.model("m") / "model.onnx_data").stat().st_nlink > 1


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_where_the_file_system_has_reflinks_copies_take_no_blocks(tmp_path: Path, kind: str) -> None:
    with loop(tmp_path, kind) as disk:
        root = disk / "root"
        root.mkdir()
        files = FILES | {DATA: noise(40 * MIB)}
        with DiskStore(root) as store:
            assert store.copies.shares_blocks
            manifest = with_copies(files)
            assert store.copies.lacking(manifest) == 0
            keep(store, files)
            os.sync()
            before = store.space.capacity().free
            publish(store, manifest, files=files)
            os.sync()
            assert before - store.space.capacity().free < 20 * MIB
            assert_shown(root, files=files)


def test_a_start_on_a_full_disk_does_not_rule_out_reflinks(tmp_path: Path) -> None:
    with loop(tmp_path, "xfs") as disk:
        root = disk / "root"
        root.mkdir()
        DiskStore(root).close()
        filler = fill(disk, leave=0)
        with DiskStore(root) as store:
            assert not store.copies.shares_blocks
            filler.unlink()
            assert store.copies.shares_blocks


@pytest.mark.parametrize("kind", ["xfs", "ext4"])
def test_the_copy_of_a_blob_whose_time_has_fractions_of_a_second_is_intact(tmp_path: Path, kind: str) -> None:
    """Older versions gave blobs such times."""
    with loop(tmp_path, kind) as disk:
        root = disk / "root"
        root.mkdir()
        with DiskStore(root) as store:
            keep(store, FILES)
            os.utime(store.content.at(data_file().blob), ns=(1_700_000_000_123_456_789,) * 2)
            publish(store, with_copies())
            assert store.check("m", now=2.0) is None
            assert store.copies.lacking(with_copies()) == 0


# --- kills ---


def test_a_process_killed_at_any_step_of_a_publish_leaves_a_model_that_is_whole_or_absent() -> None:
    with base_as_another_user() as base:
        with DiskStore(base) as store:
            keep(store, FILES)
        for root in killed_at_every_step(base, _publish_there):
            is_ready = (root / "ready/m.json").exists()
            with DiskStore(root) as store:
                if is_ready:
                    assert_shown(root)
                    assert store.check("m", now=2.0) is None
                store.sweep_snapshots()
                publish(store, with_copies())
                assert_shown(root)
                assert store.check("m", now=2.0) is None
                store.withdraw("m")
                assert names_below(root / ".cachd/copies") == set()
                assert blobs_of(root) == set()
                assert store.space.capacity().usage.total == 0


def _publish_there(root: Path) -> None:
    with DiskStore(root) as store:
        publish(store, with_copies())


def test_a_process_killed_at_any_step_of_a_withdrawal_leaves_nothing_once_the_next_life_has_swept() -> None:
    with base_as_another_user() as base:
        _publish_there(base)

        def withdraw(root: Path) -> None:
            with DiskStore(root) as store:
                store.withdraw("m")

        for root in killed_at_every_step(base, withdraw):
            if (root / "ready/m.json").exists():
                assert_shown(root)
            with DiskStore(root) as store:
                if store.names.get("m"):
                    store.withdraw("m")
                store.sweep_snapshots()
                assert names_below(root / ".cachd/copies") == set()
                assert names_below(root / "models/.trees") == set()
                for found in list(store.sweep.leftovers(before=9e9)):
                    found.remove()
                assert blobs_of(root) == set()


def test_a_publish_that_stops_before_its_copies_leaves_a_model_with_links_ready(
    store: DiskStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(store, with_copies(copy=False))

    def fill_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(store.copies, "record", fill_disk)
        with pytest.raises(NoSpace):
            publish(store, with_copies())
    assert store.check("m", now=2.0) is None
    assert (root / "ready/m.json").exists()
    publish(store, with_copies())
    assert_shown(root)


# --- damage ---


@pytest.fixture
def pulled(engine: Callable[..., Engine], hub: Hub) -> Iterator[Engine]:
    hub.add("org/model", FILES)
    on = engine(hf_endpoint=hub.url)
    on.pull("hf://org/model", name="m")
    hub.cdn.forget()
    yield on
    assert hub.cdn.requests == [], "a repair of a copy asks no source"


def spoil(place: Path) -> None:
    """Change a byte as a disk does: the time stays."""
    status = place.stat()
    place.chmod(0o644)
    with place.open("r+b") as opened:
        opened.seek(1000)
        opened.write(bytes([place.read_bytes()[1000] ^ 1]))
    os.utime(place, ns=(status.st_atime_ns, status.st_mtime_ns))
    place.chmod(0o444)


def report_damage(store: Store, place: Path, file: File | None = None) -> list[str]:
    """Report a damaged copy as a scrub does. Returns the names that are quarantined."""
    return store.quarantine_copy(
        file or data_file(), str(place), "it is damaged", place.stat().st_ino, now=2.0
    )


def test_a_copy_counts_as_damaged_only_if_a_second_read_finds_the_same(
    pulled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = iter(["it hashes to another"])
    monkeypatch.setattr(pulled.store.copies, "wrong", lambda *_: next(reads, None))
    job = pulled.scrubs.verify("m")
    assert job.ended.wait(30)
    assert job.damaged == []
    assert pulled.store.names.quarantined() == []


def test_a_copy_that_was_replaced_since_the_scrub_read_it_is_not_quarantined(
    store: DiskStore, root: Path
) -> None:
    publish(store, with_copies())
    place = places(root)[0]
    with pytest.raises(Replaced):
        store.quarantine_copy(data_file(), str(place), "it is damaged", place.stat().st_ino + 1, now=2.0)
    assert store.check("m", now=3.0) is None
    assert_shown(root)


@pytest.mark.parametrize("view", [0, 1])
def test_a_verification_reads_the_copies_and_repairs_a_damaged_one_without_the_source(
    pulled: Engine, view: int
) -> None:
    store = pulled.store
    place = places(store.layout.root, commit=store.names.ready("m").commit)[view]
    spoil(place)
    assert store.check("m", now=2.0) is None, "only reading it shows the damage"
    job = pulled.scrubs.verify("m")
    assert job.ended.wait(30)
    assert [path for path, _ in job.damaged] == [DATA]
    running = pulled.pulls.get("m")
    assert running is not None
    running.done.result(30)
    assert_shown(store.layout.root, commit=store.names.ready("m").commit)
    again = pulled.scrubs.verify("m")
    assert again.ended.wait(30)
    assert again.damaged == []


def test_a_process_killed_at_any_step_after_a_scrub_found_a_damaged_copy_shows_it_to_nobody_again() -> None:
    with base_as_another_user() as base:
        _publish_there(base)
        spoil(places(base)[0])

        def quarantine(root: Path) -> None:
            with DiskStore(root) as store:
                report_damage(store, places(root)[0])

        for root in killed_at_every_step(base, quarantine):
            with DiskStore(root) as store:
                if store.names.get("m"):
                    report_damage(store, places(root)[0])
                damaged = store.to_repair(SPEC)
                assert damaged is not None
                publish(store, damaged)
                assert_shown(root)
                assert store.check("m", now=4.0) is None


@pytest.mark.parametrize(
    "harm", [lambda p: p.write_bytes(b"x" * 300_000), Path.unlink, lambda p: os.utime(p)]
)
def test_a_copy_that_somebody_changed_or_deleted_is_noticed_and_its_blob_not_suspected(
    pulled: Engine, harm: Callable[[Path], object]
) -> None:
    store, root = pulled.store, pulled.store.layout.root
    place = places(root, commit=store.names.ready("m").commit)[1]
    place.chmod(0o644)
    harm(place)
    wrong = store.check("m", now=2.0)
    assert wrong is not None
    assert DATA in wrong
    assert names_below(root / ".cachd/damaged") == set()
    pulled.pull("hf://org/model", name="m")
    assert_shown(root, commit=store.names.ready("m").commit)


def test_a_repair_of_a_model_that_has_links_makes_no_copies_for_which_there_may_be_no_space(
    node: Callable[..., Node], hub: Hub
) -> None:
    """Older versions published all files as links, and their ready files have no `copy`."""
    hub.add("org/model", FILES)
    running = node(hf_endpoint=hub.url)
    running.pull("hf://org/model", name="m", copy=[])
    assert running.ready("m").status == 200
    running.kill()
    ready = running.root / "ready/m.json"
    older = json.loads(ready.read_bytes())
    assert older.pop("copy") == []
    ready.write_text(json.dumps(older))
    running.start()
    link = running.root / "models/m" / DATA
    link.chmod(0o644)
    link.write_bytes(b"damaged")
    running.ask("POST", "/v1/models/m/verify")
    running.wait_for("repaired", name="m")
    assert running.ready("m").status == 200
    assert link.read_bytes() == FILES[DATA]
    assert link.stat().st_nlink > 1, "it is a link, as before"


def test_a_pull_pays_for_copies_that_the_same_snapshot_has_under_another_name(
    engine: Callable[..., Engine], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", FILES)
    on = engine(hf_endpoint=hub.url)
    store, staged = on.store, list[set[str]]()
    snapshot = on.pull("hf://org/model", name="m")
    file = next(file for file in store.manifests.of(snapshot).files if file.path == DATA)
    report_damage(store, places(store.layout.root, commit=snapshot.commit)[0], file)
    publish_now = store.publish

    def publish_noting(*args: Any, **how: Any) -> Snapshot:
        staged.append(names_below(store.layout.staging))
        return publish_now(*args, **how)

    monkeypatch.setattr(store, "publish", publish_noting)
    on.pull("hf://org/model", name="linked", copy=())
    assert [len(each) for each in staged] == [2], "both copies were made before the publish"
    assert_shown(store.layout.root, commit=snapshot.commit, name="linked")


# --- use ---


def test_an_open_copy_keeps_its_model_and_cachds_own_questions_are_no_use(
    store: DiskStore, root: Path
) -> None:
    snapshot = publish(store, with_copies())
    store.watch_all()
    manifest = store.manifests.of(snapshot)
    for place in places(root):
        file = place.open("rb")
        assert store.protection.in_use_by(manifest) is not None
        file.close()
        assert store.protection.in_use_by(manifest) is None
    assert store.watch.opened_at(snapshot.manifest, 5.0) == 5.0, "the test opened them"
    for file_ in manifest.files:
        if file_.path == DATA:
            for path in store.copies.of(manifest.id):
                assert store.copies.wrong(file_, path, lambda _: None) is None
    assert store.protection.in_use_by(manifest) is None
    assert store.watch.opened_at(snapshot.manifest, 9.0) == 5.0
    with places(root)[1].open("rb"), pytest.raises(InUse):
        store.evict(snapshot.manifest)


def test_snapshots_of_one_commit_may_differ_in_their_copies(store: DiskStore, root: Path) -> None:
    """The Hub view has one directory for both: it shows a copy as long as one of them wants it."""
    publish(store, with_copies(), name="m")
    less = {DATA: FILES[DATA]}
    linked = manifest_of(less)
    publish(store, linked, name="linked", files=less)
    assert_shown(root)
    assert (root / "models/linked" / DATA).stat().st_nlink > 1
    assert store.check("linked", now=2.0) is None
    store.withdraw("m")
    assert store.check("linked", now=2.0) is None
    assert (hub(root) / "snapshots" / A / DATA).stat().st_nlink > 1
    assert store.space.capacity().usage.blobs == 4096 * -(-len(FILES[DATA]) // 4096)


def test_a_write_into_a_copy_is_no_write_into_the_blob_of_another_snapshot_that_has_a_link_there(
    store: DiskStore, root: Path
) -> None:
    publish(store, with_copies(), name="m")
    less = {DATA: FILES[DATA]}
    publish(store, manifest_of(less), name="linked", files=less)
    store.watch_all()
    store.watch.changes()
    place = places(root)[1]
    place.chmod(0o644)
    place.write_bytes(b"x")
    changes = store.watch.changes()
    assert {path for _, path, _ in changes.written} == {DATA}
    assert changes.files_written(store.manifests.readable(), store.copies.all_places()) == []


def test_a_copy_that_two_snapshots_of_a_commit_share_stays_for_the_second(
    store: DiskStore, root: Path
) -> None:
    publish(store, with_copies(), name="m")
    less = {DATA: FILES[DATA]}
    publish(store, with_copies(less), name="second", files=less)
    store.withdraw("m")
    assert store.check("second", now=2.0) is None
    assert (hub(root) / "snapshots" / A / DATA).stat().st_nlink == 1
    store.withdraw("second")
    assert store.space.capacity().usage.total == 0


def test_a_blob_stays_while_only_copies_of_it_are_shown(store: DiskStore, root: Path) -> None:
    publish(store, with_copies(), name="m")
    other = {DATA: FILES[DATA]}
    keep(store, other)
    store.publish(
        ModelSpec(Ref.parse("hf://org/other"), "other"), manifest_of(other, base="hf://org/other"), now=2.0
    )
    store.withdraw("other")
    assert store.check("m", now=2.0) is None
    assert_shown(root)


def test_the_same_snapshot_under_another_name_keeps_its_copies(store: DiskStore, root: Path) -> None:
    publish(store, with_copies(), name="m")
    publish(store, with_copies(copy=False), name="second")
    for name in ("m", "second"):
        assert_shown(root, name=name)
        assert store.check(name, now=2.0) is None


def test_a_model_that_was_published_with_links_gets_copies_when_they_are_asked_for(
    store: DiskStore, root: Path
) -> None:
    publish(store, with_copies(copy=False))
    assert {place.stat().st_nlink > 1 for place in places(root)} == {True}
    manifest = with_copies()
    assert store.copies.lacking(manifest) == 2 * len(FILES[DATA])
    publish(store, manifest)
    assert_shown(root)
    assert store.copies.lacking(manifest) == 0


def test_copies_of_one_name_in_several_folders_are_known_apart(
    next_life: Callable[[], DiskStore], root: Path
) -> None:
    files = {
        "m.onnx_data": noise(5000, 1),
        "x/m.onnx_data": noise(5000, 2),
        "x/x/m.onnx_data": noise(5000, 1),
    }
    manifest = replace(manifest_of(files), copied=tuple(files))
    for _ in range(3):
        store = next_life()
        publish(store, manifest, files=files)
        assert store.copies.lacking(manifest) == 0
        assert len(store.copies.of(manifest.id)) == 6
        assert digests(root / "models/m") == shown(files)


def test_a_rollback_shows_copies_again(root: Path) -> None:
    newer = FILES | {DATA: noise(300_000, 8)}
    with DiskStore(root, keep_previous=1) as store:
        publish(store, with_copies())
        publish(store, with_copies(newer, revision=B), files=newer)
        assert_shown(root, commit=B, files=newer)
        store.rollback("m", now=3.0)
        assert_shown(root)
        assert store.check("m", now=4.0) is None
        assert len(store.copies.places()) == 4


def test_a_request_over_the_api_chooses_copies_and_formats_and_every_report_repeats_them(
    node: Callable[..., Node], hub: Hub
) -> None:
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": noise(1000)})
    running = node(hf_endpoint=hub.url, models=[])
    asked = {"ref": "hf://org/model", "name": "m", "copy": ["*.json"], "formats": "safe"}
    assert running.ask("POST", "/v1/models", asked).status in (200, 202)
    ready = running.ready("m").document
    assert (ready["copy"], ready["formats"]) == (["*.json"], "safe")
    assert (running.root / "models/m/config.json").stat().st_nlink == 1
    assert (running.root / "models/m/model.safetensors").stat().st_nlink > 1


def test_a_configured_model_says_what_to_copy() -> None:
    model = Model.model_validate({"ref": "hf://org/model", "copy": ["*.onnx*"], "formats": "safe"})
    assert (model.spec.copy, model.spec.formats) == (("*.onnx*",), "safe")
    assert Model.model_validate({"ref": "hf://org/model", "copy": []}).spec.copy == ()


def test_warming_loads_the_copy_that_pods_read_and_is_no_use(pulled: Engine) -> None:
    store = pulled.store
    snapshot = store.names.ready("m")
    place = places(store.layout.root, commit=snapshot.commit)[0]
    with place.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if resident_bytes(opened.fileno(), 0, 300_000):
            pytest.skip("this file system keeps pages")
    store.watch_all()
    with closing(Warms(store, Metrics())) as warms:
        warming = warms.warm("m")
        assert warming.ended.wait(30)
        assert (warming.state, warming.done) == ("warm", snapshot.size)
        assert warms.resident_of(store.manifests.of(snapshot)) == snapshot.size
    with place.open("rb") as opened:
        store.watch.note_opens(1.0)
        assert resident_bytes(opened.fileno(), 0, 300_000) == 300_000
    assert store.watch.opened_at(snapshot.manifest, 9.0) == 1.0, "the test opened it, and nobody else"


def test_a_disk_that_fills_during_a_copy_fails_the_pull_and_leaves_nothing(
    small_disk: Callable[..., Path],
) -> None:
    root = small_disk(6 * MIB)
    files = FILES | {DATA: noise(2 * MIB)}
    with DiskStore(root) as store:
        keep(store, files)
        filler = fill(root, leave=3 * MIB)  # enough for one copy of two
        with pytest.raises(NoSpace):
            publish(store, with_copies(files), files=files)
        assert names_below(root / ".cachd/staging") == set()
        assert not (root / "ready/m.json").exists()
        filler.unlink()
